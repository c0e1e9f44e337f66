//! A model in another format: the packed safetensors of Hugging Face, or GGUF.
//!
//! Trits are carried over exactly. What a target rounds (scales to IEEE half) is counted and
//! reported; what it cannot hold is refused before a byte is written. Files appear under their name
//! only when they are complete.

mod compare;
mod gguf;
mod hf;

use std::io::Write;
use std::path::Path;

use rayon::prelude::*;

pub use compare::{Comparison, compare};
pub use gguf::{TARGETS, write_gguf};
pub use hf::write_hf;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::format::ggml::GgmlType;

/// Bytes made at a time.
const PIECE_BYTES: usize = 4 << 20;

/// Largest relative change of a number that rounding to a normal IEEE half makes: half of 2⁻¹⁰.
const HALF_ROUNDING: f32 = 1.0 / 2048.0;

/// What to convert a model to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A directory in the packed form of Hugging Face, which transformers loads.
    HuggingFace,
    /// A GGUF file whose linear layers are of this type: one of [`TARGETS`].
    Gguf(GgmlType),
}

/// What a conversion did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Summary {
    /// Bytes written.
    pub bytes: u64,
    /// Matrices whose scale had to be rounded to an IEEE half.
    pub rounded_scales: usize,
    /// The largest relative change that the rounding made.
    pub largest_rounding: f32,
}

/// Called with the bytes written so far and all there will be.
pub type OnBytes<'a> = &'a mut dyn FnMut(u64, u64);

/// Converts a checkpoint into `out`, which is replaced only if `force` is set.
///
/// # Errors
/// [`Error::Exists`] if `out` is there, [`Error::Conversion`] if the target cannot hold the model,
/// [`Error::Io`], or as reading the checkpoint.
pub fn convert(
    checkpoint: &Checkpoint,
    target: Target,
    out: &Path,
    force: bool,
    progress: OnBytes<'_>,
) -> Result<Summary> {
    let is_there = out.symlink_metadata().is_ok();
    if is_there && !force {
        return Err(Error::Exists { path: out.to_owned() });
    }
    match target {
        Target::HuggingFace => hf::convert(checkpoint, out, progress),
        Target::Gguf(ty) => gguf::convert(checkpoint, ty, out, progress),
    }
}

/// A writer that counts for a progress callback, and names its file in errors.
struct Out<'a, W> {
    path: &'a Path,
    inner: W,
    written: u64,
    total: u64,
    progress: OnBytes<'a>,
}

impl<W: Write> Out<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let io_error = |source| Error::Io { path: self.path.to_owned(), source };
        self.inner.write_all(bytes).map_err(io_error)?;
        self.written += bytes.len() as u64;
        (self.progress)(self.written, self.total);
        Ok(())
    }

    fn finish(mut self) -> Result<W> {
        match self.inner.flush() {
            Ok(()) => Ok(self.inner),
            Err(source) => Err(Error::Io { path: self.path.to_owned(), source }),
        }
    }

    /// `n` rows of `row_bytes` bytes, made in parallel, some at a time: `fill(n, row, scratch)`.
    fn rows<S: Send>(
        &mut self,
        n: usize,
        row_bytes: usize,
        scratch: impl Fn() -> S + Sync,
        fill: impl Fn(usize, &mut [u8], &mut S) -> Result<()> + Sync,
    ) -> Result<()> {
        let rows = PIECE_BYTES.div_ceil(row_bytes.max(1));
        let mut bytes = vec![0; rows.min(n) * row_bytes];
        for start in (0..n).step_by(rows) {
            let bytes = &mut bytes[..rows.min(n - start) * row_bytes];
            bytes
                .par_chunks_exact_mut(row_bytes)
                .enumerate()
                .try_for_each_init(&scratch, |scratch, (i, row)| fill(start + i, row, scratch))?;
            self.write(bytes)?;
        }
        Ok(())
    }
}
