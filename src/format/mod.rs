//! Files → named tensors: checked and borrowed. Knows no transformer.

use std::sync::Arc;

use crate::error::{Error, Result};

/// Element types that checkpoints in scope use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Unsigned byte: four packed ternary codes.
    U8,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

/// The bytes of a tensor: mapped from a file for as long as the view lives, or embedded.
#[derive(Clone)]
pub enum Bytes {
    /// A mapped range of a file.
    Mapped(Arc<memmap2::Mmap>),
    /// Part of the program.
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

/// One tensor: name, element type, shape and bytes, whose length matches.
#[derive(Clone)]
pub struct TensorView {
    /// The file (or shard) it is from.
    pub file: String,
    /// The tensor's name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape, last axis contiguous.
    pub shape: Vec<usize>,
    /// The elements, little-endian; may be unaligned.
    pub bytes: Bytes,
}
