//! Files that are read piece by piece, wherever they are.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::Bytes;

/// A file of a model that is neither mapped nor in memory: in the storage of a browser, behind a URL, in
/// an archive.
///
/// What is read is held only as long as it is needed. The calls come from the thread that opens and
/// loads the model, one at a time.
pub trait ReadAt: Send + Sync {
    /// Length of the file, which is asked for once.
    ///
    /// # Errors
    /// If it cannot be told.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// If the file ends before, or cannot be read. What is in `buffer` then is not used.
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// A [`ReadAt`] that several tensors share.
#[derive(Clone)]
pub(super) struct Reader(pub(super) Arc<dyn ReadAt>);

impl Reader {
    pub(super) fn len(&self) -> io::Result<u64> {
        self.0.len_bytes().map_err(on_one_line)
    }

    /// `len` bytes from `offset` on. Memory that is not there is an error: how much is asked for follows
    /// from a length that the reader says.
    pub(super) fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        bytes.resize(len, 0);
        self.0.read_exact_at(offset, &mut bytes).map_err(on_one_line)?;
        Ok(Bytes::Owned(bytes.into()))
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a reader")
    }
}

/// The same error with a message that a line holds: a server or a browser may have written it.
fn on_one_line(error: io::Error) -> io::Error {
    const MAX_CHARS: usize = 200;
    let message = error.to_string();
    if !message.contains(char::is_control) && message.chars().count() <= MAX_CHARS {
        return error;
    }
    let words = message.split(|c: char| c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    io::Error::new(error.kind(), line.chars().take(MAX_CHARS).collect::<String>())
}
