//! The integration tests that need no GPU: one binary, one module an area.

mod checkpoint;
mod shaders;
