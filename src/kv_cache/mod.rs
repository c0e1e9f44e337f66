//! The KV cache: keys and values of all positions of several sequences, in blocks of 64 positions
//! that sequences share.

mod blocks;
mod storage;

pub use blocks::{BLOCK, Blocks, Prepared, SequenceId};
pub use cpu_ref::kv::KvFormat;
pub(crate) use storage::value_bytes;
pub use storage::{HeadChunk, HeadChunkMut, KvCache, KvShape, Line, key_row};
