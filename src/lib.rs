//! Sterna runs ternary language models (weights −1, 0, +1; int8 activations) on any GPU that wgpu
//! reaches, and on the CPU.
//!
//! ```no_run
//! use sterna::{Device, GenerateOptions, Model};
//!
//! // A checkpoint directory as Hugging Face lays it out, on the best device there is.
//! let mut model = Model::load("bitnet-b1.58-2B-4T", Device::Auto)?;
//! eprintln!("on {}", model.transformer().device().description);
//! for piece in model.generate("Once upon a time", &GenerateOptions::default())? {
//!     print!("{}", piece?);
//! }
//! # Ok::<(), sterna::Error>(())
//! ```
#![deny(missing_docs)]

pub mod backend;
pub mod built_in;
mod checkpoint;
pub mod config;
pub mod convert;
#[cfg(feature = "energy")]
pub mod energy;
pub mod error;
pub mod format;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
pub mod kv_cache;
pub mod layout;
#[cfg(feature = "measure")]
pub mod measure;
pub mod model;
pub mod random;
pub mod sampler;
pub mod session;
pub mod shape;
pub mod sparsity;
pub mod speculate;
pub mod synthetic;
pub mod tensor_names;
pub mod tokenizer;
pub mod verify;
mod wait;
pub mod weights;

pub use backend::{Device, LoadOptions};
pub use checkpoint::{Checkpoint, I2sLayout, OpenOptions};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Generation, Model, Overflow, Piece};
pub use model::Transformer;
pub use sampler::Sampling;
pub use session::Session;
pub use speculate::Speculate;
pub use tokenizer::{Message, Role};
