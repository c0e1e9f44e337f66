//! The GPU backend, over wgpu.
//!
//! Everything is paid at load: pipelines, bind groups, activations, the KV cache. A forward pass is
//! one command encoder, one compute pass and one submit; greedy decoding reads back a token id.
//! Hidden states ping-pong between two buffers, and no kernel reads a buffer it writes.

pub mod account;
mod buffer;
mod device;
pub mod kernels;
mod matrix;
mod readback;
mod record;
pub mod self_test;
pub mod shader;

pub use buffer::Slice;
pub use device::{AdapterDescription, AdapterKind, Capabilities, Gpu, ResourceCounts, adapters};
pub use kernels::{GemvPlan, Variant};
pub use matrix::row_offsets;
pub use record::{Call, Op, PassParams, Pipelines, Rows, Specialised, WeightsRead, WorkDone};

use cpu_ref::layout::TILE_ROWS;
use cpu_ref::rope;

use super::{Backend, Batch, DeviceInfo, LoadOptions, OnProgress, Output, Progress, Tap, Want};
use crate::config::{Activations, ModelConfig};
use crate::error::{Error, Result};
use crate::shape::MatShape;
use crate::weights::{LayerWeights, Table, TernaryMatrix, WeightScale, WeightSource};
use kernels::{Fused, LinearRows, Rotate, RowOrder, TokensPerLane, padded_rows};
use matrix::{GpuLinear, GpuMatrix, GpuRotation, GpuRun, GpuTable, GpuTableData, HostLinear, Kind};
use readback::Staging;
use record::Recording;

/// The greedy token of NaN logits, as `argmax.wgsl` writes it.
const NAN_TOKEN: u32 = u32::MAX;

/// A model on a GPU.
pub struct GpuBackend {
    device: DeviceInfo,
    config: ModelConfig,
    max_batch: usize,
    capacity: usize,
    layers: Vec<LayerOps>,
    embed: Vec<Op>,
    head: Head,
    argmax: Op,
    buffers: Buffers,
    batch: PassParams,
    want: Want,
    /// Which of the two hidden buffers the last recorded step wrote.
    current_hidden: usize,
    recording: Option<Recording>,
    gpu: Gpu,
}

/// Activations and what is read back, for `max_batch` tokens.
struct Buffers {
    params: wgpu::Buffer,
    tokens: Slice,
    /// The residual stream at the start of a layer, and between its halves.
    hidden: [Slice; 2],
    normed: Slice,
    /// A matrix's own norm of its input, and its rotation.
    inner: Slice,
    rotated: Slice,
    codes: Slice,
    /// One a token, for each run of a linear layer; or one a group and token.
    act_scale: Slice,
    code_sum: Slice,
    acc: Slice,
    /// Q, K and V heads after their norms.
    heads: Slice,
    query: Slice,
    attended: Slice,
    gated: Slice,
    logits: Slice,
    token: Slice,
    token_staging: Staging,
    logits_staging: Staging,
}

/// A matrix step as it is recorded for one token and for many.
#[derive(Clone)]
struct Matmul {
    gemv: Vec<Op>,
    gemm: Vec<Op>,
}

/// The dispatches of one layer's five steps.
#[derive(Clone)]
struct LayerOps {
    qkv: Step,
    attend: Op,
    project_out: Step,
    gate_up: Step,
    down: Step,
}

/// A step around matrices that read one vector: what makes the vector, each run's own preparation
/// and matrix, what comes after.
#[derive(Clone)]
struct Step {
    before: Vec<Op>,
    runs: Vec<(Vec<Op>, Matmul)>,
    after: Vec<Op>,
    /// The whole step for one token, one dispatch a shard; empty where no such kernel takes it.
    fused: Vec<Op>,
}

/// The final norm and the table that makes logits.
struct Head {
    before: Vec<Op>,
    table: Matmul,
}

/// Makes the operations of a model.
struct Builder<'a> {
    gpu: &'a Gpu,
    pipelines: Pipelines,
    config: &'a ModelConfig,
    max_batch: usize,
    /// Whether matrices with scales of groups get int8 activations.
    int8: bool,
    methods: self_test::Methods<'a>,
    buffers: &'a Buffers,
}

impl GpuBackend {
    /// Loads a model on an open device with the best plan that passes its exactness check there, or
    /// with the given one. Matrices with scales of groups have one kernel, which is checked too.
    ///
    /// # Errors
    /// If a tensor is malformed, the adapter's limits are too small, the kernels are wrong on this
    /// adapter, or the model has what they do not cover: heads of more than 256 values, rotations in
    /// blocks of more than 4096.
    pub fn load(
        source: &dyn WeightSource,
        gpu: Gpu,
        plan: Option<GemvPlan>,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        let config = source.config().clone();
        let capacity = options.capacity(&config)?;
        if config.head_dim > kernels::MAX_HEAD_DIM {
            return Err(Error::Dimension {
                name: "head_dim on a GPU",
                found: config.head_dim,
                max: kernels::MAX_HEAD_DIM,
            });
        }
        let int8 = options.activations(&config)? == Activations::Int8Group;
        let max_batch = options.max_batch;
        let buffers = Buffers::new(&gpu, &config, max_batch)?;
        let mut builder = Builder {
            gpu: &gpu,
            pipelines: Pipelines::default(),
            config: &config,
            max_batch,
            int8,
            methods: self_test::Methods::new(&gpu, plan),
            buffers: &buffers,
        };
        let inv_freq = source.frequencies()?;
        let angles: Vec<[f32; 2]> = (0..capacity)
            .flat_map(|position| {
                let (cos, sin) = rope::angles(position, &inv_freq);
                cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin])
            })
            .collect();
        let angles = gpu.upload("rope angles", &angles)?;
        let total = config.num_hidden_layers;
        let mut layers = Vec::with_capacity(total);
        for index in 0..total {
            progress(Progress { done: index, total });
            // Layers have the same shapes, and a dry device holds no weights.
            if let Some(first) = layers.first().filter(|_| gpu.is_dry()) {
                layers.push(LayerOps::clone(first));
                continue;
            }
            let cache = [(); 2].map(|()| gpu.storage("KV cache", capacity * config.kv_size()));
            let [keys, values] = cache;
            let weights = source.layer(index)?;
            layers.push(builder.layer(&weights, index, &angles, &keys?, &values?)?);
        }
        progress(Progress { done: total, total });
        let gemv = builder.methods.names();
        let embedding = builder.table("embedding", &source.embedding()?)?;
        let lm_head = source.lm_head()?.map(|table| builder.table("lm_head", &table));
        let lm_head = lm_head.transpose()?;
        let final_norm = gpu.upload_weights("final norm", &source.final_norm()?)?;
        let embed = builder.embed(&embedding)?;
        let head = builder.head(lm_head.as_ref().unwrap_or(&embedding), &final_norm)?;
        let b = &buffers;
        let argmax = builder.op(&kernels::argmax(config.vocab_size), &[&b.logits, &b.token])?;
        // Frees the staging memory of what was uploaded last.
        gpu.queue.submit([]);
        gpu.wait("load the model")?;
        let adapter = &gpu.adapter;
        let device = DeviceInfo {
            name: format!("gpu:{}", adapter.index),
            description: adapter.to_string(),
            gemv,
        };
        Ok(Self {
            device,
            max_batch,
            capacity,
            layers,
            embed,
            head,
            argmax,
            buffers,
            batch: PassParams::default(),
            want: Want::Nothing,
            current_hidden: 0,
            recording: None,
            gpu,
            config,
        })
    }

    /// Driver objects of the device this model is on.
    pub fn resource_counts(&self) -> ResourceCounts {
        self.gpu.resource_counts()
    }

    /// What the device was given to do since it was opened.
    pub fn work_done(&self) -> WorkDone {
        self.gpu.work_done()
    }

    /// The device this model is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Records a step around matrices.
    fn record_step(&mut self, layer: usize, step: impl Fn(&LayerOps) -> &Step) {
        let Step { before, runs, after, fused } = step(&self.layers[layer]);
        let n_tokens = self.batch.n_tokens;
        if n_tokens == 1 && !fused.is_empty() {
            return record(&self.gpu, &mut self.recording, &self.batch, fused);
        }
        let runs =
            runs.iter().flat_map(|(before, matmul)| before.iter().chain(matmul.ops(n_tokens)));
        let ops = before.iter().chain(runs).chain(after);
        record(&self.gpu, &mut self.recording, &self.batch, ops);
    }

    /// Ends the pass, lets `copies` add to the encoder, and submits.
    fn submit(&mut self, copies: impl FnOnce(&mut wgpu::CommandEncoder, &Buffers)) {
        let recording = self.recording.take().expect("begin opens the pass");
        recording.submit(&self.gpu, |encoder| copies(encoder, &self.buffers));
    }
}

/// Records operations into the open pass.
fn record<'a>(
    gpu: &Gpu,
    recording: &mut Option<Recording>,
    batch: &PassParams,
    ops: impl IntoIterator<Item = &'a Op>,
) {
    let recording = recording.as_mut().expect("the pass is open between begin and finish");
    for op in ops {
        recording.dispatch(gpu, op, batch);
    }
}

impl Matmul {
    fn ops(&self, n_tokens: u32) -> &[Op] {
        if n_tokens == 1 { &self.gemv } else { &self.gemm }
    }
}

/// Activation scales of one run of a linear layer: its slot can be bound by itself.
fn act_stride(max_batch: usize) -> usize {
    // 256 bytes, the largest offset alignment there is.
    max_batch.next_multiple_of(64)
}

impl Buffers {
    fn new(gpu: &Gpu, config: &ModelConfig, max_batch: usize) -> Result<Self> {
        let hidden = config.hidden_size;
        let widest_in = hidden.max(config.query_size()).max(config.intermediate_size);
        // Every matrix may be a run of its own, which starts at a tile.
        let heads = padded_rows(config.query_size()) + 2 * padded_rows(config.kv_size());
        let gate_up = 2 * padded_rows(config.intermediate_size);
        let widest_out = padded_rows(hidden).max(heads).max(gate_up);
        let f32s = |what, per_token: usize| gpu.storage(what, per_token * max_batch);
        Ok(Self {
            params: gpu.params_buffer(),
            tokens: f32s("tokens", 1)?,
            hidden: [f32s("hidden", hidden)?, f32s("hidden", hidden)?],
            normed: f32s("normed", widest_in)?,
            inner: f32s("normed", widest_in)?,
            rotated: f32s("rotated", widest_in)?,
            codes: f32s("codes", widest_in.next_multiple_of(64) / 4)?,
            act_scale: {
                let of_runs = LinearRows::MAX_RUNS * act_stride(max_batch);
                let of_groups = widest_in.div_ceil(64) * max_batch;
                gpu.storage("act_scale", of_runs.max(of_groups))?
            },
            code_sum: f32s("code_sum", 1)?,
            acc: f32s("acc", widest_out)?,
            heads: f32s("heads", if config.has_head_norms() { heads } else { 1 })?,
            query: f32s("query", config.query_size())?,
            attended: f32s("attended", config.query_size())?,
            gated: f32s("gated", config.intermediate_size)?,
            logits: f32s("logits", config.vocab_size)?,
            token: gpu.storage("token", 1)?,
            token_staging: gpu.staging(1),
            logits_staging: gpu.staging(config.vocab_size),
        })
    }
}

impl Builder<'_> {
    fn op(&self, call: &Call, buffers: &[&Slice]) -> Result<Op> {
        self.gpu.op(&self.pipelines, call, &self.buffers.params, buffers)
    }

    /// Uploads a table.
    fn table(&mut self, what: &str, table: &Table) -> Result<GpuTable> {
        let table = GpuTable::upload(self.gpu, what, table)?;
        if let GpuTableData::Groups(..) = table.data {
            self.methods.groups(false)?;
        }
        Ok(table)
    }

    fn embed(&self, table: &GpuTable) -> Result<Vec<Op>> {
        let b = self.buffers;
        let k = self.config.hidden_size;
        let out = if table.rotation.is_some() { &b.rotated } else { &b.hidden[0] };
        let mut ops = Vec::new();
        match &table.data {
            GpuTableData::Dense(shards) => {
                for rows in shards {
                    let [units, scale, min] = &rows.buffers;
                    let call = kernels::embedding(rows.shard);
                    ops.push(self.op(&call, &[&b.tokens, units, scale, min, out])?);
                }
            }
            GpuTableData::Groups(shape, matrix) => {
                for (tiles, words, scales) in &matrix.shards {
                    let rows = matrix.rows_out(tiles, 0, 0);
                    let call = kernels::group_embedding(*shape, rows.base, rows.rows);
                    ops.push(self.op(&call, &[&b.tokens, words, scales, out])?);
                }
            }
        }
        if let Some(GpuRotation { block, signs }) = &table.rotation {
            let call = kernels::hadamard(k, *block, Rotate::Back);
            ops.push(self.op(&call, &[&b.rotated, signs, &b.hidden[0]])?);
        }
        Ok(ops)
    }

    fn head(&self, table: &GpuTable, norm: &Slice) -> Result<Head> {
        let b = self.buffers;
        let (k, vocab_size) = (self.config.hidden_size, self.config.vocab_size);
        let call = kernels::rmsnorm(k, self.config.rms_norm_eps, true);
        let mut before = vec![self.op(&call, &[&b.hidden[0], norm, &b.normed])?];
        let mut x = &b.normed;
        if let Some(GpuRotation { block, signs }) = &table.rotation {
            let call = kernels::hadamard(k, *block, Rotate::HeadInput);
            before.push(self.op(&call, &[x, signs, &b.rotated])?);
            x = &b.rotated;
        }
        let mut logits = Matmul { gemv: Vec::new(), gemm: Vec::new() };
        match &table.data {
            GpuTableData::Dense(shards) => {
                for rows in shards {
                    let [units, scale, min] = &rows.buffers;
                    let call = kernels::lm_head(rows.shard, vocab_size);
                    let op = self.op(&call, &[x, units, scale, min, &b.logits])?;
                    logits.gemv.push(op.clone());
                    logits.gemm.push(op);
                }
            }
            GpuTableData::Groups(shape, matrix) => {
                for (tiles, words, scales) in &matrix.shards {
                    let out = matrix.rows_out(tiles, 0, vocab_size);
                    let op = |tokens| {
                        let call = kernels::group_gemv(*shape, out, tokens, true);
                        self.op(&call, &[words, scales, x, &b.logits])
                    };
                    logits.gemv.push(op(TokensPerLane::One)?);
                    logits.gemm.push(op(TokensPerLane::Four)?);
                }
            }
        }
        Ok(Head { before, table: logits })
    }

    /// The runs of a linear layer on `x[M, K]`, into the accumulator.
    fn runs(&self, linear: &GpuLinear, x: &Slice) -> Result<Vec<(Vec<Op>, Matmul)>> {
        let runs = linear.runs.iter().enumerate();
        runs.map(|(index, run)| {
            let mut before = Vec::new();
            let x = self.input(run, x, &mut before)?;
            let matmul = match run.matrix.kind {
                Kind::Sums(plan, shape) => {
                    let (b, stride) = (self.buffers, act_stride(self.max_batch));
                    let act_scale = b.act_scale.words(index * stride, stride);
                    let call = kernels::quantize_absmax(shape.k(), plan.variant);
                    let quantized = [x, &b.codes, &act_scale, &b.code_sum];
                    before.push(self.op(&call, &quantized)?);
                    self.sums(plan, &run.matrix, &linear.rows, index)?
                }
                Kind::Groups(shape, int8) => {
                    let b = self.buffers;
                    if int8 {
                        let call = kernels::quantize_absmax_groups(shape.shape.k(), shape.group);
                        before.push(self.op(&call, &[x, &b.codes, &b.act_scale])?);
                    }
                    let base = linear.rows.first(index);
                    self.groups(&run.matrix, (base, linear.rows.padded()), x)?
                }
            };
            Ok((before, matmul))
        })
        .collect()
    }

    /// What a run does to `x[M, K]` before it multiplies; where the result is.
    fn input<'b>(&'b self, run: &GpuRun, x: &'b Slice, ops: &mut Vec<Op>) -> Result<&'b Slice> {
        let b = self.buffers;
        let k = run.matrix.kind.shape().k();
        let mut x = x;
        if let Some(weight) = &run.norm {
            let eps = self.config.linear_norm_eps.unwrap_or_default();
            ops.push(self.op(&kernels::rmsnorm(k, eps, false), &[x, weight, &b.inner])?);
            x = &b.inner;
        }
        if let Some(GpuRotation { block, signs }) = &run.rotation {
            let call = kernels::hadamard(k, *block, Rotate::Input);
            ops.push(self.op(&call, &[x, signs, &b.rotated])?);
            x = &b.rotated;
        }
        Ok(x)
    }

    /// A run with i32 sums.
    fn sums(
        &self,
        plan: GemvPlan,
        matrix: &GpuMatrix,
        rows: &LinearRows,
        run: usize,
    ) -> Result<Matmul> {
        let b = self.buffers;
        let mut matmul = Matmul { gemv: Vec::new(), gemm: Vec::new() };
        let k = matrix.kind.shape().k();
        // The GEMM's stride is that of all runs.
        let shape = MatShape::new(rows.padded(), k)?;
        let first_tile = rows.first(run) / TILE_ROWS;
        for (tiles, words, offset) in &matrix.shards {
            let mut buffers = vec![words, &b.codes, offset];
            if plan.variant.needs_code_sum() {
                buffers.push(&b.code_sum);
            }
            buffers.push(&b.acc);
            let (base, count) = (first_tile + tiles.start, tiles.len());
            matmul.gemv.push(self.op(&kernels::gemv(plan, shape, base, count), &buffers)?);
            matmul.gemm.push(self.op(&kernels::gemm(plan.variant, shape, base, count), &buffers)?);
        }
        Ok(matmul)
    }

    /// A run with scales of groups, whose rows start at `base` of the accumulator.
    fn groups(
        &self,
        matrix: &GpuMatrix,
        (base, stride): (usize, usize),
        x: &Slice,
    ) -> Result<Matmul> {
        let b = self.buffers;
        let Kind::Groups(shape, int8) = matrix.kind else { unreachable!("a run of groups") };
        let mut matmul = Matmul { gemv: Vec::new(), gemm: Vec::new() };
        for (tiles, words, scales) in &matrix.shards {
            let out = matrix.rows_out(tiles, base, stride);
            let op = |tokens| {
                if int8 {
                    let call = kernels::group_gemv_int8(shape, out, tokens);
                    self.op(&call, &[words, scales, &b.codes, &b.act_scale, &b.acc])
                } else {
                    let call = kernels::group_gemv(shape, out, tokens, false);
                    self.op(&call, &[words, scales, x, &b.acc])
                }
            };
            matmul.gemv.push(op(TokensPerLane::One)?);
            matmul.gemm.push(op(TokensPerLane::Four)?);
        }
        Ok(matmul)
    }

    /// A step in one dispatch a shard, where its kernels take the matrix: `call` has the kernel and
    /// the buffers after the rows.
    fn fused<'a>(
        &self,
        x: &Slice,
        norm: Option<&Slice>,
        linear: &GpuLinear,
        call: impl Fn(Fused) -> Option<(Call, Vec<&'a Slice>)>,
    ) -> Result<Vec<Op>> {
        let matrix = &linear.runs[0].matrix;
        let Kind::Sums(plan, shape) = matrix.kind else { return Ok(Vec::new()) };
        if !plan.fused || linear.fused_rows.is_empty() || shape.k() > Fused::MAX_K {
            return Ok(Vec::new());
        }
        let eps = norm.map(|_| self.config.rms_norm_eps);
        let shards = matrix.shards.iter().zip(&linear.fused_rows);
        let ops = shards.filter_map(|((tiles, words, _), rows)| {
            let tiles = (tiles.start, tiles.len());
            let (call, after) = call(Fused { plan, k: shape.k(), norm: eps, tiles })?;
            // Where there is no norm, the input stands in for its weight and is not read.
            let buffers = [&[words, x, norm.unwrap_or(x), rows], after.as_slice()].concat();
            Some(self.op(&call, &buffers))
        });
        ops.collect()
    }

    /// A step: norm (where there is one) of `x[M, k]`, the matrices, and what `after` makes of their
    /// rows.
    fn step<'a>(
        &self,
        x: &Slice,
        norm: Option<&Slice>,
        linear: &GpuLinear,
        after: Vec<Op>,
        fused: impl Fn(Fused) -> Option<(Call, Vec<&'a Slice>)>,
    ) -> Result<Step> {
        let fused = self.fused(x, norm, linear, fused)?;
        let mut before = Vec::new();
        let mut x = x;
        if let Some(weight) = norm {
            let k = linear.runs[0].matrix.kind.shape().k();
            let call = kernels::rmsnorm(k, self.config.rms_norm_eps, false);
            before.push(self.op(&call, &[x, weight, &self.buffers.normed])?);
            x = &self.buffers.normed;
        }
        Ok(Step { before, runs: self.runs(linear, x)?, after, fused })
    }

    /// An operation on a linear layer's rows.
    fn scaled(
        &self,
        call: &Call,
        from: &[&Slice],
        linear: &GpuLinear,
        to: &[&Slice],
    ) -> Result<Op> {
        let b = self.buffers;
        let rows = [&b.acc, &linear.weight_scale, &b.act_scale];
        self.op(call, &[from, &rows, to].concat())
    }

    /// Rows of Q, K and V: norms of the heads where there are any, RoPE, and the cache.
    fn rope(&self, qkv: &GpuLinear, norms: [Option<&Slice>; 2], to: &[&Slice]) -> Result<Vec<Op>> {
        let heads = self.config.heads();
        let [Some(query_norm), Some(key_norm)] = norms else {
            return Ok(vec![self.scaled(&kernels::rope(heads, &qkv.rows), &[], qkv, to)?]);
        };
        let b = self.buffers;
        let call = kernels::head_norm(heads, self.config.rms_norm_eps, &qkv.rows);
        let norm = self.scaled(&call, &[], qkv, &[query_norm, key_norm, &b.heads])?;
        let rows = LinearRows::floats((heads.query + 2 * heads.kv) * heads.dim);
        let rows_in = [&b.heads, &qkv.weight_scale, &b.act_scale];
        let rope = self.op(&kernels::rope(heads, &rows), &[&rows_in, to].concat())?;
        Ok(vec![norm, rope])
    }

    fn linear(&mut self, parts: &[&TernaryMatrix], order: RowOrder) -> Result<HostLinear> {
        let (int8, methods) = (self.int8, &mut self.methods);
        HostLinear::pack(parts, act_stride(self.max_batch), order, |scale| match scale {
            WeightScale::Tensor(_) => methods.sums(),
            WeightScale::Groups { .. } => methods.groups(int8),
        })
    }

    fn layer(
        &mut self,
        weights: &LayerWeights,
        index: usize,
        angles: &Slice,
        keys: &Slice,
        values: &Slice,
    ) -> Result<LayerOps> {
        if weights.q_norm.is_some() != weights.k_norm.is_some() {
            let (device, what) = ("the GPU backend", "a norm on only one of query and key heads");
            return Err(Error::UnsupportedOnDevice { device, what });
        }
        let dim = self.config.head_dim;
        let has_head_norms = weights.q_norm.is_some();
        let pairs = match dim.is_multiple_of(TILE_ROWS) && !has_head_norms {
            true => RowOrder::Pairs(dim),
            false => RowOrder::Natural,
        };
        let gate_up = RowOrder::GateUp(self.config.intermediate_size);
        let host = [
            self.linear(&[&weights.q_proj, &weights.k_proj, &weights.v_proj], pairs)?,
            self.linear(&[&weights.o_proj], RowOrder::Natural)?,
            self.linear(&[&weights.gate_proj, &weights.up_proj], gate_up)?,
            self.linear(&[&weights.down_proj], RowOrder::Natural)?,
        ];
        let norms = [
            Some(&weights.input_layernorm),
            weights.q_norm.as_ref(),
            weights.k_norm.as_ref(),
            weights.attn_sub_norm.as_ref(),
            Some(&weights.post_attention_layernorm),
            weights.ffn_sub_norm.as_ref(),
        ];
        let mut parts: Vec<&[u32]> =
            host.iter().flat_map(|linear| linear.parts(self.gpu)).collect();
        parts.extend(norms.iter().flatten().map(|norm| bytemuck::cast_slice(norm.as_slice())));
        let slices = self.gpu.upload_together(&format!("layer {index}"), &parts)?;
        let mut slices = slices.into_iter();
        let [qkv, o, gate_up, down] =
            host.each_ref().map(|linear| GpuLinear::from_slices(self.gpu, linear, &mut slices));
        let mut next_norm = |norm: Option<_>| {
            norm.map(|_: &Vec<f32>| slices.next().expect("as many slices as parts"))
        };
        let norms = norms.map(&mut next_norm);
        let [input_norm, q_norm, k_norm, attn_sub_norm, post_norm, ffn_sub_norm] =
            norms.each_ref().map(Option::as_ref);

        let b = self.buffers;
        let config = self.config;
        let hidden = config.hidden_size;
        let [start, middle] = &b.hidden;
        let add = |linear: &GpuLinear, from, to| {
            let call = kernels::residual_add(hidden, &linear.rows);
            Ok::<_, Error>(vec![self.scaled(&call, &[from], linear, &[to])?])
        };
        let rope = self.rope(&qkv, [q_norm, k_norm], &[angles, &b.query, keys, values])?;
        let (intermediate, act) = (config.intermediate_size, config.hidden_act);
        let gate = kernels::gated_activation(intermediate, act, &gate_up.rows);
        let gate = vec![self.scaled(&gate, &[], &gate_up, &[&b.gated])?];
        let attention = kernels::attention(config.heads());
        let heads = config.heads();
        // RoPE's pairs have to meet in a workgroup.
        let is_paired = qkv.rows.order == RowOrder::Pairs(dim);
        let residual =
            |from, to| move |fused: Fused| Some((fused.residual(hidden), vec![from, to]));
        Ok(LayerOps {
            qkv: self.step(start, input_norm, &qkv, rope, |fused| {
                is_paired.then(|| (fused.qkv(heads), vec![angles, &b.query, keys, values]))
            })?,
            attend: self.op(&attention, &[&b.query, keys, values, &b.attended])?,
            project_out: self.step(
                &b.attended,
                attn_sub_norm,
                &o,
                add(&o, start, middle)?,
                residual(start, middle),
            )?,
            gate_up: self.step(middle, post_norm, &gate_up, gate, |fused| {
                Some((fused.gated(intermediate, act), vec![&b.gated]))
            })?,
            down: self.step(
                &b.gated,
                ffn_sub_norm,
                &down,
                add(&down, middle, start)?,
                residual(middle, start),
            )?,
        })
    }
}

impl Backend for GpuBackend {
    fn device(&self) -> &DeviceInfo {
        &self.device
    }

    fn max_batch(&self) -> usize {
        self.max_batch
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn begin(&mut self, batch: Batch<'_>) -> Result<()> {
        batch.check(self.max_batch, self.capacity, self.config.vocab_size)?;
        let (n_tokens, n_logit_rows) = (batch.tokens.len(), batch.logit_rows());
        // Checked above: all of these are below the capacity, which fits u32.
        self.batch = PassParams {
            n_tokens: n_tokens as u32,
            start: batch.start as u32,
            first_logit_row: (n_tokens - n_logit_rows) as u32,
            n_logit_rows: n_logit_rows as u32,
            ..PassParams::default()
        };
        self.want = batch.want;
        let queue = &self.gpu.queue;
        queue.write_buffer(&self.buffers.params, 0, bytemuck::bytes_of(&self.batch));
        queue.write_buffer(&self.buffers.tokens.buffer, 0, bytemuck::cast_slice(batch.tokens));
        self.recording = Some(self.gpu.begin_recording());
        Ok(())
    }

    fn embed(&mut self) -> Result<()> {
        record(&self.gpu, &mut self.recording, &self.batch, &self.embed);
        self.current_hidden = 0;
        Ok(())
    }

    fn qkv(&mut self, layer: usize) -> Result<()> {
        self.record_step(layer, |ops| &ops.qkv);
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        record(&self.gpu, &mut self.recording, &self.batch, [&self.layers[layer].attend]);
        Ok(())
    }

    fn project_out(&mut self, layer: usize) -> Result<()> {
        self.record_step(layer, |ops| &ops.project_out);
        self.current_hidden = 1;
        Ok(())
    }

    fn gate_up(&mut self, layer: usize) -> Result<()> {
        self.record_step(layer, |ops| &ops.gate_up);
        Ok(())
    }

    fn down(&mut self, layer: usize) -> Result<()> {
        self.record_step(layer, |ops| &ops.down);
        self.current_hidden = 0;
        Ok(())
    }

    fn head(&mut self) -> Result<()> {
        let Head { before, table } = &self.head;
        let ops = before.iter().chain(table.ops(self.batch.n_logit_rows));
        record(&self.gpu, &mut self.recording, &self.batch, ops);
        Ok(())
    }

    fn argmax(&mut self) -> Result<()> {
        record(&self.gpu, &mut self.recording, &self.batch, [&self.argmax]);
        Ok(())
    }

    fn finish(&mut self) -> Result<Output> {
        let vocab_size = self.config.vocab_size;
        match self.want {
            Want::Nothing => {
                self.submit(|_, _| {});
                self.gpu.check("run a prompt chunk")?;
                Ok(Output::Nothing)
            }
            Want::Token => {
                self.submit(|encoder, b| b.token_staging.copy_from(encoder, &b.token, 0, 1));
                let token = self.gpu.read_staging(&self.buffers.token_staging, 1, |words| words[0]);
                match token? {
                    NAN_TOKEN => {
                        let position = (self.batch.start + self.batch.n_tokens - 1) as usize;
                        Err(Error::NanLogits { position })
                    }
                    token => Ok(Output::Token(token)),
                }
            }
            Want::LastLogits => {
                self.submit(|encoder, b| {
                    b.logits_staging.copy_from(encoder, &b.logits, 0, vocab_size);
                });
                let staging = &self.buffers.logits_staging;
                let logits = self.gpu.read_staging(staging, vocab_size, |words| {
                    bytemuck::cast_slice(words).to_vec()
                });
                Ok(Output::Logits(logits?))
            }
            Want::AllLogits => {
                self.submit(|_, _| {});
                let len_words = vocab_size * self.batch.n_logit_rows as usize;
                let words = self.gpu.read(&self.buffers.logits, len_words)?;
                Ok(Output::Logits(bytemuck::cast_vec(words)))
            }
        }
    }

    fn read(&mut self, tap: Tap) -> Result<Vec<f32>> {
        self.submit(|_, _| {});
        let b = &self.buffers;
        let config = &self.config;
        let (slice, width) = match tap {
            Tap::Hidden => (&b.hidden[self.current_hidden], config.hidden_size),
            Tap::Query => (&b.query, config.query_size()),
            Tap::Attended => (&b.attended, config.query_size()),
            Tap::Gated => (&b.gated, config.intermediate_size),
        };
        let words = self.gpu.read(slice, width * self.batch.n_tokens as usize)?;
        self.recording = Some(self.gpu.begin_recording());
        Ok(bytemuck::cast_vec(words))
    }
}
