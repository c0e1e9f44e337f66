//! NEON, with and without the dot-product extension.
//!
//! ```text
//! for each tile row n, chunk c, field j: acc[n] += Σ_b code[n,c,b,j] · x[64c + 16j + b]
//! ```
//!
//! A register holds one row's 16 bytes. With the extension, `sdot` multiplies 16 codes (0..=2, so
//! signed will do) by 16 activations and adds them into 4 i32 lanes. Without it, `smull` and
//! `smlal` multiply into 8 i16 lanes, which widen to i32 after every chunk.
#![expect(unsafe_code, reason = "loads, an instruction, and entry into target features")]

use std::arch::aarch64::*;

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS};

use super::{Activations, CHUNK_WORDS};

/// Rows that one pass sums.
const PASS_ROWS: usize = 8;
/// Passes of a tile.
const PASSES: usize = TILE_ROWS / PASS_ROWS;

/// Adds `Σ_j code_j · x_j` of one row and chunk to the row's lanes.
type AddPiece = fn(int32x4_t, uint8x16_t, &[int8x16_t; 4]) -> int32x4_t;

pub(super) use dotprod::NeonDotprod;
pub(super) use plain::Neon;

mod dotprod {
    use super::*;
    use crate::backend::simd::{Level, impl_kernels};

    /// The NEON level with dot products; exists only on a machine that has them.
    #[derive(Debug, Clone, Copy)]
    pub(in crate::backend::simd) struct NeonDotprod(());

    impl NeonDotprod {
        /// Whether this machine has NEON and its dot-product extension.
        pub(in crate::backend::simd) fn is_available() -> bool {
            std::arch::is_aarch64_feature_detected!("neon")
                && std::arch::is_aarch64_feature_detected!("dotprod")
        }

        /// The level's token; `None` if this machine does not run it.
        pub(in crate::backend::simd) fn new() -> Option<Self> {
            Self::is_available().then_some(Self(()))
        }
    }
}
