//! One typed function a kernel: shapes in, override constants and grid out.

use std::ops::Range;

use cpu_ref::attention::Heads;
use cpu_ref::head_int8::{gamma, half_sqrt};
use cpu_ref::layout::{CHUNK_K, TILE_ROWS, int8_rows, k_chunks};
use cpu_ref::mlp::Activation;
use cpu_ref::reduce::DOT_LANES;

use super::buffer::Slice;
use super::device::{AdapterDescription, Cooperative, Gpu};
use super::record::{Call, Rows, WeightsRead};
use super::shader::{self, Kernel};
use crate::error::{Error, Result};
use crate::kv_cache::{BLOCK, KvFormat};
use crate::layout::Layout;
use crate::shape::MatShape;

/// Lanes of the element-wise kernels.
const ELEMENT_LANES: usize = 64;
/// Slices of K in a workgroup that has no plan: 8 × 32 rows is WebGPU's 256 invocations.
const SLICES: usize = 8;
/// Tokens that a lane of `group_gemv` holds in a prompt.
const GROUP_TOKENS: u32 = 4;
/// Lanes of `quantize_absmax_groups`: a group is at least as long.
const GROUP_QUANTIZE_LANES: usize = 64;
/// Most columns of a matrix with one scale: no lane's sum, and no row's, passes 32 bits, and as f32 every
/// sum of products, of up to 128 each, is exact up to 2^24.
pub const MAX_K: usize = 131_072;
/// Workgroup memory that WebGPU promises.
const WORKGROUP_BYTES: usize = 16 << 10;
/// Rows an `lm_head` workgroup computes.
const HEAD_ROWS: usize = 8;
/// Rows a `head_rerank` workgroup looks for candidates.
const RERANK_ROWS: usize = 256;

/// How the ternary matrices are multiplied: a packed layout and the kernels that read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// `gemv_planes`: xor, and, popcount, add. The addition-only baseline.
    BitSerial,
    /// `gemv_i2`: four products an instruction where the GPU has a packed dot.
    PackedDot,
    /// `gemv_i2_signed`: the same with signed codes.
    SignedDot,
    /// `gemv_i2_half`: exact f32 products, for GPUs that emulate the packed dot.
    HalfMagic,
}

impl Variant {
    /// Every variant.
    pub const ALL: [Self; 4] = [Self::BitSerial, Self::PackedDot, Self::SignedDot, Self::HalfMagic];

    /// The layout of its weights.
    pub fn layout(self) -> Layout {
        match self {
            Self::BitSerial => Layout::Planes,
            Self::PackedDot | Self::SignedDot | Self::HalfMagic => Layout::I2,
        }
    }

    /// Its kernel for one token.
    pub fn gemv(self) -> Kernel {
        match self {
            Self::BitSerial => shader::GEMV_PLANES,
            Self::PackedDot => shader::GEMV_I2,
            Self::SignedDot => shader::GEMV_I2_SIGNED,
            Self::HalfMagic => shader::GEMV_I2_HALF,
        }
    }

    /// How its kernel for one token reads activations.
    pub fn gemv_encoding(self) -> Encoding {
        match self {
            Self::BitSerial => Encoding::Planes,
            Self::PackedDot => Encoding::Biased,
            Self::SignedDot => Encoding::Signed,
            Self::HalfMagic => Encoding::Halves,
        }
    }

    /// The inputs of its kernel for one token, in the order of the bindings.
    pub fn gemv_inputs(self, inputs: SumInputs<'_>) -> Vec<&Slice> {
        let SumInputs { words, codes, offset, code_sum } = inputs;
        match self {
            Self::BitSerial => vec![words, codes, offset],
            Self::PackedDot => vec![words, codes, offset, code_sum],
            Self::SignedDot | Self::HalfMagic => vec![words, codes, code_sum],
        }
    }

    /// Most columns for which the sums are exact when a row is split into so many slices.
    pub fn max_k(self, slices: usize) -> usize {
        match self {
            Self::BitSerial | Self::PackedDot | Self::SignedDot => MAX_K,
            // The sum of 16 of a chunk's terms, each at most 128·(1 + 2/64), stays below 2^24 steps
            // of 1/64.
            Self::HalfMagic => MAX_K.min((1 << 24) / (16 * 128 * 66) * slices * CHUNK_K),
        }
    }
}

/// What the GEMV and GEMM kernels read, whichever of it.
#[derive(Debug, Clone, Copy)]
pub struct SumInputs<'a> {
    /// Packed weights.
    pub words: &'a Slice,
    /// Activation codes in the kernel's encoding.
    pub codes: &'a Slice,
    /// What the layout adds to each row.
    pub offset: &'a Slice,
    /// What the encoding subtracts from each token's sums.
    pub code_sum: &'a Slice,
}

/// How a token's activation codes lie: see `quantize_absmax.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Bytes q + 128.
    Biased,
    /// Bit planes.
    Planes,
    /// Bytes q.
    Signed,
    /// Pairs of f16 in the order of `shared/half_pairs.wgsl`.
    Halves,
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Self; 4] = [Self::Biased, Self::Planes, Self::Signed, Self::Halves];

    /// 32-bit words of a chunk of 64 codes.
    pub fn chunk_words(self) -> usize {
        match self {
            Self::Biased | Self::Planes | Self::Signed => 16,
            Self::Halves => 32,
        }
    }

    /// The constant `ENCODING`.
    pub fn constant(self) -> usize {
        match self {
            Self::Biased => 0,
            Self::Planes => 1,
            Self::Signed => 2,
            Self::Halves => 3,
        }
    }
}

/// How a matrix with one scale is multiplied: chosen for each by name of adapter, or by measuring.
///
/// Every combination of the values below is legal if `rows · slices` lanes are within the adapter's
/// limits, and gives the same sums. A step with more than [`Self::max_fused_k`] columns is not fused
/// whatever `fused` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GemvPlan {
    /// Layout and arithmetic.
    pub variant: Variant,
    /// Slices of K in a workgroup, of `rows` lanes each: one of [`Self::SLICES`].
    pub slices: usize,
    /// Rows of a workgroup: one of [`Self::ROWS`]. Half tiles make twice the workgroups.
    pub rows: usize,
    /// Loads of 16 bytes that a lane has in flight: one of [`Self::UNROLL`].
    pub unroll: usize,
    /// Whether a step for one token is one dispatch; else norm, quantisation, matrix and what comes
    /// after are one each.
    pub fused: bool,
}

impl From<Variant> for GemvPlan {
    /// The variant as it runs within WebGPU's default limits.
    fn from(variant: Variant) -> Self {
        Self { variant, slices: SLICES, rows: TILE_ROWS, unroll: 1, fused: true }
    }
}

impl GemvPlan {
    /// What `slices` may be.
    pub const SLICES: [usize; 3] = [4, 8, 16];
    /// What `rows` may be.
    pub const ROWS: [usize; 2] = [TILE_ROWS / 2, TILE_ROWS];
    /// What `unroll` may be.
    pub const UNROLL: [usize; 3] = [1, 2, 4];

    /// Lanes of a workgroup.
    pub fn lanes(self) -> usize {
        self.rows * self.slices
    }

    /// Whether this adapter can run the plan on a matrix of `k` columns, exactly.
    ///
    /// # Errors
    /// [`Error::Plan`] for values that no kernel has, [`Error::GpuLimit`] for a workgroup that is too
    /// large, [`Error::Dimension`] if sums of `k` products may not be exact.
    pub fn validate(self, gpu: &Gpu, k: usize) -> Result<()> {
        for (field, found, allowed) in [
            ("slices", self.slices, Self::SLICES.as_slice()),
            ("rows", self.rows, &Self::ROWS),
            ("unroll", self.unroll, &Self::UNROLL),
        ] {
            if !allowed.contains(&found) {
                return Err(Error::Plan { field, found, allowed });
            }
        }
        gpu.check_lanes(self.variant.gemv().name, self.lanes())?;
        let max = self.variant.max_k(self.slices);
        if k > max {
            let name = "columns of a matrix for this GEMV plan";
            return Err(Error::Dimension { name, found: k, max });
        }
        Ok(())
    }

    /// Most columns of a fused step: the codes of a token and the scratch of reductions fit the 16 KiB
    /// of workgroup memory that WebGPU promises.
    pub fn max_fused_k(self) -> usize {
        let rest = WORKGROUP_BYTES - 4 * self.scratch_words() - 4 * TILE_ROWS;
        rest / (4 * self.variant.gemv_encoding().chunk_words()) * CHUNK_K
    }

    /// Words that the reductions of a fused step take.
    fn scratch_words(self) -> usize {
        self.lanes().max(cpu_ref::reduce::NORM_LANES)
    }

    /// The constants of `shared/gemv_shape.wgsl`.
    ///
    /// # Panics
    /// If [`Self::validate`] refuses the plan.
    fn constants(self, k: usize, tile_base: usize) -> [(&'static str, usize); 6] {
        assert!(
            Self::SLICES.contains(&self.slices)
                && Self::ROWS.contains(&self.rows)
                && Self::UNROLL.contains(&self.unroll)
                && k <= self.variant.max_k(self.slices),
            "{self:?} for {k} columns was not validated"
        );
        [
            ("KC", k_chunks(k)),
            ("S", self.slices),
            ("ROWS", self.rows),
            ("LANES", self.lanes()),
            ("UNROLL", self.unroll),
            ("TILE_BASE", tile_base),
        ]
    }

    /// Workgroups of a shard of so many tiles.
    fn workgroups(self, tiles: usize) -> usize {
        tiles * (TILE_ROWS / self.rows)
    }
}

impl std::fmt::Display for GemvPlan {
    /// The kernel, whether it runs within a fused step or by itself, and what else is not as usual.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { variant, slices, rows, unroll, fused } = *self;
        let usual = Self::from(variant);
        write!(f, "{} ({}", variant.gemv().name, if fused { "fused" } else { "split" })?;
        if slices != usual.slices {
            write!(f, ", {slices} slices")?;
        }
        if rows != usual.rows {
            write!(f, ", {rows} rows")?;
        }
        if unroll != usual.unroll {
            write!(f, ", unroll {unroll}")?;
        }
        f.write_str(")")
    }
}

/// How a matrix with one scale is multiplied by many tokens: the kernels of its layout, `gemm_i2` or
/// `gemm_planes` and those of a few tokens, and the size of their tiles; or `gemm_i2_coop8` or
/// `gemm_i2_coop16`.
///
/// Every plan gives the same sums as every [`GemvPlan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GemmPlan {
    /// Rows of a workgroup.
    pub rows: usize,
    /// Tokens of a workgroup. `rows` and `tokens` are one of [`Self::TILES`], or of
    /// [`Self::COOPERATIVE_TILES`].
    pub tokens: usize,
    /// What multiplies weights of [`Layout::I2`]: the adapter's cooperative matrices, or each lane for
    /// itself.
    pub cooperative: Option<Cooperative>,
}

impl Default for GemmPlan {
    /// Enough workgroups for a large GPU, at the shapes of a small model.
    fn default() -> Self {
        Self::tile(64, 64)
    }
}

impl GemmPlan {
    /// The kernels of a few tokens, whatever there are: for GPUs whose workgroup memory is no faster
    /// than any other.
    pub const FEW: Self = Self::tile(TILE_ROWS, 8);

    /// Rows and tokens of a workgroup.
    pub const TILES: [(usize, usize); 4] = [(128, 64), (64, 64), (64, 32), (TILE_ROWS, 8)];

    /// Those of cooperative matrices.
    pub const COOPERATIVE_TILES: [(usize, usize); 2] = [(64, 64), (64, 32)];

    /// A plan without cooperative matrices.
    pub const fn tile(rows: usize, tokens: usize) -> Self {
        Self { rows, tokens, cooperative: None }
    }

    /// Every plan without cooperative matrices.
    pub fn all() -> [Self; Self::TILES.len()] {
        Self::TILES.map(|(rows, tokens)| Self::tile(rows, tokens))
    }

    /// Every plan with them.
    pub fn all_of(cooperative: Cooperative) -> [Self; Self::COOPERATIVE_TILES.len()] {
        let cooperative = Some(cooperative);
        Self::COOPERATIVE_TILES.map(|(rows, tokens)| Self { rows, tokens, cooperative })
    }

    /// Lanes of a workgroup: each holds 8 rows and 4 tokens; those of a few tokens hold one row; a
    /// subgroup holds eight cooperative matrices.
    pub fn lanes(self) -> usize {
        match self.cooperative {
            Some(matrices) => self.subgroups(matrices) * matrices.subgroup,
            None if self == Self::FEW => TILE_ROWS * SLICES,
            None => self.rows / 8 * (self.tokens / 4),
        }
    }

    /// Subgroups of a workgroup: see `shared/gemm_coop.wgsl`.
    fn subgroups(self, matrices: Cooperative) -> usize {
        self.rows / (4 * matrices.size) * (self.tokens / (2 * matrices.size))
    }

    /// Whether this adapter can run the plan on a matrix of `k` columns in this layout, exactly.
    ///
    /// # Errors
    /// [`Error::Plan`] for a tile that no kernel has, [`Error::Cooperative`] for cooperative matrices
    /// that this adapter does not have, [`Error::GpuLimit`] for a workgroup that is too large,
    /// [`Error::Dimension`] if sums of `k` products may not be exact.
    pub fn validate(self, gpu: &Gpu, layout: Layout, k: usize) -> Result<()> {
        let (all_rows, all_tokens, tiles): (&'static [_], &'static [_], &[_]) =
            match self.cooperative {
                None => (&[64, 128, TILE_ROWS], &[32, 64, 8], &Self::TILES),
                Some(_) => (&[64], &[32, 64], &Self::COOPERATIVE_TILES),
            };
        if !tiles.contains(&(self.rows, self.tokens)) {
            return Err(match all_rows.contains(&self.rows) {
                true => Error::Plan { field: "tokens", found: self.tokens, allowed: all_tokens },
                false => Error::Plan { field: "rows", found: self.rows, allowed: all_rows },
            });
        }
        if let Some(Cooperative { size, subgroup }) = self.cooperative {
            if layout != Layout::I2 {
                let field = "cooperative matrices for bit planes";
                return Err(Error::Plan { field, found: size, allowed: &[] });
            }
            if gpu.cooperative() != self.cooperative {
                let adapter = gpu.adapter.name.clone();
                let found = gpu.cooperative().map_or("none".to_owned(), |found| {
                    let Cooperative { size, subgroup } = found;
                    format!("{size}x{size} on {subgroup} lanes")
                });
                return Err(Error::Cooperative { adapter, size, subgroup, found });
            }
        }
        if k > MAX_K {
            let name = "columns of a matrix for this GEMM plan";
            return Err(Error::Dimension { name, found: k, max: MAX_K });
        }
        gpu.check_lanes(self.kernel(layout).name, self.lanes())
    }

    /// Its kernel for as many tokens as a tile has.
    ///
    /// # Panics
    /// For cooperative matrices with a layout or of a size that [`Self::validate`] refuses.
    pub fn kernel(self, layout: Layout) -> Kernel {
        match (layout, self.cooperative.map(|matrices| matrices.size)) {
            (Layout::Planes, None) if self == Self::FEW => shader::GEMM_PLANES_FEW,
            (Layout::Planes, None) => shader::GEMM_PLANES,
            (Layout::I2, None) if self == Self::FEW => shader::GEMM_I2_FEW,
            (Layout::I2, None) => shader::GEMM_I2,
            (Layout::I2, Some(8)) => shader::GEMM_I2_COOP8,
            (Layout::I2, Some(16)) => shader::GEMM_I2_COOP16,
            _ => panic!("{self:?} for {layout:?} was not validated"),
        }
    }
}

impl std::fmt::Display for GemmPlan {
    /// Rows and tokens of a workgroup, and of its cooperative matrices.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.rows, self.tokens)?;
        match self.cooperative {
            Some(Cooperative { size, .. }) => write!(f, " of {size}x{size}"),
            None => Ok(()),
        }
    }
}

/// How the kernels of many tokens read activations.
pub fn gemm_encoding(layout: Layout) -> Encoding {
    match layout {
        Layout::Planes => Encoding::Planes,
        Layout::I2 => Encoding::Biased,
    }
}

/// The inputs of a kernel of many tokens, in the order of the bindings.
///
/// # Panics
/// If it is another kernel.
pub fn gemm_inputs(kernel: Kernel, inputs: SumInputs<'_>) -> Vec<&Slice> {
    let SumInputs { words, codes, offset, code_sum } = inputs;
    match kernel {
        shader::GEMM_PLANES | shader::GEMM_PLANES_FEW => vec![words, codes, offset],
        shader::GEMM_I2 | shader::GEMM_I2_FEW => vec![words, codes, offset, code_sum],
        shader::GEMM_I2_COOP8 | shader::GEMM_I2_COOP16 => vec![words, codes],
        _ => panic!("{} is no kernel of many tokens", kernel.name),
    }
}

/// How a matrix with one scale is multiplied, by one token and by many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SumPlans {
    /// One token. Its variant's layout is that of the weights.
    pub gemv: GemvPlan,
    /// Many.
    pub gemm: GemmPlan,
}

impl From<GemvPlan> for SumPlans {
    /// With the usual tiles.
    fn from(gemv: GemvPlan) -> Self {
        Self { gemv, gemm: GemmPlan::default() }
    }
}

impl From<Variant> for SumPlans {
    /// The variant as it runs within WebGPU's default limits.
    fn from(variant: Variant) -> Self {
        GemvPlan::from(variant).into()
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
            Self::Four => GROUP_TOKENS,
        }
    }
}

/// How many rows of logits a lane of a head computes, for which it reads the table once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitTile {
    /// A token of a text.
    One,
    /// A short draft.
    Four,
    /// A long one, or all logits of a prompt.
    Eight,
}

impl LogitTile {
    /// Every one of them, smallest first.
    pub const ALL: [Self; 3] = [Self::One, Self::Four, Self::Eight];

    /// Rows of logits.
    pub fn count(self) -> u32 {
        match self {
            Self::One => 1,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// Those that passes of at most so many rows of logits need.
    pub fn up_to(rows: u32) -> &'static [Self] {
        const ALL: &[LogitTile] = &LogitTile::ALL;
        &ALL[..=Self::index_for(rows)]
    }

    /// Which of [`Self::ALL`] so many rows of logits are computed with: the smallest that holds them.
    pub fn index_for(rows: u32) -> usize {
        let last = Self::ALL.len() - 1;
        Self::ALL.iter().position(|tile| rows <= tile.count()).unwrap_or(last)
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
    let x = u32::try_from(x).unwrap_or(u32::MAX);
    let (words, weights) = (Vec::new(), WeightsRead::All);
    Call { kernel, constants, x, y, words, writes: 0, weights, cache_bytes: 0 }
}

impl Call {
    /// See [`Call::writes`].
    fn writing(self, writes: usize) -> Self {
        Self { writes, ..self }
    }

    /// Reads one of so many rows for each token, or row of logits.
    fn looking_up(self, rows: usize) -> Self {
        Self { weights: WeightsRead::RowOf(rows), ..self }
    }
}

/// Words of a shard of packed weights.
fn weight_words(k: usize, tiles: usize) -> usize {
    tiles * k_chunks(k) * TILE_ROWS * 4
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
        .writing(shard.k)
        .looking_up(shard.rows)
}

/// tokens, w, scales, out; of rows `base..base + rows`, whole tiles but the last.
pub fn group_embedding(matrix: GroupMatrix, base: usize, rows: usize) -> Call {
    let constants = [("WG", ELEMENT_LANES), ("ROW_BASE", base), ("ROWS", rows)];
    let constants = constants.into_iter().chain(matrix.constants());
    let x = matrix.shape.k().div_ceil(ELEMENT_LANES);
    call(shader::GROUP_EMBEDDING, constants, x, Rows::Tokens)
        .writing(matrix.shape.k())
        .looking_up(padded_rows(rows))
}

/// x, w, y; of all tokens, or of those whose logits are wanted.
pub fn rmsnorm(k: usize, eps: f32, logit_rows: bool) -> Call {
    let rows = if logit_rows { Rows::LogitRows } else { Rows::Tokens };
    let mut call =
        call(shader::RMSNORM, [("K", k), ("LOGIT_ROWS", usize::from(logit_rows))], 1, rows);
    call.constants.push(("EPS", f64::from(eps)));
    call.writing(k)
}

/// x, codes, act_scale, code_sum.
pub fn quantize_absmax(k: usize, encoding: Encoding) -> Call {
    // A maximum and a sum of integers are the same in any order. Few values keep few lanes busy.
    let lanes = if k <= 1024 { 64 } else { 256 };
    let constants =
        [("WG", lanes), ("K", k), ("KC", k_chunks(k)), ("ENCODING", encoding.constant())];
    call(shader::QUANTIZE_ABSMAX, constants, 1, Rows::Tokens)
        .writing(encoding.chunk_words() * k_chunks(k) + 2)
}

/// x, codes, act_scale.
pub fn quantize_absmax_groups(k: usize, group: usize) -> Call {
    let constants = [("WG", GROUP_QUANTIZE_LANES), ("K", k), ("GROUP", group)];
    call(shader::QUANTIZE_ABSMAX_GROUPS, constants, k / group, Rows::Tokens)
        .writing(k / 4 + k / group)
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
    call.writing(k)
}

/// [`Variant::gemv_inputs`], acc; of tiles `tile_base..tile_base + tiles`.
///
/// # Panics
/// If [`GemvPlan::validate`] refuses the plan.
pub fn gemv(plan: GemvPlan, shape: MatShape, tile_base: usize, tiles: usize) -> Call {
    let k = shape.k();
    let constants = plan.constants(k, tile_base);
    let mut call = call(plan.variant.gemv(), constants, plan.workgroups(tiles), Rows::One);
    let codes = plan.variant.gemv_encoding().chunk_words() * k_chunks(k);
    let (rows, acc) = (tiles * TILE_ROWS, (tile_base + tiles) * TILE_ROWS);
    call.words = match plan.variant {
        Variant::BitSerial => vec![weight_words(k, tiles), codes, rows, acc],
        Variant::PackedDot => vec![weight_words(k, tiles), codes, rows, 1, acc],
        Variant::SignedDot | Variant::HalfMagic => vec![weight_words(k, tiles), codes, 1, acc],
    };
    call.writing(tiles * TILE_ROWS)
}

/// A shard of a matrix as the kernels of many tokens see it.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// How the weights lie.
    pub layout: Layout,
    /// `[N, K]` of the accumulator's rows.
    pub shape: MatShape,
    /// First tile of the shard.
    pub tile_base: usize,
    /// Tiles.
    pub tiles: usize,
    /// Tokens that there is room for.
    pub max_tokens: usize,
}

impl Gemm {
    /// The calls for 2 tokens to as many as there is room for, each with the most tokens that it is
    /// for. Few tokens leave most of a tile empty, and too few workgroups.
    pub fn calls(self, plan: GemmPlan) -> Vec<(usize, Call)> {
        let mut calls = vec![(4, self.few(4))];
        if plan == GemmPlan::FEW {
            calls.push((usize::MAX, self.few(8)));
        } else {
            calls.extend([(plan.tokens / 2, self.few(8)), (usize::MAX, self.tiled(plan))]);
        }
        let needed = calls.iter().take_while(|(most, _)| *most < self.max_tokens).count() + 1;
        calls.truncate(needed);
        calls
    }

    /// The call for so many tokens.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn call_for(self, plan: GemmPlan, n_tokens: usize) -> Call {
        let mut calls = self.calls(plan).into_iter();
        calls.find(|(most, _)| n_tokens <= *most).expect("there is room for the tokens").1
    }

    /// [`gemm_inputs`], acc; of tokens four or eight at a time.
    ///
    /// # Panics
    /// If `tokens` is another number.
    pub fn few(self, tokens: usize) -> Call {
        assert!([4, 8].contains(&tokens), "{tokens} tokens a lane");
        let constants = [("S", SLICES), ("TOKENS", tokens)];
        self.call(GemmPlan::FEW.kernel(self.layout), constants, self.tiles, tokens)
    }

    /// [`gemm_inputs`], acc; in tiles of rows and tokens.
    ///
    /// # Panics
    /// If [`GemmPlan::validate`] refuses the plan, or it has no tiles.
    pub fn tiled(self, plan: GemmPlan) -> Call {
        let GemmPlan { rows, tokens, cooperative } = plan;
        let shard_rows = self.tiles * TILE_ROWS;
        let mut constants =
            vec![("ROWS", shard_rows), ("LANES", plan.lanes()), ("R", rows), ("T", tokens)];
        let tiles = match cooperative {
            Some(matrices) => {
                // Columns in workgroup memory, with padding: `shared/gemm_coop.wgsl`.
                const STRIDE: usize = 40;
                let size = matrices.size;
                constants.extend([
                    ("SUBGROUP", matrices.subgroup),
                    ("SUBS_R", rows / (4 * size)),
                    ("W_HALVES", STRIDE * rows),
                    ("X_HALVES", STRIDE * tokens),
                    ("SCRATCH", plan.subgroups(matrices) * size * size),
                ]);
                GemmPlan::COOPERATIVE_TILES.as_slice()
            }
            None => {
                constants.extend([
                    ("LANES_R", rows / 8),
                    ("LANES_T", tokens / 4),
                    ("X_UNITS", 4 * (tokens + 1)),
                ]);
                constants.extend((self.layout == Layout::I2).then_some(("W_UNITS", 4 * rows)));
                GemmPlan::TILES.as_slice()
            }
        };
        assert!(
            tiles.contains(&(rows, tokens)) && plan != GemmPlan::FEW,
            "{plan:?} was not validated"
        );
        self.call(plan.kernel(self.layout), constants, shard_rows.div_ceil(rows), tokens)
    }

    fn call(
        self,
        kernel: Kernel,
        constants: impl IntoIterator<Item = (&'static str, usize)>,
        x: usize,
        tokens: usize,
    ) -> Call {
        let Self { layout, shape, tile_base, tiles, max_tokens } = self;
        assert!(max_tokens > 0, "room for no token");
        let (k, n_pad) = (shape.k(), padded_rows(shape.n()));
        assert!(k <= MAX_K, "{k} columns were not validated");
        let shared = [
            ("KC", k_chunks(k)),
            ("N_PAD", n_pad),
            ("TILE_BASE", tile_base),
            ("MAX_TOKENS", max_tokens),
        ];
        let constants = shared.into_iter().chain(constants);
        let mut call = call(kernel, constants, x, Rows::TokenTiles(tokens as u32));
        let codes = max_tokens * gemm_encoding(layout).chunk_words() * k_chunks(k);
        let acc = (max_tokens - 1) * n_pad + (tile_base + tiles) * TILE_ROWS;
        call.words = vec![weight_words(k, tiles), codes];
        // Cooperative matrices multiply the weights and codes themselves.
        if !shader::COOPERATIVE.contains(&kernel) {
            call.words.push(tiles * TILE_ROWS);
            call.words.extend((layout == Layout::I2).then_some(max_tokens));
        }
        call.words.push(acc);
        call.writing(tiles * TILE_ROWS)
    }
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
    call(shader::GROUP_GEMV, constants, out.rows.div_ceil(TILE_ROWS), rows).writing(out.rows)
}

/// w, scales, x, act_scale, y; of the shard of whole tiles that `out` says.
pub fn group_gemv_int8(matrix: GroupMatrix, out: RowsOut, tokens: TokensPerLane) -> Call {
    let constants = group_constants(matrix, out, tokens);
    let x = out.rows.div_ceil(TILE_ROWS);
    call(shader::GROUP_GEMV_INT8, constants, x, Rows::TokenTiles(tokens.count())).writing(out.rows)
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
    call.writing(all * heads.dim)
}

/// acc, weight_scale, act_scale, angles, query, new_keys, new_values.
pub fn rope(heads: Heads, rows: &LinearRows) -> Call {
    let all = heads.query + 2 * heads.kv;
    let constants =
        [("WG", ELEMENT_LANES), ("HEADS", heads.query), ("KV_HEADS", heads.kv), ("DIM", heads.dim)];
    let constants = constants.into_iter().chain(rows.constants());
    let pairs = all * heads.dim / 2;
    call(shader::ROPE, constants, pairs.div_ceil(ELEMENT_LANES), Rows::Tokens).writing(2 * pairs)
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
    /// The call with what its bindings must hold: w, x, norm, rows, then `after`.
    fn call<const N: usize>(
        self,
        kernel: Kernel,
        constants: impl IntoIterator<Item = (&'static str, usize)>,
        tiles: usize,
        after: [usize; N],
    ) -> Call {
        let Self { plan, k, .. } = self;
        assert!(k <= plan.max_fused_k(), "{k} columns in {plan:?}");
        let encoding = plan.variant.gemv_encoding();
        let shared = [
            ("K", k),
            ("UNITS", encoding.chunk_words() / 4 * k_chunks(k)),
            ("ENCODING", encoding.constant()),
            ("NORM", usize::from(self.norm.is_some())),
            ("SCRATCH", plan.scratch_words()),
        ];
        let shared = plan.constants(k, self.tiles.0).into_iter().chain(shared);
        let constants = shared.chain(constants);
        let mut call = call(kernel, constants, plan.workgroups(tiles), Rows::One);
        call.constants.push(("EPS", f64::from(self.norm.unwrap_or_default())));
        let n_tiles = self.tiles.1;
        let norm = if self.norm.is_some() { k } else { 0 };
        call.words = vec![weight_words(k, n_tiles), k, norm, 2 * TILE_ROWS * n_tiles];
        call.words.extend(after);
        call
    }

    /// w, x, norm, rows, angles, query, keys, values: into the cache, or new_keys and new_values of an
    /// int8 one.
    ///
    /// # Panics
    /// If heads are not whole tiles, or the plan does not take K.
    pub fn qkv(self, shard: KvShard) -> Call {
        let Heads { query, dim, .. } = shard.layout.heads;
        assert!(dim > 0 && dim.is_multiple_of(TILE_ROWS), "heads of {dim}");
        let is_staged = shard.layout.format == KvFormat::Int8;
        let constants = [("HEADS", query), ("STAGED", usize::from(is_staged))];
        let constants = constants.into_iter().chain(shard.constants());
        // The kernel asks for the lengths of the angles, the keys and the values itself.
        let after = [1, query * dim, 1, 1];
        // Every row of the tiles, which heads of whole tiles fill; of f16 two a word.
        let of_query = self.rows_of(query * dim, 1);
        let of_cache = self.tiles.1 * TILE_ROWS - of_query;
        let words = if is_staged { of_cache } else { of_cache >> shard.layout.shift() };
        self.call(shader::FUSED_QKV, constants, self.tiles.1, after).writing(of_query + words)
    }

    /// w, x, norm, rows, z.
    ///
    /// # Panics
    /// If the shard does not hold pairs of tiles, or the plan does not take K.
    pub fn gated(self, intermediate: usize, activation: Activation) -> Call {
        let (first, tiles) = self.tiles;
        assert!(first.is_multiple_of(2) && tiles.is_multiple_of(2), "{tiles} tiles from {first}");
        let constants = [("F", intermediate), ("ACT", act(activation))];
        let rows = self.rows_of(intermediate, 2);
        self.call(shader::FUSED_GATED, constants, tiles / 2, [intermediate]).writing(rows)
    }

    /// w, x, norm, rows, hidden, out.
    ///
    /// # Panics
    /// If the plan does not take K.
    pub fn residual(self, n: usize) -> Call {
        self.call(shader::FUSED_RESIDUAL, [("N", n)], self.tiles.1, [n, n])
            .writing(self.rows_of(n, 1))
    }

    /// How many of `n` rows of the output are this shard's, with so many tiles a tile of them.
    fn rows_of(self, n: usize, tiles_a_workgroup: usize) -> usize {
        let (first, count) = (self.tiles.0 / tiles_a_workgroup, self.tiles.1 / tiles_a_workgroup);
        n.min((first + count) * TILE_ROWS) - n.min(first * TILE_ROWS)
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

/// How a layer's KV cache lies on a GPU: `shared/kv_layout.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Heads of the layer.
    pub heads: Heads,
    /// How values are held.
    pub format: KvFormat,
}

impl KvLayout {
    /// The constant `KV`: the logarithm of the values a word.
    pub(super) fn shift(self) -> usize {
        match self.format {
            KvFormat::F32 => 0,
            KvFormat::F16 => 1,
            KvFormat::Int8 => 2,
        }
    }

    /// Units of 16 bytes of a head's key.
    pub fn key_units(self) -> usize {
        self.heads.dim.div_ceil(4 << self.shift())
    }

    /// Words of a head's value, in units of 16 bytes.
    pub fn value_words(self) -> usize {
        self.heads.dim.div_ceil(1 << self.shift()).next_multiple_of(4)
    }

    /// Words of a block's keys, values and scales.
    pub fn block_words(self) -> [usize; 3] {
        let scales = if self.format == KvFormat::Int8 { 2 } else { 0 };
        [4 * self.key_units(), self.value_words(), scales]
            .map(|words| BLOCK * self.heads.kv * words)
    }

    /// Bytes of a position.
    fn position_bytes(self) -> usize {
        self.block_words().iter().sum::<usize>() * 4 / BLOCK
    }
}

/// The blocks of a KV cache that a binding holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShard {
    /// How they lie.
    pub layout: KvLayout,
    /// First block.
    pub base: usize,
    /// How many there may be.
    pub blocks: usize,
}

impl KvShard {
    /// All blocks.
    pub fn whole(layout: KvLayout) -> Self {
        Self { layout, base: 0, blocks: u32::MAX as usize }
    }

    fn constants(self) -> [(&'static str, usize); 7] {
        let Self { layout, base, blocks } = self;
        [
            ("KV_HEADS", layout.heads.kv),
            ("DIM", layout.heads.dim),
            ("KV", layout.shift()),
            ("KEY_UNITS", layout.key_units()),
            ("VALUE_WORDS", layout.value_words()),
            ("BLOCK_BASE", base),
            ("SHARD_BLOCKS", blocks),
        ]
    }
}

/// new_keys, new_values, table, keys, values, scales.
pub fn kv_store(shard: KvShard) -> Call {
    let KvLayout { heads, .. } = shard.layout;
    let words = shard.layout.block_words().iter().sum::<usize>() / BLOCK;
    call(shader::KV_STORE, shard.constants(), heads.kv, Rows::Tokens).writing(words)
}

/// Rows of one token's queries in a workgroup of attention: `shared/attend_block.wgsl`.
#[derive(Debug, Clone, Copy)]
struct RowSets {
    /// Sets of 64 lanes.
    sets: usize,
    /// Rows of a set.
    rows: usize,
}

/// Steps of 16 dimensions that a dot product takes.
fn dot_steps(heads: Heads) -> usize {
    heads.dim.div_ceil(DOT_LANES)
}

impl RowSets {
    /// Most rows of a set: what registers hold.
    const MAX_ROWS: usize = 4;

    fn new(heads: Heads) -> Self {
        // Queries of the rows and a vector a lane fit 16 KiB.
        let units = Self::MAX_ROWS * 4 * dot_steps(heads) + BLOCK;
        let max_sets = if 4 * units * 16 <= WORKGROUP_BYTES { 4 } else { 2 };
        let ratio = heads.query / heads.kv;
        let sets = ratio.div_ceil(Self::MAX_ROWS);
        Self { sets: sets.min(max_sets), rows: ratio.div_ceil(sets) }
    }

    fn constants(self, shard: KvShard) -> Vec<(&'static str, usize)> {
        let KvLayout { heads, .. } = shard.layout;
        let steps = dot_steps(heads);
        let lane_dims = match shard.layout.format {
            KvFormat::F32 => heads.dim.div_ceil(64),
            KvFormat::F16 => 2 * heads.dim.div_ceil(128),
            KvFormat::Int8 => 4,
        };
        let mut constants = vec![
            ("HEADS", heads.query),
            ("SLOTS", self.sets),
            ("LANES", 64 * self.sets),
            ("QUERIES", self.rows),
            ("STEPS", steps),
            ("Q_UNITS", self.sets * self.rows * 4 * steps),
            ("LANE_DIMS", lane_dims),
        ];
        constants.extend(shard.constants());
        constants
    }
}

/// What [`attention_tile`] is shaped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TileFor {
    /// GPUs: one key a lane, which fits registers and makes many lanes.
    Gpu,
    /// llvmpipe, which loads one lane after another: up to four keys a lane, for the fewest loads.
    Cpu,
}

impl TileFor {
    /// What the adapter is. SwiftShader has no trouble with loads, and takes minutes to compile large
    /// shaders.
    pub fn adapter(adapter: &AdapterDescription) -> Self {
        if adapter.name.starts_with("llvmpipe") { Self::Cpu } else { Self::Gpu }
    }
}

/// Rows and keys of a workgroup of [`attention_tile`]: the constants of `attention_tile.wgsl`.
#[derive(Debug, Clone, Copy)]
struct RowTile {
    rows: usize,
    keys: usize,
    chunks: usize,
}

impl RowTile {
    fn new(heads: Heads, tile_for: TileFor) -> Self {
        let chunks = heads.dim.div_ceil(4).next_power_of_two();
        // Queries, and weights for each of 64 keys, fit 16 KiB.
        let rows = if heads.dim <= 128 { 16 } else { 8 };
        let keys = match tile_for {
            TileFor::Gpu => 1,
            // A lane has the values of at most four rows.
            TileFor::Cpu => (64 / chunks).min(4),
        };
        Self { rows, keys, chunks }
    }

    fn constants(self, shard: KvShard) -> Vec<(&'static str, usize)> {
        let KvLayout { heads, .. } = shard.layout;
        let Self { rows, keys, chunks } = self;
        let (key_lanes, row_lanes, steps) = (BLOCK / keys, 16 / keys, dot_steps(heads));
        let mut constants = vec![
            ("HEADS", heads.query),
            ("ROWS", rows),
            ("KEYS", keys),
            ("KEY_LANES", key_lanes),
            ("ROW_LANES", row_lanes),
            ("LANES", rows * row_lanes),
            ("STEPS", steps),
            ("Q_UNITS", rows * 4 * steps),
            ("S_UNITS", 16 * rows),
            ("SHARES", rows * row_lanes / 4),
            ("CHUNKS", chunks),
            ("LANE_ROWS", (4 * chunks / key_lanes).max(1)),
            ("VALUE_UNITS", shard.layout.value_words() / 4),
        ];
        constants.extend(shard.constants());
        constants
    }
}

/// A kernel of attention, with the buffers that are not the cache's, of at least so many words. The
/// shaders ask the others how many tokens and blocks there are.
fn attend_call(
    kernel: Kernel,
    shard: KvShard,
    constants: impl IntoIterator<Item = (&'static str, usize)>,
    (x, y): (usize, Rows),
    after: impl IntoIterator<Item = usize>,
) -> Call {
    let KvLayout { heads, .. } = shard.layout;
    let mut call = call(kernel, constants, x, y);
    let [keys, values, scales] = shard.layout.block_words();
    call.words = vec![heads.query * heads.dim, keys, values, scales.max(1), 1];
    call.words.extend(after);
    let inv_sqrt_dim = cpu_ref::attention::inv_sqrt_dim(heads.dim);
    call.constants.push(("INV_SQRT_DIM", f64::from(inv_sqrt_dim)));
    // Of all shards together: counted with the first.
    call.cache_bytes = if shard.base == 0 { shard.layout.position_bytes() } else { 0 };
    call
}

/// query, keys, values, scales, table, out: of one token.
pub fn attention(shard: KvShard) -> Call {
    let KvLayout { heads, .. } = shard.layout;
    let sets = RowSets::new(heads);
    let tiles = (heads.query / heads.kv).div_ceil(sets.sets * sets.rows);
    let (grid, out) = ((heads.kv * tiles, Rows::One), heads.query * heads.dim);
    attend_call(shader::ATTENTION, shard, sets.constants(shard), grid, [out]).writing(out)
}

/// query, keys, values, scales, table, state_in, out, state_out: of many tokens; the states are only
/// used in `parts`.
pub fn attention_tile(shard: KvShard, tile_for: TileFor, parts: bool) -> Call {
    let KvLayout { heads, .. } = shard.layout;
    let tile = RowTile::new(heads, tile_for);
    let y = Rows::HeadTiles { a_token: (heads.query / heads.kv) as u32, tile: tile.rows as u32 };
    let constants = tile.constants(shard).into_iter().chain([("PARTS", usize::from(parts))]);
    let (out, state) = (heads.query * heads.dim, if parts { partial_words(heads) } else { 1 });
    let after = [state, out, state];
    attend_call(shader::ATTENTION_TILE, shard, constants, (heads.kv, y), after).writing(out)
}

/// query, keys, values, scales, table, partials.
pub fn attention_blocks(shard: KvShard) -> Call {
    let KvLayout { heads, .. } = shard.layout;
    let sets = RowSets::new(heads);
    let tiles = (heads.query / heads.kv).div_ceil(sets.sets * sets.rows);
    let (grid, partials) = ((heads.kv * tiles, Rows::Blocks), partial_words(heads));
    attend_call(shader::ATTENTION_BLOCKS, shard, sets.constants(shard), grid, [partials])
        .writing(partials)
}

/// Words that a block gives to [`attention_merge`], or a token to the next part of [`attention_tile`].
pub fn partial_words(heads: Heads) -> usize {
    heads.query * (heads.dim + 2)
}

/// partials, out.
pub fn attention_merge(heads: Heads) -> Call {
    let constants = [("HEADS", heads.query), ("DIM", heads.dim)];
    let mut call = call(shader::ATTENTION_MERGE, constants, heads.query, Rows::One);
    let out = heads.query * heads.dim;
    call.words = vec![partial_words(heads), out];
    call.writing(out)
}

/// acc, weight_scale, act_scale, z.
pub fn gated_activation(intermediate: usize, activation: Activation, rows: &LinearRows) -> Call {
    let constants = [("WG", ELEMENT_LANES), ("F", intermediate), ("ACT", act(activation))];
    let constants = constants.into_iter().chain(rows.constants());
    let x = intermediate.div_ceil(ELEMENT_LANES);
    call(shader::GATED_ACTIVATION, constants, x, Rows::Tokens).writing(intermediate)
}

/// hidden, acc, weight_scale, act_scale, out.
pub fn residual_add(n: usize, rows: &LinearRows) -> Call {
    let constants = [("WG", ELEMENT_LANES), ("N", n)];
    let constants = constants.into_iter().chain(rows.constants());
    call(shader::RESIDUAL_ADD, constants, n.div_ceil(ELEMENT_LANES), Rows::Tokens).writing(n)
}

/// x, table, scale, min, logits.
pub fn lm_head(shard: DenseShard, vocab_size: usize, tile: LogitTile) -> Call {
    let constants = [
        ("TOKENS", tile.count() as usize),
        ("K", shard.k),
        ("UNITS", shard.format.units(shard.k)),
        ("ROW_BASE", shard.base),
        ("ROWS", shard.rows),
        ("V", vocab_size),
    ];
    let constants = constants.into_iter().chain(shard.format.constants());
    let rows = Rows::LogitRowTiles(tile.count());
    call(shader::LM_HEAD, constants, shard.rows.div_ceil(HEAD_ROWS), rows).writing(shard.rows)
}

/// logits, token: one for each row of logits.
pub fn argmax(vocab_size: usize) -> Call {
    call(shader::ARGMAX, [("V", vocab_size)], 1, Rows::LogitRows).writing(1)
}

/// x, norm, y, token; without an eps x is normalised already and norm is not read.
///
/// # Panics
/// If `k` is more than [`cpu_ref::head_int8::MAX_K`].
pub fn head_input(k: usize, eps: Option<f32>) -> Call {
    let chunks = int8_rows::chunks(k);
    let constants = [("K", k), ("CHUNKS", chunks), ("NORM", usize::from(eps.is_some()))];
    let mut call = call(shader::HEAD_INPUT, constants, 1, Rows::LogitRows);
    call.constants.push(("EPS", f64::from(eps.unwrap_or_default())));
    call.constants.push(("HALF_SQRT_K", f64::from(half_sqrt(k))));
    call.constants.push(("GAMMA", f64::from(gamma(k))));
    call.writing(k + 8 * chunks + 4)
}

/// table, token, seen, logits, bounds; of a head `[V, K]`, a shard of its tiles.
pub fn head_int8(shape: MatShape, tiles: Range<usize>, tile: LogitTile) -> Call {
    let tokens = tile.count() as usize;
    let constants = [
        ("TOKENS", tokens),
        ("PARTS", 256 * tokens),
        ("CHUNKS", int8_rows::chunks(shape.k())),
        ("TILE_BASE", tiles.start),
        ("TILES", shape.n().div_ceil(TILE_ROWS)),
        ("V", shape.n()),
    ];
    let rows = shape.n().min(tiles.end * TILE_ROWS) - tiles.start * TILE_ROWS;
    // A logit and an upper bound each, and a lower bound a tile.
    let writes = 2 * rows + tiles.len();
    let y = Rows::LogitRowTiles(tile.count());
    call(shader::HEAD_INT8, constants, tiles.len(), y).writing(writes)
}

/// Shards of the exact table that [`head_rerank`] takes at once.
pub const HEAD_TABLES: usize = 3;

/// Blocks of rows of one to three shards in a row, of which [`head_rerank`] finds the best.
pub fn head_blocks(shards: &[DenseShard]) -> usize {
    shards.iter().map(|shard| shard.rows).sum::<usize>().div_ceil(RERANK_ROWS)
}

/// x, bounds, seen, three tables, best; of one to three shards in a row of a float table, whose
/// workgroups write `best` from `block_base` on, of `all_blocks`.
///
/// # Panics
/// If there are other numbers of shards.
pub fn head_rerank(
    vocab_size: usize,
    shards: &[DenseShard],
    (block_base, all_blocks): (usize, usize),
) -> Call {
    assert!((1..=HEAD_TABLES).contains(&shards.len()));
    let (first, last) = (shards[0], shards[shards.len() - 1]);
    let rows = last.base + last.rows - first.base;
    let mut constants = vec![
        ("K", first.k),
        ("UNITS", first.format.units(first.k)),
        ("TILES", vocab_size.div_ceil(TILE_ROWS)),
        ("ROW_BASE", first.base),
        ("ROWS", rows),
        ("BLOCK_BASE", block_base),
        ("BLOCKS", all_blocks),
    ];
    let others = ["ROW_1", "ROW_2"].into_iter().zip(&shards[1..]);
    constants.extend(others.map(|(name, shard)| (name, shard.base - first.base)));
    let format = first.format.constants().into_iter().filter(|(name, _)| *name == "FORMAT");
    let constants = constants.into_iter().chain(format);
    // Of all tables that are bound, the last one in the place of those that are not there.
    let bound = (0..HEAD_TABLES).map(|i| shards[i.min(shards.len() - 1)].rows).sum();
    let blocks = head_blocks(shards);
    call(shader::HEAD_RERANK, constants, blocks, Rows::LogitRows)
        .writing(4 * blocks)
        .looking_up(bound)
}

/// best, tokens, counts, seen.
pub fn head_pick(vocab_size: usize, blocks: usize) -> Call {
    let constants = [("BLOCKS", blocks), ("SEEN", vocab_size.div_ceil(32))];
    call(shader::HEAD_PICK, constants, 1, Rows::LogitRows).writing(3)
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
    call(shader::SAMPLE_BLOCKS, [("V", vocab_size)], x, Rows::One).writing(vocab_size + x)
}

/// bits, block_max, weights, levels.
pub fn sample_weights(vocab_size: usize) -> Call {
    let x = vocab_size.div_ceil(SAMPLE_CHUNK);
    let writes = vocab_size + SampleLens::new(vocab_size).levels;
    call(shader::SAMPLE_WEIGHTS, [("V", vocab_size)], x, Rows::One).writing(writes)
}

/// bits, block_max, weights, levels, uniforms, seen, token; one draw, by the random number of the
/// pass: `uniforms` is not read. Whether the token is one is for the caller to see: it is `u32::MAX`
/// of logits that allow none.
///
/// # Panics
/// If the vocabulary is larger than [`MAX_SAMPLE_VOCAB`].
pub fn sample(vocab_size: usize) -> Call {
    assert!(vocab_size <= MAX_SAMPLE_VOCAB, "{vocab_size} tokens");
    call(shader::SAMPLE, [("V", vocab_size)], 1, Rows::One).writing(2)
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
