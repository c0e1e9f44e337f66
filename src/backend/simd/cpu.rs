//! The backend: packed weights, buffers and threads around the kernels.

use std::ops::Range;

use cpu_ref::layout::columns::STRIPE_ROWS;
use cpu_ref::layout::{CHUNK_K, TILE_ROWS};
use cpu_ref::mlp::Activation;
use cpu_ref::rope::Frequencies;

use super::columns::{Columns, NonZeros, most_nonzeros};
use super::head::Int8Head;
use super::load::{Layer, Weights};
use super::matrix::{Head, Linears, Matrix, Scales, UpRows};
use super::pool::{self, Pool, Split, Table};
use super::rows::{self, Open};
use super::{Activations, Kernels, Level, TokenScale, attention};
use crate::backend::choices::Choices;
use crate::backend::{
    Backend, Batch, DeviceInfo, HeadWork, LoadOptions, OnProgress, Output, Sparse, Tap, Tokens,
    Traffic, Want,
};
use crate::config::{Activations as Precision, ModelConfig};
use crate::error::{Error, Result};
use crate::kv_cache::{BLOCK, Blocks, HeadChunkMut, KvCache, KvFormat, KvShape, SequenceId};
use crate::sampler::{Sampler, Sampling};
use crate::weights::WeightSource;

/// A model on the CPU.
///
/// Steps run at once. Everything a pass needs is allocated by [`SimdBackend::load`], except new
/// blocks of the KV cache, the logits that a pass returns and, for [`Want::AllLogits`], the room to
/// compute them.
pub struct SimdBackend {
    device: DeviceInfo,
    config: ModelConfig,
    max_batch: usize,
    embedding: Head,
    lm_head: Option<Head>,
    /// The int8 rows that tokens are chosen by, where there are any.
    int8_head: Option<Int8Head>,
    final_norm: Vec<f32>,
    layers: Vec<Layer>,
    frequencies: Frequencies,
    cache: KvCache,
    blocks: Blocks,
    attention: attention::Scratch,
    work: Work,
    pass: Pass,
    choices: Choices,
    /// A row of logits of several, `[V]`.
    row: Vec<f32>,
    traffic: Traffic,
}

/// The threads, the kernels, and the buffers between them, each for `max_batch` tokens of the
/// matrix that needs most of it.
struct Work {
    pool: Pool,
    kernels: Box<dyn Kernels>,
    /// Whether activations are quantised where weights have scales of groups.
    int8_groups: bool,
    eps: f32,
    /// eps of the norms inside linear layers.
    linear_eps: f32,
    /// `[M, K]`: what a matrix multiplies, if it is f32 or not the layer's input as it is.
    inputs: Vec<f32>,
    /// `[M, 64·chunks]`.
    codes: Vec<i8>,
    /// `[M, K/group]`, or `[M]`.
    scales: Vec<TokenScale>,
    /// `[tiles][M][32]`: sums of codes.
    acc: Vec<i32>,
    /// As `acc`: results of matrices with scales of groups.
    products: Vec<f32>,
    /// `[M, N]`: the results of all matrices that read the same vector.
    rows: Vec<f32>,
    /// The inputs of a matrix by columns.
    nonzeros: NonZeros,
    /// The gates of a matrix by rows.
    open: Open,
    spared: Spared,
}

/// What decode steps did by columns and by rows.
#[derive(Default)]
struct Spared {
    /// Products by columns, and by rows, so far.
    by_columns: u64,
    by_rows: u64,
    /// Bytes of matrices that the pass does not read whole, and what it reads of them by columns and rows.
    whole: u64,
    parts: u64,
}

/// What one forward pass leaves for its next step.
struct Pass {
    tokens: Vec<u32>,
    sequence: Option<SequenceId>,
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
}

impl Pass {
    fn position_of_last(&self) -> usize {
        self.start + self.tokens.len() - 1
    }

    /// How many rows of logits are wanted.
    fn logit_rows(&self) -> usize {
        self.want.logit_rows(self.tokens.len())
    }
}

impl Work {
    /// Buffers for `max_batch` tokens of these matrices.
    fn new(
        pool: Pool,
        kernels: Box<dyn Kernels>,
        precision: Precision,
        config: &ModelConfig,
        max_batch: usize,
        layers: &[Layer],
    ) -> Self {
        let int8_groups = precision == Precision::Int8Group;
        let all = || layers.iter().flat_map(Layer::linears);
        let most = |each: &dyn Fn(&Linears) -> usize| {
            max_batch * all().map(each).max().unwrap_or_default()
        };
        let tiled = |linears: &Linears, of_groups: bool| -> usize {
            let runs = linears.runs().iter().filter(|run| run.scales.is_of_groups() == of_groups);
            runs.map(|run| run.tiles() * TILE_ROWS).max().unwrap_or_default()
        };
        // Whole stripes, where a matrix is there by columns too.
        let acc = |linears: &Linears| match linears.columns() {
            Some(_) => tiled(linears, false).next_multiple_of(STRIPE_ROWS),
            None => tiled(linears, false),
        };
        let columns = all().filter_map(Linears::columns).map(Columns::k).max().unwrap_or_default();
        let gates = all().filter_map(Linears::up).map(|up| up.rows.n()).max().unwrap_or_default();
        let scales = |linears: &Linears| {
            linears.runs().iter().map(|run| run.groups().max(1)).max().unwrap_or_default()
        };
        let codes = |linears: &Linears| {
            let of_codes = |run: &&Matrix| int8_groups || !run.scales.is_of_groups();
            let needed = linears.runs().iter().any(|run| of_codes(&run));
            let padded = linears.k().next_multiple_of(CHUNK_K);
            // Whole lines, where a matrix is there by rows too.
            let lines = linears.up().map_or(0, |up| up.rows.chunks() * CHUNK_K);
            if needed { padded.max(lines) } else { 0 }
        };
        let inputs = |linears: &Linears| {
            let needed =
                linears.runs().iter().any(|run| run.scales.is_of_groups() || run.has_input());
            if needed { linears.k() } else { 0 }
        };
        Self {
            pool,
            kernels,
            int8_groups,
            eps: config.rms_norm_eps,
            linear_eps: config.linear_norm_eps.unwrap_or_default(),
            inputs: vec![0.0; most(&inputs)],
            codes: vec![0; most(&codes)],
            scales: vec![TokenScale::default(); most(&scales)],
            acc: vec![0; most(&acc)],
            products: vec![0.0; most(&|linears| tiled(linears, true))],
            rows: vec![0.0; most(&Linears::n)],
            nonzeros: NonZeros::new(columns),
            open: Open::new(gates),
            spared: Spared::default(),
        }
    }

    /// Linear layers of one input for the M tokens `x[M,K]`: norm (where there is a weight), what
    /// each matrix wants of its input, multiply, scale back; then `finish(m, y, out)` gets each
    /// token's `y[N]` and its own chunk of `out[M, ..]`.
    fn linear(
        &mut self,
        linears: &Linears,
        x: &[f32],
        norm: Option<&[f32]>,
        out: &mut [f32],
        finish: impl Fn(&dyn Kernels, usize, &mut [f32], &mut [f32]) + Sync,
    ) {
        let (n_tokens, n) = (x.len() / linears.k(), linears.n());
        let mut start = 0;
        for run in linears.runs() {
            let columns = start..start + run.shape.n();
            start = columns.end;
            match &run.scales {
                Scales::Rows(scale) => {
                    let by_columns = linears.columns();
                    self.multiply_codes((run, scale, by_columns), (x, norm), (n, columns));
                }
                Scales::Groups { .. } => self.multiply_groups(run, (x, norm), (n, columns)),
            }
        }

        let Self { pool, kernels, rows, .. } = self;
        let kernels = kernels.as_ref();
        let rows = &mut rows[..n_tokens * n];
        let out_len = out.len() / n_tokens;
        pool.stripes2(rows, Split { len: n, cost: 8 * n }, out, out_len, |first, rows, out| {
            let tokens = rows.chunks_exact_mut(n).zip(out.chunks_exact_mut(out_len));
            for (m, (row, out)) in (first..).zip(tokens) {
                finish(kernels, m, row, out);
            }
        });
    }

    /// Writes these columns of `rows[M, n]`. One token goes by columns of the matrix, where there are any
    /// and it pays.
    fn multiply_codes(
        &mut self,
        (run, weight_scale, by_columns): (&Matrix, &[f32], Option<&Columns>),
        (x, norm): (&[f32], Option<&[f32]>),
        (n, columns): (usize, Range<usize>),
    ) {
        let (k, chunks) = (run.shape.k(), run.chunks());
        let n_tokens = x.len() / k;
        if run.has_input() {
            self.prepare(run, x, norm);
        }
        let Self { pool, kernels, eps, inputs, codes, scales, acc, rows, nonzeros, spared, .. } =
            self;
        let (kernels, eps) = (kernels.as_ref(), *eps);
        let (x, norm) = if run.has_input() { (&inputs[..n_tokens * k], None) } else { (x, norm) };

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

        let rows = &mut rows[..n_tokens * n];
        if let (Some(by_columns), 1) = (by_columns, n_tokens) {
            nonzeros.collect(&codes[..k]);
            if most_nonzeros(kernels.level()).is_some_and(|most| nonzeros.at_most(most)) {
                let (nonzeros, act_scale) = (&*nonzeros, scales[0].act_scale);
                let acc = &mut acc[..by_columns.rows()];
                let split = Split { len: STRIPE_ROWS, cost: nonzeros.len() * STRIPE_ROWS / 4 };
                let table = Table { values: rows, width: n, columns, chunk: STRIPE_ROWS };
                pool.stripes_and_columns(acc, split, table, |first, acc, mut y| {
                    let lines = by_columns.stripes(first, acc.len() / STRIPE_ROWS);
                    kernels.gemv_columns(lines, nonzeros, acc);
                    let scale = &weight_scale[first * STRIPE_ROWS..][..y.len()];
                    let acc = &acc[..y.len().next_multiple_of(TILE_ROWS)];
                    kernels.dequantize(acc, (0, 1), scale, act_scale, y.row(0));
                });
                spared.by_columns += 1;
                spared.whole += size_of_val(run.words()) as u64;
                spared.parts += (nonzeros.len() * by_columns.column_bytes()) as u64;
                return;
            }
        }
        let acc = &mut acc[..run.tiles() * n_tokens * TILE_ROWS];
        let table = Table { values: rows, width: n, columns, chunk: TILE_ROWS };
        let x = Activations::new(codes, scales, chunks);
        multiply_tiles((pool, kernels), (run, weight_scale, 0), x, acc, table);
    }

    /// `gated[I]` of one token with relu²: the gates first, and of `up_proj` only the rows whose gate is
    /// open, if that pays. Else all of them, and the same bits; a 0 may have another sign, which is
    /// that of a number that was not computed, and which the codes of `down` do not have.
    fn gate_and_up(
        &mut self,
        (run, up): (&Matrix, &UpRows),
        (x, norm): (&[f32], Option<&[f32]>),
        gated: &mut [f32],
    ) {
        let Self { pool, kernels, eps, codes, scales, acc, rows, open, spared, .. } = self;
        let kernels = kernels.as_ref();
        let Scales::Rows(weight_scale) = &run.scales else {
            unreachable!("`Linears::add_up_rows` takes no others")
        };
        let (n, row_bytes) = (gated.len(), up.rows.row_bytes());
        let codes = &mut codes[..up.rows.chunks() * CHUNK_K];
        let scale = kernels.norm_quantize(x, norm, *eps, codes);
        let scales = &mut scales[..1];
        scales[0] = scale;
        let (codes, scales) = (&*codes, &*scales);
        let tiled = Activations::new(&codes[..run.chunks() * CHUNK_K], scales, run.chunks());
        let (gate, up_values) = rows[..2 * n].split_at_mut(n);
        let half = n / TILE_ROWS;
        let acc = &mut acc[..n];
        multiply_tiles(
            (pool, kernels),
            (run, weight_scale, 0),
            tiled,
            acc,
            Table::row(gate, TILE_ROWS),
        );

        open.collect(gate);
        let act_scale = scale.act_scale;
        let is_finite = rows::is_finite(run.shape.k(), act_scale, up.largest_scale);
        if !is_finite || !most_open(kernels.level(), run).is_some_and(|most| open.at_most(most)) {
            let second = (run, &weight_scale[..], half);
            multiply_tiles((pool, kernels), second, tiled, acc, Table::row(up_values, TILE_ROWS));
            kernels.gated_activation(gate, up_values, Activation::Relu2, gated);
            return;
        }
        let x = Activations::new(codes, scales, up.rows.chunks());
        let (gate, weight_scale, open) = (&*gate, &weight_scale[n..], open.rows());
        let (acc, products) = (&mut acc[..open.len()], &mut up_values[..open.len()]);
        let split = Split { len: 1, cost: row_bytes };
        pool.stripes2(acc, split, products, 1, |first, acc, products| {
            let open = &open[first..][..acc.len()];
            kernels.gemv_rows(&up.rows, x, open, acc);
            for ((product, &sum), &row) in products.iter_mut().zip(&*acc).zip(open) {
                let (gate, weight_scale) = (gate[row as usize], weight_scale[row as usize]);
                *product = gate * gate * (sum as f32 * (weight_scale * act_scale));
            }
        });
        gated.fill(0.0);
        for (&row, &product) in open.iter().zip(&*products) {
            gated[row as usize] = product;
        }
        spared.by_rows += 1;
        spared.whole += (half * run.tile_words() * size_of::<u32>()) as u64;
        spared.parts += (open.len() * row_bytes) as u64;
    }

    /// Writes these columns of `rows[M, n]`.
    fn multiply_groups(
        &mut self,
        run: &Matrix,
        (x, norm): (&[f32], Option<&[f32]>),
        (n, columns): (usize, Range<usize>),
    ) {
        let (k, groups) = (run.shape.k(), run.groups());
        let n_tokens = x.len() / k;
        self.prepare(run, x, norm);
        let Self { pool, kernels, int8_groups, inputs, codes, scales, products, rows, .. } = self;
        let kernels = kernels.as_ref();
        let inputs = &inputs[..n_tokens * k];
        let tile_len = n_tokens * TILE_ROWS;
        let products = &mut products[..run.tiles() * tile_len];
        let values = &mut rows[..n_tokens * n];
        let table = Table { values, width: n, columns, chunk: TILE_ROWS };
        let untile = |products: &[f32], mut y: pool::Columns<'_, f32>| {
            for m in 0..n_tokens {
                kernels.untile(products, (m, n_tokens), y.row(m));
            }
        };
        if !*int8_groups {
            let split = Split { len: tile_len, cost: Split::cost_of_pieces(TILES_PER_TABLE) };
            pool.stripes_and_columns(products, split, table, |first, products, y| {
                let weights = run.group_weights().part(first, products.len() / tile_len);
                kernels.group_gemm(weights, inputs, products);
                untile(products, y);
            });
            return;
        }

        let layout = run.layout();
        let (codes, scales) = (&mut codes[..n_tokens * k], &mut scales[..n_tokens * groups]);
        pool.stripes2(
            codes,
            Split { len: k, cost: 8 * k },
            scales,
            groups,
            |first, codes, scales| {
                let tokens = codes.chunks_exact_mut(k).zip(scales.chunks_exact_mut(groups));
                for (x, (codes, scales)) in inputs[first * k..].chunks_exact(k).zip(tokens) {
                    kernels.quantize_absmax_groups(x, layout, codes, scales);
                }
            },
        );
        let x = Activations::of_groups(codes, scales, k / CHUNK_K, groups);
        let cost = n_tokens * run.tile_words() * size_of::<u32>();
        pool.stripes_and_columns(
            products,
            Split { len: tile_len, cost },
            table,
            |first, products, y| {
                let weights = run.group_weights().part(first, products.len() / tile_len);
                kernels.group_gemm_int8(weights, x, products);
                untile(products, y);
            },
        );
    }

    /// Keys and values of `positions`, which the rows hold after `query_size` values, into the cache.
    fn store(
        &mut self,
        cache: &mut KvCache,
        table: &[u32],
        layer: usize,
        positions: Range<usize>,
        query_size: usize,
    ) {
        let Self { pool, kernels, rows, .. } = self;
        let (kernels, rows) = (kernels.as_ref(), &*rows);
        let shape = *cache.shape();
        let (dim, kv_size) = (shape.dim, shape.heads * shape.dim);
        let mut from = positions.start;
        while from < positions.end {
            let to = positions.end.min((from / BLOCK + 1) * BLOCK);
            let chunks = cache.layer_mut(table[from / BLOCK], layer);
            let split = Split { len: shape.chunk_lines(), cost: 16 * dim * (to - from) };
            pool.stripes(chunks, split, |first, chunks| {
                for (head, chunk) in (first..).zip(chunks.chunks_exact_mut(shape.chunk_lines())) {
                    for position in from..to {
                        let row =
                            &rows[(position - positions.start) * (query_size + 2 * kv_size)..];
                        let key = &row[query_size + head * dim..][..dim];
                        let value = &row[query_size + kv_size + head * dim..][..dim];
                        let chunk = HeadChunkMut::of(chunk, &shape);
                        kernels.store_head(key, value, position % BLOCK, chunk);
                    }
                }
            });
            from = to;
        }
    }

    /// Writes what a matrix multiplies into `inputs[M, K]`: `x` after the norm before the layer and
    /// what the layer does to its input.
    fn prepare(&mut self, run: &Matrix, x: &[f32], norm: Option<&[f32]>) {
        let Self { pool, kernels, eps, linear_eps, inputs, .. } = self;
        let (kernels, eps, linear_eps) = (kernels.as_ref(), *eps, *linear_eps);
        let k = run.shape.k();
        let inputs = &mut inputs[..x.len()];
        pool.stripes(inputs, Split { len: k, cost: 8 * k }, |first, inputs| {
            for (x, input) in x[first * k..].chunks_exact(k).zip(inputs.chunks_exact_mut(k)) {
                match norm {
                    Some(weight) => kernels.rmsnorm(x, weight, eps, input),
                    None => input.copy_from_slice(x),
                }
                if let Some(weight) = &run.input.norm {
                    kernels.rmsnorm_heads(input, weight, linear_eps);
                }
                if let Some(rotation) = &run.input.rotation {
                    kernels.rotate(input, &rotation.signs, rotation.block);
                }
            }
        });
    }
}

/// Percents of open gates up to which `up_proj` goes by rows: a row has two bits a weight.
fn most_open(level: Level, whole: &Matrix) -> Option<usize> {
    let most = rows::most_open(level)?;
    Some(if whole.is_base3() { most * 4 / 5 } else { most })
}

/// The columns of a table from tiles of a matrix, `first` and the next ones: as many as `acc[tiles][M][32]`
/// has room for.
fn multiply_tiles(
    (pool, kernels): (&mut Pool, &dyn Kernels),
    (run, weight_scale, first): (&Matrix, &[f32], usize),
    x: Activations<'_>,
    acc: &mut [i32],
    table: Table<'_, f32>,
) {
    let n_tokens = x.n_tokens();
    let (tile_len, tile_words) = (n_tokens * TILE_ROWS, run.tile_words());
    let split = Split { len: tile_len, cost: n_tokens * tile_words * size_of::<u32>() };
    pool.stripes_and_columns(acc, split, table, |at, acc, mut y| {
        let (words, weight_scale) =
            (&run.words()[(first + at) * tile_words..], &weight_scale[(first + at) * TILE_ROWS..]);
        // So few tiles that the sums are still in the second-level cache when they are scaled.
        let tiles = (CACHED_SUMS / tile_len).max(1);
        let parts = acc.chunks_mut(tiles * tile_len).zip(words.chunks(tiles * tile_words));
        for (part, (acc, words)) in parts.enumerate() {
            let words = &words[..acc.len() / tile_len * tile_words];
            match run.is_base3() {
                true => kernels.gemm_base3(words, x, acc),
                false => kernels.gemm(words, x, acc),
            }
            let start = part * tiles * TILE_ROWS;
            let rows = start..(start + acc.len() / n_tokens).min(y.len());
            for m in 0..n_tokens {
                let (y, weight_scale) = (&mut y.row(m)[rows.clone()], &weight_scale[rows.clone()]);
                kernels.dequantize(acc, (m, n_tokens), weight_scale, x.act_scale(m), y);
            }
        }
    });
}

/// Sums of codes that stay in the second-level cache with what they are made of: 128 KiB.
const CACHED_SUMS: usize = 32 << 10;

/// Tiles that a thread takes at least: it builds the tables of the products for all of them.
const TILES_PER_TABLE: usize = 4;

/// `products[tiles][M][32]` of a matrix with scales of groups and `x[M, K]`.
fn multiply_floats(
    pool: &mut Pool,
    kernels: &dyn Kernels,
    run: &Matrix,
    x: &[f32],
    products: &mut [f32],
) {
    let tile_len = x.len() / run.shape.k() * TILE_ROWS;
    let split = Split { len: tile_len, cost: Split::cost_of_pieces(TILES_PER_TABLE) };
    pool.stripes(products, split, |first, products| {
        let weights = run.group_weights().part(first, products.len() / tile_len);
        kernels.group_gemm(weights, x, products);
    });
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
        let precision = options.activations(&config)?;
        let max_batch = options.host_batch();
        let pool = match options.pin {
            true => Pool::pinned(threads(options))?,
            false => Pool::new(threads(options))?,
        };
        let Weights { embedding, lm_head, int8_head, mut layers, mut notes } =
            super::load::load(level, pool.threads(), source, options, progress)?;
        let gemv = format!("{} {}", gemv_name(&layers), level.name());
        if options.sparse == Sparse::Auto && config.hidden_act == Activation::Relu2 {
            let more: usize = layers.iter_mut().map(|layer| layer.spare(level)).sum();
            if more > 0 {
                let more = more.div_ceil(1_000_000);
                notes.push(format!("up by rows and down by columns too, {more} MB more"));
            }
        }
        let (hidden, query) = (config.hidden_size, config.query_size());
        let intermediate = config.intermediate_size;
        Ok(Self {
            device: DeviceInfo {
                name: "cpu".to_owned(),
                description: describe(level, pool.threads()),
                gemv,
                head: if int8_head.is_some() { "head_int8" } else { "lm_head" }.to_owned(),
                notes,
            },
            max_batch,
            embedding,
            lm_head,
            int8_head,
            final_norm: source.final_norm()?,
            frequencies: source.frequencies()?,
            cache: KvCache::new(KvShape::new(&config, options.kv_format(&config)?)),
            blocks: Blocks::new(capacity),
            attention: attention::Scratch::new(
                max_batch,
                config.num_attention_heads,
                config.head_dim,
            ),
            work: Work::new(pool, kernels, precision, &config, max_batch, &layers),
            layers,
            pass: Pass {
                tokens: Vec::with_capacity(max_batch),
                sequence: None,
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
            },
            choices: Choices::default(),
            row: Vec::new(),
            traffic: Traffic::default(),
            config,
        })
    }
}

impl Layer {
    /// Keeps what the level needs to leave out weights whose inputs are 0; returns the bytes that takes.
    fn spare(&mut self, level: Level) -> usize {
        if most_nonzeros(level).is_some() {
            self.down.add_columns();
        }
        // The inputs of `down` are codes, in which a 0 has no sign.
        if self.down.columns().is_some() && rows::most_open(level).is_some() {
            self.gate_up.add_up_rows();
        }
        let columns = self.down.columns().map_or(0, Columns::len_bytes);
        columns + self.gate_up.up().map_or(0, |up| up.rows.len_bytes())
    }

    /// Bytes of matrices, their scales and norms.
    fn bytes(&self) -> u64 {
        let linears: u64 =
            self.linears().into_iter().flat_map(Linears::runs).map(Matrix::bytes).sum();
        let norms = [&self.q_norm, &self.k_norm, &self.attn_sub_norm, &self.ffn_sub_norm];
        let norms = norms.into_iter().flatten();
        let norms = norms.chain([&self.input_layernorm, &self.post_attention_layernorm]);
        linears + norms.map(|norm| size_of_val(norm.as_slice()) as u64).sum::<u64>()
    }
}

impl SimdBackend {
    /// What the last pass has read; of matrices that went by columns or rows, those it took. Of the rows
    /// that the int8 head computes exactly, which depend on the data, none is counted.
    fn read_by_pass(&self) -> Traffic {
        let Pass { tokens, start, want, .. } = &self.pass;
        let layers: u64 = self.layers.iter().map(Layer::bytes).sum();
        let Spared { whole, parts, .. } = self.work.spared;
        let layers = layers - whole + parts;
        let embedded = self.embedding.bytes() / self.config.vocab_size as u64 * tokens.len() as u64;
        let table = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let head = match (&self.int8_head, want) {
            (_, Want::Nothing) => 0,
            (Some(int8), Want::Token | Want::Tokens) => {
                let [greedy, draws] = int8.bytes();
                if self.choices.are_greedy() { greedy } else { draws }
            }
            _ => table.bytes(),
        };
        let norm =
            if *want == Want::Nothing { 0 } else { size_of_val(&self.final_norm[..]) as u64 };
        let positions = start + tokens.len();
        let cache = (positions * self.cache.shape().position_bytes()) as u64;
        Traffic { weights: layers + embedded + head + norm, cache }
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
        self.blocks.capacity()
    }

    fn head_work(&self) -> Option<HeadWork> {
        self.int8_head.as_ref().map(Int8Head::work)
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(self.traffic)
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
        let pass = &mut self.pass;
        pass.tokens.clear();
        match batch.tokens {
            Tokens::Given(tokens) => pass.tokens.extend_from_slice(tokens),
            Tokens::Chosen => pass.tokens.push(self.choices.last()?),
        }
        (pass.start, pass.want) = (batch.start, batch.want);
        pass.sequence = Some(batch.sequence);
        (self.work.spared.whole, self.work.spared.parts) = (0, 0);
        let end = batch.start + pass.tokens.len();
        self.cache.apply(self.blocks.prepare(batch.sequence, batch.start, end)?)?;
        let half = self.frequencies.inv_freq.len();
        let angles = pass.cos.chunks_exact_mut(half).zip(pass.sin.chunks_exact_mut(half));
        for (position, (cos, sin)) in (batch.start..).zip(angles).take(pass.tokens.len()) {
            rope_angles(position, &self.frequencies, cos, sin);
        }
        Ok(())
    }

    fn embed(&mut self) -> Result<()> {
        let kernels = self.work.kernels.as_ref();
        let rows = self.pass.hidden.chunks_exact_mut(self.config.hidden_size);
        for (&token, row) in self.pass.tokens.iter().zip(rows) {
            self.embedding.row(kernels, token as usize, row)?;
        }
        Ok(())
    }

    fn qkv(&mut self, layer: usize) -> Result<()> {
        let Layer { input_layernorm, qkv, q_norm, k_norm, .. } = &self.layers[layer];
        let (query_size, kv_size) = (self.config.query_size(), self.config.kv_size());
        let eps = self.config.rms_norm_eps;
        let Pass { tokens, cos, sin, hidden, query, .. } = &mut self.pass;
        let n_tokens = tokens.len();
        let (cos, sin) = (&*cos, &*sin);
        let half = self.frequencies.inv_freq.len();
        self.work.linear(
            qkv,
            &hidden[..n_tokens * self.config.hidden_size],
            Some(input_layernorm),
            &mut query[..n_tokens * query_size],
            |kernels, m, row, query| {
                let angles = m * half..(m + 1) * half;
                let query_key = &mut row[..query_size + kv_size];
                let (queries, keys) = query_key.split_at_mut(query_size);
                for (heads, norm) in [(queries, q_norm), (keys, k_norm)] {
                    if let Some(weight) = norm {
                        kernels.rmsnorm_heads(heads, weight, eps);
                    }
                }
                kernels.rope(query_key, &cos[angles.clone()], &sin[angles]);
                query.copy_from_slice(&query_key[..query_size]);
            },
        );
        let table = self.blocks.table(self.pass.sequence.ok_or(Error::NoSequence)?)?;
        let positions = self.pass.start..self.pass.start + n_tokens;
        self.work.store(&mut self.cache, table, layer, positions, query_size);
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        let Pass { tokens, sequence, start, query, attended, .. } = &mut self.pass;
        let len = tokens.len() * self.config.query_size();
        let layer = attention::Layer {
            cache: &self.cache,
            table: self.blocks.table(sequence.ok_or(Error::NoSequence)?)?,
            layer,
            start: *start,
            heads: self.config.num_attention_heads,
        };
        let Work { pool, kernels, .. } = &mut self.work;
        let on = (pool, kernels.as_ref());
        self.attention.attend(on, layer, &query[..len], &mut attended[..len]);
        Ok(())
    }

    fn project_out(&mut self, layer: usize) -> Result<()> {
        let Layer { attn_sub_norm, o, .. } = &self.layers[layer];
        let Pass { tokens, hidden, attended, .. } = &mut self.pass;
        self.work.linear(
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
        if let (Some(up), 1) = (gate_up.up(), tokens.len()) {
            let x = (&hidden[..hidden_size], Some(&post_attention_layernorm[..]));
            let gated = &mut gated[..intermediate_size];
            self.work.gate_and_up((&gate_up.runs()[0], up), x, gated);
            return Ok(());
        }
        self.work.linear(
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
        self.work.linear(
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
        let Pass { want, tokens, hidden, normed, logits, .. } = &mut self.pass;
        let Work { pool, kernels, .. } = &mut self.work;
        let (kernels, final_norm) = (kernels.as_ref(), &self.final_norm);

        let table = self.lm_head.as_ref().unwrap_or(&self.embedding);

        let hidden = &hidden[(tokens.len() - rows) * k..tokens.len() * k];
        let normed = &mut normed[..rows * k];
        pool.stripes(normed, Split { len: k, cost: 8 * k }, |first, normed| {
            for (x, y) in hidden[first * k..].chunks_exact(k).zip(normed.chunks_exact_mut(k)) {
                kernels.rmsnorm(x, final_norm, eps, y);
                table.rotate(kernels, y);
            }
        });

        let normed = &*normed;
        let tile_len = rows * TILE_ROWS;
        let len = self.config.vocab_size.div_ceil(TILE_ROWS) * tile_len;
        if logits.len() < len {
            logits.resize(len, 0.0);
        }
        let logits = &mut logits[..len];
        if let (Want::Token | Want::Tokens, Some(int8)) = (*want, &mut self.int8_head) {
            match self.choices.are_greedy() {
                true => int8.screen(pool, kernels, normed),
                false => int8.logits(pool, kernels, normed, logits),
            }
            return Ok(());
        }
        match table {
            Head::Packed { matrix, .. } => multiply_floats(pool, kernels, matrix, normed, logits),
            Head::Plain(table) => {
                let table = super::matrix::table_rows(table);
                let per_tile = Split { len: tile_len, cost: 2 * TILE_ROWS * k * rows };
                pool.stripes(logits, per_tile, |first, logits| {
                    let tiles = logits.len() / tile_len.max(1);
                    let rows = table.rows(k, first * TILE_ROWS, (first + tiles) * TILE_ROWS);
                    kernels.lm_head(rows, normed, k, logits);
                });
            }
        }
        Ok(())
    }

    fn choose(&mut self) -> Result<()> {
        let (vocab_size, k) = (self.config.vocab_size, self.config.hidden_size);
        let Work { pool, kernels, .. } = &mut self.work;
        let kernels = kernels.as_ref();
        let (rows, last) = (self.pass.logit_rows(), self.pass.position_of_last());
        let Pass { tokens, start, want, normed, logits, .. } = &mut self.pass;
        let table = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let mut pick = |sampler: &mut Sampler, m: usize, logits: &mut [f32], position| {
            let no_token = || Error::NanLogits { position };
            let is_greedy = sampler.sampling() == Sampling::Greedy;
            if let (true, Some(int8), Head::Plain(table)) = (is_greedy, &mut self.int8_head, table)
            {
                let x = &normed[m * k..][..k];
                let token = int8.greedy((pool, kernels), table, (m, rows), x, sampler);
                let token = token.ok_or_else(no_token)? as u32;
                sampler.observe(&[token]);
                return Ok(token);
            }
            if sampler.is_argmax() {
                return kernels.argmax(logits).map(|token| token as u32).ok_or_else(no_token);
            }
            sampler.sample(logits, position)
        };
        if *want == Want::Tokens {
            self.choices.each(tokens, |sampler, m| {
                self.row.clear();
                self.row.extend(row_of(logits, m, rows).take(vocab_size));
                pick(sampler, m, &mut self.row, *start + m)
            });
            return Ok(());
        }
        self.choices.one(|sampler| pick(sampler, 0, &mut logits[..vocab_size], last))
    }

    fn finish(&mut self) -> Result<Output> {
        let Traffic { weights, cache } = self.read_by_pass();
        self.traffic.weights += weights;
        self.traffic.cache += cache;
        let Pass { want, logits, .. } = &self.pass;
        let vocab_size = self.config.vocab_size;
        Ok(match want {
            Want::LastLogits => Output::Logits(logits[..vocab_size].to_vec()),
            Want::AllLogits => {
                let rows = self.pass.logit_rows();
                let mut all = Vec::with_capacity(rows * vocab_size);
                for m in 0..rows {
                    all.extend(row_of(logits, m, rows).take(vocab_size));
                }
                Output::Logits(all)
            }
            Want::Nothing | Want::Token | Want::Tokens => Output::Nothing,
        })
    }

    fn take(&mut self) -> Result<u32> {
        self.choices.take()
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

/// Row `m` of `[ceil(V/32)][rows][32]` logits, and what pads it.
fn row_of(logits: &[f32], m: usize, rows: usize) -> impl Iterator<Item = f32> {
    let tiles = logits.chunks_exact(rows * TILE_ROWS);
    tiles.flat_map(move |tile| tile[m * TILE_ROWS..][..TILE_ROWS].iter().copied())
}

/// `cpu_ref::rope::angles` into buffers that are there.
fn rope_angles(position: usize, frequencies: &Frequencies, cos: &mut [f32], sin: &mut [f32]) {
    for ((&frequency, cos), sin) in frequencies.inv_freq.iter().zip(cos).zip(sin) {
        (*cos, *sin) = cpu_ref::rope::angle(position, frequency, frequencies.attention_factor);
    }
}

/// The kernels that the layers' matrices use, by name.
fn gemv_name(layers: &[Layer]) -> String {
    let runs = layers.iter().flat_map(Layer::linears).flat_map(Linears::runs);
    let mut names: Vec<_> = runs.map(Matrix::kernel).collect();
    names.sort_unstable();
    names.dedup();
    names.join("+")
}

/// Level, threads and processor that these options choose on this machine.
///
/// # Errors
/// If the environment asks for a level that this machine does not run.
pub fn description(options: &LoadOptions) -> Result<String> {
    Ok(describe(Level::detect()?, threads(options)))
}

/// Threads that these options choose on this machine.
pub fn threads(options: &LoadOptions) -> usize {
    options.threads.unwrap_or_else(default_threads)
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
    use crate::backend::Packing;

    #[cfg(target_os = "linux")]
    #[test]
    fn there_are_no_more_threads_than_processors_that_may_be_used() {
        use super::super::affinity;
        std::thread::spawn(|| {
            affinity::pin(affinity::processors(1).unwrap()[0]).unwrap();
            assert_eq!(default_threads(), 1);
        })
        .join()
        .unwrap();
    }

    /// Logits after each of some tokens of the built-in model, fed one by one, how many products went by
    /// columns and by rows, and what was read.
    fn stepwise(sparse: Sparse, packing: Packing) -> (Vec<f32>, [u64; 2], Traffic) {
        let checkpoint = crate::built_in::checkpoint().unwrap();
        let options = LoadOptions { sparse, packing, threads: Some(2), ..LoadOptions::default() };
        let mut backend = SimdBackend::load(&checkpoint, &options, &mut |_| {}).unwrap();
        assert_eq!(backend.device.notes.len(), usize::from(sparse == Sparse::Auto));
        let sequence = backend.sequences().open();
        let mut all = Vec::new();
        for start in 0..24 {
            let tokens = [(start * 37 % 500) as u32];
            let (tokens, want) = (Tokens::Given(&tokens), Want::LastLogits);
            backend.begin(Batch { tokens, sequence, start, want }).unwrap();
            backend.embed().unwrap();
            for layer in 0..backend.layers.len() {
                backend.qkv(layer).unwrap();
                backend.attend(layer).unwrap();
                backend.project_out(layer).unwrap();
                backend.gate_up(layer).unwrap();
                backend.down(layer).unwrap();
            }
            backend.head().unwrap();
            let Output::Logits(logits) = backend.finish().unwrap() else { panic!("no logits") };
            all.extend(logits);
        }
        let Spared { by_columns, by_rows, .. } = backend.work.spared;
        (all, [by_columns, by_rows], backend.traffic)
    }

    #[test]
    fn inputs_of_zero_are_left_out_and_the_logits_stay() {
        if most_nonzeros(Level::detect().unwrap()).is_none() {
            return;
        }
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for packing in [Packing::TwoBits, Packing::Base3] {
            let (expected, none, all) = stepwise(Sparse::Off, packing);
            let (found, some, read) = stepwise(Sparse::Auto, packing);
            assert_eq!(bits(&expected), bits(&found), "{packing:?}");
            assert_eq!(none, [0, 0]);
            assert!(some.iter().all(|&products| products >= 24), "{some:?} by columns and rows");
            let share = read.weights as f64 / all.weights as f64;
            assert!(share > 0.5 && share < 0.95, "{share} of the bytes");
        }
    }

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
