//! The integration tests: one binary, one module an area.

mod backends;
mod checkpoint;
mod shaders;
mod simd;
mod util;
