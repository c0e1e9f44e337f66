//! The GPU backend, over wgpu.
//!
//! Everything is paid at load: pipelines, bind groups, activations, the KV cache. A forward pass is
//! one command encoder, one compute pass and one submit; greedy decoding reads back a token id.
//! Hidden states ping-pong between two buffers, and no kernel reads a buffer it writes.

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
pub use kernels::Variant;
pub use matrix::row_offsets;
pub use record::{Call, Op, PassParams, Pipelines, Rows, WorkDone};

use cpu_ref::rope;

use super::{Backend, Batch, DeviceInfo, LoadOptions, OnProgress, Output, Progress, Tap, Want};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::weights::WeightSource;
use kernels::padded_rows;
use matrix::{GpuMatrix, GpuTable, HostMatrix};
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
    head: Vec<Op>,
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
    codes: Slice,
    act_scale: Slice,
    code_sum: Slice,
    acc: Slice,
    query: Slice,
    attended: Slice,
    gated: Slice,
    logits: Slice,
    token: Slice,
    token_staging: Staging,
    logits_staging: Staging,
}

/// A matrix step as it is recorded for one token and for many.
struct Matmul {
    gemv: Vec<Op>,
    gemm: Vec<Op>,
}

/// The dispatches of one layer's five steps.
struct LayerOps {
    qkv: Step,
    attend: Op,
    project_out: Step,
    gate_up: Step,
    down: Step,
}

/// A step around one matrix: what comes before it, the matrix, what comes after.
struct Step {
    before: Vec<Op>,
    matmul: Matmul,
    after: Op,
}

/// Makes the operations of a model.
struct Builder<'a> {
    gpu: &'a Gpu,
    pipelines: Pipelines,
    variant: Variant,
    buffers: &'a Buffers,
}

impl GpuBackend {
    /// Loads a model on an open device with the best variant that passes its exactness check there,
    /// or with the given one.
    ///
    /// # Errors
    /// If a tensor is malformed, the adapter's limits are too small, or the kernels are wrong on
    /// this adapter.
    pub fn load(
        source: &dyn WeightSource,
        gpu: Gpu,
        variant: Option<Variant>,
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
        let (variant, refused) = match variant {
            Some(variant) => {
                self_test::check(&gpu, variant)?;
                (variant, None)
            }
            None => self_test::choose(&gpu)?,
        };
        let max_batch = options.max_batch;
        let buffers = Buffers::new(&gpu, &config, max_batch)?;
        let builder =
            Builder { gpu: &gpu, pipelines: Pipelines::default(), variant, buffers: &buffers };
        let heads = config.heads();
        let inv_freq = source.frequencies()?;
        let angles: Vec<[f32; 2]> = (0..capacity)
            .flat_map(|position| {
                let (cos, sin) = rope::angles(position, &inv_freq);
                cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin])
            })
            .collect();
        let angles = gpu.upload("rope angles", &angles)?;
        let embedding = GpuTable::upload(&gpu, "embedding", &source.embedding()?)?;
        let lm_head = source.lm_head()?.map(|table| GpuTable::upload(&gpu, "lm_head", &table));
        let lm_head = lm_head.transpose()?;
        let final_norm = gpu.upload("final norm", &source.final_norm()?)?;
        let total = config.num_hidden_layers;
        let mut layers = Vec::with_capacity(total);
        for index in 0..total {
            progress(Progress { done: index, total });
            let cache = [(); 2].map(|()| gpu.storage("KV cache", capacity * config.kv_size()));
            let [keys, values] = cache;
            layers.push(builder.layer(source, index, &angles, &keys?, &values?, heads)?);
        }
        progress(Progress { done: total, total });
        let embed = builder.embed(&embedding)?;
        let head = builder.head(lm_head.as_ref().unwrap_or(&embedding), &final_norm, &config)?;
        let b = &buffers;
        let argmax = builder.op(&kernels::argmax(config.vocab_size), &[&b.logits, &b.token])?;
        gpu.wait("load the model")?;
        let adapter = &gpu.adapter;
        let device = DeviceInfo {
            name: format!("gpu:{}", adapter.index),
            description: adapter.to_string(),
            gemv: match refused {
                None => variant.gemv().name.to_owned(),
                Some(problem) => format!("{} ({problem})", variant.gemv().name),
            },
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

    /// Records a step around a matrix.
    fn record_step(&mut self, layer: usize, step: impl Fn(&LayerOps) -> &Step) {
        let Step { before, matmul, after } = step(&self.layers[layer]);
        let matmul = if self.batch.n_tokens == 1 { &matmul.gemv } else { &matmul.gemm };
        let ops = before.iter().chain(matmul).chain([after]);
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

impl Buffers {
    fn new(gpu: &Gpu, config: &ModelConfig, max_batch: usize) -> Result<Self> {
        let hidden = config.hidden_size;
        let widest_in = hidden.max(config.query_size()).max(config.intermediate_size);
        let widest_out = hidden
            .max(config.query_size() + 2 * config.kv_size())
            .max(2 * config.intermediate_size);
        let f32s = |what, per_token: usize| gpu.storage(what, per_token * max_batch);
        Ok(Self {
            params: gpu.params_buffer(),
            tokens: f32s("tokens", 1)?,
            hidden: [f32s("hidden", hidden)?, f32s("hidden", hidden)?],
            normed: f32s("normed", widest_in)?,
            codes: f32s("codes", widest_in.next_multiple_of(64) / 4)?,
            act_scale: f32s("act_scale", 1)?,
            code_sum: f32s("code_sum", 1)?,
            acc: f32s("acc", padded_rows(widest_out))?,
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

    fn embed(&self, table: &GpuTable) -> Result<Vec<Op>> {
        let b = self.buffers;
        let ops = table.shards.iter().map(|(shard, rows)| {
            self.op(&kernels::embedding(*shard), &[&b.tokens, rows, &b.hidden[0]])
        });
        ops.collect()
    }

    fn head(&self, table: &GpuTable, norm: &Slice, config: &ModelConfig) -> Result<Vec<Op>> {
        let b = self.buffers;
        let call = kernels::rmsnorm(config.hidden_size, config.rms_norm_eps, true);
        let mut ops = vec![self.op(&call, &[&b.hidden[0], norm, &b.normed])?];
        for (shard, rows) in &table.shards {
            let call = kernels::lm_head(*shard, config.vocab_size);
            ops.push(self.op(&call, &[&b.normed, rows, &b.logits])?);
        }
        Ok(ops)
    }

    /// Norm (where there is one) and quantisation of `x[M, k]` into the shared codes.
    fn quantize(&self, x: &Slice, norm: Option<&Slice>, k: usize, eps: f32) -> Result<Vec<Op>> {
        let b = self.buffers;
        let mut ops = Vec::new();
        let mut x = x;
        if let Some(weight) = norm {
            ops.push(self.op(&kernels::rmsnorm(k, eps, false), &[x, weight, &b.normed])?);
            x = &b.normed;
        }
        let call = kernels::quantize_absmax(k, self.variant);
        ops.push(self.op(&call, &[x, &b.codes, &b.act_scale, &b.code_sum])?);
        Ok(ops)
    }

    fn matmul(&self, matrix: &GpuMatrix) -> Result<Matmul> {
        let b = self.buffers;
        let mut matmul = Matmul { gemv: Vec::new(), gemm: Vec::new() };
        for (tiles, words, offset) in &matrix.shards {
            let mut buffers = vec![words, &b.codes, offset];
            if self.variant.needs_code_sum() {
                buffers.push(&b.code_sum);
            }
            buffers.push(&b.acc);
            let (base, count) = (tiles.start, tiles.len());
            let gemv = kernels::gemv(self.variant, matrix.shape, base, count);
            matmul.gemv.push(self.op(&gemv, &buffers)?);
            let gemm = kernels::gemm(self.variant, matrix.shape, base, count);
            matmul.gemm.push(self.op(&gemm, &buffers)?);
        }
        Ok(matmul)
    }

    fn layer(
        &self,
        source: &dyn WeightSource,
        index: usize,
        angles: &Slice,
        keys: &Slice,
        values: &Slice,
        heads: cpu_ref::attention::Heads,
    ) -> Result<LayerOps> {
        let config = source.config();
        let weights = source.layer(index)?;
        if weights.q_norm.is_some() || weights.k_norm.is_some() {
            let (device, what) = ("the GPU backend", "normalised heads");
            return Err(Error::UnsupportedOnDevice { device, what });
        }
        let pack = |parts: &[&_]| HostMatrix::pack(self.variant, parts);
        let host = [
            pack(&[&weights.q_proj, &weights.k_proj, &weights.v_proj])?,
            pack(&[&weights.o_proj])?,
            pack(&[&weights.gate_proj, &weights.up_proj])?,
            pack(&[&weights.down_proj])?,
        ];
        let norms = [
            Some(&weights.input_layernorm),
            weights.attn_sub_norm.as_ref(),
            Some(&weights.post_attention_layernorm),
            weights.ffn_sub_norm.as_ref(),
        ];
        let mut parts: Vec<&[u32]> =
            host.iter().flat_map(|matrix| matrix.parts(self.gpu)).collect();
        parts.extend(norms.iter().flatten().map(|norm| bytemuck::cast_slice(norm.as_slice())));
        let slices = self.gpu.upload_together(&format!("layer {index}"), &parts)?;
        let mut slices = slices.into_iter();
        let [qkv, o, gate_up, down] =
            host.each_ref().map(|matrix| GpuMatrix::from_slices(self.gpu, matrix, &mut slices));
        let mut next_norm = |norm: Option<_>| {
            norm.map(|_: &Vec<f32>| slices.next().expect("as many slices as parts"))
        };
        let [input_norm, attn_sub_norm, post_norm, ffn_sub_norm] = norms.map(&mut next_norm);

        let b = self.buffers;
        let eps = config.rms_norm_eps;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let [start, middle] = &b.hidden;
        let scaled = |call: &Call, from: &[&Slice], matrix: &GpuMatrix, to: &[&Slice]| {
            let scales = [&matrix.weight_scale, &b.act_scale];
            self.op(call, &[from, &[&b.acc], &scales, to].concat())
        };
        Ok(LayerOps {
            qkv: Step {
                before: self.quantize(start, input_norm.as_ref(), hidden, eps)?,
                matmul: self.matmul(&qkv)?,
                after: scaled(&kernels::rope(heads), &[], &qkv, &[angles, &b.query, keys, values])?,
            },
            attend: self.op(&kernels::attention(heads), &[&b.query, keys, values, &b.attended])?,
            project_out: Step {
                before: self.quantize(
                    &b.attended,
                    attn_sub_norm.as_ref(),
                    config.query_size(),
                    eps,
                )?,
                matmul: self.matmul(&o)?,
                after: scaled(&kernels::residual_add(hidden), &[start], &o, &[middle])?,
            },
            gate_up: Step {
                before: self.quantize(middle, post_norm.as_ref(), hidden, eps)?,
                matmul: self.matmul(&gate_up)?,
                after: scaled(
                    &kernels::gated_activation(intermediate, config.hidden_act),
                    &[],
                    &gate_up,
                    &[&b.gated],
                )?,
            },
            down: Step {
                before: self.quantize(&b.gated, ffn_sub_norm.as_ref(), intermediate, eps)?,
                matmul: self.matmul(&down)?,
                after: scaled(&kernels::residual_add(hidden), &[middle], &down, &[start])?,
            },
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
        record(&self.gpu, &mut self.recording, &self.batch, &self.head);
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
