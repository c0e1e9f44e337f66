//! The files of a model, as JavaScript hands them over.

use wasm_bindgen::prelude::*;

/// Files by name.
#[wasm_bindgen]
#[derive(Default)]
pub struct Files {
    pub(crate) files: Vec<(String, Vec<u8>)>,
}

#[wasm_bindgen]
impl Files {
    /// None yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// A file that is in memory.
    pub fn add(&mut self, name: String, bytes: Vec<u8>) {
        self.files.push((name, bytes));
    }
}
