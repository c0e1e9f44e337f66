//! NEON with the dot-product extension: `sdot` multiplies 16 codes by 16 activations and adds them
//! into 4 i32 lanes. Otherwise as the NEON level.
#![expect(unsafe_code, reason = "an instruction without an intrinsic, and entry into features")]

use std::arch::aarch64::{int8x16_t, int32x4_t, vaddvq_s32, vdupq_n_s8, vdupq_n_s32};
use std::arch::{asm, is_aarch64_feature_detected};

use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS};

use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::stripe_sums;
use super::head::{coarse_sums, rest_sums};
use super::lanes::Plain as Vector;
use super::neon::{
    Fields, PASS_ROWS, gemm_by_two, load_activations, load_bits, load_codes,
    load_signs_activations, lookup_chunk, tiles,
};
use super::portable::widen_scales;
use super::rows::open_sums;
use super::tables::build_tables;
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The NEON level with dot products; exists only on a machine that has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct NeonDotprod(());

impl NeonDotprod {
    /// Whether this machine has NEON and its dot-product extension.
    pub(super) fn is_available() -> bool {
        is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")
    }

    /// The level's token; `None` if this machine does not run it.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(
    NeonDotprod,
    Level::NeonDotprod,
    #[target_feature(enable = "neon,dotprod")]
);

tiles!(#[target_feature(enable = "neon,dotprod")]);
gemm_by_two!(#[target_feature(enable = "neon,dotprod")]);

/// Codes are 0..=2, so they are the same signed and unsigned.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sum: int32x4_t, codes: &Fields, x: &Fields) -> int32x4_t {
    for j in 0..4 {
        sum = sdot(sum, codes[j], x[j]);
    }
    sum
}

/// `sum[i] += Σ_{b<4} a[4i + b]·b[4i + b]`; the intrinsic `vdotq_s32` is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction works on registers alone, and the function has its target feature.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
