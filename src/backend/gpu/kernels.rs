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
/// Lanes of `quantize_absmax_groups`: a group is at least as long.
const GROUP_QUANTIZE_LANES: usize = 64;
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

/// How a matrix with one scale is multiplied: chosen for each by name of adapter, or by measuring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemvPlan {
    /// Layout and arithmetic, for one token and for many.
    pub variant: Variant,
    /// Slices of K in the workgroup of a GEMV: 32 lanes each.
    pub slices: usize,
    /// Whether a step for one token is one dispatch; else norm, quantisation, matrix and what comes
    /// after are one each.
    pub fused: bool,
}

impl From<Variant> for GemvPlan {
    /// The variant as it runs within WebGPU's default limits.
    fn from(variant: Variant) -> Self {
        Self { variant, slices: SLICES, fused: true }
    }
}

/// A matrix with scales of groups of inputs, as its kernels see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupMatrix {
    /// `[N, K]`.
    pub shape: MatShape,
    /// Inputs a scale: a multiple of 64 that divides K.
    pub group: usize,
    /// Whether the weights lie in the layout `signs`; else in `planes`.
    pub binary: bool,
}

/// Longest group of [`quantize_absmax_groups`].
pub const MAX_INT8_GROUP: usize = 256;

impl GroupMatrix {
    /// Scales a row.
    pub fn groups(self) -> usize {
        self.shape.k() / self.group
    }

    fn constants(self) -> [(&'static str, usize); 3] {
        let binary = usize::from(self.binary);
        [("K", self.shape.k()), ("GROUP", self.group), ("BINARY", binary)]
    }
}

/// Where a shard of a matrix writes its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowsOut {
    /// First row.
    pub base: usize,
    /// Rows.
    pub rows: usize,
    /// Words from one token's rows to the next's.
    pub stride: usize,
}

/// How many tokens a lane of a group kernel holds: 1 or 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokensPerLane {
    /// Decode.
    One,
    /// Prefill.
    Four,
}

impl TokensPerLane {
    fn count(self) -> u32 {
        match self {
            Self::One => 1,
            Self::Four => GEMM_TOKENS,
        }
    }
}

/// How the rows of a linear layer lie in the accumulator: `shared/bitlinear.wgsl`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearRows {
    /// N of each run of matrices that take the input in the same way, and whether its rows are f32
    /// or i32 sums to be scaled. At most [`Self::MAX_RUNS`].
    pub runs: Vec<(usize, bool)>,
    /// Words from one run's activation scales to the next's.
    pub act_stride: usize,
    /// The order of a single run's rows.
    pub order: RowOrder,
}

/// How the rows of matrices are ordered so that a workgroup of 32 rows has what belongs together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// One matrix after another.
    Natural,
    /// Q, K and V heads of so many rows: 16 rows of a head, then the 16 that RoPE pairs them with.
    Pairs(usize),
    /// 32 rows of gate, then the same 32 of up, which have so many rows each.
    GateUp(usize),
}

impl RowOrder {
    /// Rows of `n` rows, padding included.
    pub fn rows(self, n: usize) -> usize {
        match self {
            Self::Natural | Self::Pairs(_) => n,
            Self::GateUp(size) => 2 * padded_rows(size),
        }
    }

    /// Which row is at place `n`; `None` for one of padding.
    pub fn source(self, n: usize) -> Option<usize> {
        match self {
            Self::Natural => Some(n),
            Self::Pairs(dim) => {
                let (head, tile, lane) = (n / dim, n % dim / TILE_ROWS, n % TILE_ROWS);
                let i = 16 * tile + lane % 16;
                Some(head * dim + i + if lane < 16 { 0 } else { dim / 2 })
            }
            Self::GateUp(size) => {
                let (tile, lane) = (n / TILE_ROWS, n % TILE_ROWS);
                let row = tile / 2 * TILE_ROWS + lane;
                (row < size).then_some(row + if tile.is_multiple_of(2) { 0 } else { size })
            }
        }
    }
}

impl LinearRows {
    /// Most runs: query, key and value may each have an input of its own.
    pub const MAX_RUNS: usize = 3;

    /// `n` rows of one run, i32 sums.
    pub fn sums(n: usize) -> Self {
        Self { runs: vec![(n, false)], act_stride: 0, order: RowOrder::Natural }
    }

    /// `n` rows in f32.
    pub fn floats(n: usize) -> Self {
        Self { runs: vec![(n, true)], act_stride: 0, order: RowOrder::Natural }
    }

    /// Rows of the accumulator before run `index`: every run starts at a tile.
    pub fn first(&self, index: usize) -> usize {
        self.runs[..index].iter().map(|&(n, _)| padded_rows(n)).sum()
    }

    /// Rows of the accumulator.
    pub fn padded(&self) -> usize {
        self.first(self.runs.len())
    }

    /// The constants of the snippet.
    fn constants(&self) -> Vec<(&'static str, usize)> {
        assert!((1..=Self::MAX_RUNS).contains(&self.runs.len()));
        let runs = self.runs.iter().enumerate();
        let floats = runs.map(|(run, &(_, float))| usize::from(float) << run).sum();
        let mut constants = vec![("N_PAD", self.padded()), ("FLOAT_RUNS", floats)];
        if self.runs.len() > 1 {
            constants.push(("ACT_STRIDE", self.act_stride));
        }
        match self.order {
            RowOrder::Natural => {}
            RowOrder::Pairs(size) => constants.extend([("ORDER", 1), ("ORDER_SIZE", size)]),
            RowOrder::GateUp(size) => constants.extend([("ORDER", 2), ("ORDER_SIZE", size)]),
        }
        let names = [("RUN_1", "RUN_1_PAD"), ("RUN_2", "RUN_2_PAD")];
        for (run, (row, pad)) in (1..self.runs.len()).zip(names) {
            let n = self.runs[..run].iter().map(|&(n, _)| n).sum();
            constants.extend([(row, n), (pad, self.first(run) - n)]);
        }
        constants
    }
}

/// Elements of a table and how they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenseFormat {
    /// bfloat16, 8 a unit.
    Bf16,
    /// IEEE half, 8 a unit.
    F16,
    /// IEEE single, 4 a unit.
    F32,
    /// int8 codes, 16 a unit.
    Codes {
        /// Codes a scale, a multiple of 16.
        group: usize,
        /// Whether groups have a minimum.
        has_min: bool,
    },
}

impl DenseFormat {
    /// 16-byte units of a row of `k` elements.
    pub fn units(self, k: usize) -> usize {
        k.div_ceil(match self {
            Self::Bf16 | Self::F16 => 8,
            Self::F32 => 4,
            Self::Codes { .. } => 16,
        })
    }

    fn constants(self) -> [(&'static str, usize); 3] {
        let (format, group, has_min) = match self {
            Self::Bf16 => (0, 32, false),
            Self::F16 => (1, 32, false),
            Self::F32 => (2, 32, false),
            Self::Codes { group, has_min } => (3, group, has_min),
        };
        [("FORMAT", format), ("GROUP", group), ("HAS_MIN", usize::from(has_min))]
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

fn call(
    kernel: Kernel,
    constants: impl IntoIterator<Item = (&'static str, usize)>,
    x: usize,
    y: Rows,
) -> Call {
    let constants = constants.into_iter().map(|(name, value)| (name, value as f64)).collect();
    // A grid past u32 is past every adapter's limit: `Gpu::op` refuses it.
    Call { kernel, constants, x: u32::try_from(x).unwrap_or(u32::MAX), y }
}

/// tokens, table, scale, min, out.
pub fn embedding(shard: DenseShard) -> Call {
    let units = shard.format.units(shard.k);
    let constants = [
        ("WG", ELEMENT_LANES),
        ("K", shard.k),
        ("UNITS", units),
        ("ROW_BASE", shard.base),
        ("ROWS", shard.rows),
    ];
    let constants = constants.into_iter().chain(shard.format.constants());
    call(shader::EMBEDDING, constants, units.div_ceil(ELEMENT_LANES), Rows::Tokens)
}

/// tokens, w, scales, out; of rows `base..base + rows`, whole tiles but the last.
pub fn group_embedding(matrix: GroupMatrix, base: usize, rows: usize) -> Call {
    let constants = [("WG", ELEMENT_LANES), ("ROW_BASE", base), ("ROWS", rows)];
    let constants = constants.into_iter().chain(matrix.constants());
    let x = matrix.shape.k().div_ceil(ELEMENT_LANES);
    call(shader::GROUP_EMBEDDING, constants, x, Rows::Tokens)
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

/// x, codes, act_scale.
pub fn quantize_absmax_groups(k: usize, group: usize) -> Call {
    let constants = [("WG", GROUP_QUANTIZE_LANES), ("K", k), ("GROUP", group)];
    call(shader::QUANTIZE_ABSMAX_GROUPS, constants, k / group, Rows::Tokens)
}

/// Largest block of [`hadamard`]: it fills a workgroup's memory.
pub const MAX_HADAMARD_BLOCK: usize = 4096;

/// Which way [`hadamard`] goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotate {
    /// A matrix's input: signs, then H.
    Input,
    /// The head's input, of the tokens whose logits are wanted.
    HeadInput,
    /// A row of the embedding back into its own basis: H, then signs.
    Back,
}

/// x, signs, y.
pub fn hadamard(k: usize, block: usize, rotate: Rotate) -> Call {
    let (rows, logit_rows) = match rotate {
        Rotate::HeadInput => (Rows::LogitRows, 1),
        Rotate::Input | Rotate::Back => (Rows::Tokens, 0),
    };
    let back = usize::from(rotate == Rotate::Back);
    let constants = [("K", k), ("BLOCK", block), ("BACK", back), ("LOGIT_ROWS", logit_rows)];
    let mut call = call(shader::HADAMARD, constants, k / block, rows);
    call.constants.push(("FACTOR", f64::from(cpu_ref::hadamard::inv_sqrt(block))));
    call
}

/// w, x, offset, \[code_sum,\] acc; of tiles `tile_base..tile_base + tiles`.
pub fn gemv(plan: GemvPlan, shape: MatShape, tile_base: usize, tiles: usize) -> Call {
    let constants = [("S", plan.slices), ("KC", k_chunks(shape.k())), ("TILE_BASE", tile_base)];
    call(plan.variant.gemv(), constants, tiles, Rows::One)
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

/// w, scales, x, y; of the shard of whole tiles that `out` says.
pub fn group_gemv(
    matrix: GroupMatrix,
    out: RowsOut,
    tokens: TokensPerLane,
    logit_rows: bool,
) -> Call {
    let constants = group_constants(matrix, out, tokens);
    let constants = constants.chain([("LOGIT_ROWS", usize::from(logit_rows))]);
    let rows = if logit_rows {
        Rows::LogitRowTiles(tokens.count())
    } else {
        Rows::TokenTiles(tokens.count())
    };
    call(shader::GROUP_GEMV, constants, out.rows.div_ceil(TILE_ROWS), rows)
}

/// w, scales, x, act_scale, y; of the shard of whole tiles that `out` says.
pub fn group_gemv_int8(matrix: GroupMatrix, out: RowsOut, tokens: TokensPerLane) -> Call {
    let constants = group_constants(matrix, out, tokens);
    let x = out.rows.div_ceil(TILE_ROWS);
    call(shader::GROUP_GEMV_INT8, constants, x, Rows::TokenTiles(tokens.count()))
}

// The slices of `group_gemv_int8` are the lanes of its sum.
const _: () = assert!(SLICES == cpu_ref::reduce::GROUP_LANES);

fn group_constants(
    matrix: GroupMatrix,
    out: RowsOut,
    tokens: TokensPerLane,
) -> impl Iterator<Item = (&'static str, usize)> {
    let constants = [
        ("S", SLICES),
        ("TOKENS", tokens.count() as usize),
        ("ROW_BASE", out.base),
        ("ROWS", out.rows),
        ("STRIDE", out.stride),
    ];
    constants.into_iter().chain(matrix.constants())
}

/// acc, weight_scale, act_scale, query_norm, key_norm, y: rows of Q, K and V heads, padded to whole
/// tiles.
pub fn head_norm(heads: Heads, eps: f32, rows: &LinearRows) -> Call {
    let all = heads.query + 2 * heads.kv;
    let constants = [
        ("OUT", padded_rows(all * heads.dim)),
        ("HEADS", heads.query),
        ("KV_HEADS", heads.kv),
        ("DIM", heads.dim),
    ];
    let constants = constants.into_iter().chain(rows.constants());
    let mut call = call(shader::HEAD_NORM, constants, all, Rows::Tokens);
    call.constants.push(("EPS", f64::from(eps)));
    call
}

/// acc, weight_scale, act_scale, angles, query, keys, values.
pub fn rope(heads: Heads, rows: &LinearRows) -> Call {
    let all = heads.query + 2 * heads.kv;
    let constants =
        [("WG", ELEMENT_LANES), ("HEADS", heads.query), ("KV_HEADS", heads.kv), ("DIM", heads.dim)];
    let constants = constants.into_iter().chain(rows.constants());
    let pairs = all * heads.dim / 2;
    call(shader::ROPE, constants, pairs.div_ceil(ELEMENT_LANES), Rows::Tokens)
}

/// A linear layer's step in one dispatch: what all of them share.
#[derive(Debug, Clone, Copy)]
pub struct Fused {
    /// How the matrix is multiplied.
    pub plan: GemvPlan,
    /// K.
    pub k: usize,
    /// eps of the norm before it; `None` if there is no norm.
    pub norm: Option<f32>,
    /// First tile of the shard, and how many.
    pub tiles: (usize, usize),
}

impl Fused {
    /// Most columns: the codes of a token and the scratch of reductions fit the 16 KiB of
    /// workgroup memory that WebGPU promises.
    pub const MAX_K: usize = 14_000;
    const _FITS: () = assert!(Self::MAX_K.next_multiple_of(64) + 2176 <= 16 << 10);

    fn call(
        self,
        kernel: Kernel,
        constants: impl IntoIterator<Item = (&'static str, usize)>,
        tiles_a_workgroup: usize,
    ) -> Call {
        let planes = usize::from(self.plan.variant == Variant::BitSerial);
        let shared = [
            ("K", self.k),
            ("KC", k_chunks(self.k)),
            ("UNITS", 4 * k_chunks(self.k)),
            ("PLANES", planes),
            ("NORM", usize::from(self.norm.is_some())),
            ("TILE_BASE", self.tiles.0),
        ];
        let constants = shared.into_iter().chain(constants);
        let mut call = call(kernel, constants, self.tiles.1 / tiles_a_workgroup, Rows::One);
        call.constants.push(("EPS", f64::from(self.norm.unwrap_or_default())));
        call
    }

    /// w, x, norm, rows, angles, query, keys, values.
    pub fn qkv(self, heads: Heads) -> Call {
        let constants = [("HEADS", heads.query), ("KV_HEADS", heads.kv), ("DIM", heads.dim)];
        self.call(shader::FUSED_QKV, constants, 1)
    }

    /// w, x, norm, rows, z.
    pub fn gated(self, intermediate: usize, activation: Activation) -> Call {
        let constants = [("F", intermediate), ("ACT", act(activation))];
        self.call(shader::FUSED_GATED, constants, 2)
    }

    /// w, x, norm, rows, hidden, out.
    pub fn residual(self, n: usize) -> Call {
        self.call(shader::FUSED_RESIDUAL, [("N", n)], 1)
    }
}

/// The constant `ACT`.
fn act(activation: Activation) -> usize {
    match activation {
        Activation::Relu2 => 0,
        Activation::Silu => 1,
    }
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
pub fn gated_activation(intermediate: usize, activation: Activation, rows: &LinearRows) -> Call {
    let constants = [("WG", ELEMENT_LANES), ("F", intermediate), ("ACT", act(activation))];
    let constants = constants.into_iter().chain(rows.constants());
    let x = intermediate.div_ceil(ELEMENT_LANES);
    call(shader::GATED_ACTIVATION, constants, x, Rows::Tokens)
}

/// hidden, acc, weight_scale, act_scale, out.
pub fn residual_add(n: usize, rows: &LinearRows) -> Call {
    let constants = [("WG", ELEMENT_LANES), ("N", n)];
    let constants = constants.into_iter().chain(rows.constants());
    call(shader::RESIDUAL_ADD, constants, n.div_ceil(ELEMENT_LANES), Rows::Tokens)
}

/// x, table, scale, min, logits.
pub fn lm_head(shard: DenseShard, vocab_size: usize) -> Call {
    let constants = [
        ("K", shard.k),
        ("UNITS", shard.format.units(shard.k)),
        ("ROW_BASE", shard.base),
        ("ROWS", shard.rows),
        ("V", vocab_size),
    ];
    let constants = constants.into_iter().chain(shard.format.constants());
    call(shader::LM_HEAD, constants, shard.rows.div_ceil(HEAD_ROWS), Rows::LogitRows)
}

/// logits, token.
pub fn argmax(vocab_size: usize) -> Call {
    call(shader::ARGMAX, [("V", vocab_size)], 1, Rows::One)
}

/// Largest vocabulary of [`sample`]: the sums of weights have room for it.
pub const MAX_SAMPLE_VOCAB: usize = 1 << 19;

/// Tokens of which [`sample_blocks`] notes the maximum.
const SAMPLE_BLOCK: usize = 256;
/// Tokens of a workgroup of [`sample_weights`].
const SAMPLE_CHUNK: usize = 1024;

/// Words of the buffers between the kernels that choose a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleLens {
    /// Of `bits` and of `weights`.
    pub vocab: usize,
    /// Of `block_max`.
    pub block_max: usize,
    /// Of `levels`.
    pub levels: usize,
    /// Of `seen`: a bit a token.
    pub seen: usize,
}

impl SampleLens {
    /// Those of a vocabulary.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            vocab: vocab_size,
            block_max: vocab_size.div_ceil(SAMPLE_BLOCK),
            levels: 18 + 50 * vocab_size.div_ceil(SAMPLE_CHUNK),
            seen: vocab_size.div_ceil(32),
        }
    }
}

/// logits, seen, bits, block_max.
pub fn sample_blocks(vocab_size: usize) -> Call {
    let x = vocab_size.div_ceil(SAMPLE_BLOCK);
    call(shader::SAMPLE_BLOCKS, [("V", vocab_size)], x, Rows::One)
}

/// bits, block_max, weights, levels.
pub fn sample_weights(vocab_size: usize) -> Call {
    let x = vocab_size.div_ceil(SAMPLE_CHUNK);
    call(shader::SAMPLE_WEIGHTS, [("V", vocab_size)], x, Rows::One)
}

/// bits, block_max, weights, levels, uniforms, seen, token; one draw, by the random number of the
/// pass: `uniforms` is not read. Whether the token is one is for the caller to see: it is `u32::MAX`
/// of logits that allow none.
///
/// # Panics
/// If the vocabulary is larger than [`MAX_SAMPLE_VOCAB`].
pub fn sample(vocab_size: usize) -> Call {
    assert!(vocab_size <= MAX_SAMPLE_VOCAB, "{vocab_size} tokens");
    call(shader::SAMPLE, [("V", vocab_size)], 1, Rows::One)
}

/// The same with one draw for each of `n_tokens`, by the numbers of `uniforms`: how distributions
/// are tested.
///
/// # Panics
/// As [`sample`].
pub fn sample_draws(vocab_size: usize) -> Call {
    let mut call = sample(vocab_size);
    call.constants.push(("UNIFORMS", 1.0));
    Call { y: Rows::Tokens, ..call }
}
