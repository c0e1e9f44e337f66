//! The level without intrinsics: every machine runs it.
#![expect(unsafe_code, reason = "shares the macro of the levels that have target features")]

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS, signs};

use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::stripe_sums;
use super::head::{coarse_sums, rest_sums};
use super::lanes::Plain as Vector;
use super::portable::widen_scales;
use super::rows::open_sums;
use super::tables::{FieldTables, build_tables};
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The scalar level.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar(());

impl Scalar {
    /// Always available.
    pub(super) fn is_available() -> bool {
        true
    }

    /// The level's token.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(Scalar, Level::Scalar);

/// One tile: `acc[M][32]`.
fn gemm_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    for (m, acc) in acc.iter_mut().enumerate() {
        acc.fill(-x.code_sum(m));
        for (chunk, x) in tile.iter().zip(x.token(m)) {
            for (acc, piece) in acc.iter_mut().zip(chunk.as_chunks().0) {
                *acc += piece_dot(*piece, x);
            }
        }
    }
}

/// `Σ (w + 1)·x` of one piece: 16 lanes, one a byte, that sum the four fields in i16
/// (|sum| ≤ 4·2·128).
fn piece_dot(piece: [u32; 4], x: &[i8; CHUNK_K]) -> i32 {
    let mut lanes = [0i16; 16];
    let bytes = piece.map(u32::to_le_bytes);
    for (b, (lane, byte)) in lanes.iter_mut().zip(bytes.as_flattened()).enumerate() {
        for field in 0..4 {
            *lane += i16::from(byte >> (2 * field) & 3) * i16::from(x[16 * field + b]);
        }
    }
    lanes.iter().map(|&lane| i32::from(lane)).sum()
}

/// One tile of [`super::GroupLayout::Signs`]: `acc[M][32]`.
fn signs_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    for (m, acc) in acc.iter_mut().enumerate() {
        acc.fill(x.code_sum(m));
        for (chunk, x) in tile.iter().zip(x.signs_token(m)) {
            for (acc, piece) in acc.iter_mut().zip(chunk.as_chunks().0) {
                *acc -= 2 * negatives_dot(*piece, x);
            }
        }
    }
}

/// `Σ x` of the −1 weights of one piece: 16 lanes, one a byte, that sum the eight bits in i16
/// (|sum| ≤ 8·128).
fn negatives_dot(piece: [u32; PIECE_WORDS], x: &[i8; signs::CHUNK_K]) -> i32 {
    let mut lanes = [0i16; 16];
    let bytes = piece.map(u32::to_le_bytes);
    for (b, (lane, byte)) in lanes.iter_mut().zip(bytes.as_flattened()).enumerate() {
        for bit in 0..8 {
            *lane += i16::from(byte >> bit & 1) * i16::from(x[16 * bit + b]);
        }
    }
    lanes.iter().map(|&lane| i32::from(lane)).sum()
}

/// One chunk of [`super::tables`].
pub(super) fn lookup_chunk(
    chunk: &[u32; CHUNK_WORDS],
    tables: &[FieldTables],
    sums: &mut [[f32; TILE_ROWS]],
) {
    for (tables, sums) in tables.iter().zip(sums) {
        for (sum, piece) in sums.iter_mut().zip(chunk.as_chunks::<PIECE_WORDS>().0) {
            *sum = 0.0;
            for (&word, tables) in piece.iter().zip(tables.0.as_chunks::<16>().0) {
                let mut word = word;
                for [low, high] in tables.as_chunks::<2>().0 {
                    *sum += low[(word & 3) as usize] + high[(word >> 2 & 3) as usize];
                    word >>= 4;
                }
            }
        }
    }
}
