//! One typed function a kernel: shapes in, override constants and grid out.

use cpu_ref::attention::Heads;
use cpu_ref::layout::{TILE_ROWS, k_chunks};
use cpu_ref::mlp::Activation;

use super::record::{Call, Rows};
use super::shader::{self, Kernel};
use crate::layout::Layout;
use crate::shape::MatShape;

/// Lanes of the element-wise kernels.
const ELEMENT_LANES: usize = 64;
/// Slices of K in a GEMV or GEMM workgroup: 8 × 32 rows is WebGPU's 256 invocations.
const SLICES: usize = 8;
/// Tokens a GEMM lane holds.
const GEMM_TOKENS: u32 = 4;
/// Rows an `lm_head` workgroup computes.
const HEAD_ROWS: usize = 8;

/// How the ternary matrices are multiplied: a packed layout and the kernels that read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// `gemv_planes`, `gemm_planes`: xor, and, popcount, add. The addition-only baseline.
    BitSerial,
    /// `gemv_i2`, `gemm_i2`: four products an instruction where the GPU has a packed dot.
    PackedDot,
}

impl Variant {
    /// Every variant.
    pub const ALL: [Self; 2] = [Self::BitSerial, Self::PackedDot];

    /// The layout of its weights.
    pub fn layout(self) -> Layout {
        match self {
            Self::BitSerial => Layout::Planes,
            Self::PackedDot => Layout::I2,
        }
    }

    /// Its kernel for one token.
    pub fn gemv(self) -> Kernel {
        match self {
            Self::BitSerial => shader::GEMV_PLANES,
            Self::PackedDot => shader::GEMV_I2,
        }
    }

    /// Its kernel for many tokens.
    pub fn gemm(self) -> Kernel {
        match self {
            Self::BitSerial => shader::GEMM_PLANES,
            Self::PackedDot => shader::GEMM_I2,
        }
    }

    /// Whether its kernels read the sum of the activation codes.
    pub fn needs_code_sum(self) -> bool {
        self == Self::PackedDot
    }
}

/// Elements of a dense table and how they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenseFormat {
    /// bfloat16, 8 a unit.
    Bf16 = 0,
    /// IEEE half, 8 a unit.
    F16 = 1,
    /// IEEE single, 4 a unit.
    F32 = 2,
}

impl DenseFormat {
    /// 16-byte units of a row of `k` elements.
    pub fn units(self, k: usize) -> usize {
        k.div_ceil(if self == Self::F32 { 4 } else { 8 })
    }
}

/// A shard of a dense table `[V, K]`: rows `base..base + rows`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenseShard {
    /// Element format.
    pub format: DenseFormat,
    /// K.
    pub k: usize,
    /// First row.
    pub base: usize,
    /// Rows.
    pub rows: usize,
}

/// Rows of an accumulator: N padded to whole tiles.
pub fn padded_rows(n: usize) -> usize {
    n.next_multiple_of(TILE_ROWS)
}

fn call<const C: usize>(
    kernel: Kernel,
    constants: [(&'static str, usize); C],
    x: usize,
    y: Rows,
) -> Call {
    let constants = constants.map(|(name, value)| (name, value as f64)).to_vec();
    // A grid past u32 is past every adapter's limit: `Gpu::op` refuses it.
    Call { kernel, constants, x: u32::try_from(x).unwrap_or(u32::MAX), y }
}

/// tokens, table, out.
pub fn embedding(shard: DenseShard) -> Call {
    let units = shard.format.units(shard.k);
    let constants = [
        ("WG", ELEMENT_LANES),
        ("K", shard.k),
        ("UNITS", units),
        ("ROW_BASE", shard.base),
        ("ROWS", shard.rows),
        ("FORMAT", shard.format as usize),
    ];
    call(shader::EMBEDDING, constants, units.div_ceil(ELEMENT_LANES), Rows::Tokens)
}

/// x, w, y; of all tokens, or of those whose logits are wanted.
pub fn rmsnorm(k: usize, eps: f32, logit_rows: bool) -> Call {
    let rows = if logit_rows { Rows::LogitRows } else { Rows::Tokens };
    let mut call =
        call(shader::RMSNORM, [("K", k), ("LOGIT_ROWS", usize::from(logit_rows))], 1, rows);
    call.constants.push(("EPS", f64::from(eps)));
    call
}

/// x, codes, act_scale, code_sum.
pub fn quantize_absmax(k: usize, variant: Variant) -> Call {
    let planes = usize::from(variant == Variant::BitSerial);
    let constants = [("K", k), ("KC", k_chunks(k)), ("PLANES", planes)];
    call(shader::QUANTIZE_ABSMAX, constants, 1, Rows::Tokens)
}

/// w, x, offset, \[code_sum,\] acc; of tiles `tile_base..tile_base + tiles`.
pub fn gemv(variant: Variant, shape: MatShape, tile_base: usize, tiles: usize) -> Call {
    let constants = [("S", SLICES), ("KC", k_chunks(shape.k())), ("TILE_BASE", tile_base)];
    call(variant.gemv(), constants, tiles, Rows::One)
}

/// w, x, offset, \[code_sum,\] acc; of tiles `tile_base..tile_base + tiles`.
pub fn gemm(variant: Variant, shape: MatShape, tile_base: usize, tiles: usize) -> Call {
    let constants = [
        ("S", SLICES),
        ("KC", k_chunks(shape.k())),
        ("N_PAD", padded_rows(shape.n())),
        ("TILE_BASE", tile_base),
    ];
    call(variant.gemm(), constants, tiles, Rows::TokenTiles(GEMM_TOKENS))
}

/// acc, weight_scale, act_scale, angles, query, keys, values.
pub fn rope(heads: Heads) -> Call {
    let all = heads.query + 2 * heads.kv;
    let constants = [
        ("WG", ELEMENT_LANES),
        ("N_PAD", padded_rows(all * heads.dim)),
        ("HEADS", heads.query),
        ("KV_HEADS", heads.kv),
        ("DIM", heads.dim),
    ];
    let pairs = all * heads.dim / 2;
    call(shader::ROPE, constants, pairs.div_ceil(ELEMENT_LANES), Rows::Tokens)
}

/// Largest head dimension of [`attention`].
pub const MAX_HEAD_DIM: usize = 256;

/// query, keys, values, out.
pub fn attention(heads: Heads) -> Call {
    let constants = [("HEADS", heads.query), ("KV_HEADS", heads.kv), ("DIM", heads.dim)];
    let mut call = call(shader::ATTENTION, constants, heads.query, Rows::Tokens);
    let inv_sqrt_dim = cpu_ref::attention::inv_sqrt_dim(heads.dim);
    call.constants.push(("INV_SQRT_DIM", f64::from(inv_sqrt_dim)));
    call
}

/// acc, weight_scale, act_scale, z.
pub fn gated_activation(intermediate: usize, activation: Activation) -> Call {
    let act = match activation {
        Activation::Relu2 => 0,
        Activation::Silu => 1,
    };
    let constants = [
        ("WG", ELEMENT_LANES),
        ("N_PAD", padded_rows(2 * intermediate)),
        ("F", intermediate),
        ("ACT", act),
    ];
    let x = intermediate.div_ceil(ELEMENT_LANES);
    call(shader::GATED_ACTIVATION, constants, x, Rows::Tokens)
}

/// hidden, acc, weight_scale, act_scale, out.
pub fn residual_add(n: usize) -> Call {
    let constants = [("WG", ELEMENT_LANES), ("N", n), ("N_PAD", padded_rows(n))];
    call(shader::RESIDUAL_ADD, constants, n.div_ceil(ELEMENT_LANES), Rows::Tokens)
}

/// x, table, logits.
pub fn lm_head(shard: DenseShard, vocab_size: usize) -> Call {
    let constants = [
        ("K", shard.k),
        ("UNITS", shard.format.units(shard.k)),
        ("ROW_BASE", shard.base),
        ("ROWS", shard.rows),
        ("V", vocab_size),
        ("FORMAT", shard.format as usize),
    ];
    call(shader::LM_HEAD, constants, shard.rows.div_ceil(HEAD_ROWS), Rows::LogitRows)
}

/// logits, token.
pub fn argmax(vocab_size: usize) -> Call {
    call(shader::ARGMAX, [("V", vocab_size)], 1, Rows::One)
}
