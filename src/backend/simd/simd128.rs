//! WebAssembly SIMD: products of 16 codes and 16 activations widen to two registers of eight i16, which
//! widen to i32 after every chunk.
//!
//! ```text
//! for each tile row n, chunk c, field j: acc[n] += Σ_b code[n,c,b,j] · x[64c + 16j + b]
//! ```
//!
//! A register holds one row's 16 bytes; 8 rows × 1 token or 4 × 2 are summed at once. Binary weights are
//! bits, 1 for −1: `Σ w·x = Σ x − 2·Σ bit·x`, with eight one-bit fields a byte. A module either has these
//! instructions or does not: there is nothing to detect at run time.
#![expect(unsafe_code, reason = "shares the macro of the levels that have target features")]

use std::arch::wasm32::*;

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS};

use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::stripe_sums;
use super::head::{coarse_sums, rest_sums};
use super::lanes::Plain as Vector;
use super::portable::widen_scales;
use super::rows::open_sums;
use super::scalar::lookup_chunk;
use super::tables::build_tables;
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The level of WebAssembly with 128-bit SIMD.
#[derive(Debug, Clone, Copy)]
pub(super) struct Simd128(());

impl Simd128 {
    /// Whether this machine has it: a module that was compiled for it runs nowhere else.
    pub(super) fn is_available() -> bool {
        true
    }

    /// The level's token.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(Simd128, Level::Simd128);

/// Four fields of one row's codes, or of a token's activations.
pub(super) type Fields = [v128; 4];

/// One tile: `acc[M][32]`.
fn gemm_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    gemm_by_two(tile, x, acc, dot);
}

/// One tile of [`super::GroupLayout::Signs`]: `acc[M][32]`.
fn signs_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    signs_by_one(tile, x, acc, dot);
}

/// One tile, two tokens at a time. `dot(sum, codes, x)` adds the products of 64 codes and activations to
/// four lanes.
#[inline(always)]
pub(super) fn gemm_by_two(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    acc: &mut [[i32; TILE_ROWS]],
    dot: impl Fn(v128, &Fields, &Fields) -> v128 + Copy,
) {
    let (pairs, last) = acc.as_chunks_mut::<2>();
    for (pair, acc) in pairs.iter_mut().enumerate() {
        tokens_tile::<2, 4>(tile, x, 2 * pair, acc, dot);
    }
    if let [acc] = last {
        tokens_tile::<1, 8>(tile, x, 2 * pairs.len(), std::array::from_mut(acc), dot);
    }
}

/// One tile and tokens `m..m + T`, R rows at a time.
#[inline(always)]
fn tokens_tile<const T: usize, const R: usize>(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    m: usize,
    acc: &mut [[i32; TILE_ROWS]; T],
    dot: impl Fn(v128, &Fields, &Fields) -> v128,
) {
    for pass in 0..TILE_ROWS / R {
        let mut sums = [[i32x4_splat(0); R]; T];
        for (c, chunk) in tile.iter().enumerate() {
            let fields: [Fields; T] = std::array::from_fn(|t| load_activations(&x.token(m + t)[c]));
            let pieces = &chunk.as_chunks().0[pass * R..][..R];
            for (row, piece) in pieces.iter().enumerate() {
                let codes = split_codes(load_piece(piece));
                for (sums, fields) in sums.iter_mut().zip(&fields) {
                    sums[row] = dot(sums[row], &codes, fields);
                }
            }
        }
        for (t, (acc, sums)) in acc.iter_mut().zip(&sums).enumerate() {
            for (acc, &sum) in acc[pass * R..].iter_mut().zip(sums) {
                *acc = across(sum) - x.code_sum(m + t);
            }
        }
    }
}

/// One tile of signs, with `dot` as for [`gemm_by_two`].
#[inline(always)]
pub(super) fn signs_by_one(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    acc: &mut [[i32; TILE_ROWS]],
    dot: impl Fn(v128, &Fields, &Fields) -> v128,
) {
    const PASS_ROWS: usize = 8;
    for (m, acc) in acc.iter_mut().enumerate() {
        for (pass, acc) in acc.as_chunks_mut::<PASS_ROWS>().0.iter_mut().enumerate() {
            let mut sums = [i32x4_splat(0); PASS_ROWS];
            for (chunk, x) in tile.iter().zip(x.signs_token(m)) {
                let halves = x.as_chunks().0;
                let (low, high) = (load_activations(&halves[0]), load_activations(&halves[1]));
                let pieces = &chunk.as_chunks().0[pass * PASS_ROWS..][..PASS_ROWS];
                for (sum, piece) in sums.iter_mut().zip(pieces) {
                    let v = load_piece(piece);
                    *sum = dot(*sum, &nibble_bits(v), &low);
                    *sum = dot(*sum, &nibble_bits(u8x16_shr(v, 4)), &high);
                }
            }
            for (acc, &sum) in acc.iter_mut().zip(&sums) {
                *acc = x.code_sum(m) - 2 * across(sum);
            }
        }
    }
}

/// Adds the products of 64 codes and activations to four lanes. A lane of i16 gets 8 products of a code
/// ≤ 2 and an activation in −128..=127: |lane| ≤ 2048.
#[inline(always)]
fn dot(sum: v128, codes: &Fields, x: &Fields) -> v128 {
    let mut short = i16x8_splat(0);
    for (&codes, &x) in codes.iter().zip(x) {
        short = i16x8_add(short, i16x8_extmul_low_i8x16(codes, x));
        short = i16x8_add(short, i16x8_extmul_high_i8x16(codes, x));
    }
    i32x4_add(sum, i32x4_extadd_pairwise_i16x8(short))
}

/// The sum of four lanes.
#[inline(always)]
fn across(sum: v128) -> i32 {
    i32x4_extract_lane::<0>(sum)
        + i32x4_extract_lane::<1>(sum)
        + i32x4_extract_lane::<2>(sum)
        + i32x4_extract_lane::<3>(sum)
}

/// 16 bytes of one row.
#[inline(always)]
fn load_piece(piece: &[u32; PIECE_WORDS]) -> v128 {
    u32x4(piece[0], piece[1], piece[2], piece[3])
}

/// The codes of 16 bytes, 0..=2, field by field.
#[inline(always)]
fn split_codes(v: v128) -> Fields {
    let low = u8x16_splat(0x03);
    [
        v128_and(v, low),
        v128_and(u8x16_shr(v, 2), low),
        v128_and(u8x16_shr(v, 4), low),
        u8x16_shr(v, 6),
    ]
}

/// Bits 0 to 3 of each byte.
#[inline(always)]
fn nibble_bits(v: v128) -> Fields {
    let one = u8x16_splat(1);
    [
        v128_and(v, one),
        v128_and(u8x16_shr(v, 1), one),
        v128_and(u8x16_shr(v, 2), one),
        v128_and(u8x16_shr(v, 3), one),
    ]
}

/// A token's activations of one chunk, field by field.
#[inline(always)]
fn load_activations(x: &[i8; CHUNK_K]) -> Fields {
    let x = x.as_chunks::<16>().0;
    // SAFETY: each has 16 bytes to read, and the load needs no alignment.
    [0, 1, 2, 3].map(|field| unsafe { v128_load(x[field].as_ptr().cast()) })
}
