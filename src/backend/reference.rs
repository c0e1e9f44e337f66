//! The reference backend: each step is the plain composition of `cpu_ref` functions.
//!
//! Slow, and right by inspection; the other backends are judged by it.

use cpu_ref::attention::{Cached, attention};
use cpu_ref::gemv::{dequantize, ternary_dot};
use cpu_ref::group_gemv::{group_dot, group_dot_int8, quantize_absmax_groups};
use cpu_ref::kv::{f16_bits, f16_value, store_head};
use cpu_ref::quantize_absmax::quantize_absmax;
use cpu_ref::rmsnorm::rmsnorm;
use cpu_ref::{lm_head, mlp, residual::residual_add, rope};

use super::Want;
use super::choices::Choices;
use super::{Backend, Batch, DeviceInfo, LoadOptions, OnProgress, Output, Progress, Tap, Tokens};
use crate::config::{Activations, ModelConfig};
use crate::error::{Error, Result};
use crate::format::float::f16_to_f32;
use crate::kv_cache::{
    BLOCK, Blocks, HeadChunk, HeadChunkMut, KvCache, KvFormat, KvShape, SequenceId, key_row,
};
use crate::sampler::Sampler;
use crate::weights::{Input, Table, TernaryMatrix, WeightScale, WeightSource, runs_of_input};

/// A model on the reference backend.
pub struct Reference {
    device: DeviceInfo,
    config: ModelConfig,
    max_batch: usize,
    embedding: Table,
    lm_head: Option<Table>,
    final_norm: Vec<f32>,
    layers: Vec<Layer>,
    frequencies: rope::Frequencies,
    cache: KvCache,
    blocks: Blocks,
    pass: Pass,
    choices: Choices,
}

/// Matrices that read the same vector, `[N, K]` one after another.
struct Linears(Vec<Trits>);

/// Matrices that read the same vector through the same [`Input`], as plain trits `[N, K]`.
struct Trits {
    k: usize,
    trits: Vec<i8>,
    scales: Scales,
    input: Input,
    /// eps of the input's norm.
    eps: f32,
}

enum Scales {
    /// One a row.
    Rows(Vec<f32>),
    /// `[N, K/group]`, and whether activations are quantised a group.
    Groups { scales: Vec<f32>, groups: usize, int8: bool },
}

struct Layer {
    input_layernorm: Vec<f32>,
    qkv: Linears,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    attn_sub_norm: Option<Vec<f32>>,
    o: Linears,
    post_attention_layernorm: Vec<f32>,
    gate_up: Linears,
    ffn_sub_norm: Option<Vec<f32>>,
    down: Linears,
}

/// The state of one forward pass: one vector a token.
#[derive(Default)]
struct Pass {
    tokens: Vec<u32>,
    sequence: Option<SequenceId>,
    start: usize,
    want: Option<Want>,
    hidden: Vec<Vec<f32>>,
    query: Vec<Vec<f32>>,
    attended: Vec<Vec<f32>>,
    gated: Vec<Vec<f32>>,
    logits: Vec<Vec<f32>>,
}

impl Linears {
    fn new(parts: &[&TernaryMatrix], config: &ModelConfig, options: &LoadOptions) -> Result<Self> {
        let int8 = options.activations(config)? == Activations::Int8Group;
        let eps = config.linear_norm_eps.unwrap_or_default();
        let runs = runs_of_input(parts).into_iter().map(|run| Trits::concat(run, eps, int8));
        runs.collect::<Result<_>>().map(Self)
    }

    /// `W·x` of every matrix, one after another.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        self.0.iter().flat_map(|trits| trits.apply(x)).collect()
    }
}

impl Trits {
    /// The rows of `parts` one after another.
    fn concat(parts: &[&TernaryMatrix], eps: f32, int8: bool) -> Result<Self> {
        let k = parts[0].shape().k();
        let rows: usize = parts.iter().map(|part| part.shape().n()).sum();
        let mut trits = vec![0; rows * k];
        let mut row_scales = Vec::with_capacity(rows);
        let mut group_scales = Vec::new();
        let mut out = trits.chunks_exact_mut(k);
        for part in parts {
            let mut scales = vec![0; part.groups()];
            for (n, row) in (0..part.shape().n()).zip(out.by_ref()) {
                part.row_with_scales(n, row, &mut scales)?;
                match part.scale() {
                    WeightScale::Tensor(scale) => row_scales.push(scale),
                    WeightScale::Groups { .. } => {
                        group_scales.extend(scales.iter().map(|&bits| f16_to_f32(bits)));
                    }
                }
            }
        }
        let scales = match parts[0].groups() {
            0 => Scales::Rows(row_scales),
            groups => Scales::Groups { scales: group_scales, groups, int8 },
        };
        Ok(Self { k, trits, scales, input: parts[0].input().clone(), eps })
    }

    /// The linear layer: what its input wants, then `W·x`, with int8 activations where the model
    /// has them.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let normed = self.input.norm.as_ref().map(|weight| rmsnorm(x, weight, self.eps));
        let x = normed.as_deref().unwrap_or(x);
        let rotated = self.input.rotation.as_ref().map(|rotation| rotation.rotate(x));
        let x = rotated.as_deref().unwrap_or(x);
        let rows = self.trits.chunks_exact(self.k);
        match &self.scales {
            Scales::Rows(weight_scale) => {
                let x = quantize_absmax(x);
                let acc: Vec<i32> = rows.map(|row| ternary_dot(row, &x.codes)).collect();
                dequantize(&acc, weight_scale, x.act_scale)
            }
            Scales::Groups { scales, groups, int8: false } => {
                let rows = rows.zip(scales.chunks_exact(*groups));
                rows.map(|(row, scales)| group_dot(row, scales, x)).collect()
            }
            Scales::Groups { scales, groups, int8: true } => {
                let (codes, act_scales) = quantize_absmax_groups(x, self.k / groups);
                let rows = rows.zip(scales.chunks_exact(*groups));
                rows.map(|(row, scales)| group_dot_int8(row, scales, &codes, &act_scales)).collect()
            }
        }
    }
}

impl Reference {
    /// Loads a model.
    ///
    /// # Errors
    /// If a tensor is missing or malformed.
    pub fn load(
        source: &dyn WeightSource,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        let config = source.config().clone();
        let capacity = options.capacity(&config)?;
        let total = config.num_hidden_layers;
        let mut layers = Vec::with_capacity(total);
        for index in 0..total {
            progress(Progress { done: index, total });
            let layer = source.layer(index)?;
            let linears = |parts: &[&TernaryMatrix]| Linears::new(parts, &config, options);
            layers.push(Layer {
                qkv: linears(&[&layer.q_proj, &layer.k_proj, &layer.v_proj])?,
                o: linears(&[&layer.o_proj])?,
                gate_up: linears(&[&layer.gate_proj, &layer.up_proj])?,
                down: linears(&[&layer.down_proj])?,
                input_layernorm: layer.input_layernorm,
                q_norm: layer.q_norm,
                k_norm: layer.k_norm,
                attn_sub_norm: layer.attn_sub_norm,
                post_attention_layernorm: layer.post_attention_layernorm,
                ffn_sub_norm: layer.ffn_sub_norm,
            });
        }
        progress(Progress { done: total, total });
        Ok(Self {
            device: DeviceInfo {
                name: "ref".to_owned(),
                description: "scalar reference, 1 thread".to_owned(),
                gemv: "gemv".to_owned(),
                head: "lm_head".to_owned(),
                notes: Vec::new(),
            },
            max_batch: options.host_batch(),
            embedding: source.embedding()?,
            lm_head: source.lm_head()?,
            final_norm: source.final_norm()?,
            layers,
            frequencies: source.frequencies()?,
            cache: KvCache::new(KvShape::new(&config, options.kv_format(&config)?)),
            blocks: Blocks::new(capacity),
            pass: Pass::default(),
            choices: Choices::default(),
            config,
        })
    }

    /// `RMSNorm` where the architecture has a sub-norm, the input itself elsewhere.
    fn sub_norm(x: &[f32], weight: Option<&Vec<f32>>, eps: f32) -> Vec<f32> {
        weight.map_or_else(|| x.to_vec(), |weight| rmsnorm(x, weight, eps))
    }
}

/// Stores one position's keys and values `[G·D]` as [`cpu_ref::kv`] says.
fn store_token(
    cache: &mut KvCache,
    (block, layer): (u32, usize),
    slot: usize,
    key: &[f32],
    value: &[f32],
) {
    let shape = *cache.shape();
    let (dim, format) = (shape.dim, shape.format);
    let chunks = cache.layer_mut(block, layer).chunks_exact_mut(shape.chunk_lines());
    let heads = key.chunks_exact(dim).zip(value.chunks_exact(dim));
    for (chunk, (key, value)) in chunks.zip(heads) {
        let (key, value) = (store_head(key, format), store_head(value, format));
        let mut chunk = HeadChunkMut::of(chunk, &shape);
        if let HeadChunkMut::Int8(.., key_scales, value_scales) = &mut chunk {
            (key_scales[slot], value_scales[slot]) = (key.scale, value.scale);
        }
        for d in 0..dim {
            let (at_key, at_value) = (key_row(d, dim) * BLOCK + slot, slot * dim + d);
            let (key, value) = (key.values[d], value.values[d]);
            match &mut chunk {
                HeadChunkMut::F32(keys, values) => {
                    (keys[at_key], values[at_value]) = (key, value);
                }
                HeadChunkMut::F16(keys, values) => {
                    (keys[at_key], values[at_value]) = (f16_bits(key), f16_bits(value));
                }
                HeadChunkMut::Int8(keys, values, ..) => {
                    (keys[at_key], values[at_value]) = (key as i8, value as i8);
                }
            }
        }
    }
}

/// A layer of a sequence as the cache gives it back, position by position.
#[derive(Default)]
struct CachedRows {
    /// `[S, G, D]`.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `[S, G]`, or empty.
    key_scales: Vec<f32>,
    value_scales: Vec<f32>,
}

impl CachedRows {
    fn gather(cache: &KvCache, table: &[u32], layer: usize) -> Self {
        let KvShape { heads, dim, .. } = *cache.shape();
        let mut rows = Self::default();
        for (&block, slot) in table.iter().flat_map(|b| (0..BLOCK).map(move |slot| (b, slot))) {
            for head in 0..heads {
                let chunk = cache.head(block, layer, head);
                for d in 0..dim {
                    let (key, value) = (key_row(d, dim) * BLOCK + slot, slot * dim + d);
                    let (key, value) = match chunk {
                        HeadChunk::F32(keys, values) => (keys[key], values[value]),
                        HeadChunk::F16(keys, values) => {
                            (f16_value(keys[key]), f16_value(values[value]))
                        }
                        HeadChunk::Int8(keys, values, ..) => {
                            (f32::from(keys[key]), f32::from(values[value]))
                        }
                    };
                    rows.keys.push(key);
                    rows.values.push(value);
                }
                if let HeadChunk::Int8(.., key_scales, value_scales) = chunk {
                    rows.key_scales.push(key_scales[slot]);
                    rows.value_scales.push(value_scales[slot]);
                }
            }
        }
        rows
    }

    /// The first positions.
    fn prefix(&self, positions: usize, shape: &KvShape) -> Cached<'_> {
        let (scales, len) = (positions * shape.heads, positions * shape.heads * shape.dim);
        let scales = (shape.format == KvFormat::Int8)
            .then(|| (&self.key_scales[..scales], &self.value_scales[..scales]));
        Cached { keys: &self.keys[..len], values: &self.values[..len], scales }
    }
}

impl Backend for Reference {
    fn device(&self) -> &DeviceInfo {
        &self.device
    }

    fn max_batch(&self) -> usize {
        self.max_batch
    }

    fn capacity(&self) -> usize {
        self.blocks.capacity()
    }

    fn sequences(&mut self) -> &mut Blocks {
        &mut self.blocks
    }

    fn kv_format(&self) -> KvFormat {
        self.cache.shape().format
    }

    fn kv_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    fn read_block(&mut self, block: u32) -> Result<Vec<u8>> {
        Ok(self.cache.read_block(block))
    }

    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        self.cache.write_block(block, bytes)
    }

    fn keep(&mut self, n: usize) -> Result<()> {
        self.choices.keep(n)
    }

    fn choose_with(&mut self, sampler: Sampler) -> Result<()> {
        self.choices.choose_with(sampler);
        Ok(())
    }

    fn begin(&mut self, batch: Batch<'_>) -> Result<()> {
        batch.check(self.max_batch, self.capacity(), self.config.vocab_size)?;
        let tokens = match batch.tokens {
            Tokens::Given(tokens) => tokens.to_vec(),
            Tokens::Chosen => vec![self.choices.last()?],
        };
        let end = batch.start + tokens.len();
        self.cache.apply(self.blocks.prepare(batch.sequence, batch.start, end)?)?;
        self.pass = Pass {
            tokens,
            sequence: Some(batch.sequence),
            start: batch.start,
            want: Some(batch.want),
            ..Pass::default()
        };
        Ok(())
    }

    fn embed(&mut self) -> Result<()> {
        let pass = &mut self.pass;
        for &token in &pass.tokens {
            let mut row = vec![0.0; self.config.hidden_size];
            self.embedding.row(token as usize, &mut row)?;
            if let Some(rotation) = self.embedding.rotation() {
                row = rotation.rotate_back(&row);
            }
            pass.hidden.push(row);
        }
        Ok(())
    }

    fn qkv(&mut self, layer: usize) -> Result<()> {
        let Layer { input_layernorm, qkv, q_norm, k_norm, .. } = &self.layers[layer];
        let (dim, query_size) = (self.config.head_dim, self.config.query_size());
        let table = self.blocks.table(self.pass.sequence.ok_or(Error::NoSequence)?)?;
        self.pass.query.clear();
        for (m, hidden) in self.pass.hidden.iter().enumerate() {
            let position = self.pass.start + m;
            let normed = rmsnorm(hidden, input_layernorm, self.config.rms_norm_eps);
            let mut rows = qkv.apply(&normed);
            let (cos, sin) = rope::angles(position, &self.frequencies);
            let (query_key, value) = rows.split_at_mut(query_size + self.config.kv_size());
            for (index, head) in query_key.chunks_exact_mut(dim).enumerate() {
                let norm = if index * dim < query_size { q_norm } else { k_norm };
                if let Some(weight) = norm {
                    let normed = rmsnorm(head, weight, self.config.rms_norm_eps);
                    head.copy_from_slice(&normed);
                }
                rope::rotate(head, &cos, &sin);
            }
            let (query, key) = query_key.split_at(query_size);
            let block = table[position / BLOCK];
            store_token(&mut self.cache, (block, layer), position % BLOCK, key, value);
            self.pass.query.push(query.to_vec());
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        let table = self.blocks.table(self.pass.sequence.ok_or(Error::NoSequence)?)?;
        let rows = CachedRows::gather(&self.cache, table, layer);
        self.pass.attended.clear();
        for (m, query) in self.pass.query.iter().enumerate() {
            let positions = self.pass.start + m + 1;
            let cached = rows.prefix(positions, self.cache.shape());
            self.pass.attended.push(attention(query, cached, self.config.heads()));
        }
        Ok(())
    }

    fn project_out(&mut self, layer: usize) -> Result<()> {
        let Layer { attn_sub_norm, o, .. } = &self.layers[layer];
        for (hidden, attended) in self.pass.hidden.iter_mut().zip(&self.pass.attended) {
            let x = Self::sub_norm(attended, attn_sub_norm.as_ref(), self.config.rms_norm_eps);
            *hidden = residual_add(hidden, &o.apply(&x));
        }
        Ok(())
    }

    fn gate_up(&mut self, layer: usize) -> Result<()> {
        let Layer { post_attention_layernorm, gate_up, .. } = &self.layers[layer];
        self.pass.gated.clear();
        for hidden in &self.pass.hidden {
            let normed = rmsnorm(hidden, post_attention_layernorm, self.config.rms_norm_eps);
            let rows = gate_up.apply(&normed);
            let (gate, up) = rows.split_at(self.config.intermediate_size);
            self.pass.gated.push(mlp::gated_activation(gate, up, self.config.hidden_act));
        }
        Ok(())
    }

    fn down(&mut self, layer: usize) -> Result<()> {
        let Layer { ffn_sub_norm, down, .. } = &self.layers[layer];
        for (hidden, gated) in self.pass.hidden.iter_mut().zip(&self.pass.gated) {
            let x = Self::sub_norm(gated, ffn_sub_norm.as_ref(), self.config.rms_norm_eps);
            *hidden = residual_add(hidden, &down.apply(&x));
        }
        Ok(())
    }

    fn head(&mut self) -> Result<()> {
        let table = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let first = match self.pass.want {
            Some(Want::AllLogits | Want::Tokens) => 0,
            _ => self.pass.hidden.len() - 1,
        };
        let mut row = vec![0.0; self.config.hidden_size];
        for hidden in &self.pass.hidden[first..] {
            let mut normed = rmsnorm(hidden, &self.final_norm, self.config.rms_norm_eps);
            if let Some(rotation) = table.rotation() {
                normed = rotation.rotate(&normed);
            }
            let logits = (0..self.config.vocab_size).map(|v| {
                table.row(v, &mut row)?;
                Ok(lm_head::logit(&row, &normed))
            });
            self.pass.logits.push(logits.collect::<Result<_>>()?);
        }
        Ok(())
    }

    fn choose(&mut self) -> Result<()> {
        let Pass { tokens, start, want, logits, .. } = &mut self.pass;
        let last = *start + tokens.len() - 1;
        let pick = |sampler: &mut Sampler, logits: &mut Vec<f32>, position| {
            if sampler.is_argmax() {
                let token = cpu_ref::argmax::argmax(logits);
                return token.map(|token| token as u32).ok_or(Error::NanLogits { position });
            }
            sampler.sample(logits, position)
        };
        if *want == Some(Want::Tokens) {
            let start = *start;
            self.choices.each(tokens, |sampler, row| pick(sampler, &mut logits[row], start + row));
            return Ok(());
        }
        let logits = logits.last_mut().expect("head makes a row at least");
        self.choices.one(|sampler| pick(sampler, logits, last))
    }

    fn finish(&mut self) -> Result<Output> {
        let pass = std::mem::take(&mut self.pass);
        Ok(match pass.want {
            Some(Want::LastLogits | Want::AllLogits) => Output::Logits(pass.logits.concat()),
            _ => Output::Nothing,
        })
    }

    fn take(&mut self) -> Result<u32> {
        self.choices.take()
    }

    fn read(&mut self, tap: Tap) -> Result<Vec<f32>> {
        let pass = &self.pass;
        Ok(match tap {
            Tap::Hidden => pass.hidden.concat(),
            Tap::Query => pass.query.concat(),
            Tap::Attended => pass.attended.concat(),
            Tap::Gated => pass.gated.concat(),
        })
    }
}
