//! Guarded outputs and comparisons that say what differs.

use std::fmt::Debug;

/// Elements before and after an output.
const GUARD_LEN: usize = 64;

/// Runs `write` on an output of `len` elements between guards, and fails if a guard is touched.
/// The output starts as copies of `guard` too, so that an element left alone is found out.
pub(crate) fn guarded<T: Copy + PartialEq + Debug>(
    what: &str,
    len: usize,
    guard: T,
    write: impl FnOnce(&mut [T]),
) -> Vec<T> {
    let mut all = vec![guard; len + 2 * GUARD_LEN];
    write(&mut all[GUARD_LEN..][..len]);
    let (before, rest) = all.split_at(GUARD_LEN);
    let (out, after) = rest.split_at(len);
    let touched = before.iter().chain(after).any(|value| *value != guard);
    assert!(!touched, "{what}: wrote outside its output");
    out.to_vec()
}

/// The first index at which two slices differ, with both values; their lengths are equal.
pub(crate) fn first_difference<T: Copy + PartialEq>(
    expected: &[T],
    found: &[T],
) -> Option<(usize, T, T)> {
    let at = expected.iter().zip(found).position(|(expected, found)| expected != found)?;
    Some((at, expected[at], found[at]))
}

/// Fails on the first element that differs.
pub(crate) fn assert_same<T: Copy + PartialEq + Debug>(
    kernel: &str,
    shape: impl Debug,
    seed: u64,
    variant: &str,
    expected: &[T],
    found: &[T],
) {
    let what = format!("{kernel} {shape:?}, seed {seed}, {variant}");
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some((at, expected, found)) = first_difference(expected, found) {
        panic!("{what}: [{at}]: expected {expected:?}, found {found:?}");
    }
}

/// Fails on the first float that is further than `bound(index)` from what is expected.
pub(crate) fn assert_close(
    kernel: &str,
    shape: impl Debug,
    seed: u64,
    variant: &str,
    (expected, found): (&[f32], &[f32]),
    bound: impl Fn(usize) -> f64,
) {
    let what = format!("{kernel} {shape:?}, seed {seed}, {variant}");
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (at, (&expected, &found)) in expected.iter().zip(found).enumerate() {
        let both_nan = expected.is_nan() && found.is_nan();
        let within = (f64::from(expected) - f64::from(found)).abs() <= bound(at);
        let bound = bound(at);
        assert!(
            both_nan || expected == found || within,
            "{what}: [{at}]: expected {expected} ± {bound:e}, found {found}"
        );
    }
}
