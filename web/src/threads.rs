//! Threads: workers that have a module on the same memory each, and lend themselves to the engine.

use sterna::backend::simd;
use wasm_bindgen::prelude::*;

/// Lends the calling worker to the engine, for good. It receives no messages afterwards.
#[wasm_bindgen(js_name = lendThread)]
pub fn lend_thread() {
    simd::lend_thread()
}

/// How many workers wait for a model.
#[wasm_bindgen(js_name = lentThreads)]
pub fn lent_threads() -> usize {
    simd::lent_threads()
}

/// Says that a worker which lent itself has crashed: the engine ends and does not wait for it.
#[wasm_bindgen(js_name = lentThreadCrashed)]
pub fn lent_thread_crashed() {
    simd::lent_thread_crashed();
}
