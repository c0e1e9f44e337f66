//! What every target holds its parser to: no panic, messages of one line, and memory in proportion
//! to the input.

use peak_alloc::PeakAlloc;
use sterna::Result;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Memory that a parser may take whatever its input: buffers, and the entries of maps that outweigh
/// their few bytes in the file.
const CONSTANT_BYTES: usize = 4 << 20;

/// Runs a parser on `len` bytes that the caller holds; `times` that many bytes, and the constant,
/// are the most it may allocate at one time.
pub fn bounded<T>(len: usize, times: usize, parse: impl FnOnce() -> Result<T>) -> Option<T> {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = parse();
    let taken = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(taken <= times * len + CONSTANT_BYTES, "{taken} bytes for an input of {len}");
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let message = error.to_string();
            assert!(!message.contains('\n'), "{message}");
            None
        }
    }
}
