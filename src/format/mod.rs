//! Files → named tensors: checked and borrowed. Knows no transformer.

mod elements;
mod files;
pub mod float;
pub mod ggml;
pub mod gguf;
mod mapped;
mod reader;
mod safetensors;

use std::ops::Range;
use std::sync::Arc;

pub use elements::Elements;
pub use files::{ModelFiles, StoredTensor};
pub use reader::ReadAt;

/// Element types that checkpoints in scope use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Unsigned byte: four packed ternary codes.
    U8,
    /// Unsigned word: packed codes of MLX.
    U32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Dtype {
    /// The type of that safetensors name; `None` for one that no checkpoint in scope uses.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::U8, Self::U32, Self::Bf16, Self::F16, Self::F32]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }

    /// As safetensors spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "U8",
            Self::U32 => "U32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    /// Bytes an element.
    pub fn len_bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::U32 | Self::F32 => 4,
        }
    }
}

/// The bytes of a tensor or file: mapped for as long as the value lives, read, or embedded.
#[derive(Clone)]
pub enum Bytes {
    /// A mapped range of a file.
    Mapped(Arc<memmap2::Mmap>),
    /// Read into memory.
    Owned(Arc<Vec<u8>>),
    /// A range of a file that is in memory.
    Part(Arc<Vec<u8>>, Range<usize>),
    /// Part of the program.
    Static(&'static [u8]),
}

impl Bytes {
    /// `len` bytes of a file at `offset`, mapped.
    ///
    /// # Errors
    /// If the file ends before, or the system refuses.
    pub(crate) fn map(file: &std::fs::File, offset: u64, len: usize) -> std::io::Result<Self> {
        // An empty map is an error on some systems.
        if len == 0 {
            return Ok(Self::Static(&[]));
        }
        mapped::map(file, offset, len).map(|map| Self::Mapped(Arc::new(map)))
    }

    /// The same bytes from `start`, `len` of them.
    ///
    /// # Panics
    /// If there are not that many, or they are a map: those are made in the size that is needed.
    fn part(&self, start: usize, len: usize) -> Self {
        match self {
            Self::Owned(bytes) => {
                assert!(len <= bytes.len() && start <= bytes.len() - len);
                Self::Part(bytes.clone(), start..start + len)
            }
            Self::Static(bytes) => Self::Static(&bytes[start..][..len]),
            Self::Mapped(_) | Self::Part(..) => panic!("not a whole file in memory"),
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
            Self::Part(bytes, range) => &bytes[range.clone()],
            Self::Static(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// What a header says of a tensor; its bytes lie inside the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The tensor's name.
    pub name: String,
    /// Element type as the file spells it; it need not be a [`Dtype`]. In a GGUF file the name of a
    /// [`GgmlType`](ggml::GgmlType), or a name for messages if it is none.
    pub dtype: String,
    /// Row-major shape, last axis contiguous.
    pub shape: Vec<usize>,
    /// Length of the elements; in a GGUF file, of all bytes to the next tensor if the type is
    /// unknown.
    pub len_bytes: u64,
    /// Where the elements begin in their file.
    offset: u64,
    /// Index of the file in [`ModelFiles`].
    shard: usize,
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

/// Text from a file as an error message shows it: on one line, of bounded length.
pub(crate) fn quoted(text: &str) -> String {
    format!("{:?}", shortened(text))
}

/// Text that an error message can hold: the first 80 characters.
pub(crate) fn shortened(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    let mut shown: String = text.chars().take(MAX_CHARS).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}
