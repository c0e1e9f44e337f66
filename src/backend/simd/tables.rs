//! Binary and ternary weights × float activations, by looking products up.
//!
//! ```text
//! for each tile row n, chunk c:
//!     sum[n] = Σ_f T[c,f][code(n,c,f)]        the 64 two-bit fields f of a row's 16 bytes
//!     y[n] += d[n, group of c] · sum[n]
//! ```
//!
//! A field holds one ternary code or two binary signs, so what it adds to the sum is one of at most
//! four numbers: `−x, 0, x` or `±x₀ ±x₁`. Those are computed once for a vector and read by all rows,
//! which are the lanes of a register: an in-register permutation looks up a row a lane, and nothing
//! has to be summed across lanes.
//!
//! 1. Fields are added two by two (a nibble), then one nibble after another: where a register holds
//!    16 numbers, one table serves a nibble ([`NibbleTables`]); elsewhere two ([`FieldTables`]). The
//!    additions are the same, and so are the bits of the result.
//! 2. Tables are built for a block of chunks that stays in the first-level cache while all tiles
//!    pass, and for several tokens, which share the decoding.

use cpu_ref::layout::TILE_ROWS;

use super::{CHUNK_WORDS, GroupLayout, GroupScales, GroupWeights};

/// Two-bit fields of a row's share of a chunk.
const FIELDS: usize = 64;

/// Tokens that share the decoding of the weights.
const TOKENS: usize = 4;

/// Tables that a block holds: chunks × tokens.
const BLOCK: usize = 8;

/// What a level looks up for one chunk and token.
pub(super) trait Tables: Copy {
    /// To be overwritten.
    const ZERO: Self;
}

/// `T[f][code]` for the fields in the order of their bits.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct FieldTables(pub(super) [[f32; 4]; FIELDS]);

impl Tables for FieldTables {
    const ZERO: Self = Self([[0.0; 4]; FIELDS]);
}

/// `T[2i][code & 3] + T[2i + 1][code >> 2]` for every nibble `i`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct NibbleTables(pub(super) [[f32; 16]; FIELDS / 2]);

#[cfg(target_arch = "x86_64")]
impl Tables for NibbleTables {
    const ZERO: Self = Self([[0.0; 16]; FIELDS / 2]);
}

/// The column that field `f` of [`GroupLayout::I2`] stands for.
#[inline(always)]
pub(super) fn i2_column(f: usize) -> usize {
    16 * (f % 4) + f / 4
}

/// The tables of one chunk of a token; a code that never occurs gets 0.
#[inline(always)]
pub(super) fn build_tables(layout: GroupLayout, x: &[f32], tables: &mut FieldTables) {
    match layout {
        GroupLayout::I2 => {
            for (f, table) in tables.0.iter_mut().enumerate() {
                let x = x[i2_column(f)];
                *table = [-x, 0.0, x, 0.0];
            }
        }
        GroupLayout::Signs => {
            for (table, &[a, b]) in tables.0.iter_mut().zip(x.as_chunks::<2>().0) {
                *table = [a + b, -a + b, a - b, -a - b];
            }
        }
    }
}

/// `y[n,m] = Σ_g d[n,g]·Σ_{k∈g} w[n,k]·x[m,k]` into `y[tile][M][32]`, with a level's
/// `build(layout, x, tables)`, `widen(scales)` and `lookup(chunk, tables, sums)`, which gets the
/// tables of up to [`TOKENS`] tokens and overwrites as many sums.
///
/// Within `cpu_ref::group_gemv::bound`: a product meets fewer than K roundings.
#[inline(always)]
pub(super) fn group_gemm<T: Tables>(
    weights: GroupWeights<'_>,
    x: &[f32],
    y: &mut [f32],
    build: impl Fn(GroupLayout, &[f32], &mut T),
    widen: impl Fn(&GroupScales) -> [f32; TILE_ROWS],
    lookup: impl Fn(&[u32; CHUNK_WORDS], &[T], &mut [[f32; TILE_ROWS]]),
) {
    let (k, chunk_k) = (weights.k, weights.layout.chunk_k());
    let (n_tokens, chunks) = (x.len() / k, k / chunk_k);
    let y = y.as_chunks_mut::<TILE_ROWS>().0;
    let mut tables = [T::ZERO; BLOCK];
    for first in (0..n_tokens).step_by(TOKENS) {
        let tokens = TOKENS.min(n_tokens - first);
        let block = BLOCK / tokens;
        for start in (0..chunks).step_by(block) {
            let block = start..(start + block).min(chunks);
            for (c, tables) in block.clone().zip(tables.chunks_exact_mut(tokens)) {
                for (t, table) in tables.iter_mut().enumerate() {
                    build(weights.layout, &x[(first + t) * k + c * chunk_k..][..chunk_k], table);
                }
            }
            for (tile, y) in y.chunks_exact_mut(n_tokens).enumerate() {
                let (words, scales) = weights.tile(tile);
                let y = &mut y[first..first + tokens];
                if start == 0 {
                    y.fill([0.0; TILE_ROWS]);
                }
                for (c, tables) in block.clone().zip(tables.chunks_exact(tokens)) {
                    let mut sums = [[0.0; TILE_ROWS]; TOKENS];
                    lookup(&words[c], tables, &mut sums[..tokens]);
                    let d = widen(&scales[c / weights.group_chunks()]);
                    for (y, sums) in y.iter_mut().zip(&sums) {
                        for row in 0..TILE_ROWS {
                            y[row] += d[row] * sums[row];
                        }
                    }
                }
            }
        }
    }
}
