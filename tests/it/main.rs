//! The integration tests that need no GPU: one binary, one module an area.

mod checkpoint;
#[cfg(feature = "cli")]
mod cli;
mod generate;
mod shaders;
