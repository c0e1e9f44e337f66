//! The reference backend: each step is the plain composition of `cpu_ref` functions.
//!
//! Slow, and right by inspection; the other backends are judged by it.

use cpu_ref::gemv::{dequantize, ternary_dot};
use cpu_ref::quantize_absmax::{Quantized, quantize_absmax};
use cpu_ref::rmsnorm::rmsnorm;
use cpu_ref::{attention::attention, lm_head, mlp, residual::residual_add, rope};

use super::{Backend, Batch, DeviceInfo, LoadOptions, OnProgress, Output, Progress, Tap, Want};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::kv_cache::KvCache;
use crate::weights::{DenseMatrix, TernaryMatrix, WeightSource};

/// A model on the reference backend.
pub struct Reference {
    device: DeviceInfo,
    config: ModelConfig,
    max_batch: usize,
    embedding: DenseMatrix,
    lm_head: Option<DenseMatrix>,
    final_norm: Vec<f32>,
    layers: Vec<Layer>,
    inv_freq: Vec<f32>,
    cache: KvCache,
    pass: Pass,
}

/// A ternary matrix as plain trits `[N, K]`.
struct Trits {
    k: usize,
    trits: Vec<i8>,
    weight_scale: Vec<f32>,
}

struct Layer {
    input_layernorm: Vec<f32>,
    qkv: Trits,
    attn_sub_norm: Option<Vec<f32>>,
    o: Trits,
    post_attention_layernorm: Vec<f32>,
    gate: Trits,
    up: Trits,
    ffn_sub_norm: Option<Vec<f32>>,
    down: Trits,
}

/// The state of one forward pass: one vector a token.
#[derive(Default)]
struct Pass {
    tokens: Vec<u32>,
    start: usize,
    want: Option<Want>,
    hidden: Vec<Vec<f32>>,
    query: Vec<Vec<f32>>,
    attended: Vec<Vec<f32>>,
    gated: Vec<Vec<f32>>,
    logits: Vec<Vec<f32>>,
    token: Option<u32>,
}

impl Trits {
    /// The rows of `parts` one after another.
    fn concat(parts: &[&TernaryMatrix]) -> Result<Self> {
        let k = parts[0].shape().k();
        let rows: usize = parts.iter().map(|part| part.shape().n()).sum();
        let mut trits = vec![0; rows * k];
        let mut weight_scale = Vec::with_capacity(rows);
        let mut out = trits.chunks_exact_mut(k);
        for part in parts {
            for (n, row) in (0..part.shape().n()).zip(out.by_ref()) {
                part.row(n, row)?;
                weight_scale.push(part.scale());
            }
        }
        Ok(Self { k, trits, weight_scale })
    }

    /// The BitLinear layer: `W · quantize(x)`, scaled back.
    fn bitlinear(&self, x: &[f32]) -> Vec<f32> {
        self.apply(&quantize_absmax(x))
    }

    fn apply(&self, x: &Quantized) -> Vec<f32> {
        let acc: Vec<i32> =
            self.trits.chunks_exact(self.k).map(|row| ternary_dot(row, &x.codes)).collect();
        dequantize(&acc, &self.weight_scale, x.act_scale)
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
            layers.push(Layer {
                input_layernorm: layer.input_layernorm,
                qkv: Trits::concat(&[&layer.q_proj, &layer.k_proj, &layer.v_proj])?,
                attn_sub_norm: layer.attn_sub_norm,
                o: Trits::concat(&[&layer.o_proj])?,
                post_attention_layernorm: layer.post_attention_layernorm,
                gate: Trits::concat(&[&layer.gate_proj])?,
                up: Trits::concat(&[&layer.up_proj])?,
                ffn_sub_norm: layer.ffn_sub_norm,
                down: Trits::concat(&[&layer.down_proj])?,
            });
        }
        progress(Progress { done: total, total });
        Ok(Self {
            device: DeviceInfo {
                name: "ref".to_owned(),
                description: "scalar reference, 1 thread".to_owned(),
                gemv: "gemv".to_owned(),
            },
            max_batch: options.max_batch,
            embedding: source.embedding()?,
            lm_head: source.lm_head()?,
            final_norm: source.final_norm()?,
            layers,
            inv_freq: rope::inv_frequencies(config.rope_theta, config.head_dim),
            cache: KvCache::new(total, capacity, config.kv_size()),
            pass: Pass::default(),
            config,
        })
    }

    /// `RMSNorm` where the architecture has a sub-norm, the input itself elsewhere.
    fn sub_norm(x: &[f32], weight: Option<&Vec<f32>>, eps: f32) -> Vec<f32> {
        weight.map_or_else(|| x.to_vec(), |weight| rmsnorm(x, weight, eps))
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
        self.cache.capacity()
    }

    fn begin(&mut self, batch: Batch<'_>) -> Result<()> {
        batch.check(self.max_batch, self.capacity(), self.config.vocab_size)?;
        self.pass = Pass {
            tokens: batch.tokens.to_vec(),
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
            self.embedding.row(token as usize, &mut row);
            pass.hidden.push(row);
        }
        Ok(())
    }

    fn qkv(&mut self, layer: usize) -> Result<()> {
        let Layer { input_layernorm, qkv, .. } = &self.layers[layer];
        let (dim, query_size) = (self.config.head_dim, self.config.query_size());
        self.pass.query.clear();
        for (m, hidden) in self.pass.hidden.iter().enumerate() {
            let position = self.pass.start + m;
            let normed = rmsnorm(hidden, input_layernorm, self.config.rms_norm_eps);
            let mut rows = qkv.bitlinear(&normed);
            let (cos, sin) = rope::angles(position, &self.inv_freq);
            let (query_key, value) = rows.split_at_mut(query_size + self.config.kv_size());
            for head in query_key.chunks_exact_mut(dim) {
                rope::rotate(head, &cos, &sin);
            }
            let (query, key) = query_key.split_at(query_size);
            let (key_slot, value_slot) = self.cache.slot(layer, position);
            key_slot.copy_from_slice(key);
            value_slot.copy_from_slice(value);
            self.pass.query.push(query.to_vec());
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        self.pass.attended.clear();
        for (m, query) in self.pass.query.iter().enumerate() {
            let (keys, values) = self.cache.prefix(layer, self.pass.start + m + 1);
            self.pass.attended.push(attention(query, keys, values, self.config.heads()));
        }
        Ok(())
    }

    fn project_out(&mut self, layer: usize) -> Result<()> {
        let Layer { attn_sub_norm, o, .. } = &self.layers[layer];
        for (hidden, attended) in self.pass.hidden.iter_mut().zip(&self.pass.attended) {
            let x = Self::sub_norm(attended, attn_sub_norm.as_ref(), self.config.rms_norm_eps);
            *hidden = residual_add(hidden, &o.bitlinear(&x));
        }
        Ok(())
    }

    fn gate_up(&mut self, layer: usize) -> Result<()> {
        let Layer { post_attention_layernorm, gate, up, .. } = &self.layers[layer];
        self.pass.gated.clear();
        for hidden in &self.pass.hidden {
            let normed = rmsnorm(hidden, post_attention_layernorm, self.config.rms_norm_eps);
            let x = quantize_absmax(&normed);
            let (gate, up) = (gate.apply(&x), up.apply(&x));
            self.pass.gated.push(mlp::gated_activation(&gate, &up, self.config.hidden_act));
        }
        Ok(())
    }

    fn down(&mut self, layer: usize) -> Result<()> {
        let Layer { ffn_sub_norm, down, .. } = &self.layers[layer];
        for (hidden, gated) in self.pass.hidden.iter_mut().zip(&self.pass.gated) {
            let x = Self::sub_norm(gated, ffn_sub_norm.as_ref(), self.config.rms_norm_eps);
            *hidden = residual_add(hidden, &down.bitlinear(&x));
        }
        Ok(())
    }

    fn head(&mut self) -> Result<()> {
        let table = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let first = match self.pass.want {
            Some(Want::AllLogits) => 0,
            _ => self.pass.hidden.len() - 1,
        };
        let mut row = vec![0.0; self.config.hidden_size];
        for hidden in &self.pass.hidden[first..] {
            let normed = rmsnorm(hidden, &self.final_norm, self.config.rms_norm_eps);
            let logits = (0..self.config.vocab_size).map(|v| {
                table.row(v, &mut row);
                lm_head::logit(&row, &normed)
            });
            self.pass.logits.push(logits.collect());
        }
        Ok(())
    }

    fn argmax(&mut self) -> Result<()> {
        let logits = self.pass.logits.last().map(Vec::as_slice).unwrap_or_default();
        let position = self.pass.start + self.pass.tokens.len() - 1;
        let token = cpu_ref::argmax::argmax(logits).ok_or(Error::NanLogits { position })?;
        self.pass.token = Some(token as u32);
        Ok(())
    }

    fn finish(&mut self) -> Result<Output> {
        let pass = std::mem::take(&mut self.pass);
        Ok(match (pass.want, pass.token) {
            (Some(Want::Token), Some(token)) => Output::Token(token),
            (Some(Want::LastLogits | Want::AllLogits), _) => Output::Logits(pass.logits.concat()),
            _ => Output::Nothing,
        })
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
