//! Which processors threads may run on, and binding a thread to one. Linux alone.

use crate::error::{Error, Result};

/// A processor for each of `threads` threads, the caller of the pool being the first: of those that this
/// thread may use, one of each core before any other of it.
///
/// # Errors
/// [`Error::Threads`] if there are fewer, or the system does not say.
pub(super) fn processors(threads: usize) -> Result<Vec<usize>> {
    let fail = |problem| Error::Threads { threads, problem };
    let mut all = system::allowed().map_err(|problem| fail(format!("no pinning: {problem}")))?;
    if all.len() < threads {
        let n = all.len();
        return Err(fail(format!("pinned, they need a processor each, and {n} may be used")));
    }
    all.sort_by_key(|&processor| (system::is_sibling(processor), processor));
    all.truncate(threads);
    Ok(all)
}

pub(super) use system::pin;

#[cfg(any(target_os = "linux", target_os = "android"))]
mod system {
    use std::path::Path;

    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    /// Processors that this thread may use.
    pub(super) fn allowed() -> Result<Vec<usize>, String> {
        let set = sched_getaffinity(None).map_err(|error| error.to_string())?;
        Ok((0..CpuSet::MAX_CPU).filter(|&processor| set.is_set(processor)).collect())
    }

    /// Whether a processor shares its core with one of a lower number; false where the system does not
    /// tell.
    pub(super) fn is_sibling(processor: usize) -> bool {
        let path = format!("/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list");
        first_sibling(Path::new(&path)).is_some_and(|first| first < processor)
    }

    /// The lowest of a list such as "3,7" or "2-3".
    fn first_sibling(path: &Path) -> Option<usize> {
        let list = std::fs::read_to_string(path).ok()?;
        list.trim().split([',', '-']).next()?.parse().ok()
    }

    /// Binds the calling thread to a processor.
    pub(in crate::backend::simd) fn pin(processor: usize) -> Result<(), String> {
        let mut set = CpuSet::new();
        set.set(processor);
        sched_setaffinity(None, &set).map_err(|error| error.to_string())
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn lists_of_siblings_are_read() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("thread_siblings_list");
            for (list, first) in
                [("0\n", Some(0)), ("3,7\n", Some(3)), ("2-3", Some(2)), ("", None), ("x", None)]
            {
                std::fs::write(&path, list).unwrap();
                assert_eq!(first_sibling(&path), first, "{list:?}");
            }
            assert_eq!(first_sibling(&folder.path().join("none")), None);
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod system {
    /// Why there is none.
    const PROBLEM: &str = "this system is not asked which thread runs where";

    pub(super) fn allowed() -> Result<Vec<usize>, String> {
        Err(PROBLEM.to_owned())
    }

    pub(super) fn is_sibling(_: usize) -> bool {
        false
    }

    pub(in crate::backend::simd) fn pin(_: usize) -> Result<(), String> {
        Err(PROBLEM.to_owned())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gets_a_processor_that_may_be_used() {
        let allowed = system::allowed().unwrap();
        // A quota may leave fewer.
        assert!(allowed.len() >= std::thread::available_parallelism().unwrap().get());
        let mut chosen = processors(allowed.len()).unwrap();
        chosen.sort_unstable();
        assert_eq!(chosen, allowed);
        let error = processors(allowed.len() + 1).unwrap_err().to_string();
        assert!(error.contains("need a processor each"), "{error}");

        let last = *allowed.last().unwrap();
        std::thread::spawn(move || {
            pin(last).unwrap();
            assert_eq!(system::allowed().unwrap(), [last]);
            assert_eq!(processors(1).unwrap(), [last]);
            assert!(processors(2).is_err());
        })
        .join()
        .unwrap();
    }
}
