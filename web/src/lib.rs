//! The engine for JavaScript: a thin crate over `sterna`, which `web/package/worker.js` drives in a
//! Web Worker. Programs use `web/package/sterna.js`.
//!
//! Everything that waits for the GPU is a promise. Options come, and results go, as JSON; tokens go
//! through a callback as they are made.
#![cfg(target_family = "wasm")]

mod engine;
mod error;
mod files;
mod options;
#[cfg(target_feature = "atomics")]
mod threads;
