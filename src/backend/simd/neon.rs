//! NEON: `smull` and `smlal` multiply 8 codes by 8 activations into 8 i16 lanes, which widen to i32
//! after every chunk.
//!
//! ```text
//! for each tile row n, chunk c, field j: acc[n] += Σ_b code[n,c,b,j] · x[64c + 16j + b]
//! ```
//!
//! A register holds one row's 16 bytes; 8 rows × up to 2 tokens are summed at once.
#![expect(unsafe_code, reason = "loads, and entry into target features")]

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS};

use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The NEON level; exists only on a machine that has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neon(());

impl Neon {
    /// Whether this machine has NEON: every AArch64 machine this is compiled for.
    pub(super) fn is_available() -> bool {
        is_aarch64_feature_detected!("neon")
    }

    /// The level's token; `None` if this machine does not run it.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(Neon, Level::Neon, #[target_feature(enable = "neon")]);

/// Rows that one pass sums.
pub(super) const PASS_ROWS: usize = 8;

/// Four fields of one row's codes, or of a token's activations.
pub(super) type Fields = [int8x16_t; 4];

/// Defines `gemm_tile` with the target features of a level and its `dot(sum, codes, x)`, which adds
/// the products of 64 codes and activations to four lanes. A macro, because a generic function
/// would not take the features of `dot`.
macro_rules! tiles {
    (#[$features:meta]) => {
        /// One tile: `acc[M][32]`.
        #[$features]
        fn gemm_tile(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            for (group, acc) in acc.chunks_mut(2).enumerate() {
                let m = 2 * group;
                match acc.len() {
                    2 => tokens_tile::<2>(tile, x, m, acc),
                    _ => tokens_tile::<1>(tile, x, m, acc),
                }
            }
        }

        /// One tile and tokens `m..m + T`; `acc` holds T tokens.
        #[$features]
        fn tokens_tile<const T: usize>(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            m: usize,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            for pass in 0..TILE_ROWS / PASS_ROWS {
                let mut sums = [[vdupq_n_s32(0); PASS_ROWS]; T];
                for (c, chunk) in tile.iter().enumerate() {
                    let mut fields = [[vdupq_n_s8(0); 4]; T];
                    for (t, fields) in fields.iter_mut().enumerate() {
                        *fields = load_activations(&x.token(m + t)[c]);
                    }
                    let pieces = chunk.as_chunks::<PIECE_WORDS>().0;
                    let pieces = &pieces[pass * PASS_ROWS..][..PASS_ROWS];
                    for (row, piece) in pieces.iter().enumerate() {
                        let codes = load_codes(piece);
                        for t in 0..T {
                            sums[t][row] = dot(sums[t][row], &codes, &fields[t]);
                        }
                    }
                }
                for (t, acc) in acc.iter_mut().enumerate() {
                    let code_sum = x.scales[m + t].code_sum;
                    let rows = &mut acc[pass * PASS_ROWS..][..PASS_ROWS];
                    for (row, &lanes) in rows.iter_mut().zip(&sums[t]) {
                        *row = vaddvq_s32(lanes) - code_sum;
                    }
                }
            }
        }
    };
}
pub(super) use tiles;

tiles!(#[target_feature(enable = "neon")]);

/// A lane of i16 gets 8 products of a code ≤ 2 and an activation in −128..=127: |lane| ≤ 2048.
#[inline]
#[target_feature(enable = "neon")]
fn dot(sum: int32x4_t, codes: &Fields, x: &Fields) -> int32x4_t {
    let mut short = vmull_s8(vget_low_s8(codes[0]), vget_low_s8(x[0]));
    short = vmlal_high_s8(short, codes[0], x[0]);
    for j in 1..4 {
        short = vmlal_s8(short, vget_low_s8(codes[j]), vget_low_s8(x[j]));
        short = vmlal_high_s8(short, codes[j], x[j]);
    }
    vpadalq_s16(sum, short)
}

/// One row's codes, 0..=2, field by field.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_codes(piece: &[u32; PIECE_WORDS]) -> Fields {
    // SAFETY: `piece` has 16 bytes to read, and the load needs no alignment.
    let v = unsafe { vld1q_u8(piece.as_ptr().cast()) };
    let low = vdupq_n_u8(0x03);
    [
        vreinterpretq_s8_u8(vandq_u8(v, low)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<2>(v), low)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<4>(v), low)),
        vreinterpretq_s8_u8(vshrq_n_u8::<6>(v)),
    ]
}

/// A token's activations of one chunk, field by field.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_activations(x: &[i8; CHUNK_K]) -> Fields {
    let x = x.as_chunks::<16>().0;
    [load_field(&x[0]), load_field(&x[1]), load_field(&x[2]), load_field(&x[3])]
}

/// The 16 activations of a field.
#[inline]
#[target_feature(enable = "neon")]
fn load_field(x: &[i8; 16]) -> int8x16_t {
    // SAFETY: `x` has 16 bytes to read, and the load needs no alignment.
    unsafe { vld1q_s8(x.as_ptr()) }
}
