//! Threads that somebody else has started: a program in a browser cannot start its own, only the
//! scripts around it can.
//!
//! A helper waits in a room until a pool takes it, works for that pool as long as there is one, and
//! comes back.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Thread;

/// The helpers that wait.
static ROOM: Mutex<Vec<Helper>> = Mutex::new(Vec::new());

/// Whether a helper has ended, which none does unless it crashes.
static CRASHED: AtomicBool = AtomicBool::new(false);

struct Helper {
    thread: Thread,
    inbox: Sender<Task>,
}

/// What a helper is to do, and who waits for it to be back in the room.
struct Task {
    run: Box<dyn FnOnce() + Send>,
    done: Sender<()>,
}

/// A helper at work.
pub(super) struct Busy {
    thread: Thread,
    done: Receiver<()>,
}

/// Lends the calling thread to CPU backends, for good: one that is loaded afterwards computes on lent
/// threads before it starts its own.
///
/// Made for Web Workers on one WebAssembly memory. Elsewhere a backend starts all the threads it needs.
pub fn lend_thread() -> ! {
    let (inbox, tasks) = channel::<Task>();
    let enter = || room().push(Helper { thread: std::thread::current(), inbox: inbox.clone() });
    enter();
    loop {
        let Task { run, done } = tasks.recv().expect("this thread holds a sender");
        run();
        enter();
        // Whoever started the task may be gone.
        let _ = done.send(());
    }
}

/// Lent threads that no backend computes on.
pub fn lent_threads() -> usize {
    room().len()
}

/// Says that a lent thread has crashed. Whatever it held it holds forever, so backends end the process,
/// or the WebAssembly instance, as soon as they compute or wait.
pub fn lent_thread_crashed() {
    CRASHED.store(true, SeqCst);
}

/// For pools to call before they trust a helper, and again and again while they wait for one.
pub(super) fn abort_if_crashed() {
    if CRASHED.load(SeqCst) {
        std::process::abort();
    }
}

/// Has a helper run something; gives it back if there is none.
pub(super) fn take<F: FnOnce() + Send + 'static>(run: F) -> Result<Busy, F> {
    let Some(helper) = room().pop() else { return Err(run) };
    let (sender, done) = channel();
    let task = Task { run: Box::new(run), done: sender };
    helper.inbox.send(task).expect("a helper receives as long as it lives, which is forever");
    Ok(Busy { thread: helper.thread, done })
}

impl Busy {
    /// The helper's thread.
    pub(super) fn thread(&self) -> &Thread {
        &self.thread
    }

    /// Waits until the helper has left its task and waits for another.
    pub(super) fn join(self) {
        while self.done.try_recv() == Err(TryRecvError::Empty) {
            abort_if_crashed();
            std::thread::yield_now();
        }
    }
}

fn room() -> MutexGuard<'static, Vec<Helper>> {
    ROOM.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread::ThreadId;

    use super::*;

    /// Has a helper, waiting for one if need be, tell who it is.
    fn ask() -> (Busy, ThreadId) {
        let (sender, answer) = channel();
        loop {
            let sender = sender.clone();
            let tell = move || sender.send(std::thread::current().id()).unwrap();
            if let Ok(busy) = take(tell) {
                return (busy, answer.recv().unwrap());
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_helper_comes_back() {
        // Other tests of this process may take it in between, and give it back.
        let helper = std::thread::spawn(|| lend_thread()).thread().id();
        for _ in 0..3 {
            let (busy, id) = ask();
            assert_eq!((busy.thread().id(), id), (helper, helper));
            busy.join();
        }
    }
}
