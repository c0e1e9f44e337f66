//! The worker threads: one job at a time, split into pieces that idle threads take.
//!
//! A decode step has some 150 short parallel phases, so a phase must cost about a microsecond:
//! workers spin for a while after a job before they sleep, and nothing is allocated. The caller
//! works too and waits only for workers that have begun, so a thread that the system has not
//! scheduled delays nobody.
#![expect(unsafe_code, reason = "lends borrowed closures and disjoint slices to threads")]

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};

use super::affinity;
use super::helpers::{self, Busy};
use crate::error::{Error, Result};

/// Turns of the wait loop before a worker sleeps: some 100 µs, longer than any pause within a pass.
/// WebAssembly has no instruction to pause with, and its turns are shorter.
const SPINS: u32 = if cfg!(target_family = "wasm") { 40_000 } else { 4000 };

/// Cost below which a piece is not worth taking, in the unit of [`Split::cost`]: some 2 µs.
const MIN_PIECE_COST: usize = 32 << 10;

/// Pieces a thread takes if all are equally fast.
const PIECES_PER_THREAD: usize = 8;

type Job<'a> = dyn Fn() + Sync + 'a;

/// A fixed set of threads, the caller being one of them.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

/// A thread that is not the caller.
enum Worker {
    /// The pool's own.
    Started(JoinHandle<()>),
    Lent(Busy),
}

struct Shared {
    /// The job, while `open`.
    job: UnsafeCell<Option<*const Job<'static>>>,
    /// Whether a worker that is `active` may read `job`.
    open: AtomicBool,
    /// Workers that look at `open` or run the job; at first, those that have not started.
    active: AtomicUsize,
    /// Jobs so far.
    epoch: AtomicUsize,
    panicked: AtomicBool,
    /// Why a worker could not be bound to its processor.
    unpinned: OnceLock<String>,
    stop: AtomicBool,
    /// Which workers are, or are about to be, parked.
    sleeping: Vec<AtomicBool>,
}

// SAFETY: the pointer in `job` is written by the pool's owner only while `open` is false and no
// worker that saw it true is active (`Pool::run`), and it points to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Shared {}

/// How a slice is cut: into chunks of `len` elements, each costing about `cost` (bytes of weights,
/// or operations in registers' worth).
#[derive(Debug, Clone, Copy)]
pub(super) struct Split {
    pub(super) len: usize,
    pub(super) cost: usize,
}

impl Split {
    /// The cost of a chunk of which a piece has at least `chunks`.
    pub(super) const fn cost_of_pieces(chunks: usize) -> usize {
        MIN_PIECE_COST / chunks
    }
}

/// A table `[rows, width]` of which some columns are written, `chunk` for each chunk of a slice.
pub(super) struct Table<'a, T> {
    pub(super) values: &'a mut [T],
    pub(super) width: usize,
    pub(super) columns: Range<usize>,
    pub(super) chunk: usize,
}

impl<'a, T> Table<'a, T> {
    /// All of one row.
    pub(super) fn row(values: &'a mut [T], chunk: usize) -> Self {
        let width = values.len();
        Self { values, width, columns: 0..width, chunk }
    }
}

/// A piece's columns of a table.
pub(super) struct Columns<'a, T> {
    values: &'a Base<T>,
    rows: usize,
    width: usize,
    start: usize,
    end: usize,
}

impl<T> Columns<'_, T> {
    /// How many.
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// These columns of a row.
    ///
    /// # Panics
    /// If the table has no such row.
    pub(super) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "a row of the table");
        // SAFETY: `Pool::stripes_and_columns` borrows the table mutably and gives each column to one
        // piece; this piece's are borrowed by one row at a time.
        unsafe { self.values.stripe(row * self.width + self.start, self.len()) }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller included.
    ///
    /// # Errors
    /// [`Error::Threads`] if the system refuses one, or none are asked for.
    pub(super) fn new(threads: usize) -> Result<Self> {
        Self::start(threads, &[])
    }

    /// The same, and each worker stays on a processor of its own. The caller stays what it is: a
    /// thread that the system moves, and that finds its place beside them.
    ///
    /// # Errors
    /// As [`Pool::new`], or if there are fewer processors or the system binds no threads.
    pub(super) fn pinned(threads: usize) -> Result<Self> {
        Self::start(threads, &affinity::processors(threads)?)
    }

    /// `processors`: none, or one for each thread.
    fn start(threads: usize, processors: &[usize]) -> Result<Self> {
        let fail = |problem: String| Error::Threads { threads, problem };
        if threads == 0 {
            return Err(fail("at least one is needed".to_owned()));
        }
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            open: AtomicBool::new(false),
            active: AtomicUsize::new(threads - 1),
            epoch: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            unpinned: OnceLock::new(),
            stop: AtomicBool::new(false),
            sleeping: (1..threads).map(|_| AtomicBool::new(false)).collect(),
        });
        // The pool stops the workers it has if a later one cannot be started.
        let mut pool = Self { shared, workers: Vec::with_capacity(threads - 1) };
        for index in 0..threads - 1 {
            let shared = Arc::clone(&pool.shared);
            let processor = processors.get(index + 1).copied();
            let worker = Worker::new(index, move || shared.work(index, processor))
                .map_err(|error| fail(error.to_string()))?;
            pool.workers.push(worker);
        }
        // A thread's start takes time and memory: have it here, not in the first pass.
        while pool.shared.active.load(SeqCst) != 0 {
            helpers::abort_if_crashed();
            std::thread::yield_now();
        }
        match pool.shared.unpinned.get() {
            Some(problem) => Err(fail(format!("no pinning: {problem}"))),
            None => Ok(pool),
        }
    }

    /// Threads, the caller included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(first_chunk, stripe)` until the stripes have covered `data`, whose length is a
    /// multiple of the chunk's, once; on several threads if it is worth it.
    pub(super) fn stripes<T: Send>(
        &mut self,
        data: &mut [T],
        split: Split,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let mut nothing = [(); 0];
        self.stripes2(data, split, &mut nothing, 0, |first, stripe, _| f(first, stripe));
    }

    /// [`Pool::stripes`] over two slices cut into equally many chunks, the other's of `other_len`
    /// elements.
    pub(super) fn stripes2<T: Send, U: Send>(
        &mut self,
        data: &mut [T],
        split: Split,
        other: &mut [U],
        other_len: usize,
        f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        let chunks = data.len() / split.len;
        assert_eq!(data.len(), chunks * split.len, "a whole number of chunks");
        assert_eq!(other.len(), chunks * other_len, "as many chunks as the first slice");
        let (data, other) = (Base(data.as_mut_ptr()), Base(other.as_mut_ptr()));
        self.pieces(chunks, split.cost, &|first, n| {
            // SAFETY: chunks first..first + n lie within the slice, which is borrowed mutably
            // for this call and whose elements are Send; no other piece has any of them.
            let stripe = unsafe { data.stripe(first * split.len, n * split.len) };
            // SAFETY: the same.
            let other = unsafe { other.stripe(first * other_len, n * other_len) };
            f(first, stripe, other);
        });
    }

    /// [`Pool::stripes`] over a slice and the columns of a table: with each of its chunks go the next
    /// `table.chunk` columns, as far as there are.
    pub(super) fn stripes_and_columns<T: Send, U: Send>(
        &mut self,
        data: &mut [T],
        split: Split,
        table: Table<'_, U>,
        f: impl Fn(usize, &mut [T], Columns<'_, U>) + Sync,
    ) {
        let chunks = data.len() / split.len;
        assert_eq!(data.len(), chunks * split.len, "a whole number of chunks");
        let Table { values, width, columns, chunk } = table;
        assert!(columns.start <= columns.end && columns.end <= width, "columns of the table");
        let rows = values.len() / width;
        let (data, values) = (Base(data.as_mut_ptr()), Base(values.as_mut_ptr()));
        self.pieces(chunks, split.cost, &|first, n| {
            // SAFETY: as in `stripes2`.
            let stripe = unsafe { data.stripe(first * split.len, n * split.len) };
            let start = (columns.start + first * chunk).min(columns.end);
            let end = (start + n * chunk).min(columns.end);
            f(first, stripe, Columns { values: &values, rows, width, start, end });
        });
    }

    /// Calls `f(first, n)` until chunks `first..first + n` have been all of `chunks` once; on several
    /// threads if it is worth it, where each costs `cost`.
    fn pieces(&mut self, chunks: usize, cost: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        let smallest = MIN_PIECE_COST.div_ceil(cost.max(1));
        let piece = chunks.div_ceil(self.threads() * PIECES_PER_THREAD).max(smallest);
        if self.workers.is_empty() || chunks <= piece {
            if chunks > 0 {
                f(0, chunks);
            }
            return;
        }
        // The counter hands out each chunk once.
        let next = AtomicUsize::new(0);
        self.run(&|| {
            loop {
                let first = next.fetch_add(piece, SeqCst);
                if first >= chunks {
                    break;
                }
                f(first, piece.min(chunks - first));
            }
        });
    }

    /// Runs `job` on the caller and on every worker that comes in time; returns when all that
    /// began have ended.
    fn run(&mut self, job: &Job<'_>) {
        helpers::abort_if_crashed();
        let shared = &*self.shared;
        let job_pointer: *const Job<'_> = job;
        // SAFETY: erases the lifetime only. No worker reads the pointer after `close` has been
        // dropped, which is before `job`'s borrow ends.
        let job_pointer =
            unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job_pointer) };
        // SAFETY: `open` is false and the last run waited for the workers that had seen it true,
        // so nobody reads the cell; `&mut self` keeps other writers out.
        unsafe { *shared.job.get() = Some(job_pointer) };
        let close = Close(shared);
        shared.open.store(true, SeqCst);
        shared.epoch.fetch_add(1, SeqCst);
        for (worker, sleeping) in self.workers.iter().zip(&shared.sleeping) {
            if sleeping.load(SeqCst) {
                worker.thread().unpark();
            }
        }
        job();
        drop(close);
        assert!(!shared.panicked.swap(false, SeqCst), "a worker thread panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            worker.join();
        }
    }
}

impl Worker {
    /// A lent thread that runs `work`, or else a new one.
    fn new(index: usize, work: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        helpers::take(work).map(Self::Lent).or_else(|work| {
            let name = format!("sterna-cpu-{}", index + 1);
            std::thread::Builder::new().name(name).spawn(work).map(Self::Started)
        })
    }

    fn thread(&self) -> &Thread {
        match self {
            Self::Started(worker) => worker.thread(),
            Self::Lent(worker) => worker.thread(),
        }
    }

    fn join(self) {
        match self {
            // A worker catches its job's panics, and that job's caller has reported them.
            Self::Started(worker) => drop(worker.join()),
            Self::Lent(worker) => worker.join(),
        }
    }
}

impl Shared {
    /// The life of worker `index`, on one processor if so asked.
    fn work(&self, index: usize, processor: Option<usize>) {
        if let Some(Err(problem)) = processor.map(affinity::pin) {
            // The first reason is as good as any.
            self.unpinned.get_or_init(|| problem);
        }
        drop(Active(self));
        let mut seen = 0;
        while self.wait(index, &mut seen) {
            let active = Active::enter(self);
            // Having announced itself, the worker may use the job if it is open: the owner closes
            // it first and then waits for `active` to become 0.
            if self.open.load(SeqCst) {
                // SAFETY: `open` was set after the cell was written, and the owner neither writes
                // it nor lets the job's borrow end while this worker is active.
                let job = unsafe { (*self.job.get()).map(|job| &*job) };
                let result = catch_unwind(AssertUnwindSafe(|| job.map(|job| job())));
                if result.is_err() {
                    self.panicked.store(true, SeqCst);
                }
            }
            drop(active);
        }
    }

    /// Waits for an epoch other than `seen`; false if the pool is to end.
    fn wait(&self, index: usize, seen: &mut usize) -> bool {
        let mut spins = 0;
        loop {
            if self.stop.load(SeqCst) {
                return false;
            }
            let epoch = self.epoch.load(SeqCst);
            if epoch != *seen {
                *seen = epoch;
                return true;
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            // Announce first, then look again: whoever changes the epoch after that look sees the
            // announcement and unparks.
            self.sleeping[index].store(true, SeqCst);
            if self.epoch.load(SeqCst) == *seen && !self.stop.load(SeqCst) {
                std::thread::park();
            }
            self.sleeping[index].store(false, SeqCst);
        }
    }
}

/// A worker's presence, until dropped.
struct Active<'a>(&'a Shared);

impl<'a> Active<'a> {
    fn enter(shared: &'a Shared) -> Self {
        shared.active.fetch_add(1, SeqCst);
        Self(shared)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, SeqCst);
    }
}

/// Closes the job and waits for those that run it, also when the caller's share panics.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.open.store(false, SeqCst);
        let mut spins = 0;
        while self.0.active.load(SeqCst) != 0 {
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                helpers::abort_if_crashed();
                std::thread::yield_now();
            }
        }
    }
}

/// The start of a slice that threads take pieces of.
struct Base<T>(*mut T);

// SAFETY: hands out disjoint pieces of a slice whose elements may go to other threads.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// They must lie within the slice that `self` was made from, which must be borrowed mutably
    /// meanwhile, and no other live stripe may overlap them.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that stripes are disjoint")]
    unsafe fn stripe(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every chunk a piece of its own.
    const DEAR: usize = MIN_PIECE_COST;

    #[test]
    fn every_chunk_is_visited_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).unwrap();
            for chunks in [0, 1, 2, 7, 1000] {
                let (mut data, mut other) = (vec![0usize; chunks * 3], vec![0usize; chunks]);
                for round in 0..20 {
                    let split = Split { len: 3, cost: DEAR };
                    pool.stripes2(&mut data, split, &mut other, 1, |first, data, other| {
                        for (i, other) in other.iter_mut().enumerate() {
                            *other += first + i;
                        }
                        for (i, value) in data.iter_mut().enumerate() {
                            *value += 3 * first + i;
                        }
                    });
                    assert!(data.iter().enumerate().all(|(i, &v)| v == (round + 1) * i));
                    assert!(other.iter().enumerate().all(|(i, &v)| v == (round + 1) * i));
                }
            }
        }
    }

    #[test]
    fn every_column_is_visited_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).unwrap();
            // The last chunk may have fewer columns, or none.
            for (chunks, columns, width) in
                [(0, 2..2, 5), (1, 0..3, 3), (7, 4..23, 30), (9, 1..23, 23)]
            {
                let (mut data, mut values) = (vec![0; chunks * 2], vec![0; 4 * width]);
                let table =
                    Table { values: &mut values, width, columns: columns.clone(), chunk: 3 };
                let split = Split { len: 2, cost: DEAR };
                pool.stripes_and_columns(&mut data, split, table, |first, data, mut part| {
                    data.fill(first + 1);
                    for row in 0..4 {
                        for (i, value) in part.row(row).iter_mut().enumerate() {
                            *value += 100 * row + 3 * first + i + 1;
                        }
                    }
                });
                assert!(!data.contains(&0));
                for (at, value) in values.into_iter().enumerate() {
                    let (row, column) = (at / width, at % width);
                    let written = columns.clone().position(|other| other == column);
                    let expected = written.map_or(0, |at| 100 * row + at + 1);
                    assert_eq!(value, expected, "{row} {column}");
                }
            }
        }
    }

    #[test]
    fn small_work_stays_on_the_caller() {
        let mut pool = Pool::new(4).unwrap();
        let caller = std::thread::current().id();
        let split = Split { len: 1, cost: 1 };
        pool.stripes(&mut [0; 100], split, |first, stripe| {
            assert_eq!((first, stripe.len()), (0, 100));
            assert_eq!(std::thread::current().id(), caller);
        });
    }

    #[test]
    fn workers_wake_from_sleep() {
        let mut pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let both = std::sync::Barrier::new(2);
            // Returns only if two threads take a chunk each.
            pool.stripes(&mut [0; 2], Split { len: 1, cost: DEAR }, |_, _| {
                both.wait();
            });
        }
    }

    #[test]
    fn idle_workers_sleep() {
        let mut pool = Pool::new(3).unwrap();
        pool.stripes(&mut [0; 64], Split { len: 1, cost: DEAR }, |_, _| {});
        let asleep = |pool: &Pool| pool.shared.sleeping.iter().all(|worker| worker.load(SeqCst));
        let start = std::time::Instant::now();
        while !asleep(&pool) {
            assert!(start.elapsed().as_secs() < 20, "a worker still spins");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn any_thread_may_drive_it() {
        let mut pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            pool = std::thread::spawn(move || {
                let mut data = [0; 64];
                pool.stripes(&mut data, Split { len: 1, cost: DEAR }, |_, stripe| stripe.fill(1));
                assert_eq!(data, [1; 64]);
                pool
            })
            .join()
            .unwrap();
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..10 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.stripes(&mut [0; 64], Split { len: 1, cost: DEAR }, |first, _| {
                    assert!(first != 33, "on purpose");
                });
            }));
            assert!(result.is_err());
            let mut data = [0; 64];
            pool.stripes(&mut data, Split { len: 1, cost: DEAR }, |_, stripe| stripe.fill(1));
            assert_eq!(data, [1; 64]);
        }
    }

    #[test]
    fn no_threads_is_an_error() {
        assert!(matches!(Pool::new(0), Err(Error::Threads { threads: 0, .. })));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pinned_workers_have_a_processor_each() {
        let threads = std::thread::available_parallelism().unwrap().get();
        let mut pool = Pool::pinned(threads).unwrap();
        let caller = affinity::processors(1).unwrap()[0];
        let seen = std::sync::Mutex::new(std::collections::BTreeSet::new());
        let all = std::sync::Barrier::new(threads);
        // Returns only if each thread takes a chunk.
        pool.stripes(&mut vec![0; threads], Split { len: 1, cost: DEAR }, |_, _| {
            let mine = affinity::processors(1).unwrap()[0];
            let is_bound = affinity::processors(2).is_err();
            seen.lock().unwrap().insert((is_bound, mine));
            all.wait();
        });
        let expected = affinity::processors(threads).unwrap();
        let expected = expected[1..].iter().map(|&processor| (true, processor));
        let bound = seen.into_inner().unwrap();
        assert!(threads == 1 || bound.contains(&(false, caller)));
        assert!(bound.into_iter().filter(|&(is_bound, _)| is_bound).eq({
            let mut expected: Vec<_> = expected.collect();
            expected.sort_unstable();
            expected
        }));
        drop(pool);
        assert!(matches!(Pool::pinned(1 << 12), Err(Error::Threads { .. })));
    }
}
