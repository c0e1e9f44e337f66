//! Waiting for a device, which a browser does not allow.
//!
//! What waits is an `async fn`. Natively it blocks inside, with a deadline, and never yields; in a
//! browser it yields to the event loop, which alone brings a device's answers.

use crate::error::Result;

/// Runs a future to its end on this thread.
///
/// # Errors
/// The future's; in a browser [`Error::WouldBlock`](crate::Error::WouldBlock) if it has to wait.
#[cfg(not(target_family = "wasm"))]
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    pollster::block_on(future)
}

#[cfg(target_family = "wasm")]
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    use std::task::{Context, Poll, Waker};

    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(crate::Error::WouldBlock),
    }
}
