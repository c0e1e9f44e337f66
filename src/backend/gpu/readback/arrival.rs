//! What a callback of the device brings, once, and whoever waits for it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

/// A value on its way.
pub(in super::super) struct Arrival<T>(Arc<Shared<T>>);

/// Where it comes from.
pub(in super::super) struct Sender<T>(Arc<Shared<T>>);

struct Shared<T> {
    slot: Mutex<Slot<T>>,
    filled: Condvar,
}

struct Slot<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

/// A value that will be sent.
pub(in super::super) fn arrival<T>() -> (Sender<T>, Arrival<T>) {
    let slot = Mutex::new(Slot { value: None, waker: None });
    let shared = Arc::new(Shared { slot, filled: Condvar::new() });
    (Sender(shared.clone()), Arrival(shared))
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Sender<T> {
    /// Hands the value over; nobody takes what was forgotten.
    pub(in super::super) fn send(self, value: T) {
        let mut slot = self.0.lock();
        slot.value = Some(value);
        let waker = slot.waker.take();
        drop(slot);
        self.0.filled.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Arrival<T> {
    /// Blocks for the value, so long at most; in a browser takes it only if it is there.
    pub(in super::super) fn wait(&self, patience: Duration) -> Option<T> {
        let slot = self.0.lock();
        if cfg!(target_family = "wasm") {
            let mut slot = slot;
            return slot.value.take();
        }
        let waited = self.0.filled.wait_timeout_while(slot, patience, |slot| slot.value.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.value.take()
    }

    /// Takes the value, or has `context` woken when it is there.
    #[cfg(target_family = "wasm")]
    pub(in super::super) fn poll(
        &self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<T> {
        let mut slot = self.0.lock();
        match slot.value.take() {
            Some(value) => std::task::Poll::Ready(value),
            None => {
                slot.waker = Some(context.waker().clone());
                std::task::Poll::Pending
            }
        }
    }

    /// The value, when it is there.
    #[cfg(target_family = "wasm")]
    pub(in super::super) async fn arrived(&self) -> T {
        std::future::poll_fn(|context| self.poll(context)).await
    }
}
