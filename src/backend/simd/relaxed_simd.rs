//! WebAssembly relaxed SIMD: one instruction multiplies 16 codes by 16 activations and adds them into 4
//! i32 lanes. Otherwise as the level with 128-bit SIMD.
//!
//! What is relaxed about the instruction does not show here. It may take a second operand with the
//! highest bit set as signed or as unsigned: codes are 0..=2. It may sum pairs of products in i16, and
//! wrap or saturate there: a pair is at most 2·2·128. The other instructions of the extension, such as
//! the product with addition that rounds once or twice, are not used: all levels return the same bits.
#![expect(unsafe_code, reason = "shares the macro of the levels that have target features")]

use std::arch::wasm32::{i32x4_relaxed_dot_i8x16_i7x16_add, v128};

use cpu_ref::layout::TILE_ROWS;

use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::stripe_sums;
use super::head::{coarse_sums, rest_sums};
use super::lanes::Plain as Vector;
use super::portable::widen_scales;
use super::rows::open_sums;
use super::scalar::lookup_chunk;
use super::simd128::{Fields, gemm_by_two, signs_by_one};
use super::tables::build_tables;
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The level of WebAssembly with relaxed SIMD.
#[derive(Debug, Clone, Copy)]
pub(super) struct RelaxedSimd(());

impl RelaxedSimd {
    /// Whether this machine has it: a module that was compiled for it runs nowhere else.
    pub(super) fn is_available() -> bool {
        true
    }

    /// The level's token.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(RelaxedSimd, Level::RelaxedSimd);

/// One tile: `acc[M][32]`.
fn gemm_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    gemm_by_two(tile, x, acc, dot);
}

/// One tile of [`super::GroupLayout::Signs`]: `acc[M][32]`.
fn signs_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    signs_by_one(tile, x, acc, dot);
}

/// Adds the products of 64 codes and activations to four lanes.
#[inline(always)]
fn dot(sum: v128, codes: &Fields, x: &Fields) -> v128 {
    let products = codes.iter().zip(x);
    products.fold(sum, |sum, (&codes, &x)| i32x4_relaxed_dot_i8x16_i7x16_add(x, codes, sum))
}
