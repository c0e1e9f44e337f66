//! The integration tests that need no GPU: one binary, one module an area.

mod backends;
mod checkpoint;
mod shaders;
mod simd;
mod util;
