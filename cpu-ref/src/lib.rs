//! The executable specification of Sterna's kernels.
//!
//! Every kernel of the forward pass is written here once more as the obvious loop over plain
//! slices: ternary weights as `i8` in {−1, 0, +1}, quantised activations as `i8`, everything else
//! as `f32`. No packing tricks, no dependencies, no `unsafe`. The SIMD and GPU backends are judged
//! against these functions: integers must be equal, floats stay within a bound stated beside the
//! kernel that is judged.
//!
//! Everything that feeds the residual stream is f32 with a fixed order of operations ([`reduce`],
//! [`exp`]), so that a backend on hardware with IEEE arithmetic can give the same bits; the order
//! is part of the specification.
//!
//! Dimensions, everywhere: **M** tokens, **N** output features, **K** input features, with
//! `y[M,N] = x[M,K] · W[N,K]ᵀ`, row-major, last axis contiguous. H query heads, G key/value heads,
//! D head dimension, S cached positions, V vocabulary.
//!
//! Lengths that do not match the stated shapes are a caller's mistake and panic.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod argmax;
pub mod attention;
pub mod embedding;
pub mod exp;
pub mod gemm;
pub mod gemv;
pub mod group_gemv;
pub mod hadamard;
pub mod head_int8;
pub mod kv;
pub mod layout;
pub mod lm_head;
pub mod mlp;
pub mod quantize_absmax;
pub mod reduce;
pub mod residual;
pub mod rmsnorm;
pub mod rope;
pub mod sample;
pub mod ternarize_absmean;
