//! NEON with products of int8 matrices: `smmla` multiplies 2 rows × 8 codes by 2 tokens × 8
//! activations and adds them into 2 × 2 lanes of i32, twice what `sdot` does. Otherwise, and for one
//! token, as the NEON level with dot products.
#![expect(unsafe_code, reason = "instructions without intrinsics, and entry into features")]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS};

use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::stripe_sums;
use super::head::{coarse_sums, rest_sums};
use super::lanes::Plain as Vector;
use super::neon::{
    Fields, PASS_ROWS, load_activations, load_bits, load_codes, load_piece, load_signs_activations,
    lookup_chunk, split_codes, tiles,
};
use super::neon_dotprod::sdot;
use super::portable::widen_scales;
use super::rows::open_sums;
use super::tables::build_tables;
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The NEON level with products of matrices; exists only on a machine that has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct NeonI8mm(());

impl NeonI8mm {
    /// Whether this machine has NEON and its extensions for dot products and int8 matrices.
    pub(super) fn is_available() -> bool {
        is_aarch64_feature_detected!("neon")
            && is_aarch64_feature_detected!("dotprod")
            && is_aarch64_feature_detected!("i8mm")
    }

    /// The level's token; `None` if this machine does not run it.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(
    NeonI8mm,
    Level::NeonI8mm,
    #[target_feature(enable = "neon,dotprod,i8mm")]
);

tiles!(#[target_feature(enable = "neon,dotprod,i8mm")]);

/// As with dot products.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn dot(mut sum: int32x4_t, codes: &Fields, x: &Fields) -> int32x4_t {
    for j in 0..4 {
        sum = sdot(sum, codes[j], x[j]);
    }
    sum
}

/// One tile: `acc[M][32]`.
#[target_feature(enable = "neon,dotprod,i8mm")]
fn gemm_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    let (mut m, mut rest) = (0, acc);
    while !rest.is_empty() {
        let (acc, after) = rest.split_at_mut(match rest.len() {
            4.. => 4,
            2.. => 2,
            _ => 1,
        });
        match acc.len() {
            4 => pairs_tile::<2>(tile, x, m, acc),
            2 => pairs_tile::<1>(tile, x, m, acc),
            _ => tokens_tile::<1>(tile, x, m, acc),
        }
        (m, rest) = (m + acc.len(), after);
    }
}

/// One tile and the P pairs of tokens from `m` on; `acc` holds 2P tokens.
#[target_feature(enable = "neon,dotprod,i8mm")]
fn pairs_tile<const P: usize>(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    m: usize,
    acc: &mut [[i32; TILE_ROWS]],
) {
    for pass in 0..TILE_ROWS / PASS_ROWS {
        // Of a pair of rows and a pair of tokens: (0, 0), (0, 1), (1, 0), (1, 1).
        let mut sums = [[vdupq_n_s32(0); PASS_ROWS / 2]; P];
        for (c, chunk) in tile.iter().enumerate() {
            let mut x_pairs = [[[vdupq_n_s8(0); 4]; 2]; P];
            for (p, x_pair) in x_pairs.iter_mut().enumerate() {
                let a = load_activations(&x.token(m + 2 * p)[c]);
                let b = load_activations(&x.token(m + 2 * p + 1)[c]);
                for j in 0..4 {
                    x_pair[0][j] = low_halves(a[j], b[j]);
                    x_pair[1][j] = high_halves(a[j], b[j]);
                }
            }
            let rows = chunk.as_chunks::<{ 2 * PIECE_WORDS }>().0;
            let rows = &rows[pass * PASS_ROWS / 2..][..PASS_ROWS / 2];
            for (r, rows) in rows.iter().enumerate() {
                let [a, b] = rows.as_chunks::<PIECE_WORDS>().0 else { unreachable!("two pieces") };
                let (a, b) = (load_piece(a), load_piece(b));
                let (a, b) = (vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b));
                let halves = [low_halves(a, b), high_halves(a, b)];
                for (h, &half) in halves.iter().enumerate() {
                    let codes = split_codes(vreinterpretq_u8_s8(half));
                    for (sums, x_pair) in sums.iter_mut().zip(&x_pairs) {
                        for j in 0..4 {
                            sums[r] = smmla(sums[r], codes[j], x_pair[h][j]);
                        }
                    }
                }
            }
        }
        for (t, acc) in acc.iter_mut().enumerate() {
            let code_sum = x.code_sum(m + t);
            let rows = acc.as_chunks_mut::<2>().0[pass * PASS_ROWS / 2..].iter_mut();
            for (rows, &sums) in rows.zip(&sums[t / 2]) {
                *rows = match t % 2 {
                    0 => [vgetq_lane_s32::<0>(sums), vgetq_lane_s32::<2>(sums)],
                    _ => [vgetq_lane_s32::<1>(sums), vgetq_lane_s32::<3>(sums)],
                }
                .map(|sum| sum - code_sum);
            }
        }
    }
}

/// The first 8 bytes of both.
#[inline]
#[target_feature(enable = "neon")]
fn low_halves(a: int8x16_t, b: int8x16_t) -> int8x16_t {
    vcombine_s8(vget_low_s8(a), vget_low_s8(b))
}

/// The last 8 bytes of both.
#[inline]
#[target_feature(enable = "neon")]
fn high_halves(a: int8x16_t, b: int8x16_t) -> int8x16_t {
    vcombine_s8(vget_high_s8(a), vget_high_s8(b))
}

/// `sum[2i + j] += Σ_{b<8} a[8i + b]·b[8j + b]`; the intrinsic `vmmlaq_s32` is not stable.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction works on registers alone, and the function has its target feature.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
