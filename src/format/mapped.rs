//! Mapping a range of a file.

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};

/// Maps `len` bytes at `offset`, read-only.
///
/// Only the range is mapped, so that its pages leave the resident set when the map is dropped: a
/// checkpoint that is read tensor by tensor never stands in memory as a whole.
///
/// # Errors
/// If the file ends before the range, or the system refuses.
#[expect(unsafe_code, reason = "there is no safe way to map a file")]
pub(super) fn map(file: &File, offset: u64, len: usize) -> io::Result<Mmap> {
    // The file may have been cut since its header was checked; a page past its end would fault.
    let end = offset.checked_add(len as u64).ok_or(io::ErrorKind::InvalidInput)?;
    let file_len = file.metadata()?.len();
    if end > file_len {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the file has shrunk to {file_len} bytes, expected at least {end}"),
        ));
    }
    // SAFETY: the map is read-only, inside the file, and owned by the value returned. What remains
    // is the condition of every file map: nobody may write to the file or shorten it while the map
    // lives. Checkpoints are not modified in place (tools write a new file and rename it, which
    // leaves this one as it is), and every reader of the bytes checks the values it depends on.
    unsafe { MmapOptions::new().offset(offset).len(len).map(file) }
}

/// Takes the pages of a map out of the resident set; who reads them again gets them from the file, or from
/// the system's cache of it. Where the system has no such call, it decides by itself.
#[cfg(unix)]
#[expect(unsafe_code, reason = "for other maps, the advice would lose what was written")]
pub(super) fn release(map: &Mmap) {
    // SAFETY: the map is read-only and backed by a file, so that dropped pages read the same again.
    let advised = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    // Only a hint: at worst the pages stay.
    drop(advised);
}

/// Windows takes pages of a map back when it needs them; there is nothing to call.
#[cfg(not(unix))]
pub(super) fn release(_map: &Mmap) {}
