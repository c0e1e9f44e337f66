//! The tests of tests/it/simd.rs on AArch64, built without what other integration tests need:
//! `tools/cross-aarch64.sh test -p sterna-tools --test aarch64`.
#![cfg(target_arch = "aarch64")]

#[path = "../../tests/it/simd.rs"]
mod simd;
#[path = "../../tests/it/util.rs"]
mod util;

use sterna::backend::simd::Level;

/// The tests of a level that is not here only say so.
#[test]
fn every_level_is_here() {
    let levels = [Level::NeonI8mm, Level::NeonDotprod, Level::Neon, Level::Scalar];
    assert_eq!(Level::available().collect::<Vec<_>>(), levels);
}
