//! The exactness check that a variant must pass on an adapter before it may run a model there.

mod blocking;

pub use blocking::*;

use std::ops::Range;

use cpu_ref::attention::Cached;
use cpu_ref::group_gemv::{group_dot, group_dot_int8};
use cpu_ref::head_int8;
use cpu_ref::kv::store_head;
use cpu_ref::layout::{CHUNK_K, k_chunks};
use cpu_ref::sample::Sampling;

use super::cache::pack;
use super::head::{HeadInput, HeadOps, HeadStep, Int8Head, LOGIT_ROWS};
use super::kernels::{
    Encoding, Fused, Gemm, GemmPlan, GemvPlan, KvLayout, KvShard, LogitTile, RowOrder, SumInputs,
    SumPlans, TileFor, TokensPerLane, gemm_encoding, gemm_inputs,
};
use super::matrix::{
    GpuLinear, GpuMatrix, GpuTable, GpuTableData, HostLinear, HostMatrix, Kind, Method,
};
use super::record::Op;
use super::tune::{GemmPlans, Plans, Step};
use super::{Gpu, PassParams, Pipelines, Slice, kernels, row_offsets, shader};
use crate::backend::gpu::record::Call;
use crate::error::{Error, Result};
use crate::format::float::{f16_to_f32, f32_to_f16};
use crate::kv_cache::{BLOCK, KvFormat};
use crate::layout::{Layout, Packed};
use crate::random::Random;
use crate::shape::MatShape;
use crate::wait::block_on;
use crate::weights::{Alphabet, Table, TableData, TernaryMatrix};

/// The methods in use on an adapter: each is checked when the first matrix that needs it is met.
pub(super) struct Methods<'a> {
    gpu: &'a Gpu,
    sums: Sums,
    gemms: Gemms,
    /// Whether the group kernels with f32 and with int8 activations have passed.
    groups: [bool; 2],
}

/// Which plan each step's matrices get.
struct Sums {
    plans: Plans,
    passed: Vec<GemvPlan>,
    /// The plans that are wrong here, and how.
    refused: Vec<(GemvPlan, Error)>,
    /// By step: what passed for it, and that as it is used.
    chosen: [Option<GemvPlan>; 4],
    used: [Option<GemvPlan>; 4],
}

impl Sums {
    fn new(plans: Plans) -> Self {
        let (passed, refused) = (Vec::new(), Vec::new());
        Self { plans, passed, refused, chosen: [None; 4], used: [None; 4] }
    }

    /// The plan of a step's matrix that is exact here, as `check` says.
    async fn plan(
        &mut self,
        step: Step,
        can_fuse: impl Fn(GemvPlan) -> bool,
        check: impl AsyncFnMut(GemvPlan) -> Result<()>,
    ) -> Result<GemvPlan> {
        let at = step as usize;
        let plan = match self.chosen[at] {
            Some(plan) => plan,
            None => self.choose(at, check).await?,
        };
        self.chosen[at] = Some(plan);
        let plan = GemvPlan { fused: plan.fused && can_fuse(plan), ..plan };
        Ok(*self.used[at].insert(plan))
    }

    async fn choose(
        &mut self,
        at: usize,
        mut check: impl AsyncFnMut(GemvPlan) -> Result<()>,
    ) -> Result<GemvPlan> {
        let plans = match &self.plans {
            Plans::Asked(plan) => vec![*plan],
            Plans::Preferred(plans, variants) => {
                let others = variants.iter().copied().map(GemvPlan::from);
                [plans[at]].into_iter().chain(others).collect()
            }
        };
        for &plan in &plans {
            // The check of a fused plan runs the split kernels too.
            let fused = GemvPlan { fused: true, ..plan };
            if self.passed.contains(&plan) || self.passed.contains(&fused) {
                return Ok(plan);
            }
            if self.refused.iter().any(|(refused, _)| *refused == plan) {
                continue;
            }
            match check(plan).await {
                Ok(()) => {
                    self.passed.push(plan);
                    return Ok(plan);
                }
                Err(problem @ Error::SelfTest { .. }) => self.refused.push((plan, problem)),
                Err(error) => return Err(error),
            }
        }
        let (_, problem) = self.refused.pop().expect("there is a plan, and it was refused");
        Err(problem)
    }

    /// The plans in use, for people: with their steps where these differ.
    fn names(&self) -> Option<String> {
        let used = |step: &Step| self.used[*step as usize];
        let mut plans: Vec<GemvPlan> = Vec::new();
        for plan in Step::ALL.iter().filter_map(used) {
            if !plans.contains(&plan) {
                plans.push(plan);
            }
        }
        let name = |plan: &GemvPlan| {
            let steps = Step::ALL.into_iter().filter(|step| used(step) == Some(*plan));
            let steps = steps.map(Step::name).collect::<Vec<_>>().join(", ");
            format!("{plan}: {steps}")
        };
        match plans.as_slice() {
            [] => None,
            [plan] => Some(plan.to_string()),
            plans => Some(plans.iter().map(name).collect::<Vec<_>>().join("; ")),
        }
    }
}

/// Which tiles the matrices of a layout get for many tokens.
struct Gemms {
    plans: GemmPlans,
    passed: Vec<(Layout, GemmPlan)>,
    refused: Vec<(Layout, GemmPlan, Error)>,
}

impl Gemms {
    fn new(plans: GemmPlans) -> Self {
        Self { plans, passed: Vec::new(), refused: Vec::new() }
    }

    /// The plan of a layout that is exact here, as `check` says: the preferred one, else the same tile
    /// without cooperative matrices, else the kernels of a few tokens for any number of them.
    async fn plan(
        &mut self,
        layout: Layout,
        mut check: impl AsyncFnMut(GemmPlan) -> Result<()>,
    ) -> Result<GemmPlan> {
        let plan = self.plans.of(layout);
        for plan in [plan, GemmPlan { cooperative: None, ..plan }, GemmPlan::FEW] {
            if self.passed.contains(&(layout, plan)) {
                return Ok(plan);
            }
            if self.refused.iter().any(|(l, p, _)| (*l, *p) == (layout, plan)) {
                continue;
            }
            match check(plan).await {
                Ok(()) => {
                    self.passed.push((layout, plan));
                    return Ok(plan);
                }
                Err(problem @ Error::SelfTest { .. }) => {
                    self.refused.push((layout, plan, problem));
                }
                Err(error) => return Err(error),
            }
        }
        let (_, _, problem) = self.refused.pop().expect("there is a plan, and it was refused");
        Err(problem)
    }
}

impl<'a> Methods<'a> {
    /// None yet.
    pub fn new(gpu: &'a Gpu, plans: Plans, gemms: GemmPlans) -> Self {
        Self { gpu, sums: Sums::new(plans), gemms: Gemms::new(gemms), groups: [false; 2] }
    }

    /// The method of a step's matrices with one scale; `can_fuse` says whether a plan has a fused kernel
    /// for them.
    ///
    /// # Errors
    /// [`Error::SelfTest`] if the plan, or every one of them, is wrong on this adapter.
    pub async fn sums(
        &mut self,
        step: Step,
        can_fuse: impl Fn(GemvPlan) -> bool,
    ) -> Result<Method> {
        let gpu = self.gpu;
        // A dry device computes nothing that could be checked.
        let check = async |plan| match gpu.is_dry() {
            true => Ok(()),
            false => check_async(gpu, plan).await,
        };
        let gemv = self.sums.plan(step, can_fuse, check).await?;
        let layout = gemv.variant.layout();
        let check = async |plan| match gpu.is_dry() {
            true => Ok(()),
            false => check_gemm_async(gpu, layout, plan).await,
        };
        let gemm = self.gemms.plan(layout, check).await?;
        Ok(Method::Sums(SumPlans { gemv, gemm }))
    }

    /// The method of matrices with scales of groups.
    ///
    /// # Errors
    /// [`Error::SelfTest`] if its kernels are wrong on this adapter.
    pub async fn groups(&mut self, int8: bool) -> Result<Method> {
        let passed = &mut self.groups[usize::from(int8)];
        if !*passed && !self.gpu.is_dry() {
            check_groups_async(self.gpu, int8).await?;
        }
        *passed = true;
        Ok(Method::Groups { int8 })
    }

    /// The kernels of the methods so far, for people.
    pub fn names(&self) -> String {
        let groups = [false, true].into_iter().filter(|&int8| self.groups[usize::from(int8)]);
        let groups = groups.map(|int8| Method::Groups { int8 }.gemv().name.to_owned());
        self.sums.names().into_iter().chain(groups).collect::<Vec<_>>().join(", ")
    }

    /// The plans that were wrong on this adapter, one line each.
    pub fn refusals(&self) -> Vec<String> {
        let gemvs = self.sums.refused.iter().map(|(_, problem)| problem);
        let gemms = self.gemms.refused.iter().map(|(_, _, problem)| problem);
        gemvs.chain(gemms).map(ToString::to_string).collect()
    }
}

/// Rows and columns of the check: partial tiles, partial chunks.
const SHAPE: (usize, usize) = (70, 1000);
/// Rows and columns of the check of the kernels for many tokens.
const GEMM_SHAPE: (usize, usize) = (70, 300);
/// Tokens of the check of the kernels of groups: a partial token tile.
const TOKENS: usize = 5;

/// Runs the plan's kernels for one token on a fixed pseudo-random matrix and compares with the
/// reference.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub async fn check_async(gpu: &Gpu, plan: GemvPlan) -> Result<()> {
    let variant = plan.variant;
    let shape = MatShape::new(SHAPE.0, SHAPE.1)?;
    plan.validate(gpu, shape.k())?;
    let mut random = Random::new(0x5EED);
    let (trits, codes) = (random.trits(shape.len()), random.codes(shape.k()));
    let packed = Packed::pack(variant.layout(), shape, &trits);
    let found = multiply_async(gpu, plan.into(), &packed, &codes, 1).await?;
    compare(gpu, variant.gemv().name, &found, &cpu_ref::gemv::gemv(&trits, &codes))?;
    check_quantize(gpu, variant.gemv_encoding(), &mut random).await?;
    if plan.fused { check_fused(gpu, plan).await } else { Ok(()) }
}

/// Runs the kernels for many tokens of a layout and plan in the same way: each with a partial tile of
/// tokens.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub async fn check_gemm_async(gpu: &Gpu, layout: Layout, plan: GemmPlan) -> Result<()> {
    let shape = MatShape::new(GEMM_SHAPE.0, GEMM_SHAPE.1)?;
    plan.validate(gpu, layout, shape.k())?;
    let mut random = Random::new(0x5EEC);
    let trits = random.trits(shape.len());
    let packed = Packed::pack(layout, shape, &trits);
    let counts = [3, 5, plan.tokens + 1];
    let most = counts.into_iter().max().expect("there are three");
    let codes = random.codes(most * shape.k());
    let expected = cpu_ref::gemm::gemm(&trits, &codes, shape.k());
    let product = Product::upload(gpu, gemm_encoding(layout), &packed, &codes)?;
    for n_tokens in counts {
        let call = product.gemm(layout).call_for(plan, n_tokens);
        let inputs = gemm_inputs(call.kernel, product.inputs());
        let found = product.run(gpu, &call, inputs, n_tokens).await?;
        compare(gpu, call.kernel.name, &found, &expected[..found.len()])?;
    }
    if plan.cooperative.is_some() {
        check_long_sums(gpu, plan, &mut random).await?;
    }
    check_quantize(gpu, gemm_encoding(layout), &mut random).await
}

/// Sums of the longest rows, of more than 2^23, where f32 has no bit to spare: matrix units need not add
/// up as IEEE 754 says.
async fn check_long_sums(gpu: &Gpu, plan: GemmPlan, random: &mut Random) -> Result<()> {
    let shape = MatShape::new(3, kernels::MAX_K)?;
    let mut trits = vec![1i8; shape.len()];
    trits[shape.k()..2 * shape.k()].fill(-1);
    // Up to there, and back to a small sum.
    trits[2 * shape.k() + shape.k() / 2..].fill(-1);
    let packed = Packed::pack(Layout::I2, shape, &trits);
    let codes: Vec<i8> = (0..2 * shape.k())
        .map(|_| (80 + random.below(48)) as i8)
        .chain(vec![-128; shape.k()])
        .collect();
    let call = |gemm: Gemm| gemm.tiled(plan);
    let (kernel, found) = multiply_many_async(gpu, &packed, &codes, call).await?;
    compare(gpu, kernel, &found, &cpu_ref::gemm::gemm(&trits, &codes, shape.k()))
}

/// Quantises with scale 1, and no value near a tie: a division that is off in the last bit is allowed.
async fn check_quantize(gpu: &Gpu, encoding: Encoding, random: &mut Random) -> Result<()> {
    let kernel = "quantize_absmax";
    let k = SHAPE.1;
    let value = |at| if at == 7 { -127.0 } else { random.below(253) as f32 - 125.75 };
    let x: Vec<f32> = (0..k).map(value).collect();
    let expected = cpu_ref::quantize_absmax::quantize_absmax(&x).codes;
    let found = quantize_async(gpu, encoding, &x, 1).await?;
    compare(gpu, kernel, &found.codes, &encode_codes(encoding, &expected, k))?;
    compare(gpu, kernel, &found.code_sum, &[code_sum(encoding, &expected)])
}

/// Runs a fused step on a fixed pseudo-random matrix. A root or division that is off in the last bit
/// may move a code by a step; what is wrong is off by many.
async fn check_fused(gpu: &Gpu, plan: GemvPlan) -> Result<()> {
    let shape = MatShape::new(SHAPE.0, SHAPE.1)?;
    let mut random = Random::new(0x5EEF);
    let (trits, scale, eps) = (random.trits(shape.len()), 0.5, 1e-5);
    let (x, norm) = (random.floats(shape.k(), 3.0), random.floats(shape.k(), 1.0));
    let hidden = random.floats(shape.n(), 3.0);
    let matrix = TernaryMatrix::from_trits(shape, trits.clone(), scale);
    let fused = |tiles| Fused { plan, k: shape.k(), norm: Some(eps), tiles };
    let out = gpu.storage("out", shape.n())?;
    let inputs = [&gpu.upload("x", &x)?, &gpu.upload("norm", &norm)?];
    let hidden_in = gpu.upload("hidden", &hidden)?;
    let params = PassParams { n_tokens: 1, ..PassParams::default() };
    for (tiles, words, rows) in fused_matrix(gpu, plan, &[&matrix], RowOrder::Natural)? {
        let buffers = [&words, inputs[0], inputs[1], &rows, &hidden_in, &out];
        run(gpu, &fused(tiles).residual(shape.n()), params, &buffers)?;
    }
    let found: Vec<f32> = bytemuck::cast_vec(gpu.read_async(&out, shape.n()).await?);
    let x = cpu_ref::quantize_absmax::quantize_absmax(&cpu_ref::rmsnorm::rmsnorm(&x, &norm, eps));
    let acc = cpu_ref::gemv::gemv(&trits, &x.codes);
    let y = cpu_ref::gemv::dequantize(&acc, &vec![scale; shape.n()], x.act_scale);
    let step = scale * x.act_scale;
    for (at, ((&found, y), hidden)) in found.iter().zip(y).zip(hidden).enumerate() {
        let (expected, bound) = (hidden + y, 4.0 * step + 1e-5 * y.abs());
        let is_close = (found - expected).abs() <= bound;
        if !is_close {
            let kernel = fused((0, 1)).residual(1).kernel.name;
            return Err(differs(
                gpu,
                kernel,
                format!("[{at}]: expected {expected}, found {found}"),
            ));
        }
    }
    Ok(())
}

/// A shard of a fused step's matrices: first tile and how many, packed words, offset and scale of
/// each row.
pub type FusedShard = ((usize, usize), Slice, Slice);

/// Matrices as a fused step reads them, in shards that fit a binding.
///
/// # Errors
/// [`Error::GpuLimit`] if a tile does not fit.
pub fn fused_matrix(
    gpu: &Gpu,
    plan: GemvPlan,
    parts: &[&TernaryMatrix],
    order: RowOrder,
) -> Result<Vec<FusedShard>> {
    let host = HostLinear::pack(parts, 64, order, |_| Method::Sums(plan.into()))?;
    let slices = gpu.upload_together("fused", &host.parts(gpu))?;
    let linear = GpuLinear::from_slices(gpu, &host, &mut slices.into_iter());
    let shards = linear.runs[0].matrix.shards.iter().zip(&linear.fused_rows);
    let shard = |((tiles, words, _), rows): (&(Range<usize>, Slice, Slice), &Slice)| {
        ((tiles.start, tiles.len()), words.clone(), rows.clone())
    };
    Ok(shards.map(shard).collect())
}

/// Runs the kernels of matrices with scales of groups on fixed pseudo-random ones, whose scales are
/// powers of two and whose activations are small integers: every sum is exact in any order.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub async fn check_groups_async(gpu: &Gpu, int8: bool) -> Result<()> {
    let mut random = Random::new(0x5EEE);
    let kernel = Method::Groups { int8 }.gemv().name;
    for (alphabet, k, group) in [
        (Alphabet::Ternary, 640, 128),
        (Alphabet::Ternary, 192, 64),
        (Alphabet::Binary, 1152, 128),
        (Alphabet::Binary, 192, 64),
    ] {
        let shape = MatShape::new(SHAPE.0, k)?;
        let mut trits = random.trits(shape.len());
        if alphabet == Alphabet::Binary {
            trits.iter_mut().for_each(|trit| *trit = if *trit < 0 { -1 } else { 1 });
        }
        // Halves of −4 to 4.
        let scale = |random: &mut Random| 0x3800 + 0x400 * random.below(4) as u16;
        let sign = |random: &mut Random| (random.below(2) as u16) << 15;
        let scales: Vec<u16> =
            (0..shape.len() / group).map(|_| scale(&mut random) | sign(&mut random)).collect();
        let act_scales: Vec<f32> =
            (0..TOKENS * k / group).map(|_| [0.5, 1.0, 2.0][random.below(3)]).collect();
        let codes = random.codes(TOKENS * k);
        let x: Vec<f32> = codes.iter().map(|&code| f32::from(code)).collect();
        let expected: Vec<f32> = (0..TOKENS)
            .flat_map(|m| {
                let x = &x[m * k..][..k];
                let codes = &codes[m * k..][..k];
                let act_scales = &act_scales[m * k / group..][..k / group];
                let rows = trits.chunks_exact(k).zip(scales.chunks_exact(k / group));
                rows.map(move |(row, scales)| {
                    let scales: Vec<f32> = scales.iter().map(|&bits| f16_to_f32(bits)).collect();
                    match int8 {
                        false => group_dot(row, &scales, x),
                        true => group_dot_int8(row, &scales, codes, act_scales),
                    }
                })
                .collect::<Vec<_>>()
            })
            .collect();
        let matrix = TernaryMatrix::from_groups(shape, trits, scales, group, alphabet);
        for n_tokens in [1, TOKENS] {
            let input = match int8 {
                false => GroupInput::Float(&x[..n_tokens * k]),
                true => GroupInput::Int8 {
                    codes: &codes[..n_tokens * k],
                    act_scales: &act_scales[..n_tokens * k / group],
                },
            };
            let found = multiply_groups_async(gpu, &matrix, input, n_tokens).await?;
            compare(gpu, kernel, &found, &expected[..found.len()])?;
        }
    }
    Ok(())
}

/// The exact and the int8 head of one table on the device, for up to [`LOGIT_ROWS`] tokens.
pub struct Heads<'a> {
    gpu: &'a Gpu,
    uniform: wgpu::Buffer,
    hidden: Slice,
    seen: Slice,
    logits: [Slice; 2],
    tokens: [Slice; 2],
    counts: Slice,
    v: usize,
    k: usize,
    norm: Vec<Op>,
    /// `lm_head` by [`LogitTile`].
    exact: [Vec<Op>; LogitTile::ALL.len()],
    /// `argmax` of its logits.
    pub argmax: Op,
    /// The int8 head.
    pub int8: HeadOps,
}

/// What a head finds for a token.
#[derive(Debug, Clone)]
pub struct HeadFound {
    /// `[V]`, without penalty.
    pub logits: Vec<f32>,
    /// The greedy token, u32::MAX if a logit is NaN.
    pub token: u32,
}

impl<'a> Heads<'a> {
    /// Uploads a float table both ways, for up to [`LOGIT_ROWS`] tokens. The head's input goes through the norm `[K]` with its eps, or
    /// is normalised already.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver refuses, [`Error::GpuLimit`] if a row does not fit.
    ///
    /// # Panics
    /// If the table has no int8 head.
    pub fn new(gpu: &'a Gpu, table: &Table, norm: Option<(&[f32], f32)>) -> Result<Self> {
        block_on(Self::with_rows(gpu, table, norm, LOGIT_ROWS))
    }

    /// [`Heads::new`] for up to `max_rows` tokens, where nothing may block.
    async fn with_rows(
        gpu: &'a Gpu,
        table: &Table,
        norm: Option<(&[f32], f32)>,
        max_rows: usize,
    ) -> Result<Self> {
        let (v, k) = (table.shape().n(), table.shape().k());
        let on_gpu = GpuTable::upload(gpu, "lm_head", table).await?;
        let int8 = Int8Head::upload(gpu, "int8 lm_head", table).await?.expect("a float table");
        let storage = |len_words| gpu.storage("head", len_words);
        let (pipelines, uniform) = (gpu.pipelines(), gpu.params_buffer());
        let rows = |len_words: usize| storage(LOGIT_ROWS * len_words);
        let (hidden, normed, seen) = (rows(k)?, rows(k)?, rows(v.div_ceil(32))?);
        let logits = [rows(v)?, rows(v)?];
        let tokens = [rows(1)?, rows(1)?];
        let counts = rows(1)?;
        let mut norms = Vec::new();
        let weight = gpu.upload("norm", norm.map_or(&[][..], |(weight, _)| weight))?;
        let (input, x) = match norm {
            Some((_, eps)) => {
                let call = kernels::rmsnorm(k, eps, true);
                norms.push(gpu.op(&pipelines, &call, &uniform, &[&hidden, &weight, &normed])?);
                (HeadInput::Hidden(&hidden, &weight, eps), &normed)
            }
            None => (HeadInput::Normed(&hidden), &hidden),
        };
        let GpuTableData::Dense(shards) = &on_gpu.data else { panic!("a float table is dense") };
        let mut exact = LogitTile::ALL.map(|_| Vec::new());
        for (ops, &tile) in exact.iter_mut().zip(LogitTile::up_to(max_rows as u32)) {
            for rows in shards {
                let [units, scale, min] = &rows.buffers;
                let call = kernels::lm_head(rows.shard, v, tile);
                let buffers = [x, units, scale, min, &logits[0]];
                ops.push(gpu.op(&pipelines, &call, &uniform, &buffers)?);
            }
        }
        let buffers = [&logits[0], &tokens[0]];
        let argmax = gpu.op(&pipelines, &kernels::argmax(v), &uniform, &buffers)?;
        let step = HeadStep {
            input,
            table: &on_gpu,
            logits: &logits[1],
            seen: &seen,
            tokens: &tokens[1],
            counts: &counts,
            rows: max_rows,
        };
        let int8 = int8.ops(gpu, &pipelines, &uniform, &step)?;
        Ok(Self {
            gpu,
            uniform,
            hidden,
            seen,
            logits,
            tokens,
            counts,
            v,
            k,
            norm: norms,
            exact,
            argmax,
            int8,
        })
    }

    /// Norm and logits of `lm_head`, of so many rows.
    pub fn exact(&self, rows: u32) -> impl Iterator<Item = &Op> {
        self.norm.iter().chain(&self.exact[LogitTile::index_for(rows)])
    }

    fn run<'b>(
        &self,
        hidden: &[f32],
        penalty: f32,
        ops: impl IntoIterator<Item = &'b Op>,
    ) -> Result<()> {
        let params = Self::params(self.rows_of(hidden), penalty);
        self.gpu.queue.write_buffer(&self.hidden.buffer, 0, bytemuck::cast_slice(hidden));
        self.gpu.run_all(&self.uniform, params, ops)
    }

    fn rows_of(&self, hidden: &[f32]) -> u32 {
        (hidden.len() / self.k) as u32
    }

    /// So many tokens, each with its logits.
    pub fn params(rows: u32, penalty: f32) -> PassParams {
        PassParams { n_tokens: rows, n_logit_rows: rows, penalty, ..PassParams::default() }
    }

    /// The uniform of the operations.
    pub fn uniform(&self) -> &wgpu::Buffer {
        &self.uniform
    }

    /// What `lm_head` and `argmax` find for one token, without penalty.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub async fn find_exact_async(&self, hidden: &[f32]) -> Result<HeadFound> {
        Ok(self.find_exact_rows_async(hidden).await?.swap_remove(0))
    }

    /// The same for up to [`LOGIT_ROWS`] tokens `[M, K]` at once.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub async fn find_exact_rows_async(&self, hidden: &[f32]) -> Result<Vec<HeadFound>> {
        let rows = self.rows_of(hidden);
        self.run(hidden, 1.0, self.exact(rows).chain([&self.argmax]))?;
        self.found(0, rows as usize).await
    }

    /// What the int8 head finds for one token with a penalty of the tokens in `seen`, and how many
    /// candidates there were.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub async fn find_int8_async(
        &self,
        hidden: &[f32],
        seen: &[u32],
        penalty: f32,
    ) -> Result<(HeadFound, usize)> {
        Ok(self.find_int8_rows_async(hidden, seen, penalty).await?.swap_remove(0))
    }

    /// The same for up to [`LOGIT_ROWS`] tokens `[M, K]` at once, with bits of `seen` for each:
    /// `[M, ceil(V/32)]`.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub async fn find_int8_rows_async(
        &self,
        hidden: &[f32],
        seen: &[u32],
        penalty: f32,
    ) -> Result<Vec<(HeadFound, usize)>> {
        let rows = self.rows_of(hidden);
        self.gpu.queue.write_buffer(&self.seen.buffer, 0, bytemuck::cast_slice(seen));
        self.run(hidden, penalty, self.int8.logits(rows).chain(&self.int8.greedy))?;
        let candidates = self.gpu.read_async(&self.counts, rows as usize).await?;
        let found = self.found(1, rows as usize).await?.into_iter();
        Ok(found.zip(candidates).map(|(found, count)| (found, count as usize)).collect())
    }

    async fn found(&self, which: usize, rows: usize) -> Result<Vec<HeadFound>> {
        let logits: Vec<f32> =
            bytemuck::cast_vec(self.gpu.read_async(&self.logits[which], rows * self.v).await?);
        let tokens = self.gpu.read_async(&self.tokens[which], rows).await?;
        let rows = logits.chunks_exact(self.v).zip(tokens);
        Ok(rows.map(|(logits, token)| HeadFound { logits: logits.to_vec(), token }).collect())
    }
}

/// Runs the int8 head on rows that int8 cannot tell apart, and compares its greedy tokens with
/// those of the exact head on this adapter; several tokens at once only if passes may have more than
/// one row of logits.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub async fn check_head_async(gpu: &Gpu, max_rows: usize) -> Result<()> {
    let max_rows = max_rows.min(LOGIT_ROWS);
    let kernel = "head_int8";
    let mut random = Random::new(0x5EF0);
    let shape = MatShape::new(HEAD_SHAPE.0, HEAD_SHAPE.1)?;
    let k = shape.k();
    let (hidden, norm) = (random.floats(k, 3.0), random.floats(k, 1.0));
    let mut w = random.floats(shape.len(), 0.1);
    // Rows along the input, each a little longer than the one before; a pair of them is equal.
    for (step, n) in HEAD_NEAR.into_iter().enumerate() {
        for (at, w) in w[n * k..][..k].iter_mut().enumerate() {
            *w = hidden[at] * norm[at] * 0.05 * (1.0 + step.min(6) as f32 * 1e-5);
        }
    }
    let table = Table::new(shape, TableData::F32(w.into()));
    let heads = Heads::with_rows(gpu, &table, Some((&norm, 1e-5)), max_rows).await?;
    let negative: Vec<f32> = hidden.iter().map(|value| -value).collect();
    let none = vec![0; shape.n().div_ceil(32)];
    for hidden in [&hidden, &negative] {
        let exact = heads.find_exact_async(hidden).await?;
        let (found, candidates) = heads.find_int8_async(hidden, &none, 1.0).await?;
        compare(gpu, kernel, &[found.token], &[exact.token])?;
        if candidates < HEAD_NEAR.len() && exact.token as usize == HEAD_NEAR[6] {
            let problem = format!("{candidates} candidates, expected {}", HEAD_NEAR.len());
            return Err(differs(gpu, kernel, problem));
        }
    }
    // Whoever leads is seen, and falls behind.
    let exact = heads.find_exact_async(&hidden).await?;
    let mut seen = none;
    seen[exact.token as usize / 32] |= 1 << (exact.token % 32);
    let (found, _) = heads.find_int8_async(&hidden, &seen, 2.0).await?;
    let rest = |n: usize| if n == exact.token as usize { f32::MIN } else { exact.logits[n] };
    let logits: Vec<f32> = (0..shape.n()).map(rest).collect();
    let second = cpu_ref::argmax::argmax(&logits).map_or(u32::MAX, |token| token as u32);
    compare(gpu, kernel, &[found.token], &[second])?;
    if max_rows > 1 {
        let tokens = [exact.token, second];
        check_head_rows(gpu, &heads, [&hidden, &negative], &seen, tokens, max_rows).await?;
    }
    check_head_bits(gpu, shape, &mut random, max_rows).await
}

/// Several rows of logits at once, every second one of `hidden` and the others of its negative; the
/// first has a penalty of `seen`, and then `second` for its token instead of `first`.
async fn check_head_rows(
    gpu: &Gpu,
    heads: &Heads<'_>,
    hidden: [&[f32]; 2],
    seen: &[u32],
    [first, second]: [u32; 2],
    max_rows: usize,
) -> Result<()> {
    let kernel = "head_int8";
    let other = heads.find_exact_async(hidden[1]).await?.token;
    let none = vec![0; seen.len()];
    for rows in [max_rows.min(3), max_rows] {
        let x: Vec<f32> = (0..rows).flat_map(|row| hidden[row % 2]).copied().collect();
        let expected: Vec<u32> = (0..rows).map(|row| [first, other][row % 2]).collect();
        let found = heads.find_exact_rows_async(&x).await?;
        let found: Vec<u32> = found.iter().map(|found| found.token).collect();
        compare(gpu, shader::LM_HEAD.name, &found, &expected)?;
        let bits = |row| if row == 0 { seen } else { &none[..] };
        let all_seen: Vec<u32> = (0..rows).flat_map(bits).copied().collect();
        let found = heads.find_int8_rows_async(&x, &all_seen, 2.0).await?;
        let found: Vec<u32> = found.iter().map(|(found, _)| found.token).collect();
        let expected = [&[second], &expected[1..]].concat();
        compare(gpu, kernel, &found, &expected)?;
    }
    Ok(())
}

/// Rows that differ in the last bits alone, so that rounding decides which is the best; and their
/// approximate logits, which are integers times two scales.
async fn check_head_bits(
    gpu: &Gpu,
    shape: MatShape,
    random: &mut Random,
    max_rows: usize,
) -> Result<()> {
    let kernel = "head_int8";
    let first = random.floats(shape.k(), 0.1);
    let mut last_bit = |w: &f32| f32::from_bits(w.to_bits() ^ random.bits() as u32 & 1);
    let w: Vec<f32> =
        (0..shape.n()).flat_map(|_| first.iter().map(&mut last_bit).collect::<Vec<_>>()).collect();
    let table = Table::new(shape, TableData::F32(w.clone().into()));
    let heads = Heads::with_rows(gpu, &table, None, max_rows).await?;
    let none = vec![0; shape.n().div_ceil(32)];
    for _ in 0..4 {
        let hidden = random.floats(shape.k(), 3.0);
        let exact = heads.find_exact_async(&hidden).await?;
        let (found, _) = heads.find_int8_async(&hidden, &none, 1.0).await?;
        compare(gpu, kernel, &[found.token], &[exact.token])?;
        let x = head_int8::quantize_input(&hidden);
        let mut codes = vec![0; shape.k()];
        for (n, (w, found)) in w.chunks_exact(shape.k()).zip(found.logits).enumerate() {
            let row = head_int8::quantize_row(w, 0.0, &mut codes);
            let expected = head_int8::logit(row, &x, head_int8::sums(&codes, &x));
            // A few roundings, in any mode.
            let is_close = (found - expected).abs() <= 1e-6 * expected.abs();
            if !is_close {
                let problem = format!("[{n}]: expected {expected}, found {found}");
                return Err(differs(gpu, kernel, problem));
            }
        }
    }
    Ok(())
}

/// Rows and columns of the check of the int8 head, and its rows that are nearly the same: the last
/// two are equal.
const HEAD_SHAPE: (usize, usize) = (300, 200);
const HEAD_NEAR: [usize; 8] = [7, 290, 40, 255, 31, 32, 100, 256];

/// Most draws of each setting in the check of sampling.
const DRAWS: usize = 8;
/// Tokens that have a chance in it, if there are as many.
const LIKELY: usize = 1500;

/// Draws tokens of fixed pseudo-random logits by every kind of cut, with random numbers in the middle
/// of what belongs to a token, where no rounding leads to another: with the pipelines of a model of
/// that vocabulary.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub async fn check_sample_async(gpu: &Gpu, vocab_size: usize) -> Result<()> {
    let mut random = Random::new(0x5EED);
    let likely = vocab_size.min(LIKELY);
    let mut logits = vec![-60.0; vocab_size];
    for (at, logit) in random.floats(likely, 6.0).into_iter().enumerate() {
        // Ties.
        logits[at * vocab_size / likely] = (logit * 4.0).round() / 4.0;
    }
    let seen: Vec<u32> = (0..vocab_size.div_ceil(32)).map(|_| random.bits() as u32).collect();
    let mut draws = Draws::new(gpu, &logits)?;
    let plain = Sampling { temperature: 1.5, penalty: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    for how in [
        plain,
        Sampling { top_k: 40, penalty: 2.0, ..plain },
        Sampling { top_p: 0.875, ..plain },
        Sampling { top_k: 600, top_p: 0.9375, min_p: 0.25, ..plain },
        Sampling { temperature: 0.0, penalty: 2.0, ..plain },
    ] {
        let candidates =
            cpu_ref::sample::candidates(&logits, &seen, &how).expect("the logits are finite");
        let total = cpu_ref::sample::total_weight(&candidates);
        let (mut uniforms, mut expected, mut before) = (Vec::new(), Vec::new(), 0.0);
        for candidate in &candidates {
            let share = candidate.weight / total;
            if share > 1e-4 && uniforms.len() < DRAWS {
                uniforms.push((before + share / 2.0) as f32);
                expected.push(candidate.token as u32);
            }
            before += share;
        }
        let params = PassParams {
            n_tokens: 1,
            n_logit_rows: 1,
            temperature: how.temperature,
            penalty: how.penalty,
            top_k: how.top_k as u32,
            top_p: how.top_p as f32,
            min_p: how.min_p as f32,
            ..PassParams::default()
        };
        for (uniform, expected) in uniforms.into_iter().zip(expected) {
            let found = draws.one(&seen, PassParams { uniform, ..params }).await?;
            compare(gpu, "sample", &[found], &[expected])?;
        }
    }
    logits[vocab_size / 2] = f32::NAN;
    draws.set_logits(&logits);
    let params = PassParams {
        n_tokens: 1,
        n_logit_rows: 1,
        temperature: 1.0,
        uniform: 0.5,
        ..PassParams::default()
    };
    compare(gpu, "sample", &[draws.one(&seen, params).await?], &[u32::MAX])
}

fn compare<T: PartialEq + std::fmt::Display>(
    gpu: &Gpu,
    kernel: &str,
    found: &[T],
    expected: &[T],
) -> Result<()> {
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => {
            let problem = format!("[{at}]: expected {}, found {}", expected[at], found[at]);
            Err(differs(gpu, kernel, problem))
        }
    }
}

fn differs(gpu: &Gpu, kernel: &str, problem: String) -> Error {
    let device = format!("gpu:{} {}", gpu.adapter.index, gpu.adapter.name);
    Error::SelfTest { device, kernel: kernel.to_owned(), problem }
}

/// Activation codes `[M, K]` as `quantize_absmax.wgsl` writes them.
pub fn encode_codes(encoding: Encoding, codes: &[i8], k: usize) -> Vec<u32> {
    let chunks = k_chunks(k);
    let mut words = Vec::with_capacity(codes.len() / k * chunks * encoding.chunk_words());
    for token in codes.chunks_exact(k) {
        let mut padded = vec![0i8; chunks * CHUNK_K];
        padded[..k].copy_from_slice(token);
        match encoding {
            Encoding::Biased => words.extend(padded.chunks_exact(4).map(|bytes| {
                u32::from_le_bytes(std::array::from_fn(|b| (i32::from(bytes[b]) + 128) as u8))
            })),
            Encoding::Signed => words.extend(
                padded
                    .chunks_exact(4)
                    .map(|bytes| u32::from_le_bytes(std::array::from_fn(|b| bytes[b] as u8))),
            ),
            Encoding::Halves => {
                for chunk in padded.chunks_exact(CHUNK_K) {
                    words.extend((0..Encoding::Halves.chunk_words()).map(|word| {
                        let k = half_pair(word).0;
                        let half = |at: usize| u32::from(f32_to_f16(f32::from(chunk[at])));
                        half(k) | half(k + 2) << 16
                    }));
                }
            }
            Encoding::Planes => {
                for group in padded.chunks_exact(32) {
                    for plane in 0..8 {
                        let bit = |&code: &i8| u32::from(code as u8 >> plane & 1);
                        words.push(group.iter().enumerate().map(|(i, code)| bit(code) << i).sum());
                    }
                }
            }
        }
    }
    words
}

/// The inverse of [`encode_codes`] for the words of one token.
pub fn decode_codes(encoding: Encoding, words: &[u32], k: usize) -> Vec<i8> {
    let code = |k: usize| match encoding {
        Encoding::Biased => ((words[k / 4] >> (8 * (k % 4)) & 0xff) as i32 - 128) as i8,
        Encoding::Planes => {
            let planes = &words[k / 32 * 8..][..8];
            let bit = |j: usize| (planes[j] >> (k % 32) & 1) << j;
            (0..8).map(bit).sum::<u32>() as u8 as i8
        }
        Encoding::Signed => (words[k / 4] >> (8 * (k % 4))) as u8 as i8,
        Encoding::Halves => {
            let chunk = &words[k / CHUNK_K * 32..][..32];
            let at = |(k, word): (usize, u32)| (k, f16_to_f32(word as u16) as i8);
            let both = |word: usize| {
                let first = half_pair(word).0;
                [at((first, chunk[word])), at((first + 2, chunk[word] >> 16))]
            };
            let mut all = (0..32).flat_map(both);
            all.find(|&(at, _)| at == k % CHUNK_K).expect("every column is in a pair").1
        }
    };
    (0..k).map(code).collect()
}

/// Tokens that were drawn, and the bits of tokens seen after that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drawn {
    /// One a draw; `u32::MAX` if the logits allow none.
    pub tokens: Vec<u32>,
    /// `[⌈V/32⌉]`.
    pub seen: Vec<u32>,
}

/// The operations of a draw as decoding has them, on buffers of their own.
struct Draws<'a> {
    gpu: &'a Gpu,
    uniform: wgpu::Buffer,
    logits: Slice,
    seen: Slice,
    token: Slice,
    ops: [Op; 3],
}

impl<'a> Draws<'a> {
    fn new(gpu: &'a Gpu, logits: &[f32]) -> Result<Self> {
        let vocab_size = logits.len();
        let lens = kernels::SampleLens::new(vocab_size);
        let (pipelines, uniform) = (gpu.pipelines(), gpu.params_buffer());
        let (logits, seen) = (gpu.upload("logits", logits)?, gpu.storage("seen", lens.seen)?);
        let [bits, weights] = [(); 2].map(|()| gpu.storage("bits", lens.vocab));
        let (bits, weights) = (bits?, weights?);
        let block_max = gpu.storage("block_max", lens.block_max)?;
        let levels = gpu.storage("levels", lens.levels)?;
        let token = gpu.storage("token", 1)?;
        let draw = [&bits, &block_max, &weights, &levels, &bits, &seen, &token];
        let op = |call: &Call, buffers: &[&Slice]| gpu.op(&pipelines, call, &uniform, buffers);
        let ops = [
            op(&kernels::sample_blocks(vocab_size), &[&logits, &seen, &bits, &block_max])?,
            op(&kernels::sample_weights(vocab_size), &[&bits, &block_max, &weights, &levels])?,
            op(&kernels::sample(vocab_size), &draw)?,
        ];
        Ok(Self { gpu, uniform, logits, seen, token, ops })
    }

    fn set_logits(&mut self, logits: &[f32]) {
        self.gpu.queue.write_buffer(&self.logits.buffer, 0, bytemuck::cast_slice(logits));
    }

    /// One token by the number in the pass.
    async fn one(&self, seen: &[u32], params: PassParams) -> Result<u32> {
        self.gpu.queue.write_buffer(&self.seen.buffer, 0, bytemuck::cast_slice(seen));
        self.gpu.run_all(&self.uniform, params, &self.ops)?;
        Ok(self.gpu.read_async(&self.token, 1).await?[0])
    }
}

/// Draws tokens of logits `[V]`, one for each random number; a single one as decoding does, by the
/// number in the pass.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub async fn draw_tokens_async(
    gpu: &Gpu,
    pipelines: &Pipelines,
    logits: &[f32],
    seen: &[u32],
    params: PassParams,
    uniforms: &[f32],
) -> Result<Drawn> {
    let (vocab_size, draws) = (logits.len(), uniforms.len());
    let lens = kernels::SampleLens::new(vocab_size);
    let (logits, seen) = (gpu.upload("logits", logits)?, gpu.upload("seen", seen)?);
    let all_uniforms = gpu.upload("uniforms", uniforms)?;
    let (bits, weights) = (gpu.storage("bits", lens.vocab)?, gpu.storage("weights", lens.vocab)?);
    let block_max = gpu.storage("block_max", lens.block_max)?;
    let levels = gpu.storage("levels", lens.levels)?;
    let tokens = gpu.storage("tokens", draws)?;
    let uniform = gpu.params_buffer();
    let draw = match draws {
        1 => kernels::sample(vocab_size),
        _ => kernels::sample_draws(vocab_size),
    };
    let buffers = [&bits, &block_max, &weights, &levels, &all_uniforms, &seen, &tokens];
    let ops = [
        (kernels::sample_blocks(vocab_size), &[&logits, &seen, &bits, &block_max][..]),
        (kernels::sample_weights(vocab_size), &[&bits, &block_max, &weights, &levels]),
        (draw, &buffers),
    ];
    let ops = ops.map(|(call, buffers)| gpu.op(pipelines, &call, &uniform, buffers));
    let ops = ops.into_iter().collect::<Result<Vec<_>>>()?;
    let params = PassParams { n_tokens: draws as u32, uniform: uniforms[0], ..params };
    gpu.run_all(&uniform, params, &ops)?;
    Ok(Drawn {
        tokens: gpu.read_async(&tokens, draws).await?,
        seen: gpu.read_async(&seen, lens.seen).await?,
    })
}

/// What `quantize_absmax.wgsl` makes the sum of a token's codes: what the encoding's kernel subtracts.
pub fn code_sum(encoding: Encoding, codes: &[i8]) -> i32 {
    match encoding {
        Encoding::Biased | Encoding::Planes | Encoding::Signed => {
            codes.iter().map(|&code| i32::from(code)).sum()
        }
        Encoding::Halves => {
            let mut weights = [0; CHUNK_K];
            for (k, constant) in (0..Encoding::Halves.chunk_words()).map(half_pair) {
                (weights[k], weights[k + 2]) = (1 + constant, 1 + constant);
            }
            let codes = codes.iter().enumerate();
            codes.map(|(k, &code)| i32::from(code) * weights[k % CHUNK_K]).sum()
        }
    }
}

/// The first column of a pair of a chunk's f16 codes, and what its weights' scaled-up 1 adds: see
/// `shared/half_pairs.wgsl`.
fn half_pair(word: usize) -> (usize, i32) {
    const BYTE_FIELD_CONSTANT: [(usize, usize, i32); 8] = [
        (1, 0, 4),
        (0, 3, 16),
        (0, 2, 64),
        (1, 3, 4),
        (1, 2, 16),
        (1, 1, 64),
        (0, 1, 4),
        (0, 0, 16),
    ];
    let (byte, field, constant) = BYTE_FIELD_CONSTANT[word % 8];
    (16 * field + word / 8 * 4 + byte, constant)
}

/// Runs one kernel and waits for it.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub fn run(gpu: &Gpu, call: &Call, params: PassParams, buffers: &[&Slice]) -> Result<()> {
    let uniform = gpu.params_buffer();
    let op = gpu.op(&gpu.pipelines(), call, &uniform, buffers)?;
    gpu.run_all(&uniform, params, [&op])
}

/// `acc[M, N]` of a packed matrix and int8 codes `[M, K]`, as a model has it: the GEMV kernel for one
/// token, the kernels of the GEMM plan for more.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub async fn multiply_async(
    gpu: &Gpu,
    plans: SumPlans,
    packed: &Packed,
    codes: &[i8],
    n_tokens: usize,
) -> Result<Vec<i32>> {
    let SumPlans { gemv, gemm } = plans;
    gemv.validate(gpu, packed.shape().k())?;
    gemm.validate(gpu, packed.layout(), packed.shape().k())?;
    if n_tokens > 1 {
        let call = |shard: Gemm| shard.call_for(gemm, n_tokens);
        return Ok(multiply_many_async(gpu, packed, codes, call).await?.1);
    }
    let variant = gemv.variant;
    let product = Product::upload(gpu, variant.gemv_encoding(), packed, codes)?;
    let call = kernels::gemv(gemv, packed.shape(), 0, product.tiles());
    product.run(gpu, &call, variant.gemv_inputs(product.inputs()), 1).await
}

/// The same with one of the kernels of many tokens, and its name.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub async fn multiply_many_async(
    gpu: &Gpu,
    packed: &Packed,
    codes: &[i8],
    call: impl FnOnce(Gemm) -> Call,
) -> Result<(&'static str, Vec<i32>)> {
    let layout = packed.layout();
    let product = Product::upload(gpu, gemm_encoding(layout), packed, codes)?;
    let call = call(product.gemm(layout));
    let inputs = gemm_inputs(call.kernel, product.inputs());
    let found = product.run(gpu, &call, inputs, product.max_tokens).await?;
    Ok((call.kernel.name, found))
}

/// A matrix and activations on the device.
struct Product {
    shape: MatShape,
    max_tokens: usize,
    words: Slice,
    codes: Slice,
    offset: Slice,
    code_sum: Slice,
    acc: Slice,
}

impl Product {
    fn upload(gpu: &Gpu, encoding: Encoding, packed: &Packed, codes: &[i8]) -> Result<Self> {
        let shape = packed.shape();
        let tokens = codes.chunks_exact(shape.k());
        let max_tokens = tokens.len();
        let sums: Vec<i32> = tokens.map(|token| code_sum(encoding, token)).collect();
        Ok(Self {
            shape,
            max_tokens,
            words: gpu.upload("w", packed.words())?,
            codes: gpu.upload("x", &encode_codes(encoding, codes, shape.k()))?,
            offset: gpu.upload("offset", &row_offsets(packed))?,
            code_sum: gpu.upload("code_sum", &sums)?,
            acc: gpu.storage("acc", max_tokens * kernels::padded_rows(shape.n()))?,
        })
    }

    fn tiles(&self) -> usize {
        kernels::padded_rows(self.shape.n()) / cpu_ref::layout::TILE_ROWS
    }

    /// With room for all tokens, from the first tile on.
    fn gemm(&self, layout: Layout) -> Gemm {
        let Self { shape, max_tokens, .. } = *self;
        Gemm { layout, shape, tile_base: 0, tiles: self.tiles(), max_tokens }
    }

    fn inputs(&self) -> SumInputs<'_> {
        let Self { words, codes, offset, code_sum, .. } = self;
        SumInputs { words, codes, offset, code_sum }
    }

    /// What a call finds for the first tokens.
    async fn run<'a>(
        &'a self,
        gpu: &Gpu,
        call: &Call,
        mut buffers: Vec<&'a Slice>,
        n_tokens: usize,
    ) -> Result<Vec<i32>> {
        buffers.push(&self.acc);
        let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
        run(gpu, call, params, &buffers)?;
        let n_pad = kernels::padded_rows(self.shape.n());
        let words = gpu.read_async(&self.acc, n_tokens * n_pad).await?;
        let rows = words.chunks_exact(n_pad).flat_map(|row| &row[..self.shape.n()]);
        Ok(rows.map(|&word| word as i32).collect())
    }
}

/// Activations `[M, K]` of a matrix with scales of groups.
#[derive(Debug, Clone, Copy)]
pub enum GroupInput<'a> {
    /// f32.
    Float(&'a [f32]),
    /// int8.
    Int8 {
        /// `[M, K]`.
        codes: &'a [i8],
        /// `[M, K/group]`.
        act_scales: &'a [f32],
    },
}

/// `y[M, N]` of a matrix with scales of groups: one token a lane for one token, four for more.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub async fn multiply_groups_async(
    gpu: &Gpu,
    matrix: &TernaryMatrix,
    input: GroupInput<'_>,
    n_tokens: usize,
) -> Result<Vec<f32>> {
    let method = Method::Groups { int8: matches!(input, GroupInput::Int8 { .. }) };
    let host = HostMatrix::pack(method, &[matrix], RowOrder::Natural)?;
    let on_gpu = GpuMatrix::upload(gpu, "w", &host)?;
    let Kind::Groups(shape, _) = on_gpu.kind else { panic!("a matrix with scales of groups") };
    let (n, k) = (shape.shape.n(), shape.shape.k());
    let y = gpu.storage("y", n_tokens * n)?;
    let tokens = if n_tokens == 1 { TokensPerLane::One } else { TokensPerLane::Four };
    let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
    for (tiles, words, scales) in &on_gpu.shards {
        let out = on_gpu.rows_out(tiles, 0, n);
        match input {
            GroupInput::Float(x) => {
                let call = kernels::group_gemv(shape, out, tokens, false);
                run(gpu, &call, params, &[words, scales, &gpu.upload("x", x)?, &y])?;
            }
            GroupInput::Int8 { codes, act_scales } => {
                let call = kernels::group_gemv_int8(shape, out, tokens);
                let codes = gpu.upload("x", &encode_codes(Encoding::Planes, codes, k))?;
                let act_scales = gpu.upload("act_scale", act_scales)?;
                run(gpu, &call, params, &[words, scales, &codes, &act_scales, &y])?;
            }
        }
    }
    Ok(bytemuck::cast_vec(gpu.read_async(&y, n_tokens * n).await?))
}

/// Row `token` of a table with scales of groups.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub async fn embed_groups_async(gpu: &Gpu, table: &TernaryMatrix, token: u32) -> Result<Vec<f32>> {
    let host = HostMatrix::pack(Method::Groups { int8: false }, &[table], RowOrder::Natural)?;
    let on_gpu = GpuMatrix::upload(gpu, "table", &host)?;
    let Kind::Groups(shape, _) = on_gpu.kind else { panic!("a matrix with scales of groups") };
    let tokens = gpu.upload("tokens", &[token])?;
    let out = gpu.storage("out", shape.shape.k())?;
    let params = PassParams { n_tokens: 1, ..PassParams::default() };
    for (tiles, words, scales) in &on_gpu.shards {
        let rows = on_gpu.rows_out(tiles, 0, 0);
        let call = kernels::group_embedding(shape, rows.base, rows.rows);
        run(gpu, &call, params, &[&tokens, words, scales, &out])?;
    }
    Ok(bytemuck::cast_vec(gpu.read_async(&out, shape.shape.k()).await?))
}

/// Positions of the check of attention: two blocks, the second in part; and tokens at their end.
const POSITIONS: usize = 70;
const ROWS: usize = 3;

/// Stores fixed pseudo-random keys and values in a model's cache and attends to them in every way.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub async fn check_attention_async(gpu: &Gpu, layout: KvLayout) -> Result<()> {
    let KvLayout { mut heads, format } = layout;
    if 4 * (2 * BLOCK * heads.kv * heads.dim) as u64 > gpu.max_binding() {
        // One key head stands for all where a binding does not hold two blocks of all.
        (heads.query, heads.kv) = (heads.query / heads.kv, 1);
    }
    let layout = KvLayout { heads, format };
    let mut random = Random::new(0x5EF0);
    let (kv_size, query_size) = (heads.kv * heads.dim, heads.query * heads.dim);
    let rows = [2.0, 5.0].map(|range| random.floats(POSITIONS * kv_size, range));
    let cache = TestCache::upload(gpu, layout, [&rows[0], &rows[1]], &[1, 0], 2)?;
    check_store(gpu, &cache, &rows).await?;
    let (mut stored, mut scales) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for (part, rows) in rows.iter().enumerate() {
        for head in rows.chunks_exact(heads.dim) {
            let head = store_head(head, format);
            stored[part].extend(head.values);
            scales[part].push(head.scale);
        }
    }
    let query = random.floats(ROWS * query_size, 3.0);
    let expected: Vec<f32> = query
        .chunks_exact(query_size)
        .zip(POSITIONS + 1 - ROWS..)
        .flat_map(|(query, seen)| {
            let [keys, values] = stored.each_ref().map(|rows| &rows[..seen * kv_size]);
            let [key, value] = scales.each_ref().map(|scales| &scales[..seen * heads.kv]);
            let cached = Cached { keys, values, scales: Some((key, value)) };
            cpu_ref::attention::attention(query, cached, heads)
        })
        .collect();
    // What products that are fused and a division that is not exact may change of values up to 5.
    let bound = 5.0 * (32.0 + heads.dim as f32) * f32::EPSILON;
    let tile = Attend::Tile(TileFor::adapter(&gpu.adapter));
    for (how, tokens) in [(tile, ROWS), (Attend::Whole, 1), (Attend::Blocks, 1)] {
        let last = (ROWS - tokens) * query_size;
        let found = attend_async(gpu, &cache, how, &query[last..], POSITIONS - tokens).await?;
        for (at, (&found, &expected)) in found.iter().zip(&expected[last..]).enumerate() {
            let is_close = (found - expected).abs() <= bound;
            if !is_close {
                let problem = format!("[{at}]: expected {expected}, found {found}");
                return Err(differs(gpu, how.kernel(), problem));
            }
        }
    }
    Ok(())
}

/// Stores what a cache was packed with on the host, and compares: codes may differ by a step, as a
/// division that is not exact allows, and scales in their last bits.
async fn check_store(gpu: &Gpu, cache: &TestCache, rows: &[Vec<f32>; 2]) -> Result<()> {
    let layout = cache.layout;
    let new = [gpu.upload("keys", &rows[0])?, gpu.upload("values", &rows[1])?];
    let lens = layout.block_words().map(|words| 2 * words);
    let out = [gpu.storage("k", lens[0])?, gpu.storage("v", lens[1])?, gpu.storage("s", lens[2])?];
    let buffers = [&new[0], &new[1], &cache.table, &out[0], &out[1], &out[2]];
    let call = kernels::kv_store(KvShard::whole(layout));
    let params = PassParams { n_tokens: POSITIONS as u32, ..PassParams::default() };
    run(gpu, &call, params, &buffers)?;
    // Of the second block only what was stored: the host packs zeros, with their scale.
    let is_int8 = layout.format == KvFormat::Int8;
    for (part, len) in lens.into_iter().enumerate().filter(|&(_, len)| len > 0) {
        let [found, expected] =
            [&out[part], &cache.parts[part]].map(|slice| gpu.read_async(slice, len));
        for (at, (found, expected)) in found.await?.into_iter().zip(expected.await?).enumerate() {
            let is_close = match part {
                2 => {
                    let [found, expected] = [found, expected].map(f32::from_bits);
                    found == 0.0 || (found - expected).abs() <= 4.0 * f32::EPSILON * expected
                }
                _ if is_int8 => {
                    let bytes = found.to_le_bytes().into_iter().zip(expected.to_le_bytes());
                    bytes.into_iter().all(|(a, b)| (a as i8).abs_diff(b as i8) <= 1)
                }
                _ => found == expected,
            };
            if !is_close {
                let problem = format!("[{at}]: expected {expected:#x}, found {found:#x}");
                return Err(differs(gpu, call.kernel.name, problem));
            }
        }
    }
    Ok(())
}

impl Attend {
    /// The kernel that does the work.
    fn kernel(self) -> &'static str {
        match self {
            Self::Whole => shader::ATTENTION.name,
            Self::Tile(_) => shader::ATTENTION_TILE.name,
            Self::Blocks => shader::ATTENTION_BLOCKS.name,
        }
    }
}

/// How a token's attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attend {
    /// `attention`; one token.
    Whole,
    /// `attention_tile`.
    Tile(TileFor),
    /// `attention_blocks` and `attention_merge`; one token.
    Blocks,
}

/// A layer's KV cache for a test: keys, values, scales, table.
pub struct TestCache {
    /// How it lies.
    pub layout: KvLayout,
    /// Keys, values and scales.
    pub parts: [Slice; 3],
    /// The sequence's blocks.
    pub table: Slice,
}

impl TestCache {
    /// Keys and values `[S, G, D]`, position `s` in block `table[s / 64]` of so many.
    ///
    /// # Errors
    /// [`Error::GpuLimit`] if they do not fit.
    pub fn upload(
        gpu: &Gpu,
        layout: KvLayout,
        rows: [&[f32]; 2],
        table: &[u32],
        blocks: usize,
    ) -> Result<Self> {
        let [keys, values, scales] = pack(layout, rows, table, blocks);
        let parts = [
            gpu.upload("keys", &keys)?,
            gpu.upload("values", &values)?,
            gpu.upload("scales", &scales)?,
        ];
        Ok(Self { layout, parts, table: gpu.upload("table", table)? })
    }

    /// What attention reads: query, keys, values, scales, table.
    pub fn inputs<'a>(&'a self, query: &'a Slice) -> [&'a Slice; 5] {
        let [keys, values, scales] = &self.parts;
        [query, keys, values, scales, &self.table]
    }
}

/// Attention of queries `[M, H, D]` at positions from `start` on.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub async fn attend_async(
    gpu: &Gpu,
    cache: &TestCache,
    how: Attend,
    query: &[f32],
    start: usize,
) -> Result<Vec<f32>> {
    let heads = cache.layout.heads;
    let n_tokens = query.len() / (heads.query * heads.dim);
    let params =
        PassParams { n_tokens: n_tokens as u32, start: start as u32, ..PassParams::default() };
    let len = query.len();
    let (query, out) = (gpu.upload("query", query)?, gpu.storage("out", len)?);
    let (shard, inputs) = (KvShard::whole(cache.layout), cache.inputs(&query));
    match how {
        Attend::Whole => {
            run(gpu, &kernels::attention(shard), params, &[&inputs[..], &[&out]].concat())?;
        }
        Attend::Tile(tile_for) => {
            let unused = [gpu.storage("unread", 1)?, gpu.storage("unwritten", 1)?];
            let after = [&unused[0], &out, &unused[1]];
            let call = kernels::attention_tile(shard, tile_for, false);
            run(gpu, &call, params, &[&inputs[..], &after].concat())?;
        }
        Attend::Blocks => {
            let words = kernels::partial_words(heads) * (start / BLOCK + 1);
            let partials = gpu.storage("partials", words)?;
            let call = kernels::attention_blocks(shard);
            run(gpu, &call, params, &[&inputs[..], &[&partials]].concat())?;
            run(gpu, &kernels::attention_merge(heads), params, &[&partials, &out])?;
        }
    }
    Ok(bytemuck::cast_vec(gpu.read_async(&out, len).await?))
}

/// What `quantize_absmax.wgsl` writes.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedWords {
    /// `[M, KC]` chunks, encoded.
    pub codes: Vec<u32>,
    /// `[M]`.
    pub act_scale: Vec<f32>,
    /// `[M]`.
    pub code_sum: Vec<i32>,
}

impl QuantizedWords {
    /// The code words of token `m`.
    pub fn token(&self, m: usize) -> &[u32] {
        let len = self.codes.len() / self.act_scale.len();
        &self.codes[m * len..][..len]
    }
}

/// Quantises `x[M, K]`.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub async fn quantize_async(
    gpu: &Gpu,
    encoding: Encoding,
    x: &[f32],
    n_tokens: usize,
) -> Result<QuantizedWords> {
    let k = x.len() / n_tokens;
    let len_words = n_tokens * k_chunks(k) * encoding.chunk_words();
    let x = gpu.upload("x", x)?;
    let codes = gpu.storage("codes", len_words)?;
    let act_scale = gpu.storage("act_scale", n_tokens)?;
    let code_sum = gpu.storage("code_sum", n_tokens)?;
    let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
    let call = kernels::quantize_absmax(k, encoding);
    run(gpu, &call, params, &[&x, &codes, &act_scale, &code_sum])?;
    Ok(QuantizedWords {
        codes: gpu.read_async(&codes, len_words).await?,
        act_scale: bytemuck::cast_vec(gpu.read_async(&act_scale, n_tokens).await?),
        code_sum: bytemuck::cast_vec(gpu.read_async(&code_sum, n_tokens).await?),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Cooperative, Variant};
    use super::*;
    use crate::wait::block_on;

    fn wrong_result() -> Error {
        let [device, kernel, problem] = ["gpu:0", "gemv", "wrong"].map(str::to_owned);
        Error::SelfTest { device, kernel, problem }
    }

    fn plan(variant: Variant) -> GemvPlan {
        variant.into()
    }

    #[test]
    fn a_preferred_plan_that_is_wrong_is_replaced_and_named() {
        let tuned = GemvPlan { slices: 4, fused: false, ..plan(Variant::PackedDot) };
        let other = plan(Variant::BitSerial);
        let order = vec![Variant::PackedDot, Variant::BitSerial];
        let mut sums = Sums::new(Plans::Preferred([other, tuned, other, tuned], order));
        let mut checks = Vec::new();
        for _layer in 0..2 {
            for (step, expected) in Step::ALL.into_iter().zip([Variant::BitSerial; 4]) {
                let check = async |plan: GemvPlan| {
                    checks.push(plan);
                    match plan.variant {
                        Variant::PackedDot => Err(wrong_result()),
                        _ => Ok(()),
                    }
                };
                let found = block_on(sums.plan(step, |_| true, check));
                assert_eq!(found.unwrap(), plan(expected));
            }
        }
        // Each plan is checked once: what was kept, the default, what took their place.
        assert_eq!(checks, [other, tuned, plan(Variant::PackedDot)]);
        assert_eq!(sums.refused.len(), 2);
        assert_eq!(sums.names().as_deref(), Some("gemv_planes (fused)"));
    }

    #[test]
    fn wrong_tiles_are_replaced_and_named() {
        let tiles = GemmPlan::tile(64, 32);
        let mut gemms = Gemms::new(GemmPlans { i2: tiles, ..GemmPlans::default() });
        let mut checks = Vec::new();
        let mut check = |wrong: Option<GemmPlan>, layout| {
            let check = async |plan| {
                checks.push((layout, plan));
                if wrong.is_none_or(|wrong| wrong == plan) { Err(wrong_result()) } else { Ok(()) }
            };
            block_on(gemms.plan(layout, check))
        };
        for _layer in 0..2 {
            assert_eq!(check(Some(tiles), Layout::I2).unwrap(), GemmPlan::FEW);
            assert_eq!(check(Some(tiles), Layout::Planes).unwrap(), GemmPlan::default());
        }
        let usual = (Layout::Planes, GemmPlan::default());
        assert_eq!(checks, [(Layout::I2, tiles), (Layout::I2, GemmPlan::FEW), usual]);
        assert_eq!(gemms.refused.len(), 1);
        // Cooperative matrices give way to the same tile without.
        let matrices = Cooperative { size: 16, subgroup: 32 };
        let [cooperative, _] = GemmPlan::all_of(matrices);
        let mut gemms = Gemms::new(GemmPlans::default().with(Layout::I2, cooperative));
        let check = async |plan: GemmPlan| match plan.cooperative {
            Some(_) => Err(wrong_result()),
            None => Ok(()),
        };
        let plan = block_on(gemms.plan(Layout::I2, check)).unwrap();
        assert_eq!(plan, GemmPlan { cooperative: None, ..cooperative });
        assert_eq!(gemms.refused.len(), 1);
        // Where nothing is right there is no kernel for a prompt.
        let mut gemms = Gemms::new(GemmPlans::default());
        let found = block_on(gemms.plan(Layout::I2, async |_| Err(wrong_result())));
        assert!(matches!(found, Err(Error::SelfTest { .. })));
    }

    #[test]
    fn plans_are_named_with_their_steps() {
        let split = GemvPlan { slices: 4, fused: false, ..plan(Variant::PackedDot) };
        let fused = plan(Variant::PackedDot);
        let mut sums = Sums::new(Plans::Preferred([fused, split, fused, fused], Vec::new()));
        assert_eq!(sums.names(), None);
        for step in Step::ALL {
            // There is no fused kernel for one of them.
            block_on(sums.plan(step, |_| step != Step::Down, async |_| Ok(()))).unwrap();
        }
        let names =
            "gemv_i2 (fused): qkv, gate_up; gemv_i2 (split, 4 slices): o; gemv_i2 (split): down";
        assert_eq!(sums.names().as_deref(), Some(names));
    }

    #[test]
    fn a_plan_that_is_asked_for_has_no_substitute() {
        let mut sums = Sums::new(Plans::Asked(plan(Variant::BitSerial)));
        let found = block_on(sums.plan(Step::O, |_| true, async |_| Err(wrong_result())));
        assert!(matches!(found, Err(Error::SelfTest { .. })));
        let order = Variant::ALL.to_vec();
        let mut sums = Sums::new(Plans::Preferred([plan(Variant::BitSerial); 4], order));
        let found = block_on(sums.plan(Step::O, |_| true, async |_| Err(wrong_result())));
        assert!(found.is_err());
        // A driver's failure is no wrong result.
        let lost = async |_| Err(Error::EmptyPrompt);
        assert!(matches!(block_on(sums.plan(Step::Qkv, |_| true, lost)), Err(Error::EmptyPrompt)));
    }
}
