//! The GPU backend, over wgpu.
//!
//! Everything is paid at load: pipelines, bind groups, activations, the KV cache. A chosen token is
//! embedded where it is, so that several forward passes are recorded in one compute pass and
//! submitted together, and more of them while they run; token ids alone are read back. Hidden states
//! ping-pong between two buffers, and no kernel reads a buffer it writes.

#[cfg(not(target_family = "wasm"))]
pub mod account;
#[cfg(any(test, target_family = "wasm"))]
mod browser;
mod buffer;
mod cache;
mod device;
mod head;
pub mod kernels;
mod matrix;
mod pace;
mod profile;
mod readback;
mod record;
pub mod self_test;
pub mod shader;
pub mod tune;

pub use buffer::Slice;
#[cfg(not(target_family = "wasm"))]
pub use device::adapters;
pub use device::{
    AdapterDescription, AdapterKind, Capabilities, Cooperative, Gpu, ResourceCounts, adapters_async,
};
pub use head::{HeadInput, HeadOps, HeadStep, Int8Head, LOGIT_ROWS};
pub use kernels::{Encoding, GemmPlan, GemvPlan, SumPlans, Variant};
pub use matrix::row_offsets;
pub use record::{Call, Op, PassParams, Pipelines, Rows, Specialised, WeightsRead, WorkDone};

use cpu_ref::layout::TILE_ROWS;

use std::collections::VecDeque;
use std::ops::Range;
use std::slice::from_ref;
#[cfg(target_family = "wasm")]
use std::task::{Context, Poll, ready};

use web_time::Instant;

use super::{
    Backend, Batch, DeviceInfo, HeadChoice, HeadWork, LoadOptions, OnProgress, Output, PartTime,
    Profiling, Progress, Tap, Tokens, Traffic, Want,
};
use crate::config::{Activations, ModelConfig};
use crate::error::{Error, Result};
use crate::kv_cache::{BLOCK, Blocks, KvFormat};
use crate::sampler::{Mark, Sampler, Sampling};
use crate::shape::MatShape;
use crate::wait::block_on;
use crate::weights::{Input, LayerWeights, Table, TernaryMatrix, WeightScale, WeightSource};
use cache::Cache;
use kernels::{
    Fused, Gemm, KvLayout, LinearRows, LogitTile, MAX_SAMPLE_VOCAB, Rotate, RowOrder, SampleLens,
    SumInputs, TileFor, TokensPerLane, gemm_encoding, gemm_inputs, padded_rows,
};
use matrix::{GpuLinear, GpuMatrix, GpuRotation, GpuRun, GpuTable, GpuTableData, HostLinear, Kind};
use pace::{MAX_STEPS, Pace};
use readback::{ChosenToken, Landing, Staging, TokenRing, run_time};
use record::{PARAMS_SLOTS, PARAMS_STRIDE, PART_SLOTS, Parameters, Recording};
use tune::{GemmPlans, Plans, Step as MatrixStep};

/// The greedy token of NaN logits, as `argmax.wgsl` writes it.
const NAN_TOKEN: u32 = u32::MAX;

/// A model on a GPU.
pub struct GpuBackend {
    device: DeviceInfo,
    config: ModelConfig,
    max_batch: usize,
    max_logit_rows: usize,
    capacity: usize,
    sequences: Blocks,
    cache: Cache,
    /// The batch's attention in parts, each of blocks of one shard; empty if there is one shard.
    parts: Vec<AttendPart>,
    /// Shards into which the batch's positions fall: from here to here.
    written: Vec<usize>,
    pipelines: Pipelines,
    layers: Vec<LayerOps>,
    embed: Vec<Op>,
    head: Head,
    /// The best of exact logits; `None` where the int8 head chooses.
    argmax: Option<Op>,
    /// The int8 head, where there is one.
    int8_head: Option<HeadOps>,
    head_work: HeadWork,
    /// Draws a token from logits, or takes the best with a penalty.
    sample: Vec<Op>,
    buffers: Buffers,
    batch: Parameters,
    /// For [`Want::Tokens`]: what each row of logits is sampled with.
    rows: Vec<Parameters>,
    /// The pass whose tokens may not all be text.
    draft: Option<Draft>,
    want: Want,
    /// Which of the two hidden buffers the last recorded step wrote.
    current_hidden: usize,
    recording: Option<Recording>,
    sampler: Sampler,
    pace: Pace,
    chosen: Chosen,
    ring: TokenRing,
    /// Prompt chunks on their way.
    chunks: VecDeque<Chunk>,
    /// Tokens of the prompt chunk whose last choice is on its way; 0: of a draft.
    prompt_tokens: usize,
    /// When the last submit was complete that was waited for.
    done: Instant,
    gpu: Gpu,
}

/// Token ids that are chosen at once: places in their buffer.
const CHOSEN_SLOTS: usize = 4 * MAX_STEPS;
/// Submits of tokens on their way at once.
const SUBMITS: usize = 4;

/// Tokens that passes choose, in the places of the buffer that follow the prompt's, in turn.
#[derive(Default)]
struct Chosen {
    /// Tokens chosen since the model was loaded: the next place, but for the turn.
    count: usize,
    /// How many of the last are recorded and not on their way.
    recorded: usize,
    /// Position of the first of these.
    first_position: usize,
    /// Whether the last may be fed.
    is_fresh: bool,
}

/// A pass of [`Want::Tokens`] until it is known how many of its tokens are text.
struct Draft {
    /// The sampler before the pass.
    start: Mark,
    /// Tokens chosen before it.
    count: usize,
    /// Its tokens that were taken.
    taken: Vec<u32>,
}

/// Activations and what is read back, for `max_batch` tokens and `max_logit_rows` rows of logits.
struct Buffers {
    params: wgpu::Buffer,
    /// The prompt's, then what was chosen.
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
    /// Keys and values on their way into the cache.
    new_keys: Slice,
    new_values: Slice,
    attended: Slice,
    gated: Slice,
    logits: Slice,
    /// Which tokens have occurred before each row of logits: bit n % 32 of word n / 32.
    seen: Slice,
    /// Between the kernels that sample: see `sample.wgsl`.
    bits: Slice,
    block_max: Slice,
    weights: Slice,
    levels: Slice,
    /// How many exact logits a chosen token took: at its place in `tokens`.
    counts: Slice,
    logits_staging: Staging,
}

/// A matrix step as it is recorded for each number of tokens.
#[derive(Clone)]
struct Matmul {
    /// Most tokens, rising, and what runs for as many.
    by_tokens: Vec<(u32, Vec<Op>)>,
}

/// The dispatches of one layer's five steps.
#[derive(Clone)]
struct LayerOps {
    /// As far as it does not touch the cache.
    qkv: Step,
    recipe: CacheRecipe,
    cache: CacheOps,
    project_out: Step,
    gate_up: Step,
    down: Step,
}

/// A call, and what it reads before what the cache has.
type Unbound = (Call, Vec<Slice>);

/// What the operations on the cache are made of, which are made again whenever it grows.
#[derive(Clone)]
struct CacheRecipe {
    /// `rope`, with what it reads before the angles.
    rope: Unbound,
    /// `fused_qkv` for each shard of the matrix, with what it reads before the angles.
    fused: Vec<(Fused, Vec<Slice>)>,
}

/// The operations of a layer on its cache: by shard, but for `rope` and `merge`.
#[derive(Clone)]
struct CacheOps {
    rope: Op,
    /// The whole step `qkv` for one token, but for `store` of an int8 cache.
    fused: Vec<Vec<Op>>,
    store: Vec<Op>,
    /// Attention of one token in a short context, where there is one shard.
    short: Vec<Op>,
    /// Attention of many; in parts by turns, from one state to the other.
    many: Vec<[Op; 2]>,
    /// Attention of one token, and the blocks together.
    blocks: Vec<Op>,
    merge: Op,
}

/// Blocks of one shard that attention takes together.
struct AttendPart {
    shard: usize,
    first_block: u32,
    end_block: u32,
}

/// Blocks of a context that one token's attention takes in one dispatch: with more, blocks are taken
/// apart and merged by a second.
const SHORT_BLOCKS: usize = 4;

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
    /// By [`LogitTile`].
    tables: [Vec<Op>; LogitTile::ALL.len()],
}

/// Makes the operations of a model.
struct Builder<'a> {
    gpu: &'a Gpu,
    pipelines: Pipelines,
    config: &'a ModelConfig,
    max_batch: usize,
    max_logit_rows: usize,
    /// Whether matrices with scales of groups get int8 activations.
    int8: bool,
    methods: self_test::Methods<'a>,
    buffers: &'a Buffers,
    /// Weights that a pass reads.
    weight_bytes: u64,
}

impl GpuBackend {
    /// Loads a model on an open device with the plans that [`LoadOptions::tune`] asks for and that pass
    /// their exactness check there, or with the given ones. Matrices with scales of groups have one
    /// kernel, which is checked too.
    ///
    /// # Errors
    /// If a tensor is malformed, the adapter's limits are too small, the kernels are wrong on this
    /// adapter, or the model has what they do not cover: heads of more than 256 values, rotations in
    /// blocks of more than 4096.
    pub fn load(
        source: &dyn WeightSource,
        gpu: Gpu,
        plans: Option<SumPlans>,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        block_on(Self::load_async(source, gpu, plans, options, progress))
    }

    /// [`GpuBackend::load`] where nothing may block.
    ///
    /// # Errors
    /// As for [`GpuBackend::load`].
    pub async fn load_async(
        source: &dyn WeightSource,
        gpu: Gpu,
        plans: Option<SumPlans>,
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
        let (plans, gemms, mut notes) = match plans {
            Some(SumPlans { gemv, gemm }) => {
                let gemms = GemmPlans::default().with(gemv.variant.layout(), gemm);
                (Plans::Asked(gemv), gemms, Vec::new())
            }
            None => tune::choose(&gpu, &config, options.tune).await?,
        };
        let max_batch = max_batch(&gpu, &config, options.max_batch);
        let max_logit_rows = max_logit_rows(&gpu, &config, max_batch.min(options.max_logit_rows));
        let buffers = Buffers::new(&gpu, &config, max_batch, max_logit_rows)?;
        let mut builder = Builder {
            gpu: &gpu,
            pipelines: gpu.pipelines(),
            config: &config,
            max_batch,
            max_logit_rows,
            int8,
            methods: self_test::Methods::new(&gpu, plans, gemms),
            buffers: &buffers,
            weight_bytes: 0,
        };
        let layout = KvLayout { heads: config.heads(), format: options.kv_format(&config)? };
        let n_layers = config.num_hidden_layers;
        if !gpu.is_dry() {
            self_test::check_attention_async(&gpu, layout).await?;
        }
        let cache =
            Cache::new(&gpu, layout, n_layers, (capacity, max_batch), source.frequencies()?)?;
        let total = config.num_hidden_layers;
        let mut layers = Vec::with_capacity(total);
        for index in 0..total {
            progress(Progress { done: index, total });
            // Layers have the same shapes, and a dry device holds no weights.
            if let Some(first) = layers.first().filter(|_| gpu.is_dry()) {
                layers.push(LayerOps::clone(first));
                continue;
            }
            let weights = source.layer(index)?;
            layers.push(builder.layer(&weights, index, &cache).await?);
        }
        progress(Progress { done: total, total });
        let gemv = builder.methods.names();
        notes.extend(builder.methods.refusals());
        let (embedding_rows, head_rows) = (source.stored_embedding()?, source.stored_lm_head()?);
        let embedding = builder.table("embedding", &embedding_rows).await?;
        let lm_head = match &head_rows {
            Some(table) => Some(builder.table("lm_head", table).await?),
            None => None,
        };
        let final_norm = gpu.upload_weights("final norm", &source.final_norm()?)?;
        let embed = builder.embed(&embedding)?;
        let exact = lm_head.as_ref().unwrap_or(&embedding);
        let head = builder.head(exact, &final_norm)?;
        let rows = head_rows.as_ref().unwrap_or(&embedding_rows);
        let (int8_head, head_name) = match options.head {
            HeadChoice::Exact => (None, shader::LM_HEAD.name.to_owned()),
            HeadChoice::Int8 => builder.int8_head(rows, exact, &final_norm).await?,
        };
        let b = &buffers;
        let argmax = match &int8_head {
            Some(_) => None,
            None => {
                let call = kernels::argmax(config.vocab_size);
                Some(builder.op(&call, &[&b.logits, &b.tokens])?)
            }
        };
        let sample = builder.sample().await?;
        let (weight_bytes, pipelines) = (builder.weight_bytes, builder.pipelines);
        // Frees the staging memory of what was uploaded last.
        gpu.queue.submit([]);
        gpu.done("load the model").await?;
        let adapter = &gpu.adapter;
        let device = DeviceInfo {
            name: format!("gpu:{}", adapter.index),
            description: adapter.to_string(),
            gemv,
            head: head_name,
            notes,
        };
        Ok(Self {
            device,
            max_batch,
            max_logit_rows,
            capacity,
            sequences: Blocks::new(capacity),
            cache,
            parts: Vec::new(),
            written: vec![0],
            pipelines,
            layers,
            embed,
            head,
            argmax,
            int8_head,
            head_work: HeadWork::default(),
            sample,
            buffers,
            batch: Parameters::default(),
            rows: Vec::new(),
            draft: None,
            want: Want::Nothing,
            current_hidden: 0,
            recording: None,
            sampler: Sampler::default(),
            pace: Pace::new(total, weight_bytes, gpu.adapter.kind == AdapterKind::Software),
            chosen: Chosen::default(),
            ring: TokenRing::new(&gpu, SUBMITS, MAX_STEPS),
            chunks: VecDeque::with_capacity(2),
            prompt_tokens: 1,
            done: Instant::now(),
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
        let n_tokens = self.batch.values.n_tokens;
        if n_tokens == 1 && !fused.is_empty() {
            return record(&self.gpu, &mut self.recording, &self.batch, fused);
        }
        let runs =
            runs.iter().flat_map(|(before, matmul)| before.iter().chain(matmul.ops(n_tokens)));
        let ops = before.iter().chain(runs).chain(after);
        record(&self.gpu, &mut self.recording, &self.batch, ops);
    }

    /// Submits what is recorded.
    fn flush(&mut self) {
        if self.recording.is_some() {
            self.submit(|_, _| {});
            self.recording = Some(self.gpu.begin_recording());
        }
    }

    /// Makes room in the cache for so many blocks, and for a sequence of `depth` of them.
    fn make_room(&mut self, blocks: usize, depth: usize) -> Result<()> {
        if self.cache.has_room(blocks, depth) {
            return Ok(());
        }
        self.flush();
        self.cache.grow(&self.gpu, blocks, depth, self.sequences.sequences())?;
        for index in 0..self.layers.len() {
            self.layers[index].cache = match index {
                // Layers of a dry device share one's.
                1.. if self.gpu.is_dry() => self.layers[0].cache.clone(),
                _ => {
                    let (b, recipe) = (&self.buffers, &self.layers[index].recipe);
                    cache_ops(&self.gpu, &self.pipelines, b, &self.cache, recipe, index)?
                }
            };
        }
        self.gpu.check("make room in the KV cache")
    }

    /// Gives the batch's positions blocks, and the device their table. Returns the first one's block.
    fn prepare(&mut self, batch: &Batch<'_>) -> Result<u32> {
        let Batch { sequence, start, .. } = *batch;
        let end = start + batch.tokens.count();
        let prepared = self.sequences.prepare(sequence, start, end)?;
        self.make_room(prepared.blocks, end.div_ceil(BLOCK))?;
        if let Some((from, to)) = prepared.copy {
            self.flush();
            self.cache.copy_block(&self.gpu, from, to);
        }
        let table = self.sequences.table(sequence)?;
        if self.cache.changes(table) {
            // What is recorded has read the table as it was.
            self.flush();
        }
        let table = self.sequences.table(sequence)?;
        self.cache.set_table(&self.gpu, table);
        let block = table[start / BLOCK];
        let (first, n_blocks) = (start / BLOCK, end.div_ceil(BLOCK));
        self.written.clear();
        self.parts.clear();
        if self.cache.shards() == 1 {
            self.written.push(0);
            return Ok(block);
        }
        // Passes that wait for the same submit would share the parameters of parts.
        self.flush();
        let mut at = 0;
        while at < n_blocks {
            let (shard, end) = self.cache.run_from(at, n_blocks);
            let (first_block, end_block) = (at as u32, end as u32);
            self.parts.push(AttendPart { shard, first_block, end_block });
            if end > first && !self.written.contains(&shard) {
                self.written.push(shard);
            }
            at = end;
        }
        Ok(block)
    }

    fn write_parameters(&self, parameters: &Parameters) {
        let offset = u64::from(parameters.slot * PARAMS_STRIDE);
        let bytes = bytemuck::bytes_of(&parameters.values);
        self.gpu.queue.write_buffer(&self.buffers.params, offset, bytes);
    }

    /// Attention of many tokens over several shards: a dispatch for each run of blocks in one.
    fn attend_in_parts(&mut self, layer: usize) -> Result<()> {
        for first in (0..self.parts.len()).step_by(PART_SLOTS as usize) {
            if first > 0 {
                // Their parameters take the places of those before.
                self.flush();
                self.gpu.check("attend in parts")?;
            }
            let parts = self.parts.iter().enumerate().skip(first).take(PART_SLOTS as usize);
            for (index, part) in parts {
                let AttendPart { shard, first_block, end_block } = *part;
                let values = PassParams { first_block, end_block, ..self.batch.values };
                let slot = PARAMS_SLOTS + (index - first) as u32;
                let parameters = Parameters { values, slot };
                if layer == 0 || self.parts.len() > PART_SLOTS as usize {
                    self.write_parameters(&parameters);
                }
                let op = &self.layers[layer].cache.many[shard][index % 2];
                record(&self.gpu, &mut self.recording, &parameters, [op]);
            }
        }
        Ok(())
    }

    /// Ends the pass, lets `copies` add to the encoder, and submits.
    fn submit(
        &mut self,
        copies: impl FnOnce(&mut wgpu::CommandEncoder, &Buffers),
    ) -> wgpu::SubmissionIndex {
        let recording = self.recording.take().expect("begin opens the pass");
        recording.submit(&self.gpu, |encoder| copies(encoder, &self.buffers))
    }

    /// Place of the `count`-th chosen token in the buffer.
    fn place(&self, count: usize) -> usize {
        self.max_batch + count % CHOSEN_SLOTS
    }

    /// Submits what is recorded; the tokens chosen in it are on their way.
    fn launch(&mut self) -> Result<()> {
        let staging = self.ring.staging(&self.gpu)?;
        let Chosen { count, recorded, first_position, .. } = self.chosen;
        let places = (count - recorded..count).map(|count| self.place(count));
        let places: [usize; MAX_STEPS] = collect(places);
        let submission = self.submit(|encoder, b| {
            for (at, &place) in places[..recorded].iter().enumerate() {
                staging.copy_from(encoder, &b.tokens.words(place, 1), 2 * at, 1);
                staging.copy_from(encoder, &b.counts.words(place, 1), 2 * at + 1, 1);
            }
        });
        self.ring.launch(&self.gpu, staging, submission, (first_position, recorded));
        self.chosen.recorded = 0;
        self.gpu.check("choose a token")
    }

    /// Waits for the tokens of the oldest submit, and learns from how long it took.
    fn land(&mut self) -> Result<bool> {
        let landing = self.ring.land(&self.gpu)?;
        Ok(landing.map(|landing| self.learn(landing)).is_some())
    }

    fn learn(&mut self, Landing { count, submitted }: Landing) {
        let time = run_time(submitted, &mut self.done);
        match std::mem::replace(&mut self.prompt_tokens, 1) {
            // Neither a step nor a prompt.
            0 => {}
            1 => self.pace.measured_steps(count, time),
            n_tokens => self.pace.measured_prompt(n_tokens, time),
        }
    }

    /// Drops what was chosen and not taken, and all of a draft of which nothing was kept.
    fn forget(&mut self) {
        if let Some(Draft { start, .. }) = self.draft.take() {
            self.sampler.rewind(&start);
        }
        self.ring.forget();
        self.recording = None;
        (self.chosen.recorded, self.chosen.is_fresh) = (0, false);
        self.prompt_tokens = 1;
    }

    /// Writes which tokens have occurred before each of the rows of logits that follow `batch`, whose
    /// first token has.
    fn write_seen(&self, batch: &[u32]) {
        let mut seen = vec![0u32; self.config.vocab_size.div_ceil(32)];
        let mut note = |token: u32| {
            // A prompt's tokens are checked when they are fed.
            if let Some(word) = seen.get_mut(token as usize / 32) {
                *word |= 1 << (token % 32);
            }
        };
        self.sampler.seen().for_each(&mut note);
        let len_bytes = size_of_val(seen.as_slice()) as u64;
        let write = |row: usize, seen: &[u32]| {
            let offset = row as u64 * len_bytes;
            let buffer = &self.buffers.seen.buffer;
            self.gpu.queue.write_buffer(buffer, offset, bytemuck::cast_slice(seen));
        };
        write(0, &seen);
        for (row, &token) in batch.iter().enumerate().skip(1) {
            seen[token as usize / 32] |= 1 << (token % 32);
            write(row, &seen);
        }
    }

    /// Writes a pass's parameters to the next place of their buffer.
    fn parameters(&mut self, values: PassParams) -> Parameters {
        let slot = (self.batch.slot + 1 + self.rows.len() as u32) % PARAMS_SLOTS;
        let parameters = Parameters { values, slot };
        self.write_parameters(&parameters);
        parameters
    }

    /// Prepares a pass of [`Want::Tokens`]: where its tokens go, what has occurred before each, and what
    /// each is drawn with.
    fn begin_draft(&mut self, tokens: &[u32]) {
        let count = &mut self.chosen.count;
        if *count % CHOSEN_SLOTS + tokens.len() > CHOSEN_SLOTS {
            // Their places are in a row.
            *count = count.next_multiple_of(CHOSEN_SLOTS);
        }
        let count = *count;
        self.draft = Some(Draft { start: self.sampler.mark(), count, taken: Vec::new() });
        if self.sampler.repetition_penalty() != 1.0 {
            self.write_seen(tokens);
        }
        self.batch.values.token_out = self.place(count) as u32;
        self.prompt_tokens = 0;
    }

    /// What each row of a draft is drawn with: the last of `n_logit_rows` is the row.
    fn draw_rows(&mut self) {
        let values = self.batch.values;
        for row in 0..values.n_logit_rows {
            let mut values =
                PassParams { n_logit_rows: row + 1, token_out: values.token_out + row, ..values };
            values.sample(&mut self.sampler);
            let parameters = self.parameters(values);
            self.rows.push(parameters);
        }
    }

    /// Submits what is recorded of a pass, if it would otherwise take the device for too long.
    fn split(&mut self, layer: usize) -> Result<()> {
        let layers = self.pace.layers(self.batch.values.n_tokens as usize);
        let is_last = layer + 1 == self.layers.len();
        if (layer + 1).is_multiple_of(layers) && !is_last {
            self.submit(|_, _| {});
            self.gpu.check("run a part of the layers")?;
            self.recording = Some(self.gpu.begin_recording());
        }
        Ok(())
    }

    /// Waits for the prompt chunk before the last, so that no more than two are on their way. In a
    /// browser [`Backend::poll_ready`] does.
    fn land_chunk(&mut self) -> Result<()> {
        if cfg!(not(target_family = "wasm"))
            && let Some(chunk) = self.chunks.pop_front()
        {
            self.gpu.wait_for(Some(chunk.submission), "run a prompt chunk")?;
            self.learn_chunk(chunk.submitted, chunk.n_tokens);
        }
        Ok(())
    }

    fn learn_chunk(&mut self, submitted: Instant, n_tokens: usize) {
        let time = run_time(submitted, &mut self.done);
        self.pace.measured_prompt(n_tokens, time);
    }
}

fn collect<const N: usize>(values: impl Iterator<Item = usize>) -> [usize; N] {
    let mut array = [0; N];
    array.iter_mut().zip(values).for_each(|(slot, value)| *slot = value);
    array
}

/// A prompt chunk on its way.
struct Chunk {
    submission: wgpu::SubmissionIndex,
    submitted: Instant,
    n_tokens: usize,
    #[cfg(target_family = "wasm")]
    done: readback::Arrival<()>,
}

/// The operations on a layer's cache as it is now.
fn cache_ops(
    gpu: &Gpu,
    pipelines: &Pipelines,
    b: &Buffers,
    cache: &Cache,
    recipe: &CacheRecipe,
    layer: usize,
) -> Result<CacheOps> {
    let op = |call: &Call, buffers: &[&Slice]| gpu.op(pipelines, call, &b.params, buffers);
    let (call, from) = &recipe.rope;
    let to = [&cache.angles, &b.query, &b.new_keys, &b.new_values];
    let rope = op(call, &[from.iter().collect::<Vec<_>>(), to.to_vec()].concat())?;
    let heads = cache.layout.heads;
    let merge = op(&kernels::attention_merge(heads), &[&cache.partials, &b.attended])?;
    let (fused, store, short, many, blocks) = Default::default();
    let mut ops = CacheOps { rope, fused, store, short, many, blocks, merge };
    let has_parts = cache.shards() > 1;
    for index in 0..cache.shards() {
        let (shard, buffers) = (cache.shard(index), cache.buffers(layer, index));
        let (keys, values) = (&buffers.keys, &buffers.values);
        let is_scaled = cache.layout.format == KvFormat::Int8;
        // Into the cache where whole words are known, else on the way there.
        let [to_keys, to_values] =
            if is_scaled { [&b.new_keys, &b.new_values] } else { [keys, values] };
        let fused = recipe.fused.iter().map(|(fused, from)| {
            let to = [&cache.angles, &b.query, to_keys, to_values];
            op(&fused.qkv(shard), &[from.iter().collect::<Vec<_>>(), to.to_vec()].concat())
        });
        let fused = fused.collect::<Result<Vec<_>>>()?;
        if !fused.is_empty() {
            ops.fused.push(fused);
        }
        let [scales, to_scales] = match is_scaled {
            true => [&buffers.scales; 2],
            false => [&cache.unread, &cache.unwritten],
        };
        let to = [&b.new_keys, &b.new_values, &cache.table, keys, values, to_scales];
        ops.store.push(op(&kernels::kv_store(shard), &to)?);
        let cached = [&b.query, keys, values, scales, &cache.table];
        let call = kernels::attention_blocks(shard);
        ops.blocks.push(op(&call, &[&cached[..], &[&cache.partials]].concat())?);
        let tile_for = TileFor::adapter(&gpu.adapter);
        let call = kernels::attention_tile(shard, tile_for, has_parts);
        let Some([first, second]) = &cache.states else {
            let after = [&cache.unread, &b.attended, &cache.unwritten];
            let after = [&cached[..], &after].concat();
            let many = op(&call, &after)?;
            ops.many.push([many.clone(), many]);
            let call = kernels::attention(shard);
            ops.short.push(op(&call, &[&cached[..], &[&b.attended]].concat())?);
            continue;
        };
        ops.many.push([
            op(&call, &[&cached[..], &[second, &b.attended, first]].concat())?,
            op(&call, &[&cached[..], &[first, &b.attended, second]].concat())?,
        ]);
    }
    Ok(ops)
}

/// Records operations into the open pass.
fn record<'a>(
    gpu: &Gpu,
    recording: &mut Option<Recording>,
    batch: &Parameters,
    ops: impl IntoIterator<Item = &'a Op>,
) {
    let recording = recording.as_mut().expect("the pass is open between begin and finish");
    for op in ops {
        recording.dispatch(gpu, op, batch);
    }
}

impl Matmul {
    /// One kernel for one token, another for more.
    fn new(gemv: Vec<Op>, gemm: Vec<Op>) -> Self {
        Self { by_tokens: vec![(1, gemv), (u32::MAX, gemm)] }
    }

    fn ops(&self, n_tokens: u32) -> &[Op] {
        let mut by_tokens = self.by_tokens.iter();
        let ops = by_tokens.find(|(most, _)| n_tokens <= *most);
        let (_, ops) = ops.expect("a batch is no longer than there is room for");
        ops
    }
}

/// Whether a linear layer's step may be one dispatch.
fn can_fuse(plan: GemvPlan, shape: MatShape, linear: &GpuLinear) -> bool {
    plan.fused && !linear.fused_rows.is_empty() && shape.k() <= plan.max_fused_k()
}

/// Activation scales of one run of a linear layer: its slot can be bound by itself.
fn act_stride(max_batch: usize) -> usize {
    // 256 bytes, the largest offset alignment there is.
    max_batch.next_multiple_of(64)
}

/// Most bytes of an activation buffer: a binding that WebGPU promises.
const MAX_ACTIVATION_BYTES: u64 = 128 << 20;
/// Most rows of logits at once.
const MAX_LOGIT_ROWS: usize = 64;

/// Words of a token in the widest buffers: of matrices' inputs, of heads, of matrices' results.
struct Widths {
    input: usize,
    heads: usize,
    output: usize,
}

impl Widths {
    fn new(config: &ModelConfig) -> Self {
        let hidden = config.hidden_size;
        // Every matrix may be a run of its own, which starts at a tile.
        let heads = padded_rows(config.query_size()) + 2 * padded_rows(config.kv_size());
        let gate_up = 2 * padded_rows(config.intermediate_size);
        Self {
            input: hidden.max(config.query_size()).max(config.intermediate_size),
            heads,
            output: padded_rows(hidden).max(heads).max(gate_up),
        }
    }
}

/// How many rows of so many words a buffer of activations holds.
fn rows_that_fit(gpu: &Gpu, row_words: usize) -> usize {
    let bytes = gpu.max_binding().min(MAX_ACTIVATION_BYTES);
    usize::try_from(bytes).unwrap_or(usize::MAX) / 4 / row_words.max(1)
}

/// Tokens of a pass: as many as are asked for and every buffer and grid has room for. What holds not
/// even one is refused by name when it is made.
fn max_batch(gpu: &Gpu, config: &ModelConfig, asked: usize) -> usize {
    let Widths { input, output, .. } = Widths::new(config);
    let grid = gpu.device.limits().max_compute_workgroups_per_dimension as usize;
    asked.min(rows_that_fit(gpu, input.max(output))).min(grid).max(1)
}

/// Rows of logits of a pass.
fn max_logit_rows(gpu: &Gpu, config: &ModelConfig, max_batch: usize) -> usize {
    max_batch.min(MAX_LOGIT_ROWS).min(rows_that_fit(gpu, config.vocab_size)).max(1)
}

impl Buffers {
    fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        max_batch: usize,
        max_logit_rows: usize,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let Widths { input: widest_in, heads, output: widest_out } = Widths::new(config);
        let f32s = |what, per_token: usize| gpu.storage(what, per_token * max_batch);
        let sample = SampleLens::new(config.vocab_size);
        Ok(Self {
            params: gpu.params_buffer(),
            tokens: gpu.storage("tokens", max_batch + CHOSEN_SLOTS)?,
            hidden: [f32s("hidden", hidden)?, f32s("hidden", hidden)?],
            normed: f32s("normed", widest_in)?,
            inner: f32s("normed", widest_in)?,
            rotated: f32s("rotated", widest_in)?,
            codes: {
                // Bytes or bit planes of every token, or f16 pairs of one.
                let bytes_of = |tokens: usize| widest_in.next_multiple_of(64) / 4 * tokens;
                gpu.storage("codes", bytes_of(max_batch.max(2)))?
            },
            act_scale: {
                let of_runs = LinearRows::MAX_RUNS * act_stride(max_batch);
                let of_groups = widest_in.div_ceil(64) * max_batch;
                gpu.storage("act_scale", of_runs.max(of_groups))?
            },
            code_sum: f32s("code_sum", 1)?,
            acc: f32s("acc", widest_out)?,
            heads: f32s("heads", if config.has_head_norms() { heads } else { 1 })?,
            query: f32s("query", config.query_size())?,
            new_keys: f32s("new keys", config.kv_size())?,
            new_values: f32s("new values", config.kv_size())?,
            attended: f32s("attended", config.query_size())?,
            gated: f32s("gated", config.intermediate_size)?,
            logits: gpu.storage("logits", config.vocab_size * max_logit_rows)?,
            seen: gpu.storage("seen", LOGIT_ROWS * sample.seen)?,
            bits: gpu.storage("ordered logits", sample.vocab)?,
            block_max: gpu.storage("best of blocks", sample.block_max)?,
            weights: gpu.storage("weights", sample.vocab)?,
            levels: gpu.storage("levels", sample.levels)?,
            counts: gpu.storage("counts", max_batch + CHOSEN_SLOTS)?,
            logits_staging: gpu.staging(config.vocab_size),
        })
    }
}

impl Builder<'_> {
    fn op(&self, call: &Call, buffers: &[&Slice]) -> Result<Op> {
        self.gpu.op(&self.pipelines, call, &self.buffers.params, buffers)
    }

    /// Uploads a table.
    async fn table(&mut self, what: &str, table: &Table) -> Result<GpuTable> {
        let table = GpuTable::upload(self.gpu, what, table).await?;
        if let GpuTableData::Groups(..) = table.data {
            self.methods.groups(false).await?;
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

    /// The final norm, and the rotation where the head's table has one; where the result is.
    fn head_before(&self, table: &GpuTable, norm: &Slice) -> Result<(Vec<Op>, &Slice)> {
        let b = self.buffers;
        let k = self.config.hidden_size;
        let call = kernels::rmsnorm(k, self.config.rms_norm_eps, true);
        let mut before = vec![self.op(&call, &[&b.hidden[0], norm, &b.normed])?];
        let Some(GpuRotation { block, signs }) = &table.rotation else {
            return Ok((before, &b.normed));
        };
        let call = kernels::hadamard(k, *block, Rotate::HeadInput);
        before.push(self.op(&call, &[&b.normed, signs, &b.rotated])?);
        Ok((before, &b.rotated))
    }

    fn head(&self, table: &GpuTable, norm: &Slice) -> Result<Head> {
        let b = self.buffers;
        let vocab_size = self.config.vocab_size;
        let (before, x) = self.head_before(table, norm)?;
        let mut tables = LogitTile::ALL.map(|_| Vec::new());
        let needed = LogitTile::up_to(self.max_logit_rows as u32);
        for (ops, &tile) in tables.iter_mut().zip(needed) {
            match &table.data {
                GpuTableData::Dense(shards) => {
                    for rows in shards {
                        let [units, scale, min] = &rows.buffers;
                        let call = kernels::lm_head(rows.shard, vocab_size, tile);
                        ops.push(self.op(&call, &[x, units, scale, min, &b.logits])?);
                    }
                }
                GpuTableData::Groups(shape, matrix) => {
                    for (tiles, words, scales) in &matrix.shards {
                        let out = matrix.rows_out(tiles, 0, vocab_size);
                        let tokens = match tile {
                            LogitTile::One => TokensPerLane::One,
                            LogitTile::Four | LogitTile::Eight => TokensPerLane::Four,
                        };
                        let call = kernels::group_gemv(*shape, out, tokens, true);
                        ops.push(self.op(&call, &[words, scales, x, &b.logits])?);
                    }
                }
            }
        }
        Ok(Head { before, tables })
    }

    /// The kernels that sample a token.
    async fn sample(&self) -> Result<Vec<Op>> {
        let (b, vocab_size) = (self.buffers, self.config.vocab_size);
        if vocab_size > MAX_SAMPLE_VOCAB {
            let (name, max) = ("tokens of the vocabulary on a GPU", MAX_SAMPLE_VOCAB);
            return Err(Error::Dimension { name, found: vocab_size, max });
        }
        if !self.gpu.is_dry() {
            self_test::check_sample_async(self.gpu, vocab_size).await?;
        }
        let blocks = [&b.logits, &b.seen, &b.bits, &b.block_max];
        let weights = [&b.bits, &b.block_max, &b.weights, &b.levels];
        // The random number comes with the pass: the buffer of several is not read.
        let [bits, block_max, weights_in, levels] = weights;
        let draw = [bits, block_max, weights_in, levels, bits, &b.seen, &b.tokens];
        Ok(vec![
            self.op(&kernels::sample_blocks(vocab_size), &blocks)?,
            self.op(&kernels::sample_weights(vocab_size), &weights)?,
            self.op(&kernels::sample(vocab_size), &draw)?,
        ])
    }

    /// The int8 head with its name; none where the table is quantised already, or its kernels are
    /// wrong on this adapter.
    async fn int8_head(
        &self,
        rows: &Table,
        exact: &GpuTable,
        norm: &Slice,
    ) -> Result<(Option<HeadOps>, String)> {
        let exact_name = shader::LM_HEAD.name;
        // A dry device computes nothing that could be checked.
        let checked = match self.gpu.is_dry() {
            true => Ok(()),
            false => self_test::check_head_async(self.gpu, self.max_logit_rows).await,
        };
        match checked {
            Ok(()) => {}
            Err(problem @ Error::SelfTest { .. }) => {
                return Ok((None, format!("{exact_name} ({problem})")));
            }
            Err(error) => return Err(error),
        }
        let Some(int8) = Int8Head::upload(self.gpu, "int8 head", rows).await? else {
            return Ok((None, exact_name.to_owned()));
        };
        let b = self.buffers;
        let eps = self.config.rms_norm_eps;
        let step = HeadStep {
            input: match &exact.rotation {
                None => HeadInput::Hidden(&b.hidden[0], norm, eps),
                Some(_) => HeadInput::Normed(&b.rotated),
            },
            table: exact,
            logits: &b.logits,
            seen: &b.seen,
            tokens: &b.tokens,
            counts: &b.counts,
            rows: self.max_logit_rows,
        };
        let mut ops = int8.ops(self.gpu, &self.pipelines, &b.params, &step)?;
        if exact.rotation.is_some() {
            let before = self.head_before(exact, norm)?.0;
            ops.input.splice(..0, before);
        }
        Ok((Some(ops), shader::HEAD_INT8.name.to_owned()))
    }

    /// The runs of a linear layer on `x[M, K]`, into the accumulator.
    fn runs(&self, linear: &GpuLinear, x: &Slice) -> Result<Vec<(Vec<Op>, Matmul)>> {
        let runs = linear.runs.iter().enumerate();
        runs.map(|(index, run)| {
            let mut before = Vec::new();
            let x = self.input(run, x, &mut before)?;
            let matmul = match run.matrix.kind {
                Kind::Sums(plans, shape) => {
                    let (b, stride) = (self.buffers, act_stride(self.max_batch));
                    let act_scale = b.act_scale.words(index * stride, stride);
                    let quantize = |encoding| {
                        let call = kernels::quantize_absmax(shape.k(), encoding);
                        self.op(&call, &[x, &b.codes, &act_scale, &b.code_sum])
                    };
                    plans.gemv.validate(self.gpu, shape.k())?;
                    let variant = plans.gemv.variant;
                    plans.gemm.validate(self.gpu, variant.layout(), shape.k())?;
                    let one = quantize(variant.gemv_encoding())?;
                    let many = quantize(gemm_encoding(variant.layout()))?;
                    let mut matmul = self.sums(plans, &run.matrix, &linear.rows, index)?;
                    for (most, ops) in &mut matmul.by_tokens {
                        ops.insert(0, if *most == 1 { one.clone() } else { many.clone() });
                    }
                    matmul
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
        plans: SumPlans,
        matrix: &GpuMatrix,
        rows: &LinearRows,
        run: usize,
    ) -> Result<Matmul> {
        let b = self.buffers;
        let (variant, k) = (plans.gemv.variant, matrix.kind.shape().k());
        let layout = variant.layout();
        // The GEMM's stride is that of all runs.
        let shape = MatShape::new(rows.padded(), k)?;
        let first_tile = rows.first(run) / TILE_ROWS;
        let mut by_tokens = vec![(1, Vec::new())];
        for (at, (tiles, words, offset)) in matrix.shards.iter().enumerate() {
            let inputs = SumInputs { words, codes: &b.codes, offset, code_sum: &b.code_sum };
            let (tile_base, tiles) = (first_tile + tiles.start, tiles.len());
            let op = |call: &Call, mut buffers: Vec<_>| {
                buffers.push(&b.acc);
                self.op(call, &buffers)
            };
            let gemv = kernels::gemv(plans.gemv, shape, tile_base, tiles);
            by_tokens[0].1.push(op(&gemv, variant.gemv_inputs(inputs))?);
            let gemm = Gemm { layout, shape, tile_base, tiles, max_tokens: self.max_batch };
            for (index, (most, call)) in gemm.calls(plans.gemm).into_iter().enumerate() {
                let op = op(&call, gemm_inputs(call.kernel, inputs))?;
                let most = u32::try_from(most).unwrap_or(u32::MAX);
                match at {
                    0 => by_tokens.push((most, vec![op])),
                    _ => by_tokens[1 + index].1.push(op),
                }
            }
        }
        Ok(Matmul { by_tokens })
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
        let (mut gemv, mut gemm) = (Vec::new(), Vec::new());
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
            gemv.push(op(TokensPerLane::One)?);
            gemm.push(op(TokensPerLane::Four)?);
        }
        Ok(Matmul::new(gemv, gemm))
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
        let Kind::Sums(SumPlans { gemv: plan, .. }, shape) = matrix.kind else {
            return Ok(Vec::new());
        };
        if !can_fuse(plan, shape, linear) {
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

    /// Rows of Q, K and V: norms of the heads where there are any; then RoPE, and what it reads.
    fn rope(&self, qkv: &GpuLinear, norms: [Option<&Slice>; 2]) -> Result<(Vec<Op>, Unbound)> {
        let (b, heads) = (self.buffers, self.config.heads());
        let with_scales =
            |rows: &Slice| vec![rows.clone(), qkv.weight_scale.clone(), b.act_scale.clone()];
        let [Some(query_norm), Some(key_norm)] = norms else {
            return Ok((Vec::new(), (kernels::rope(heads, &qkv.rows), with_scales(&b.acc))));
        };
        let call = kernels::head_norm(heads, self.config.rms_norm_eps, &qkv.rows);
        let norm = self.scaled(&call, &[], qkv, &[query_norm, key_norm, &b.heads])?;
        let rows = LinearRows::floats((heads.query + 2 * heads.kv) * heads.dim);
        Ok((vec![norm], (kernels::rope(heads, &rows), with_scales(&b.heads))))
    }

    /// The fused kernels of Q, K and V with what they read before the angles; none where they do not take
    /// the matrix.
    fn fused_qkv(&self, x: &Slice, norm: &Slice, qkv: &GpuLinear) -> Vec<(Fused, Vec<Slice>)> {
        let matrix = &qkv.runs[0].matrix;
        let Kind::Sums(SumPlans { gemv: plan, .. }, shape) = matrix.kind else { return Vec::new() };
        // RoPE's pairs have to meet in a workgroup.
        let is_paired = qkv.rows.order == RowOrder::Pairs(self.config.head_dim);
        if !is_paired || !can_fuse(plan, shape, qkv) {
            return Vec::new();
        }
        let shards = matrix.shards.iter().zip(&qkv.fused_rows);
        let shard = |((tiles, words, _), rows): (&(Range<usize>, Slice, Slice), &Slice)| {
            let (k, norm_eps) = (shape.k(), Some(self.config.rms_norm_eps));
            let fused = Fused { plan, k, norm: norm_eps, tiles: (tiles.start, tiles.len()) };
            (fused, vec![words.clone(), x.clone(), norm.clone(), rows.clone()])
        };
        shards.map(shard).collect()
    }

    async fn linear(
        &mut self,
        step: MatrixStep,
        parts: &[&TernaryMatrix],
        order: RowOrder,
    ) -> Result<HostLinear> {
        let (int8, methods) = (self.int8, &mut self.methods);
        let is_plain = parts.iter().all(|part| *part.input() == Input::default());
        // RoPE's pairs have to meet in a workgroup.
        let is_paired = step != MatrixStep::Qkv || order != RowOrder::Natural;
        let k = parts[0].shape().k();
        let can_fuse = |plan: GemvPlan| is_plain && is_paired && k <= plan.max_fused_k();
        let is_sums = |part: &&TernaryMatrix| matches!(part.scale(), WeightScale::Tensor(_));
        let sums = match parts.iter().any(is_sums) {
            true => Some(methods.sums(step, can_fuse).await?),
            false => None,
        };
        let groups = match parts.iter().all(is_sums) {
            true => None,
            false => Some(methods.groups(int8).await?),
        };
        HostLinear::pack(parts, act_stride(self.max_batch), order, |scale| match scale {
            WeightScale::Tensor(_) => sums.expect("a part has it"),
            WeightScale::Groups { .. } => groups.expect("a part has it"),
        })
    }

    async fn layer(
        &mut self,
        weights: &LayerWeights,
        index: usize,
        cache: &Cache,
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
            self.linear(
                MatrixStep::Qkv,
                &[&weights.q_proj, &weights.k_proj, &weights.v_proj],
                pairs,
            )
            .await?,
            self.linear(MatrixStep::O, &[&weights.o_proj], RowOrder::Natural).await?,
            self.linear(MatrixStep::GateUp, &[&weights.gate_proj, &weights.up_proj], gate_up)
                .await?,
            self.linear(MatrixStep::Down, &[&weights.down_proj], RowOrder::Natural).await?,
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
        self.weight_bytes += parts.iter().map(|part| size_of_val(*part) as u64).sum::<u64>();
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
        let (head_norms, rope) = self.rope(&qkv, [q_norm, k_norm])?;
        let recipe = CacheRecipe {
            rope,
            fused: match input_norm {
                Some(norm) => self.fused_qkv(start, norm, &qkv),
                None => Vec::new(),
            },
        };
        let (intermediate, act) = (config.intermediate_size, config.hidden_act);
        let gate = kernels::gated_activation(intermediate, act, &gate_up.rows);
        let gate = vec![self.scaled(&gate, &[], &gate_up, &[&b.gated])?];
        let residual =
            |from, to| move |fused: Fused| Some((fused.residual(hidden), vec![from, to]));
        Ok(LayerOps {
            qkv: self.step(start, input_norm, &qkv, head_norms, |_| None)?,
            cache: cache_ops(self.gpu, &self.pipelines, b, cache, &recipe, index)?,
            recipe,
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

    fn chunk(&self) -> usize {
        self.pace.chunk(self.max_batch)
    }

    fn max_logit_rows(&self) -> usize {
        self.max_logit_rows
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn head_work(&self) -> Option<HeadWork> {
        self.int8_head.as_ref().map(|_| self.head_work)
    }

    fn traffic(&self) -> Option<Traffic> {
        let WorkDone { weight_bytes, cache_bytes, .. } = self.gpu.work_done();
        Some(Traffic { weights: weight_bytes, cache: cache_bytes })
    }

    fn device_bytes(&self) -> Option<u64> {
        self.gpu.buffer_bytes()
    }

    fn start_profile(&mut self) -> Profiling {
        if self.gpu.start_profile() { Profiling::Kernels } else { Profiling::Nothing }
    }

    fn end_profile(&mut self) -> Result<Vec<PartTime>> {
        self.gpu.end_profile()
    }

    fn lead(&self) -> usize {
        // One submit runs while the next is recorded.
        2 * self.pace.steps()
    }

    fn sequences(&mut self) -> &mut Blocks {
        &mut self.sequences
    }

    fn kv_format(&self) -> KvFormat {
        self.cache.layout.format
    }

    fn kv_bytes(&self) -> u64 {
        self.cache.len_bytes()
    }

    fn read_block(&mut self, block: u32) -> Result<Vec<u8>> {
        self.flush();
        self.cache.read_block(&self.gpu, block)
    }

    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        self.flush();
        self.make_room(block as usize + 1, 0)?;
        self.cache.write_block(&self.gpu, block, bytes)
    }

    fn keep(&mut self, n: usize) -> Result<()> {
        let Some(draft) = self.draft.take_if(|draft| (1..=draft.taken.len()).contains(&n)) else {
            return Err(Error::NoToken);
        };
        let Draft { start, count, taken } = draft;
        self.ring.forget();
        self.sampler.rewind(&start);
        taken[..n].iter().for_each(|&token| self.sampler.follow(token));
        (self.chosen.count, self.chosen.is_fresh) = (count + n, true);
        if self.sampler.repetition_penalty() != 1.0 {
            self.write_seen(&[]);
        }
        self.gpu.check("keep tokens")
    }

    fn choose_with(&mut self, sampler: Sampler) -> Result<()> {
        self.forget();
        self.sampler = sampler;
        self.write_seen(&[]);
        Ok(())
    }

    fn begin(&mut self, batch: Batch<'_>) -> Result<()> {
        batch.check(self.max_batch, self.capacity, self.config.vocab_size)?;
        let (n_tokens, n_logit_rows) = (batch.tokens.count(), batch.logit_rows());
        if n_logit_rows > self.max_logit_rows {
            let (name, max) = ("rows of logits of a batch", self.max_logit_rows);
            return Err(Error::Dimension { name, found: n_logit_rows, max });
        }
        let token_in = match batch.tokens {
            Tokens::Given(tokens) => {
                self.forget();
                let buffer = &self.buffers.tokens.buffer;
                self.gpu.queue.write_buffer(buffer, 0, bytemuck::cast_slice(tokens));
                self.prompt_tokens = n_tokens;
                0
            }
            Tokens::Chosen if self.chosen.is_fresh => self.place(self.chosen.count - 1),
            Tokens::Chosen => return Err(Error::NoToken),
        };
        self.rows.clear();
        let block = self.prepare(&batch)?;
        // Checked above: all of these are below the capacity, which fits u32.
        self.batch.values = PassParams {
            block,
            n_tokens: n_tokens as u32,
            start: batch.start as u32,
            first_logit_row: (n_tokens - n_logit_rows) as u32,
            n_logit_rows: n_logit_rows as u32,
            token_in: token_in as u32,
            token_out: self.place(self.chosen.count) as u32,
            penalty: self.sampler.repetition_penalty(),
            ..PassParams::default()
        };
        match (batch.want, batch.tokens) {
            (Want::Token, _) => self.batch.values.sample(&mut self.sampler),
            (Want::Tokens, Tokens::Given(tokens)) => self.begin_draft(tokens),
            _ => {}
        }
        self.batch = self.parameters(self.batch.values);
        if batch.want == Want::Tokens {
            self.draw_rows();
        }
        self.want = batch.want;
        self.recording.get_or_insert_with(|| self.gpu.begin_recording());
        Ok(())
    }

    fn embed(&mut self) -> Result<()> {
        record(&self.gpu, &mut self.recording, &self.batch, &self.embed);
        self.current_hidden = 0;
        Ok(())
    }

    fn qkv(&mut self, layer: usize) -> Result<()> {
        let LayerOps { cache, .. } = &self.layers[layer];
        let Parameters { values: PassParams { n_tokens, block, .. }, .. } = self.batch;
        let is_fused = n_tokens == 1 && !cache.fused.is_empty();
        if is_fused {
            let fused = &cache.fused[self.cache.shard_of(block)];
            record(&self.gpu, &mut self.recording, &self.batch, fused);
        } else {
            self.record_step(layer, |ops| &ops.qkv);
            let rope = [&self.layers[layer].cache.rope];
            record(&self.gpu, &mut self.recording, &self.batch, rope);
        }
        if !is_fused || self.kv_format() == KvFormat::Int8 {
            let store = &self.layers[layer].cache.store;
            let store = self.written.iter().map(|&shard| &store[shard]);
            record(&self.gpu, &mut self.recording, &self.batch, store);
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        let PassParams { n_tokens, start, .. } = self.batch.values;
        if n_tokens > 1 && !self.parts.is_empty() {
            return self.attend_in_parts(layer);
        }
        let ops = &self.layers[layer].cache;
        let has_one_shard = self.cache.shards() == 1;
        let is_short = has_one_shard && start as usize / BLOCK < SHORT_BLOCKS;
        let (batch, recording) = (&self.batch, &mut self.recording);
        match n_tokens {
            1 if is_short => record(&self.gpu, recording, batch, &ops.short),
            1 => record(&self.gpu, recording, batch, ops.blocks.iter().chain([&ops.merge])),
            _ => record(&self.gpu, recording, batch, [&ops.many[0][0]]),
        }
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
        self.split(layer)
    }

    fn head(&mut self) -> Result<()> {
        let rows = self.batch.values.n_logit_rows;
        if let (Want::Token | Want::Tokens, Some(int8)) = (self.want, &self.int8_head) {
            record(&self.gpu, &mut self.recording, &self.batch, int8.logits(rows));
            return Ok(());
        }
        let Head { before, tables } = &self.head;
        let ops = before.iter().chain(&tables[LogitTile::index_for(rows)]);
        record(&self.gpu, &mut self.recording, &self.batch, ops);
        Ok(())
    }

    fn choose(&mut self) -> Result<()> {
        let is_greedy = self.sampler.sampling() == Sampling::Greedy;
        // These choose for every row of logits; a draw is of one.
        let (ops, parameters) = match (&self.int8_head, &self.argmax) {
            (Some(int8), _) if is_greedy => (int8.greedy.as_slice(), &[][..]),
            (None, Some(argmax)) if self.sampler.is_argmax() => (from_ref(argmax), &[][..]),
            _ => (self.sample.as_slice(), self.rows.as_slice()),
        };
        let parameters = if parameters.is_empty() { from_ref(&self.batch) } else { parameters };
        for parameters in parameters {
            record(&self.gpu, &mut self.recording, parameters, ops);
        }
        let PassParams { start, n_tokens, n_logit_rows, .. } = self.batch.values;
        let Chosen { count, recorded, first_position, is_fresh } = &mut self.chosen;
        if *recorded == 0 {
            *first_position = (start + n_tokens - n_logit_rows) as usize;
        }
        // Of several tokens it is not known yet which is the last one.
        *is_fresh = self.draft.is_none();
        (*count, *recorded) = (*count + n_logit_rows as usize, *recorded + n_logit_rows as usize);
        Ok(())
    }

    fn finish(&mut self) -> Result<Output> {
        let vocab_size = self.config.vocab_size;
        match self.want {
            Want::Nothing => {
                let submission = self.submit(|_, _| {});
                self.gpu.check("run a prompt chunk")?;
                self.land_chunk()?;
                self.chunks.push_back(Chunk {
                    submission,
                    submitted: Instant::now(),
                    n_tokens: self.batch.values.n_tokens as usize,
                    #[cfg(target_family = "wasm")]
                    done: self.gpu.submitted_work(),
                });
                Ok(Output::Nothing)
            }
            Want::Tokens => {
                self.launch()?;
                Ok(Output::Nothing)
            }
            Want::Token => {
                let is_given = self.batch.values.token_in == 0;
                if is_given || self.chosen.recorded >= self.pace.steps() {
                    self.launch()?;
                }
                Ok(Output::Nothing)
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
                let len_words = vocab_size * self.batch.values.n_logit_rows as usize;
                let words = self.gpu.read(&self.buffers.logits, len_words)?;
                Ok(Output::Logits(bytemuck::cast_vec(words)))
            }
        }
    }

    /// Two prompt chunks may be on their way, and a token has to be here before it is taken.
    #[cfg(target_family = "wasm")]
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        while self.chunks.len() > 1 {
            let Chunk { submitted, n_tokens, done, .. } = &self.chunks[0];
            let (submitted, n_tokens) = (*submitted, *n_tokens);
            ready!(done.poll(context));
            self.chunks.pop_front();
            self.learn_chunk(submitted, n_tokens);
        }
        if self.ring.is_empty() && self.chosen.recorded > 0 {
            self.launch()?;
        }
        if let Some(landing) = ready!(self.ring.poll_land(&self.gpu, context))? {
            self.learn(landing);
        }
        Poll::Ready(self.gpu.check("run kernels"))
    }

    fn take(&mut self) -> Result<u32> {
        loop {
            match self.ring.next() {
                Some(ChosenToken { token, candidates, .. })
                    if (token as usize) < self.config.vocab_size =>
                {
                    if self.sampler.sampling() == Sampling::Greedy {
                        let work = &mut self.head_work;
                        work.tokens += 1;
                        work.candidates += u64::from(candidates);
                        work.most = work.most.max(candidates.into());
                    }
                    match &mut self.draft {
                        Some(draft) => draft.taken.push(token),
                        None => self.sampler.observe(&[token]),
                    }
                    return Ok(token);
                }
                Some(ChosenToken { token, position, .. }) => {
                    self.forget();
                    return Err(match token {
                        NAN_TOKEN => Error::NanLogits { position },
                        _ => self.gpu.error("choose a token", format!("{token} is no token")),
                    });
                }
                None => {}
            }
            if !self.land()? {
                if self.chosen.recorded == 0 {
                    return Err(Error::NoToken);
                }
                self.launch()?;
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
        let words = self.gpu.read(slice, width * self.batch.values.n_tokens as usize)?;
        self.recording = Some(self.gpu.begin_recording());
        Ok(bytemuck::cast_vec(words))
    }
}
