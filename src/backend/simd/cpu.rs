//! The backend: packed weights, buffers and threads around the kernels.

use cpu_ref::layout::{CHUNK_K, TILE_ROWS, k_chunks};
use cpu_ref::rope::Frequencies;

use super::pool::{Pool, Split};
use super::{Activations, CHUNK_WORDS, CacheHead, Kernels, Level, TableRows, TokenScale};
use crate::backend::{
    Backend, Batch, DeviceInfo, LoadOptions, OnProgress, Output, Progress, Tap, Want,
};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::kv_cache::KvCache;
use crate::layout::{Layout, Packed};
use crate::shape::MatShape;
use crate::weights::{Input, Table, TableData, TernaryMatrix, WeightScale, WeightSource};

/// A model on the CPU.
///
/// Steps run at once. Everything a pass needs is allocated by [`SimdBackend::load`], except the
/// logits that a pass returns and, for [`Want::AllLogits`], the room to compute them.
pub struct SimdBackend {
    device: DeviceInfo,
    config: ModelConfig,
    max_batch: usize,
    embedding: Table,
    lm_head: Option<Table>,
    final_norm: Vec<f32>,
    layers: Vec<Layer>,
    frequencies: Frequencies,
    cache: KvCache,
    work: Work,
    pass: Pass,
}

struct Layer {
    input_layernorm: Vec<f32>,
    qkv: Matrix,
    attn_sub_norm: Option<Vec<f32>>,
    o: Matrix,
    post_attention_layernorm: Vec<f32>,
    gate_up: Matrix,
    ffn_sub_norm: Option<Vec<f32>>,
    down: Matrix,
}

/// A cache line of packed weights: a matrix that starts on one never has a load across two.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// A packed ternary matrix `[N, K]` (or several of the same K, one after another) in layout I2.
struct Matrix {
    shape: MatShape,
    lines: Vec<Line>,
    /// `[N]`: the scale of the matrix that a row came from.
    weight_scale: Vec<f32>,
}

impl Matrix {
    /// The rows of `parts` one after another.
    fn concat(parts: &[&TernaryMatrix]) -> Result<Self> {
        let mut weight_scale = Vec::new();
        // (part, row) of each row.
        let mut origin = Vec::new();
        for part in parts {
            let WeightScale::Tensor(scale) = part.scale() else {
                return Err(unsupported("scales of groups of inputs"));
            };
            if part.input() != &Input::default() {
                return Err(unsupported("a norm or rotation inside linear layers"));
            }
            weight_scale.extend((0..part.shape().n()).map(|_| scale));
            origin.extend((0..part.shape().n()).map(|n| (part, n)));
        }
        let shape = MatShape::new(origin.len(), parts[0].shape().k())?;
        let packed = Packed::try_pack(Layout::I2, shape, |n, row| {
            let (part, n) = origin[n];
            part.row(n, row)
        })?;
        let words = packed.words();
        let mut lines = vec![Line([0; 16]); words.len() / 16];
        bytemuck::cast_slice_mut(&mut lines).copy_from_slice(words);
        Ok(Self { shape, lines, weight_scale })
    }

    /// `[tiles][chunks][32][4]`.
    fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.lines)
    }

    fn chunks(&self) -> usize {
        k_chunks(self.shape.k())
    }

    fn tiles(&self) -> usize {
        self.shape.n().div_ceil(TILE_ROWS)
    }
}

/// The threads, the kernels, and the buffers between them, each for `max_batch` tokens of the
/// widest matrix.
struct Work {
    pool: Pool,
    kernels: Box<dyn Kernels>,
    eps: f32,
    /// `[M, 64·chunks]`.
    codes: Vec<i8>,
    /// `[M]`.
    scales: Vec<TokenScale>,
    /// `[tiles][M][32]`.
    acc: Vec<i32>,
    /// `[M, N]`.
    rows: Vec<f32>,
}

/// What one forward pass leaves for its next step.
struct Pass {
    tokens: Vec<u32>,
    start: usize,
    want: Want,
    /// `[M, D/2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[M, hidden]`.
    hidden: Vec<f32>,
    /// `[M, H·D]`.
    query: Vec<f32>,
    /// `[M, H·D]`.
    attended: Vec<f32>,
    /// `[M, intermediate]`.
    gated: Vec<f32>,
    /// `[rows wanted, hidden]`.
    normed: Vec<f32>,
    /// `[ceil(V/32)][rows wanted][32]`.
    logits: Vec<f32>,
    token: Option<u32>,
}

impl Pass {
    fn position_of_last(&self) -> usize {
        self.start + self.tokens.len() - 1
    }

    /// How many rows of logits are wanted.
    fn logit_rows(&self) -> usize {
        Batch { tokens: &self.tokens, start: self.start, want: self.want }.logit_rows()
    }
}

impl Work {
    /// A ternary linear layer for the M tokens `x[M,K]`: norm (where there is a weight), quantise,
    /// multiply, scale back; then `finish(m, y, out)` gets each token's `y[N]` and its own chunk of
    /// `out[M, ..]`.
    fn bitlinear(
        &mut self,
        matrix: &Matrix,
        x: &[f32],
        norm: Option<&[f32]>,
        out: &mut [f32],
        finish: impl Fn(&dyn Kernels, usize, &mut [f32], &mut [f32]) + Sync,
    ) {
        let Self { pool, kernels, eps, codes, scales, acc, rows } = self;
        let (kernels, eps) = (kernels.as_ref(), *eps);
        let (n, k, chunks) = (matrix.shape.n(), matrix.shape.k(), matrix.chunks());
        let n_tokens = x.len() / k;

        let codes = &mut codes[..n_tokens * chunks * CHUNK_K];
        let scales = &mut scales[..n_tokens];
        let per_token = Split { len: chunks * CHUNK_K, cost: 8 * k };
        pool.stripes2(codes, per_token, scales, 1, |first, codes, scales| {
            let x = x[first * k..].chunks_exact(k);
            let codes = codes.chunks_exact_mut(chunks * CHUNK_K);
            for ((x, codes), scale) in x.zip(codes).zip(scales) {
                *scale = kernels.norm_quantize(x, norm, eps, codes);
            }
        });

        let x = Activations::new(codes, scales, chunks);
        let acc = &mut acc[..matrix.tiles() * n_tokens * TILE_ROWS];
        let tile_words = chunks * CHUNK_WORDS;
        let per_tile =
            Split { len: n_tokens * TILE_ROWS, cost: n_tokens * tile_words * size_of::<u32>() };
        pool.stripes(acc, per_tile, |first, acc| {
            let tiles = acc.len() / (n_tokens * TILE_ROWS);
            let words = &matrix.words()[first * tile_words..][..tiles * tile_words];
            kernels.gemm(words, x, acc);
        });

        let rows = &mut rows[..n_tokens * n];
        let out_len = out.len() / n_tokens;
        pool.stripes2(rows, Split { len: n, cost: 8 * n }, out, out_len, |first, rows, out| {
            let tokens = rows.chunks_exact_mut(n).zip(out.chunks_exact_mut(out_len));
            for (m, (row, out)) in (first..).zip(tokens) {
                let act_scale = scales[m].act_scale;
                kernels.dequantize(acc, (m, n_tokens), &matrix.weight_scale, act_scale, row);
                finish(kernels, m, row, out);
            }
        });
    }
}

impl SimdBackend {
    /// Loads a model on the level that [`Level::detect`] finds.
    ///
    /// # Errors
    /// If a tensor is missing or malformed, the threads cannot be started, or the environment
    /// asks for a level that this machine does not run.
    pub fn load(
        source: &dyn WeightSource,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        Self::load_on(Level::detect()?, source, options, progress)
    }

    /// Loads a model on a given level.
    ///
    /// # Errors
    /// As for [`SimdBackend::load`].
    pub fn load_on(
        level: Level,
        source: &dyn WeightSource,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        let kernels = level.require()?;
        let config = source.config().clone();
        let capacity = options.capacity(&config)?;
        let max_batch = options.max_batch;
        let pool = Pool::new(options.threads.unwrap_or_else(default_threads))?;
        let total = config.num_hidden_layers;
        let mut layers = Vec::with_capacity(total);
        for index in 0..total {
            progress(Progress { done: index, total });
            let layer = source.layer(index)?;
            if layer.q_norm.is_some() || layer.k_norm.is_some() {
                return Err(unsupported("normalised heads"));
            }
            layers.push(Layer {
                input_layernorm: layer.input_layernorm,
                qkv: Matrix::concat(&[&layer.q_proj, &layer.k_proj, &layer.v_proj])?,
                attn_sub_norm: layer.attn_sub_norm,
                o: Matrix::concat(&[&layer.o_proj])?,
                post_attention_layernorm: layer.post_attention_layernorm,
                gate_up: Matrix::concat(&[&layer.gate_proj, &layer.up_proj])?,
                ffn_sub_norm: layer.ffn_sub_norm,
                down: Matrix::concat(&[&layer.down_proj])?,
            });
        }
        progress(Progress { done: total, total });

        let (hidden, query) = (config.hidden_size, config.query_size());
        let intermediate = config.intermediate_size;
        let widest_k = hidden.max(query).max(intermediate).next_multiple_of(CHUNK_K);
        let widest_n = hidden.max(query + 2 * config.kv_size()).max(2 * intermediate);
        Ok(Self {
            device: DeviceInfo {
                name: "cpu".to_owned(),
                description: describe(level, pool.threads()),
                gemv: format!("gemv_i2 {}", level.name()),
            },
            max_batch,
            embedding: source.embedding()?,
            lm_head: source.lm_head()?,
            final_norm: source.final_norm()?,
            layers,
            frequencies: source.frequencies()?,
            cache: KvCache::new(total, capacity, config.kv_size()),
            work: Work {
                pool,
                kernels,
                eps: config.rms_norm_eps,
                codes: vec![0; max_batch * widest_k],
                scales: vec![TokenScale::default(); max_batch],
                acc: vec![0; max_batch * widest_n.next_multiple_of(TILE_ROWS)],
                rows: vec![0.0; max_batch * widest_n],
            },
            pass: Pass {
                tokens: Vec::with_capacity(max_batch),
                start: 0,
                want: Want::Nothing,
                cos: vec![0.0; max_batch * config.head_dim / 2],
                sin: vec![0.0; max_batch * config.head_dim / 2],
                hidden: vec![0.0; max_batch * hidden],
                query: vec![0.0; max_batch * query],
                attended: vec![0.0; max_batch * query],
                gated: vec![0.0; max_batch * intermediate],
                normed: vec![0.0; max_batch * hidden],
                logits: vec![0.0; config.vocab_size.next_multiple_of(TILE_ROWS)],
                token: None,
            },
            config,
        })
    }
}

impl Backend for SimdBackend {
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
        let pass = &mut self.pass;
        pass.tokens.clear();
        pass.tokens.extend_from_slice(batch.tokens);
        (pass.start, pass.want, pass.token) = (batch.start, batch.want, None);
        let half = self.frequencies.inv_freq.len();
        let angles = pass.cos.chunks_exact_mut(half).zip(pass.sin.chunks_exact_mut(half));
        for (position, (cos, sin)) in (batch.start..).zip(angles).take(batch.tokens.len()) {
            rope_angles(position, &self.frequencies, cos, sin);
        }
        Ok(())
    }

    fn embed(&mut self) -> Result<()> {
        let rows = self.pass.hidden.chunks_exact_mut(self.config.hidden_size);
        for (&token, row) in self.pass.tokens.iter().zip(rows) {
            self.embedding.row(token as usize, row)?;
        }
        Ok(())
    }

    fn qkv(&mut self, layer: usize) -> Result<()> {
        let Layer { input_layernorm, qkv, .. } = &self.layers[layer];
        let (query_size, kv_size) = (self.config.query_size(), self.config.kv_size());
        let Pass { tokens, start, cos, sin, hidden, query, .. } = &mut self.pass;
        let n_tokens = tokens.len();
        let (cos, sin) = (&*cos, &*sin);
        let half = self.frequencies.inv_freq.len();
        self.work.bitlinear(
            qkv,
            &hidden[..n_tokens * self.config.hidden_size],
            Some(input_layernorm),
            &mut query[..n_tokens * query_size],
            |kernels, m, row, query| {
                let angles = m * half..(m + 1) * half;
                let query_key = &mut row[..query_size + kv_size];
                kernels.rope(query_key, &cos[angles.clone()], &sin[angles]);
                query.copy_from_slice(&query_key[..query_size]);
            },
        );
        let rows = self.work.rows.chunks_exact(query_size + 2 * kv_size).take(n_tokens);
        for (position, row) in (*start..).zip(rows) {
            let (key, value) = self.cache.slot(layer, position);
            key.copy_from_slice(&row[query_size..][..kv_size]);
            value.copy_from_slice(&row[query_size + kv_size..]);
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        let heads = self.config.heads();
        let Pass { tokens, start, query, attended, .. } = &mut self.pass;
        let (query, start, n_tokens) = (&*query, *start, tokens.len());
        let (keys, values) = self.cache.prefix(layer, start + n_tokens);
        let Work { pool, kernels, .. } = &mut self.work;
        // A position costs its key and its value.
        let cost = (start + n_tokens) * heads.dim * 2 * size_of::<f32>();
        let per_head = Split { len: heads.dim, cost };
        let attended = &mut attended[..n_tokens * heads.query * heads.dim];
        pool.stripes(attended, per_head, |first, attended| {
            for (index, out) in (first..).zip(attended.chunks_exact_mut(heads.dim)) {
                let (m, head) = (index / heads.query, index % heads.query);
                let group = head / (heads.query / heads.kv);
                let cache = CacheHead {
                    keys: &keys[group * heads.dim..],
                    values: &values[group * heads.dim..],
                    stride: heads.kv * heads.dim,
                    len: start + m + 1,
                };
                kernels.attend_head(&query[index * heads.dim..][..heads.dim], cache, out);
            }
        });
        Ok(())
    }

    fn project_out(&mut self, layer: usize) -> Result<()> {
        let Layer { attn_sub_norm, o, .. } = &self.layers[layer];
        let Pass { tokens, hidden, attended, .. } = &mut self.pass;
        self.work.bitlinear(
            o,
            &attended[..tokens.len() * self.config.query_size()],
            attn_sub_norm.as_deref(),
            &mut hidden[..tokens.len() * self.config.hidden_size],
            |kernels, _, row, hidden| kernels.residual_add(hidden, row),
        );
        Ok(())
    }

    fn gate_up(&mut self, layer: usize) -> Result<()> {
        let Layer { post_attention_layernorm, gate_up, .. } = &self.layers[layer];
        let ModelConfig { hidden_size, intermediate_size, hidden_act, .. } = self.config;
        let Pass { tokens, hidden, gated, .. } = &mut self.pass;
        self.work.bitlinear(
            gate_up,
            &hidden[..tokens.len() * hidden_size],
            Some(post_attention_layernorm),
            &mut gated[..tokens.len() * intermediate_size],
            |kernels, _, row, gated| {
                let (gate, up) = row.split_at(intermediate_size);
                kernels.gated_activation(gate, up, hidden_act, gated);
            },
        );
        Ok(())
    }

    fn down(&mut self, layer: usize) -> Result<()> {
        let Layer { ffn_sub_norm, down, .. } = &self.layers[layer];
        let Pass { tokens, hidden, gated, .. } = &mut self.pass;
        self.work.bitlinear(
            down,
            &gated[..tokens.len() * self.config.intermediate_size],
            ffn_sub_norm.as_deref(),
            &mut hidden[..tokens.len() * self.config.hidden_size],
            |kernels, _, row, hidden| kernels.residual_add(hidden, row),
        );
        Ok(())
    }

    fn head(&mut self) -> Result<()> {
        let (k, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let rows = self.pass.logit_rows();
        let Pass { tokens, hidden, normed, logits, .. } = &mut self.pass;
        let Work { pool, kernels, .. } = &mut self.work;
        let (kernels, final_norm) = (kernels.as_ref(), &self.final_norm);

        let hidden = &hidden[(tokens.len() - rows) * k..tokens.len() * k];
        let normed = &mut normed[..rows * k];
        pool.stripes(normed, Split { len: k, cost: 8 * k }, |first, normed| {
            for (x, y) in hidden[first * k..].chunks_exact(k).zip(normed.chunks_exact_mut(k)) {
                kernels.rmsnorm(x, final_norm, eps, y);
            }
        });

        let normed = &*normed;
        let tile_len = rows * TILE_ROWS;
        let len = self.config.vocab_size.div_ceil(TILE_ROWS) * tile_len;
        if logits.len() < len {
            logits.resize(len, 0.0);
        }
        let table = table_rows(self.lm_head.as_ref().unwrap_or(&self.embedding))?;
        let per_tile = Split { len: tile_len, cost: 2 * TILE_ROWS * k * rows };
        pool.stripes(&mut logits[..len], per_tile, |first, logits| {
            let tiles = logits.len() / tile_len.max(1);
            let rows = table.rows(k, first * TILE_ROWS, (first + tiles) * TILE_ROWS);
            kernels.lm_head(rows, normed, k, logits);
        });
        Ok(())
    }

    fn argmax(&mut self) -> Result<()> {
        let rows = self.pass.logit_rows();
        let position = self.pass.position_of_last();
        let logits = if rows == 1 { &self.pass.logits[..self.config.vocab_size] } else { &[] };
        let token = self.work.kernels.argmax(logits).ok_or(Error::NanLogits { position })?;
        self.pass.token = Some(token as u32);
        Ok(())
    }

    fn finish(&mut self) -> Result<Output> {
        let Pass { want, token, logits, .. } = &self.pass;
        let vocab_size = self.config.vocab_size;
        Ok(match (want, *token) {
            (Want::Token, Some(token)) => Output::Token(token),
            (Want::LastLogits, _) => Output::Logits(logits[..vocab_size].to_vec()),
            (Want::AllLogits, _) => {
                let rows = self.pass.logit_rows();
                let mut all = Vec::with_capacity(rows * vocab_size);
                for m in 0..rows {
                    let tiles = logits.chunks_exact(rows * TILE_ROWS);
                    let row = tiles.flat_map(|tile| &tile[m * TILE_ROWS..][..TILE_ROWS]);
                    all.extend(row.take(vocab_size));
                }
                Output::Logits(all)
            }
            _ => Output::Nothing,
        })
    }

    fn read(&mut self, tap: Tap) -> Result<Vec<f32>> {
        let (pass, n_tokens) = (&self.pass, self.pass.tokens.len());
        let (values, width) = match tap {
            Tap::Hidden => (&pass.hidden, self.config.hidden_size),
            Tap::Query => (&pass.query, self.config.query_size()),
            Tap::Attended => (&pass.attended, self.config.query_size()),
            Tap::Gated => (&pass.gated, self.config.intermediate_size),
        };
        Ok(values[..n_tokens * width].to_vec())
    }
}

/// `cpu_ref::rope::angles` into buffers that are there.
fn rope_angles(position: usize, frequencies: &Frequencies, cos: &mut [f32], sin: &mut [f32]) {
    for ((&frequency, cos), sin) in frequencies.inv_freq.iter().zip(cos).zip(sin) {
        (*cos, *sin) = cpu_ref::rope::angle(position, frequency, frequencies.attention_factor);
    }
}

/// The whole table, as the kernels take it.
fn table_rows(table: &Table) -> Result<TableRows<'_>> {
    Ok(match table.data() {
        TableData::Bf16(rows) => TableRows::Bf16(rows),
        TableData::F16(rows) => TableRows::F16(rows),
        TableData::F32(rows) => TableRows::F32(rows),
        TableData::Codes(_) | TableData::Groups(_) => return Err(unsupported("a packed LM head")),
    })
}

fn unsupported(what: &'static str) -> Error {
    Error::UnsupportedOnDevice { device: "the CPU backend", what }
}

/// Level, threads and processor that these options choose on this machine.
///
/// # Errors
/// If the environment asks for a level that this machine does not run.
pub fn description(options: &LoadOptions) -> Result<String> {
    let threads = options.threads.unwrap_or_else(default_threads);
    Ok(describe(Level::detect()?, threads))
}

fn describe(level: Level, threads: usize) -> String {
    let plural = if threads == 1 { "" } else { "s" };
    let processor = processor_name().map(|name| format!(" ({name})")).unwrap_or_default();
    format!("{}, {threads} thread{plural}{processor}", level.title())
}

/// One thread a physical core, as far as the process may use them (affinity, cgroup quota).
fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    num_cpus::get_physical().clamp(1, allowed)
}

/// The processor's name, where the system tells it in a file.
fn processor_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_those_of_the_reference() {
        let inv_freq = cpu_ref::rope::frequencies(500_000.0, 128, cpu_ref::rope::Scaling::None);
        let (mut cos, mut sin) = ([0.0; 64], [0.0; 64]);
        for position in [0, 1, 77, 4095] {
            rope_angles(position, &inv_freq, &mut cos, &mut sin);
            let (expected_cos, expected_sin) = cpu_ref::rope::angles(position, &inv_freq);
            assert_eq!((&cos[..], &sin[..]), (&expected_cos[..], &expected_sin[..]));
        }
    }
}
