//! Timing on a device: steps of a token on cold weights, copies, empty dispatches.

use std::collections::HashMap;
use web_time::{Duration, Instant};

use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS, k_chunks};

use super::super::buffer::Slice;
use super::super::device::{AdapterKind, Gpu};
use super::super::kernels::{
    self, Fused, Gemm, GemmPlan, GemvPlan, KvLayout, KvShard, LinearRows, SumInputs, gemm_encoding,
    gemm_inputs,
};
use super::super::readback::Staging;
use super::super::record::{Call, Op, Parameters, PassParams, Pipelines};
use super::super::self_test;
use super::{GemmShape, Step, StepShape, Track};
use crate::error::{Error, Result};
use crate::kv_cache::KvFormat;
use crate::layout::Layout;
use crate::random::Random;
use crate::shape::MatShape;
#[cfg(feature = "measure")]
use crate::wait::block_on;

/// Bytes of weights that take turns: more than the last-level caches that there are, 96 MiB on
/// discrete GPUs and 48 MiB on integrated ones, which is all that a page may ask of a phone. On a
/// software rasteriser only the path is tested.
fn rotated_bytes(kind: AdapterKind) -> u64 {
    match kind {
        AdapterKind::Software => 8 << 20,
        AdapterKind::Integrated => 96 << 20,
        _ if cfg!(target_family = "wasm") => 96 << 20,
        AdapterKind::Discrete | AdapterKind::Virtual | AdapterKind::Other => 256 << 20,
    }
}

/// Fewest copies of a matrix, and most: each of them has bind groups of its own.
const COPIES: (usize, usize) = (3, 96);
/// How long a pass should take, so that a clock's ticks do not count: a browser's are a tenth of a
/// millisecond, and it says a little later that a pass is complete.
const PASS: Duration = Duration::from_millis(if cfg!(target_family = "wasm") { 10 } else { 2 });
/// Most steps of a pass.
const MAX_STEPS: u32 = 512;
/// Timed passes; their median counts.
const PASSES: usize = 5;
/// Timed passes of a product of many tokens, which takes milliseconds.
const GEMM_PASSES: usize = 3;
/// A device sleeps until it has had something to do for a while.
const WARM_UP: Duration = Duration::from_millis(40);
/// Random words that the weights are filled with, again and again.
const NOISE_BYTES: u64 = 4 << 20;

/// Buffers and clocks of the measurements on one device.
pub(super) struct Bench<'a> {
    gpu: &'a Gpu,
    start: Instant,
    pipelines: Pipelines,
    uniform: wgpu::Buffer,
    params: PassParams,
    /// The uniform of the products of many tokens.
    gemm_uniform: wgpu::Buffer,
    /// Random words, in two buffers.
    weights: [Slice; 2],
    clock: Clock,
    is_warm: bool,
    /// What the check said of each plan: kernel and problem.
    checked: HashMap<GemvPlan, Option<(String, String)>>,
}

impl<'a> Bench<'a> {
    /// With room for the copies of each step's matrix; `start` is when the budget began.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails, or has no memory for it.
    pub async fn new(gpu: &'a Gpu, steps: &[StepShape], start: Instant) -> Result<Self> {
        let largest = steps.iter().map(|step| step_bytes(gpu, step)).max().unwrap_or_default();
        // Half of the copies in each buffer.
        let half = (rotated_bytes(gpu.adapter.kind) / 2).max(2 * (largest + 256));
        let half = half.min(gpu.max_binding()) & !255;
        let scope = gpu.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let weights = [(); 2].map(|()| gpu.storage("weights", half as usize / 4));
        if let Some(problem) = scope.pop().await {
            return Err(gpu.error("make room for measuring", problem.to_string()));
        }
        let [first, second] = weights;
        let weights = [first?, second?];
        fill(gpu, &weights).await?;
        let uniform = gpu.params_buffer();
        let params = PassParams { n_tokens: 1, ..PassParams::default() };
        gpu.queue.write_buffer(&uniform, 0, bytemuck::bytes_of(&params));
        let clock = Clock::new(gpu).await?;
        Ok(Self {
            gpu,
            start,
            pipelines: gpu.pipelines(),
            uniform,
            params,
            gemm_uniform: gpu.params_buffer(),
            weights,
            clock,
            is_warm: false,
            checked: HashMap::new(),
        })
    }

    /// Who times.
    pub fn clock(&self) -> &'static str {
        if self.clock.queries.is_some() { "timestamps" } else { "wall" }
    }

    /// Bytes of weights that take turns.
    pub fn rotated_bytes(&self) -> u64 {
        self.weights.iter().map(Slice::len_bytes).sum()
    }

    /// Bytes of weights that a measured step reads: all, or what fits a binding.
    pub fn step_bytes(&self, step: &StepShape) -> u64 {
        step_bytes(self.gpu, step)
    }

    /// Rows of a measured product of many tokens: all, or what fits a binding.
    pub fn gemm_rows(&self, product: &GemmShape) -> usize {
        self.gemm_tiles(product) * TILE_ROWS
    }

    fn gemm_tiles(&self, product: &GemmShape) -> usize {
        let shape = product.shape;
        let tile_bytes = (k_chunks(shape.k()) * TILE_ROWS * PIECE_WORDS * 4) as u64;
        let room = usize::try_from(self.weights[0].len_bytes() / tile_bytes).unwrap_or(usize::MAX);
        let row_bytes = 4 * TILE_ROWS as u64 * self.gemm_tokens() as u64;
        let fit = usize::try_from(self.gpu.max_binding() / row_bytes).unwrap_or(usize::MAX);
        (shape.n() / TILE_ROWS).min(room).min(fit).max(1)
    }

    /// The operation of a product of many tokens.
    fn gemm_op(&self, product: &GemmShape, plan: GemmPlan) -> Result<Op> {
        let (gpu, layout, k) = (self.gpu, product.layout, product.shape.k());
        let (tiles, max_tokens) = (self.gemm_tiles(product), self.gemm_tokens());
        let shape = MatShape::new(tiles * TILE_ROWS, k)?;
        let tile_words = k_chunks(k) * TILE_ROWS * PIECE_WORDS;
        let words = self.weights[0].words(0, tiles * tile_words);
        let n_codes = max_tokens * gemm_encoding(layout).chunk_words() * k_chunks(k);
        let codes = self.weights[1].words(0, n_codes.min(self.weights[1].len_bytes() as usize / 4));
        let offset = gpu.storage("offset", shape.n())?;
        let code_sum = gpu.storage("code_sum", max_tokens)?;
        let acc = gpu.storage("acc", max_tokens * shape.n())?;
        let inputs =
            SumInputs { words: &words, codes: &codes, offset: &offset, code_sum: &code_sum };
        let gemm = Gemm { layout, shape, tile_base: 0, tiles, max_tokens };
        let call = gemm.call_for(plan, max_tokens);
        let buffers = [gemm_inputs(call.kernel, inputs), vec![&acc]].concat();
        gpu.op(&self.pipelines, &call, &self.gemm_uniform, &buffers)
    }

    fn left(&self, budget: Duration) -> bool {
        self.start.elapsed() < budget
    }

    /// Bytes read and written by copies from one buffer to the other, 10⁹ a second.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub async fn copy_gb_s(&self, budget: Duration) -> Result<Option<f64>> {
        let bytes = self.weights[0].len_bytes();
        let copies = async |count: u32| {
            let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
            for i in 0..count as usize {
                let [from, to] = [&self.weights[i % 2], &self.weights[(i + 1) % 2]];
                encoder.copy_buffer_to_buffer(&from.buffer, 0, &to.buffer, 0, bytes);
            }
            let commands = encoder.finish();
            let begin = Instant::now();
            self.gpu.queue.submit([commands]);
            self.gpu.done("measure a copy").await?;
            Ok::<_, Error>(begin.elapsed().saturating_sub(self.clock.empty))
        };
        if !self.left(budget) {
            return Ok(None);
        }
        let first = copies(1).await?.max(Duration::from_nanos(1));
        let count = passes_for(10 * PASS, first, 64);
        let mut times = Vec::new();
        while times.len() < PASSES && self.left(budget) {
            times.push(copies(count).await?);
        }
        let time = median(&mut times).filter(|time| !time.is_zero());
        Ok(time.map(|time| (2 * bytes * u64::from(count)) as f64 / time.as_secs_f64() / 1e9))
    }

    /// What a dispatch costs that waits for the one before it and adds 64 numbers, in microseconds:
    /// the difference between many and twice as many.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub async fn dispatch_us(&self, budget: Duration) -> Result<Option<f64>> {
        const N: usize = 64;
        const COUNT: usize = 256;
        let zeros = |what| self.gpu.storage(what, N);
        let (a, b, acc, scale) = (zeros("a")?, zeros("b")?, zeros("acc")?, zeros("scale")?);
        let call = kernels::residual_add(N, &LinearRows::sums(N));
        let op = |from, to| self.op(&call, &[from, &acc, &scale, &scale, to]);
        let ops = [op(&a, &b)?, op(&b, &a)?];
        let many = |count| ops.iter().cycle().take(count);
        let mut times = Vec::new();
        for pass in 0..=PASSES {
            if !self.left(budget) {
                break;
            }
            let once = self.clock.time(self.gpu, &self.params, many(COUNT)).await?;
            let twice = self.clock.time(self.gpu, &self.params, many(2 * COUNT)).await?;
            if pass > 0 {
                times.push(twice.saturating_sub(once));
            }
        }
        Ok(median(&mut times).map(|time| time.as_secs_f64() * 1e6 / COUNT as f64))
    }

    fn op(&self, call: &Call, buffers: &[&Slice]) -> Result<Op> {
        self.gpu.op(&self.pipelines, call, &self.uniform, buffers)
    }

    /// Where the copies of a matrix lie.
    fn copies(&self, len_bytes: u64) -> Vec<Slice> {
        let mut copies = Vec::new();
        for half in &self.weights {
            let mut at = 0;
            while at + len_bytes <= half.len_bytes() && copies.len() < COPIES.1 {
                copies.push(half.words(at as usize / 4, len_bytes as usize / 4));
                // An offset that every adapter may bind.
                at += len_bytes.next_multiple_of(256);
            }
        }
        copies
    }

    /// The operations of a step: those that all copies share and that come first, one of each copy,
    /// and those that come after.
    fn step_ops(&self, step: &StepShape, plan: GemvPlan) -> Result<StepOps> {
        let (gpu, k, rows) = (self.gpu, step.shape.k(), step.rows());
        let n_pad = kernels::padded_rows(rows);
        let tiles = tiles(gpu, step);
        let mut random = Random::new(1);
        let x = gpu.upload("x", &random.floats(k, 1.0))?;
        let norm = gpu.upload("norm", &random.floats(k, 1.0))?;
        let out = Outputs::new(gpu, step)?;
        let copies = self.copies(step_bytes(gpu, step));
        if plan.fused {
            // An offset and a scale for each row.
            let row_words = gpu.storage("rows", 2 * n_pad)?;
            let eps = step.norm.then_some(1e-5);
            let fused = Fused { plan, k, norm: eps, tiles: (0, tiles) };
            let (call, after) = match step.step {
                Step::Qkv => (fused.qkv(cache(step)), out.qkv().to_vec()),
                Step::GateUp => (fused.gated(step.shape.n() / 2, step.act), vec![&out.result]),
                Step::O | Step::Down => {
                    (fused.residual(step.shape.n()), vec![&out.hidden, &out.result])
                }
            };
            let matrix = copies
                .iter()
                .map(|w| self.op(&call, &[&[w, &x, &norm, &row_words], after.as_slice()].concat()));
            let matrix = matrix.collect::<Result<_>>()?;
            return Ok(StepOps { before: Vec::new(), matrix, after: Vec::new() });
        }
        let normed = gpu.storage("normed", k)?;
        let encoding = plan.variant.gemv_encoding();
        let codes = gpu.storage("codes", encoding.chunk_words() * k_chunks(k))?;
        let [act_scale, code_sum] = [gpu.storage("act_scale", 1)?, gpu.storage("code_sum", 1)?];
        let [offset, weight_scale] = [gpu.storage("offset", n_pad)?, gpu.storage("scale", n_pad)?];
        let acc = gpu.storage("acc", n_pad)?;
        let mut before = Vec::new();
        if step.norm {
            before.push(self.op(&kernels::rmsnorm(k, 1e-5, false), &[&x, &norm, &normed])?);
        }
        let x = if step.norm { &normed } else { &x };
        let call = kernels::quantize_absmax(k, encoding);
        before.push(self.op(&call, &[x, &codes, &act_scale, &code_sum])?);
        let call = kernels::gemv(plan, MatShape::new(rows, k)?, 0, tiles);
        let matrix = copies.iter().map(|words| {
            let inputs = SumInputs { words, codes: &codes, offset: &offset, code_sum: &code_sum };
            self.op(&call, &[plan.variant.gemv_inputs(inputs), vec![&acc]].concat())
        });
        let matrix = matrix.collect::<Result<_>>()?;
        let lines = LinearRows { runs: vec![(rows, false)], act_stride: 0, order: step.order };
        let scaled = [&acc, &weight_scale, &act_scale];
        let (call, buffers) = match step.step {
            Step::Qkv => (kernels::rope(step.heads, &lines), [&scaled[..], &out.qkv()].concat()),
            Step::GateUp => {
                let call = kernels::gated_activation(step.shape.n() / 2, step.act, &lines);
                (call, [&scaled[..], &[&out.result]].concat())
            }
            Step::O | Step::Down => {
                let call = kernels::residual_add(step.shape.n(), &lines);
                (call, [&[&out.hidden], &scaled[..], &[&out.result]].concat())
            }
        };
        Ok(StepOps { before, matrix, after: vec![self.op(&call, &buffers)?] })
    }
}

impl Track for Bench<'_> {
    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    async fn check(&mut self, plan: GemvPlan) -> Result<()> {
        // The check of a fused plan runs the split kernels too.
        let fused = GemvPlan { fused: true, ..plan };
        if let Some(None) = self.checked.get(&fused) {
            return Ok(());
        }
        if !self.checked.contains_key(&plan) {
            let problem = match self_test::check_async(self.gpu, plan).await {
                Ok(()) => None,
                Err(Error::SelfTest { kernel, problem, .. }) => Some((kernel, problem)),
                Err(error) => return Err(error),
            };
            self.checked.insert(plan, problem);
        }
        match &self.checked[&plan] {
            None => Ok(()),
            Some((kernel, problem)) => Err(Error::SelfTest {
                device: format!("gpu:{} {}", self.gpu.adapter.index, self.gpu.adapter.name),
                kernel: kernel.clone(),
                problem: problem.clone(),
            }),
        }
    }

    async fn measure(
        &mut self,
        step: &StepShape,
        plan: GemvPlan,
        end: Duration,
    ) -> Result<Option<Duration>> {
        let ops = self.step_ops(step, plan)?;
        let mut at = 0;
        let mut pass = async |count: u32| {
            let first = at;
            at += count as usize;
            let steps = (first..at).flat_map(|i| ops.step(i));
            self.clock.time(self.gpu, &self.params, steps).await
        };
        // The first pass pays for what is done once; it only says how many steps to take.
        let mut one = pass(1).await?;
        let warm_since = Instant::now();
        while !self.is_warm && warm_since.elapsed() < WARM_UP && self.start.elapsed() < end {
            let count = passes_for(PASS, one, MAX_STEPS);
            one = pass(count).await? / count;
        }
        self.is_warm = true;
        let count = passes_for(PASS, one, MAX_STEPS).max(COPIES.0 as u32);
        let mut times = Vec::new();
        while times.len() < PASSES && self.start.elapsed() + count * one < end {
            times.push(pass(count).await?);
        }
        // A clock that saw nothing has measured nothing.
        Ok(median(&mut times).map(|time| time / count).filter(|time| !time.is_zero()))
    }

    async fn check_gemm(&mut self, layout: Layout, plan: GemmPlan) -> Result<()> {
        self_test::check_gemm_async(self.gpu, layout, plan).await
    }

    async fn measure_gemm(
        &mut self,
        product: &GemmShape,
        plan: GemmPlan,
        end: Duration,
    ) -> Result<Option<Duration>> {
        let op = self.gemm_op(product, plan)?;
        let params = PassParams { n_tokens: self.gemm_tokens() as u32, ..self.params };
        self.gpu.queue.write_buffer(&self.gemm_uniform, 0, bytemuck::bytes_of(&params));
        let pass = async |count: u32| {
            let ops = std::iter::repeat_n(&op, count as usize);
            self.clock.time(self.gpu, &params, ops).await
        };
        // The first pass pays for what is done once; it only says how many products to take.
        let one = pass(1).await?;
        let count = passes_for(PASS, one, MAX_STEPS);
        let mut times = Vec::new();
        while times.len() < GEMM_PASSES && self.start.elapsed() + count * one < end {
            times.push(pass(count).await?);
        }
        Ok(median(&mut times).map(|time| time / count).filter(|time| !time.is_zero()))
    }

    fn gemm_tokens(&self) -> usize {
        match self.gpu.adapter.kind {
            AdapterKind::Software => 64,
            _ => 256,
        }
    }
}

/// How many of something that takes `one` take `whole`; at least one.
fn passes_for(whole: Duration, one: Duration, max: u32) -> u32 {
    let count = whole.as_nanos().div_ceil(one.as_nanos().max(1));
    u32::try_from(count).unwrap_or(max).clamp(1, max)
}

/// The middle one; `None` of none.
fn median(times: &mut [Duration]) -> Option<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}

/// The operations of a step, one matrix for each copy of its weights.
struct StepOps {
    before: Vec<Op>,
    matrix: Vec<Op>,
    after: Vec<Op>,
}

impl StepOps {
    /// The step on copy `i`, counted round and round.
    fn step(&self, i: usize) -> impl Iterator<Item = &Op> {
        let matrix = &self.matrix[i % self.matrix.len()];
        self.before.iter().chain([matrix]).chain(&self.after)
    }
}

/// What a step reads besides its matrix and its input, and what it writes.
struct Outputs {
    /// Of one position.
    angles: Slice,
    query: Slice,
    keys: Slice,
    values: Slice,
    hidden: Slice,
    result: Slice,
}

impl Outputs {
    fn new(gpu: &Gpu, step: &StepShape) -> Result<Self> {
        let heads = step.heads;
        let [keys, values, _] = cache(step).layout.block_words();
        Ok(Self {
            angles: gpu.storage("angles", heads.dim)?,
            query: gpu.storage("query", heads.query * heads.dim)?,
            keys: gpu.storage("keys", keys)?,
            values: gpu.storage("values", values)?,
            hidden: gpu.storage("hidden", step.shape.n())?,
            result: gpu.storage("result", step.shape.n())?,
        })
    }

    /// As `rope` and `fused_qkv` bind them.
    fn qkv(&self) -> [&Slice; 4] {
        [&self.angles, &self.query, &self.keys, &self.values]
    }
}

/// A cache of one block: the format changes a few stores.
fn cache(step: &StepShape) -> KvShard {
    KvShard::whole(KvLayout { heads: step.heads, format: KvFormat::F32 })
}

/// Bytes of a tile: all layouts of ternary matrices have pieces of 16 bytes.
fn tile_bytes(step: &StepShape) -> u64 {
    (k_chunks(step.shape.k()) * TILE_ROWS * PIECE_WORDS * 4) as u64
}

/// Tiles that are measured: those of the first shard, if a binding does not hold all of them.
fn tiles(gpu: &Gpu, step: &StepShape) -> usize {
    let fit = usize::try_from(gpu.max_binding() / tile_bytes(step)).unwrap_or(usize::MAX);
    // Tiles of gate and up stay together.
    step.tiles().min(if fit > 1 { fit - fit % 2 } else { 1 })
}

/// Bytes of weights that a measured step reads.
fn step_bytes(gpu: &Gpu, step: &StepShape) -> u64 {
    tiles(gpu, step) as u64 * tile_bytes(step)
}

/// Bytes read and written by copies of `len_bytes` between two buffers, 10⁹ a second: the fastest of
/// some passes.
///
/// # Errors
/// [`Error::Gpu`] if the driver fails, or has no memory for it.
#[cfg(feature = "measure")]
pub(crate) fn copy_gb_s(gpu: &Gpu, len_bytes: u64, passes: usize) -> Result<f64> {
    let scope = gpu.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let len_words = usize::try_from(len_bytes / 4).unwrap_or(usize::MAX);
    let buffers = [(); 2].map(|()| gpu.storage("copied", len_words));
    if let Some(problem) = pollster::block_on(scope.pop()) {
        return Err(gpu.error("make room for measuring", problem.to_string()));
    }
    let [a, b] = buffers;
    let buffers = [a?, b?];
    block_on(fill(gpu, &buffers))?;
    let empty = block_on(Clock::new(gpu))?.empty;
    let copies = |count: u32| {
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        for i in 0..count as usize {
            let [from, to] = [&buffers[i % 2], &buffers[(i + 1) % 2]];
            encoder.copy_buffer_to_buffer(&from.buffer, 0, &to.buffer, 0, from.size);
        }
        let commands = encoder.finish();
        let begin = Instant::now();
        gpu.queue.submit([commands]);
        gpu.wait("measure a copy")?;
        Ok::<_, Error>(begin.elapsed().saturating_sub(empty).max(Duration::from_nanos(1)))
    };
    let count = passes_for(10 * PASS, copies(1)?, 64);
    let mut fastest = Duration::MAX;
    for _ in 0..passes {
        fastest = fastest.min(copies(count)?);
    }
    Ok((2 * buffers[0].size * u64::from(count)) as f64 / fastest.as_secs_f64() / 1e9)
}

/// Fills buffers with random words.
async fn fill(gpu: &Gpu, buffers: &[Slice]) -> Result<()> {
    let mut random = Random::new(2);
    let words: Vec<u64> = (0..NOISE_BYTES / 8).map(|_| random.bits()).collect();
    let noise = gpu.upload("noise", &words)?;
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    for buffer in buffers {
        for at in (0..buffer.size).step_by(NOISE_BYTES as usize) {
            let size = NOISE_BYTES.min(buffer.size - at);
            encoder.copy_buffer_to_buffer(&noise.buffer, 0, &buffer.buffer, at, size);
        }
    }
    gpu.queue.submit([encoder.finish()]);
    gpu.done("make room for measuring").await
}

/// Times a pass: on the device where it can, else on the host.
struct Clock {
    queries: Option<Queries>,
    /// What submitting nothing and waiting for it takes on the host.
    empty: Duration,
}

/// Two times, and the way back to the host.
struct Queries {
    set: wgpu::QuerySet,
    resolved: Slice,
    staging: Staging,
    /// Nanoseconds a tick.
    period: f64,
}

impl Clock {
    async fn new(gpu: &Gpu) -> Result<Self> {
        const LEN_BYTES: u64 = 16;
        let queries = gpu.has_timestamps().then(|| {
            let set = gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("times"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            });
            let buffer = gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("times"),
                size: LEN_BYTES,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            Queries {
                set,
                resolved: Slice { buffer, offset: 0, size: LEN_BYTES, is_weights: false },
                staging: gpu.staging(LEN_BYTES as usize / 4),
                period: f64::from(gpu.queue.get_timestamp_period()),
            }
        });
        let host = Self { queries: None, empty: Duration::ZERO };
        let params = PassParams::default();
        let mut times = Vec::new();
        for _ in 0..2 * PASSES {
            times.push(host.time(gpu, &params, []).await?);
        }
        // The least of them: what is taken off should never be more than there was.
        let empty = times.into_iter().min().unwrap_or_default();
        Ok(Self { queries, empty })
    }

    /// Runs operations in one pass.
    async fn time<'a>(
        &self,
        gpu: &Gpu,
        params: &PassParams,
        ops: impl IntoIterator<Item = &'a Op>,
    ) -> Result<Duration> {
        let writes = self.queries.as_ref().map(|queries| wgpu::ComputePassTimestampWrites {
            query_set: &queries.set,
            beginning_of_pass_write_index: Some(0),
            end_of_pass_write_index: Some(1),
        });
        let mut recording = gpu.begin_timed_recording(writes);
        for op in ops {
            recording.dispatch(gpu, op, &Parameters { values: *params, slot: 0 });
        }
        let commands = recording.finish(|encoder| {
            if let Some(Queries { set, resolved, staging, .. }) = &self.queries {
                encoder.resolve_query_set(set, 0..2, &resolved.buffer, 0);
                staging.copy_from(encoder, resolved, 0, 4);
            }
        });
        let begin = Instant::now();
        gpu.queue.submit([commands]);
        gpu.done("measure kernels").await?;
        let elapsed = begin.elapsed();
        let host = elapsed.saturating_sub(self.empty);
        let Some(queries) = &self.queries else { return Ok(host) };
        let ticks = gpu.read_staging_async(&queries.staging, 4, |words| {
            let at = |i: usize| u64::from(words[i]) | u64::from(words[i + 1]) << 32;
            at(2).checked_sub(at(0))
        });
        let ticks = ticks.await?;
        let device =
            ticks.map(|ticks| Duration::from_nanos((ticks as f64 * queries.period) as u64));
        // Some drivers' timestamps are no times: they stand still, or run ahead of the host.
        Ok(device.filter(|time| !time.is_zero() && *time <= elapsed).unwrap_or(host))
    }
}
