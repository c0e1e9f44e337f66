//! Integration tests that need no GPU.

mod shaders;
