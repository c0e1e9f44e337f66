//! The int8 LM head of a decode step: approximate logits from half the bytes, and the exact greedy
//! token from them.
//!
//! To use it: [`Int8Head::upload`] beside the exact table's [`GpuTable`], once
//! [`check_head`](super::self_test::check_head) has passed, and [`Int8Head::ops`] for the step.
//! Record [`HeadOps::logits`] for every token, or for as many as a draft has, then [`HeadOps::greedy`]
//! where the tokens are the greedy ones; a sampler reads the logits instead. Taps and everything else
//! that wants exact logits stay with `lm_head`.

use std::ops::Range;

use cpu_ref::layout::int8_rows;

use super::buffer::Slice;
use super::device::Gpu;
use super::kernels::{self, DenseShard, HEAD_TABLES, LogitTile};
use super::matrix::{DenseRows, GpuTable, GpuTableData, UPLOAD_BYTES};
use super::record::{Call, Op, Pipelines};
use crate::backend::MAX_DRAFT;
use crate::error::Result;
use crate::shape::MatShape;
use crate::weights::{Int8Rows, Table};

/// Most rows of logits from which tokens are chosen in one pass.
pub const LOGIT_ROWS: usize = MAX_DRAFT + 1;

/// The int8 rows of a head on the device, with what [`LOGIT_ROWS`] tokens need.
pub struct Int8Head {
    shape: MatShape,
    /// Tiles and words of each shard.
    shards: Vec<(Range<usize>, Slice)>,
    x: Slice,
    token: Slice,
    bounds: Slice,
}

/// Where the head's input comes from.
#[derive(Clone, Copy)]
pub enum HeadInput<'a> {
    /// The residual stream, still to be normalised: hidden states `[M, K]`, the norm's weight `[K]`
    /// and its eps.
    Hidden(&'a Slice, &'a Slice, f32),
    /// The logit rows normalised, and rotated if the table is: `[logit rows, K]`.
    Normed(&'a Slice),
}

/// What a step of the head reads and writes.
pub struct HeadStep<'a> {
    /// The head's input.
    pub input: HeadInput<'a>,
    /// The exact table, of the same rows.
    pub table: &'a GpuTable,
    /// Approximate logits, `[logit rows, V]`, without penalty.
    pub logits: &'a Slice,
    /// Which tokens the penalty is for: bit `n % 32` of word `n / 32`, `[logit rows, ceil(V/32)]`.
    pub seen: &'a Slice,
    /// The greedy tokens, from `token_out` on.
    pub tokens: &'a Slice,
    /// How many exact logits each took, from `token_out` on.
    pub counts: &'a Slice,
    /// Most rows of logits of a pass.
    pub rows: usize,
}

/// The operations of a step, in their order.
pub struct HeadOps {
    /// What comes before the logits.
    pub input: Vec<Op>,
    /// Approximate logits by [`LogitTile`]: one dispatch for each shard of the int8 rows.
    tiles: [Vec<Op>; LogitTile::ALL.len()],
    /// The greedy tokens: one dispatch for every three shards of the exact table, and one.
    pub greedy: Vec<Op>,
}

impl HeadOps {
    /// Input and approximate logits of so many rows.
    pub fn logits(&self, rows: u32) -> impl Iterator<Item = &Op> {
        self.input.iter().chain(&self.tiles[LogitTile::index_for(rows)])
    }
}

impl Int8Head {
    /// Quantises a table and uploads it in shards that fit a binding; `None` for a table that is
    /// quantised already or too wide, whose own head is the only one. Rows that are still in their file are
    /// read piece by piece.
    ///
    /// # Errors
    /// [`crate::Error::GpuLimit`] if a tile of rows does not fit.
    pub async fn upload(gpu: &Gpu, what: &str, table: &Table) -> Result<Option<Self>> {
        let Some(rows) = Int8Rows::of(table) else { return Ok(None) };
        let tile_words = rows.tile_words();
        let fit = usize::try_from(gpu.max_binding() / 4).unwrap_or(usize::MAX) / tile_words;
        // A tile that does not fit at all is refused by name.
        let fit = fit.max(1);
        let mut shards = Vec::new();
        for first in (0..rows.tiles()).step_by(fit) {
            let tiles = first..(first + fit).min(rows.tiles());
            let slice = gpu.weights(what, tiles.len() * tile_words)?;
            let batch = (UPLOAD_BYTES / 4 / tile_words).max(1);
            // A dry device holds no weights.
            let packed = if gpu.is_dry() { 0..0 } else { tiles.clone() };
            for first in packed.step_by(batch) {
                let words = rows.pack(first..(first + batch).min(tiles.end))?;
                let offset = ((first - tiles.start) * tile_words * 4) as u64;
                gpu.write_weights(&slice, offset, bytemuck::cast_slice(&words));
                gpu.queue.submit([]);
                gpu.done("upload a table").await?;
            }
            shards.push((tiles, slice));
        }
        let shape = table.shape();
        Ok(Some(Self {
            shape,
            shards,
            x: gpu.storage("head input", LOGIT_ROWS * shape.k())?,
            token: gpu
                .storage("head input", LOGIT_ROWS * (8 * int8_rows::chunks(shape.k()) + 4))?,
            bounds: gpu.storage("head bounds", LOGIT_ROWS * 33 * rows.tiles())?,
        }))
    }

    /// Makes the operations of a step for up to [`LOGIT_ROWS`] rows of logits.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`] if the driver refuses.
    ///
    /// # Panics
    /// If the exact table is not the one that was uploaded.
    pub fn ops(
        &self,
        gpu: &Gpu,
        pipelines: &Pipelines,
        params: &wgpu::Buffer,
        step: &HeadStep<'_>,
    ) -> Result<HeadOps> {
        let op = |call: &Call, buffers: &[&Slice]| gpu.op(pipelines, call, params, buffers);
        let (n, k) = (self.shape.n(), self.shape.k());
        let input = match step.input {
            HeadInput::Hidden(hidden, norm, eps) => {
                let call = kernels::head_input(k, Some(eps));
                op(&call, &[hidden, norm, &self.x, &self.token])?
            }
            HeadInput::Normed(x) => {
                op(&kernels::head_input(k, None), &[x, x, &self.x, &self.token])?
            }
        };
        let mut tiles = LogitTile::ALL.map(|_| Vec::new());
        let needed = LogitTile::up_to(step.rows.min(LOGIT_ROWS) as u32);
        for (ops, &tile) in tiles.iter_mut().zip(needed) {
            for (tiles, words) in &self.shards {
                let call = kernels::head_int8(self.shape, tiles.clone(), tile);
                let buffers = [words, &self.token, step.seen, step.logits, &self.bounds];
                ops.push(op(&call, &buffers)?);
            }
        }
        let GpuTableData::Dense(exact) = &step.table.data else {
            panic!("a table with an int8 head is dense")
        };
        let shards_of = |shards: &[DenseRows]| -> Vec<DenseShard> {
            shards.iter().map(|rows| rows.shard).collect()
        };
        let chunks = || exact.chunks(HEAD_TABLES).map(|shards| (shards_of(shards), shards));
        let blocks = chunks().map(|(rows, _)| kernels::head_blocks(&rows)).sum();
        let best = gpu.storage("head best", LOGIT_ROWS * 4 * blocks)?;
        let (mut greedy, mut base) = (Vec::new(), 0);
        for (rows, shards) in chunks() {
            let call = kernels::head_rerank(n, &rows, (base, blocks));
            base += kernels::head_blocks(&rows);
            // A table that is not there is never read.
            let table = |i: usize| &shards[i.min(shards.len() - 1)].buffers[0];
            let tables = [table(0), table(1), table(2)];
            let buffers =
                [&self.x, &self.bounds, step.seen, tables[0], tables[1], tables[2], &best];
            greedy.push(op(&call, &buffers)?);
        }
        let buffers = [&best, step.tokens, step.counts, step.seen];
        greedy.push(op(&kernels::head_pick(n, blocks), &buffers)?);
        Ok(HeadOps { input: vec![input], tiles, greedy })
    }
}
