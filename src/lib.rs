//! Sterna runs ternary language models (weights −1, 0, +1; int8 activations) on any GPU that wgpu
//! reaches, and on the CPU.
#![deny(missing_docs)]

pub mod backend;
mod checkpoint;
pub mod config;
pub mod error;
pub mod format;
pub mod kv_cache;
pub mod layout;
pub mod model;
pub mod sampler;
pub mod shape;
pub mod synthetic;
pub mod tensor_names;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
pub use model::Transformer;
