//! NEON: `smull` and `smlal` multiply 8 codes by 8 activations into 8 i16 lanes, which widen to i32
//! after every chunk.
//!
//! ```text
//! for each tile row n, chunk c, field j: acc[n] += Σ_b code[n,c,b,j] · x[64c + 16j + b]
//! ```
//!
//! A register holds one row's 16 bytes; 8 rows × up to 2 tokens are summed at once. Binary weights
//! are bits, 1 for −1: `Σ w·x = Σ x − 2·Σ bit·x`, with eight one-bit fields a byte. For float
//! activations a lane is a row, and `tbl` looks up a field ([`super::tables`]).
#![expect(unsafe_code, reason = "loads, and entry into target features")]

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS, signs};

use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::stripe_sums;
use super::head::{coarse_sums, rest_sums};
use super::lanes::Plain as Vector;
use super::portable::widen_scales;
use super::rows::open_sums;
use super::tables::{FieldTables, build_tables};
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

/// Defines `tokens_tile` and `signs_tile` with the target features of a level and its
/// `dot(sum, codes, x)`, which adds the products of 64 codes and activations to four lanes. A macro,
/// because a generic function would not take the features of `dot`.
macro_rules! tiles {
    (#[$features:meta]) => {
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
                    let code_sum = x.code_sum(m + t);
                    let rows = &mut acc[pass * PASS_ROWS..][..PASS_ROWS];
                    for (row, &lanes) in rows.iter_mut().zip(&sums[t]) {
                        *row = vaddvq_s32(lanes) - code_sum;
                    }
                }
            }
        }

        /// One tile of [`super::GroupLayout::Signs`]: `acc[M][32]`.
        #[$features]
        fn signs_tile(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            for (m, acc) in acc.iter_mut().enumerate() {
                for (pass, acc) in acc.as_chunks_mut::<PASS_ROWS>().0.iter_mut().enumerate() {
                    let mut sums = [vdupq_n_s32(0); PASS_ROWS];
                    for (chunk, x) in tile.iter().zip(x.signs_token(m)) {
                        let (low, high) = load_signs_activations(x);
                        let pieces = chunk.as_chunks::<PIECE_WORDS>().0;
                        let pieces = &pieces[pass * PASS_ROWS..][..PASS_ROWS];
                        for (sum, piece) in sums.iter_mut().zip(pieces) {
                            let (low_bits, high_bits) = load_bits(piece);
                            *sum = dot(dot(*sum, &low_bits, &low), &high_bits, &high);
                        }
                    }
                    for (acc, &sum) in acc.iter_mut().zip(&sums) {
                        *acc = x.code_sum(m) - 2 * vaddvq_s32(sum);
                    }
                }
            }
        }
    };
}
pub(super) use tiles;

/// Defines `gemm_tile` by `tokens_tile`, two tokens at a time.
macro_rules! gemm_by_two {
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
    };
}
pub(super) use gemm_by_two;

tiles!(#[target_feature(enable = "neon")]);
gemm_by_two!(#[target_feature(enable = "neon")]);

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
    split_codes(load_piece(piece))
}

/// 16 bytes of one row.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_piece(piece: &[u32; PIECE_WORDS]) -> uint8x16_t {
    // SAFETY: `piece` has 16 bytes to read, and the load needs no alignment.
    unsafe { vld1q_u8(piece.as_ptr().cast()) }
}

/// The codes of 16 bytes, 0..=2, field by field.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn split_codes(v: uint8x16_t) -> Fields {
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

/// One row's bits, 0 or 1, field by field: those of the low and of the high nibbles.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_bits(piece: &[u32; PIECE_WORDS]) -> (Fields, Fields) {
    let v = load_piece(piece);
    (nibble_bits(v), nibble_bits(vshrq_n_u8::<4>(v)))
}

/// Bits 0 to 3 of each byte.
#[inline]
#[target_feature(enable = "neon")]
fn nibble_bits(v: uint8x16_t) -> Fields {
    let one = vdupq_n_u8(1);
    [
        vreinterpretq_s8_u8(vandq_u8(v, one)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<1>(v), one)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<2>(v), one)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<3>(v), one)),
    ]
}

/// A token's activations of one chunk of binary weights, field by field.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_signs_activations(x: &[i8; signs::CHUNK_K]) -> (Fields, Fields) {
    let halves = x.as_chunks::<CHUNK_K>().0;
    (load_activations(&halves[0]), load_activations(&halves[1]))
}

/// Rows whose words are transposed by one load, and loads of a pass over the tables.
const QUAD_ROWS: usize = 4;
const PASS_QUADS: usize = 4;

/// One chunk of [`super::tables`], 16 rows at a time.
#[target_feature(enable = "neon")]
pub(super) fn lookup_chunk(
    chunk: &[u32; CHUNK_WORDS],
    tables: &[FieldTables],
    sums: &mut [[f32; TILE_ROWS]],
) {
    const PASS_WORDS: usize = PASS_QUADS * QUAD_ROWS * PIECE_WORDS;
    for (pass, chunk) in chunk.as_chunks::<PASS_WORDS>().0.iter().enumerate() {
        let mut words =
            [uint32x4x4_t(vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0));
                PASS_QUADS];
        for (words, quad) in words.iter_mut().zip(chunk.as_chunks().0) {
            *words = load_transposed(quad);
        }
        for (tables, sums) in tables.iter().zip(&mut *sums) {
            let mut acc = [vdupq_n_f32(0.0); PASS_QUADS];
            let (nibbles, _) = tables.0.as_chunks::<2>();
            for (w, nibbles) in nibbles.as_chunks::<8>().0.iter().enumerate() {
                let mut v = words.map(|words| [words.0, words.1, words.2, words.3][w]);
                for [low, high] in nibbles {
                    let (low, high) = (load_table(low), load_table(high));
                    for q in 0..PASS_QUADS {
                        let a = lookup(low, v[q]);
                        let b = lookup(high, vshrq_n_u32::<2>(v[q]));
                        acc[q] = vaddq_f32(acc[q], vaddq_f32(a, b));
                        v[q] = vshrq_n_u32::<4>(v[q]);
                    }
                }
            }
            let rows = sums.as_chunks_mut::<{ PASS_QUADS * QUAD_ROWS }>().0;
            for (acc, rows) in acc.iter().zip(rows[pass].as_chunks_mut::<QUAD_ROWS>().0) {
                // SAFETY: `rows` has 16 bytes to write, and the store needs no alignment.
                unsafe { vst1q_f32(rows.as_mut_ptr(), *acc) };
            }
        }
    }
}

/// Four rows' words: register `w` holds word `w` of each row.
#[inline]
#[target_feature(enable = "neon")]
fn load_transposed(quad: &[u32; QUAD_ROWS * PIECE_WORDS]) -> uint32x4x4_t {
    // SAFETY: `quad` has 64 bytes to read, and the load needs no alignment.
    unsafe { vld4q_u32(quad.as_ptr()) }
}

/// A field's table.
#[inline]
#[target_feature(enable = "neon")]
fn load_table(table: &[f32; 4]) -> uint8x16_t {
    // SAFETY: `table` has 16 bytes to read, and the load needs no alignment.
    unsafe { vld1q_u8(table.as_ptr().cast()) }
}

/// `table[word & 3]` of every lane: the code is spread to the four bytes of its entry.
#[inline]
#[target_feature(enable = "neon")]
fn lookup(table: uint8x16_t, words: uint32x4_t) -> float32x4_t {
    let codes = vandq_u32(words, vdupq_n_u32(3));
    let bytes = vmlaq_u32(vdupq_n_u32(0x0302_0100), codes, vdupq_n_u32(0x0404_0404));
    vreinterpretq_f32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(bytes)))
}
