//! Attention over the blocks of the KV cache: the kernels, and how a pass spreads them over threads.
//!
//! The twin of `cpu_ref::attention`, with its bits: a block is scored, weighed and summed by itself
//! and merged into a running softmax. Who computes a block is therefore free. With many tokens each
//! thread takes some tokens and goes through all blocks; with few, threads take blocks, and the
//! partial results are merged in order.
#![expect(unsafe_code, reason = "reads rows by address")]

use cpu_ref::attention::{Heads, inv_sqrt_dim};
use cpu_ref::reduce::{DOT_LANES, tree_sum};

use super::Kernels;
use super::lanes::Lanes;
use super::pool::{Pool, Split};
use super::portable::{exp, quantize_absmax};
use crate::error::Result;
use crate::kv_cache::{BLOCK, HeadChunk, HeadChunkMut, KvCache, KvFormat, KvShape, Prepared};

/// Lanes of the maximum of a block's scores.
const PART: usize = 16;

/// Queries that share the loads of a block.
const TILE: usize = 4;

/// The softmax of one query over the blocks it has seen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Softmax {
    /// The largest score, or the lowest f32.
    pub max: f32,
    /// The sum of the weights `exp(score − max)`.
    pub total: f32,
}

impl Default for Softmax {
    /// Of no block.
    fn default() -> Self {
        Self { max: f32::MIN, total: 0.0 }
    }
}

/// The queries of some tokens that read one key/value head.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// Token `m`'s queries are `q[m·stride..][..heads·D]`.
    pub q: &'a [f32],
    /// Values from one token to the next.
    pub stride: usize,
    /// H/G, queries a token.
    pub heads: usize,
    /// M.
    pub tokens: usize,
    /// Positions of the block that the first token sees, each later token one more; below 1 none, from
    /// 64 on all.
    pub seen: isize,
}

impl Queries<'_> {
    /// Positions of the block that token `m` sees.
    fn len(&self, m: usize) -> usize {
        self.seen.saturating_add_unsigned(m).clamp(0, BLOCK as isize) as usize
    }
}

/// Where [`Kernels::attend_block`] adds a block: query `h` of token `m` is number `m·stride + h`.
#[derive(Debug)]
pub struct Attended<'a> {
    /// One a query.
    pub softmax: &'a mut [Softmax],
    /// `[D]` a query: `Σ weight·value`, relative to the softmax's maximum.
    pub out: &'a mut [f32],
    /// Queries from one token to the next.
    pub stride: usize,
}

/// See [`Kernels::store_head`].
#[inline(always)]
pub(super) fn store_head(key: &[f32], value: &[f32], slot: usize, chunk: HeadChunkMut<'_>) {
    let dim = key.len();
    let row = slot * dim..(slot + 1) * dim;
    match chunk {
        HeadChunkMut::F32(keys, values) => {
            scatter(key, slot, keys);
            values[row].copy_from_slice(value);
        }
        HeadChunkMut::F16(keys, values) => {
            // The value's place is free until the value comes.
            let values = &mut values[row];
            narrow(key, values);
            scatter(values, slot, keys);
            narrow(value, values);
        }
        HeadChunkMut::Int8(keys, values, key_scales, value_scales) => {
            let values = &mut values[row];
            key_scales[slot] = quantize_absmax(key.iter().copied(), values, dim).act_scale;
            scatter(values, slot, keys);
            value_scales[slot] = quantize_absmax(value.iter().copied(), values, dim).act_scale;
        }
    }
}

/// Puts a key `[D]` into column `slot` of `keys[D][64]`, whose rows are in the order of
/// [`crate::kv_cache::key_row`].
#[inline(always)]
fn scatter<T: Copy>(key: &[T], slot: usize, keys: &mut [T]) {
    let mut rows = keys.as_chunks_mut::<BLOCK>().0.iter_mut();
    for lane in 0..DOT_LANES {
        for (value, row) in key.iter().skip(lane).step_by(DOT_LANES).zip(rows.by_ref()) {
            row[slot] = *value;
        }
    }
}

/// `cpu_ref::kv::f16_bits` of each value.
#[inline(always)]
fn narrow(values: &[f32], halves: &mut [u16]) {
    for (half, value) in halves.iter_mut().zip(values) {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let rounded = magnitude + 0x0fff + (magnitude >> 13 & 1);
        let normal = rounded.wrapping_sub(0x3800_0000) >> 13;
        let finite = if rounded < 0x3880_0000 { 0 } else { normal };
        let number = if rounded >= 0x4780_0000 { 0x7c00 } else { finite };
        let unsigned = if magnitude > 0x7f80_0000 { 0x7e00 } else { number };
        *half = ((bits >> 16 & 0x8000) | unsigned) as u16;
    }
}

/// `cpu_ref::kv::f16_value`, without a branch.
#[inline(always)]
pub(super) fn widen_half(bits: u16) -> f32 {
    const REBASE: u32 = 0x3800_0000;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let special = if magnitude >= 0x7c00 << 13 { REBASE } else { 0 };
    let normal = magnitude + REBASE + special;
    let unsigned = if magnitude < 0x0400 << 13 { 0 } else { normal };
    f32::from_bits(u32::from(bits & 0x8000) << 16 | unsigned)
}

/// See [`Kernels::attend_block`].
///
/// # Safety
///
/// This machine has the instructions of S, and the caller is compiled for them.
#[inline(always)]
pub(super) unsafe fn attend_block<S: Lanes>(
    queries: Queries<'_>,
    chunk: HeadChunk<'_>,
    next: Option<HeadChunk<'_>>,
    attended: Attended<'_>,
) {
    let next = next.unwrap_or(chunk).start();
    match chunk {
        HeadChunk::F32(keys, values) => {
            let rows = Rows { keys, values, scales: None, next };
            // SAFETY: promised by the caller.
            unsafe { attend_rows::<S, f32>(queries, rows, attended) };
        }
        HeadChunk::F16(keys, values) => {
            let rows = Rows { keys, values, scales: None, next };
            // SAFETY: promised by the caller.
            unsafe { attend_rows::<S, u16>(queries, rows, attended) };
        }
        HeadChunk::Int8(keys, values, key_scales, value_scales) => {
            let rows = Rows { keys, values, scales: Some((key_scales, value_scales)), next };
            // SAFETY: promised by the caller.
            unsafe { attend_rows::<S, i8>(queries, rows, attended) };
        }
    }
}

/// A value of the cache, without its scale.
trait Value: Copy {
    /// As a float.
    fn widen(self) -> f32;
    /// See [`Lanes`], whose demands are the same.
    unsafe fn load<S: Lanes>(at: *const Self) -> S;
}

impl Value for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(at: *const Self) -> S {
        // SAFETY: promised by the caller.
        unsafe { S::load(at) }
    }
}

impl Value for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_half(self)
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(at: *const Self) -> S {
        // SAFETY: promised by the caller.
        unsafe { S::load_halves(at) }
    }
}

impl Value for i8 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(at: *const Self) -> S {
        // SAFETY: promised by the caller.
        unsafe { S::load_codes(at) }
    }
}

/// [`HeadChunk`] of one type of values.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    keys: &'a [T],
    values: &'a [T],
    scales: Option<(&'a [f32], &'a [f32])>,
    /// Where the chunk begins that is wanted after this one.
    next: *const u8,
}

/// Takes up to [`TILE`] queries at a time that see the same positions.
///
/// # Safety
///
/// As for [`attend_block`].
#[inline(always)]
unsafe fn attend_rows<S: Lanes, T: Value>(
    queries: Queries<'_>,
    rows: Rows<'_, T>,
    mut attended: Attended<'_>,
) {
    let (heads, count) = (queries.heads, queries.tokens * queries.heads);
    let mut first = 0;
    while first < count {
        let len = queries.len(first / heads);
        let alike = (first + 1..count).take(TILE - 1).take_while(|i| queries.len(i / heads) == len);
        let alike = 1 + alike.count();
        // SAFETY: promised by the caller.
        first += unsafe {
            match (len, alike) {
                (0, _) => alike,
                (_, TILE) => attend_tile::<S, T, TILE>(queries, first, len, rows, &mut attended),
                (_, 2..) => attend_tile::<S, T, 2>(queries, first, len, rows, &mut attended),
                _ => attend_tile::<S, T, 1>(queries, first, len, rows, &mut attended),
            }
        };
    }
}

/// Queries `first..first + Q` over the first `len` positions of a block; returns Q.
///
/// # Safety
///
/// As for [`attend_block`].
#[inline(always)]
unsafe fn attend_tile<S: Lanes, T: Value, const Q: usize>(
    queries: Queries<'_>,
    first: usize,
    len: usize,
    rows: Rows<'_, T>,
    attended: &mut Attended<'_>,
) -> usize {
    let dim = rows.keys.len() / BLOCK;
    let at = |t: usize| ((first + t) / queries.heads, (first + t) % queries.heads);
    let q: [&[f32]; Q] = std::array::from_fn(|t| {
        let (m, head) = at(t);
        &queries.q[m * queries.stride + head * dim..][..dim]
    });
    let number: [usize; Q] = std::array::from_fn(|t| {
        let (m, head) = at(t);
        m * attended.stride + head
    });

    let mut weights = [[0.0f32; BLOCK]; Q];
    // SAFETY: promised by the caller.
    unsafe {
        match S::WIDE {
            4 if len > 2 * S::N => score::<S, T, Q, 4>(q, len, rows, &mut weights),
            2.. => score::<S, T, Q, 2>(q, len, rows, &mut weights),
            _ => score::<S, T, Q, 1>(q, len, rows, &mut weights),
        }
    }
    let mut scales = [(0.0f32, 0.0f32); Q];
    for t in 0..Q {
        let softmax = &mut attended.softmax[number[t]];
        let block = weigh(&mut weights[t], len);
        scales[t] = merge(softmax, block);
        if let Some((_, value_scales)) = rows.scales {
            for (weight, scale) in weights[t].iter_mut().zip(value_scales) {
                *weight *= scale;
            }
        }
    }

    let mut d = 0;
    // SAFETY: promised by the caller.
    unsafe {
        while S::WIDE == 4 && d + 4 * S::N <= dim {
            sum_values::<S, T, Q, 4>(&weights, d, len, rows, scales, number, attended);
            d += 4 * S::N;
        }
        while S::WIDE >= 2 && d + 2 * S::N <= dim {
            sum_values::<S, T, Q, 2>(&weights, d, len, rows, scales, number, attended);
            d += 2 * S::N;
        }
        while d + S::N <= dim {
            sum_values::<S, T, Q, 1>(&weights, d, len, rows, scales, number, attended);
            d += S::N;
        }
    }
    for d in d..dim {
        for t in 0..Q {
            let mut sum = 0.0f32;
            for (row, weight) in rows.values.chunks_exact(dim).zip(weights[t]).take(len) {
                sum += weight * row[d].widen();
            }
            let (decay, growth) = scales[t];
            let out = &mut attended.out[number[t] * dim + d];
            *out = *out * decay + sum * growth;
        }
    }
    Q
}

/// Rows of the cache, coefficients of each query, and what is asked for meanwhile.
#[derive(Clone, Copy)]
struct Sums<T, const Q: usize> {
    /// The vectors of the first row.
    row: *const T,
    /// Values from one row to the next.
    row_step: usize,
    /// How many rows.
    count: usize,
    /// Each query's coefficient of the first row.
    coefficients: [*const f32; Q],
    /// From one coefficient to the next.
    step: usize,
    /// The first of as many bytes as these vectors of all rows have.
    ahead: *const u8,
}

/// `Σ coefficient·row`, V vectors of each query, all in registers.
///
/// # Safety
///
/// As for [`attend_block`]; and V vectors lie in every row, and a coefficient for every row of every
/// query.
#[expect(clippy::needless_range_loop, reason = "t and v are those of all arrays alike")]
#[inline(always)]
unsafe fn sum<S: Lanes, T: Value, const Q: usize, const V: usize>(sums: Sums<T, Q>) -> [[S; V]; Q] {
    let line_step = V * S::N * size_of::<T>();
    // SAFETY: promised by the caller.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; Q];
        for i in 0..sums.count {
            let row = sums.row.add(i * sums.row_step);
            for byte in (0..line_step).step_by(64) {
                S::prefetch(sums.ahead.wrapping_add(i * line_step + byte));
            }
            let mut values = [S::splat(0.0); V];
            for v in 0..V {
                values[v] = T::load(row.add(v * S::N));
            }
            for t in 0..Q {
                let coefficient = S::splat(*sums.coefficients[t].add(i * sums.step));
                for v in 0..V {
                    acc[t][v] = acc[t][v].add(coefficient.mul(values[v]));
                }
            }
        }
        acc
    }
}

/// The scores of the first `len` positions, `(q·k)·(1/√D)·key_scale`; the others mean nothing.
///
/// # Safety
///
/// As for [`attend_block`].
#[inline(always)]
unsafe fn score<S: Lanes, T: Value, const Q: usize, const V: usize>(
    q: [&[f32]; Q],
    len: usize,
    rows: Rows<'_, T>,
    scores: &mut [[f32; BLOCK]; Q],
) {
    let part = V * S::N;
    let dim = rows.keys.len() / BLOCK;
    assert!(BLOCK.is_multiple_of(part) && rows.keys.len() == dim * BLOCK);
    assert!(q.iter().all(|q| q.len() == dim));
    let ahead: *const u8 = rows.values.as_ptr().cast();
    // SAFETY: promised by the caller; the rows of lane `lane` are `from..from + count`, dimensions
    // `lane`, `lane + 16` and so on, all below `dim`, and `first + part` is at most 64.
    unsafe {
        let scale = S::splat(inv_sqrt_dim(dim));
        for first in (0..len).step_by(part) {
            // Sums of 1, 2, 4 and 8 lanes that wait for their other half.
            let mut waiting = [[[S::splat(0.0); V]; Q]; DOT_LANES.ilog2() as usize + 1];
            let mut ahead = ahead.wrapping_add(first * dim * size_of::<T>());
            for turn in 0..DOT_LANES {
                // Lanes in the order in which `cpu_ref::reduce::tree_sum` adds them.
                let lane = turn.reverse_bits() >> (usize::BITS - DOT_LANES.ilog2());
                let from = crate::kv_cache::key_row(lane, dim);
                let count = dim.saturating_sub(lane).div_ceil(DOT_LANES);
                let mut lanes = sum::<S, T, Q, V>(Sums {
                    row: rows.keys.as_ptr().add(from * BLOCK + first),
                    row_step: BLOCK,
                    count,
                    coefficients: q.map(|q| q.as_ptr().wrapping_add(lane)),
                    step: DOT_LANES,
                    ahead,
                });
                ahead = ahead.wrapping_add(count * part * size_of::<T>());
                let level = turn.trailing_ones() as usize;
                for lower in &waiting[..level] {
                    for t in 0..Q {
                        for v in 0..V {
                            lanes[t][v] = lower[t][v].add(lanes[t][v]);
                        }
                    }
                }
                waiting[level] = lanes;
            }
            let sums = waiting[DOT_LANES.ilog2() as usize];
            for t in 0..Q {
                let scores = &mut scores[t][first..first + part];
                for v in 0..V {
                    sums[t][v].mul(scale).store(scores[v * S::N..].as_mut_ptr());
                }
            }
        }
    }
    if let Some((key_scales, _)) = rows.scales {
        for scores in scores {
            for (score, scale) in scores.iter_mut().zip(key_scales) {
                *score *= scale;
            }
        }
    }
}

/// Merges `Σ weight·value` of dimensions `d..` over the first `len` positions.
///
/// # Safety
///
/// As for [`attend_block`].
#[inline(always)]
unsafe fn sum_values<S: Lanes, T: Value, const Q: usize, const V: usize>(
    weights: &[[f32; BLOCK]; Q],
    d: usize,
    len: usize,
    rows: Rows<'_, T>,
    scales: [(f32, f32); Q],
    number: [usize; Q],
    attended: &mut Attended<'_>,
) {
    let dim = rows.values.len() / BLOCK;
    assert!(len <= BLOCK && d + V * S::N <= dim);
    // SAFETY: promised by the caller; there are `len` rows of `dim` values, `d + V·N` at most, and 64
    // weights a query.
    unsafe {
        let sums = sum::<S, T, Q, V>(Sums {
            row: rows.values.as_ptr().add(d),
            row_step: dim,
            count: len,
            coefficients: weights.each_ref().map(|weights| weights.as_ptr()),
            step: 1,
            ahead: rows.next.wrapping_add(d * BLOCK * size_of::<T>()),
        });
        for t in 0..Q {
            let (decay, growth) = (S::splat(scales[t].0), S::splat(scales[t].1));
            let out = &mut attended.out[number[t] * dim + d..][..V * S::N];
            for v in 0..V {
                let out = out[v * S::N..].as_mut_ptr();
                S::load(out).mul(decay).add(sums[t][v].mul(growth)).store(out);
            }
        }
    }
}

/// The softmax of a block by itself; its scores become weights, past `len` zeros.
#[inline(always)]
fn weigh(scores: &mut [f32; BLOCK], len: usize) -> Softmax {
    scores[len..].fill(f32::MIN);
    let mut lanes = [f32::MIN; PART];
    for part in scores.as_chunks::<PART>().0 {
        for (max, &score) in lanes.iter_mut().zip(part) {
            *max = maximum(*max, score);
        }
    }
    let max = lanes.into_iter().fold(f32::MIN, maximum);
    for score in scores.iter_mut() {
        *score = exp(*score - max);
    }
    scores[len..].fill(0.0);
    Softmax { max, total: tree_sum(*scores) }
}

/// Adds a block to a running softmax; returns what multiplies the sums so far, and the block's.
#[inline(always)]
fn merge(running: &mut Softmax, block: Softmax) -> (f32, f32) {
    let max = maximum(running.max, block.max);
    let (decay, growth) = (exp(running.max - max), exp(block.max - max));
    *running = Softmax { max, total: running.total * decay + block.total * growth };
    (decay, growth)
}

/// The larger value; NaN if either is: no comparison with it is true.
#[inline(always)]
fn maximum(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// See [`Kernels::merge_block`].
#[inline(always)]
pub(super) fn merge_block(block: (Softmax, &[f32]), running: &mut Softmax, out: &mut [f32]) {
    let (softmax, sums) = block;
    let (decay, growth) = merge(running, softmax);
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = *out * decay + sum * growth;
    }
}

/// Blocks of one token whose results wait to be merged; of several tokens, accordingly fewer.
const WAVE: usize = 32;

/// Tokens up to which threads take blocks.
const FEW: usize = 8;

/// What a pass needs beside its input and output, whatever the context.
pub(super) struct Scratch {
    /// `[M, H]`.
    running: Vec<Softmax>,
    /// `[blocks, G, M, H/G]` with at most [`WAVE`] blocks times tokens.
    partial: Vec<Softmax>,
    /// The same with `[D]` each.
    sums: Vec<f32>,
}

/// One layer's part of a pass.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) cache: &'a KvCache,
    /// The sequence's blocks.
    pub(super) table: &'a [u32],
    pub(super) layer: usize,
    /// Position of the first token.
    pub(super) start: usize,
    /// H.
    pub(super) heads: usize,
}

impl Scratch {
    /// For passes of `max_batch` tokens with `heads` query heads of `dim`.
    pub(super) fn new(max_batch: usize, heads: usize, dim: usize) -> Self {
        Self {
            running: vec![Softmax::default(); max_batch * heads],
            partial: vec![Softmax::default(); WAVE * heads],
            sums: vec![0.0; WAVE * heads * dim],
        }
    }

    /// `attended[M, H·D]` of `query[M, H·D]`.
    pub(super) fn attend(
        &mut self,
        (pool, kernels): (&mut Pool, &dyn Kernels),
        layer: Layer<'_>,
        query: &[f32],
        attended: &mut [f32],
    ) {
        let row = layer.heads * layer.cache.shape().dim;
        let tokens = query.len() / row;
        attended.fill(0.0);
        let running = &mut self.running[..tokens * layer.heads];
        running.fill(Softmax::default());
        if tokens <= FEW {
            self.attend_few((pool, kernels), layer, query, attended);
        } else {
            attend_many((pool, kernels), layer, query, running, attended);
        }
    }

    /// Threads take blocks of each head, a wave at a time, then heads of each token.
    fn attend_few(
        &mut self,
        (pool, kernels): (&mut Pool, &dyn Kernels),
        layer: Layer<'_>,
        query: &[f32],
        attended: &mut [f32],
    ) {
        let shape = *layer.cache.shape();
        let (dim, groups) = (shape.dim, shape.heads);
        let heads = layer.heads / groups;
        let tokens = query.len() / (layer.heads * dim);
        let blocks = (layer.start + tokens).div_ceil(BLOCK);
        let chunk = tokens * heads;
        for first in (0..blocks).step_by(WAVE / tokens) {
            let wave = (blocks - first).min(WAVE / tokens);
            let partial = &mut self.partial[..wave * groups * chunk];
            let sums = &mut self.sums[..wave * groups * chunk * dim];
            let split = Split { len: chunk * dim, cost: layer.cost(chunk) };
            pool.stripes2(sums, split, partial, chunk, |at, sums, partial| {
                sums.fill(0.0);
                partial.fill(Softmax::default());
                let chunks =
                    sums.chunks_exact_mut(chunk * dim).zip(partial.chunks_exact_mut(chunk));
                let chunk_of = |at: usize| {
                    let (block, group) = (first + at / groups, at % groups);
                    layer.cache.head(layer.table[block], layer.layer, group)
                };
                let last = at + chunks.len() - 1;
                for (at, (out, softmax)) in (at..).zip(chunks) {
                    let (block, group) = (first + at / groups, at % groups);
                    let queries = Queries {
                        q: &query[group * heads * dim..],
                        stride: layer.heads * dim,
                        heads,
                        tokens,
                        seen: layer.seen(0, block),
                    };
                    let next = (at < last).then(|| chunk_of(at + 1));
                    let attended = Attended { softmax, out, stride: heads };
                    kernels.attend_block(queries, chunk_of(at), next, attended);
                }
            });

            let (partial, sums) = (&*partial, &*sums);
            let running = &mut self.running[..tokens * layer.heads];
            let split = Split { len: dim, cost: wave * dim * size_of::<f32>() };
            pool.stripes2(attended, split, running, 1, |at, attended, running| {
                let each = attended.chunks_exact_mut(dim).zip(running);
                for (index, (out, running)) in (at..).zip(each) {
                    let (m, head) = (index / layer.heads, index % layer.heads);
                    for block in (0..wave).filter(|block| layer.seen(m, first + block) > 0) {
                        let group = block * groups + head / heads;
                        let at = (group * tokens + m) * heads + head % heads;
                        let sums = &sums[at * dim..][..dim];
                        kernels.merge_block((partial[at], sums), running, out);
                    }
                    if first + wave == blocks {
                        divide(out, running.total);
                    }
                }
            });
        }
    }
}

/// Threads take tokens and go through all blocks they see, one head after another.
fn attend_many(
    (pool, kernels): (&mut Pool, &dyn Kernels),
    layer: Layer<'_>,
    query: &[f32],
    running: &mut [Softmax],
    attended: &mut [f32],
) {
    let shape = *layer.cache.shape();
    let (dim, groups) = (shape.dim, shape.heads);
    let heads = layer.heads / groups;
    let row = layer.heads * dim;
    let blocks = (layer.start + query.len() / row).div_ceil(BLOCK);
    let split = Split { len: row, cost: blocks * groups * layer.cost(heads) };
    pool.stripes2(attended, split, running, layer.heads, |first, attended, running| {
        let tokens = running.len() / layer.heads;
        let blocks = (layer.start + first + tokens).div_ceil(BLOCK);
        for group in 0..groups {
            let head = group * heads;
            let chunk_of = |&id: &u32| layer.cache.head(id, layer.layer, group);
            let table = &layer.table[..blocks];
            for (block, id) in table.iter().enumerate() {
                let queries = Queries {
                    q: &query[first * row + head * dim..],
                    stride: row,
                    heads,
                    tokens,
                    seen: layer.seen(first, block),
                };
                let (softmax, out) = (&mut running[head..], &mut attended[head * dim..]);
                let attended = Attended { softmax, out, stride: layer.heads };
                let next = table.get(block + 1).map(chunk_of);
                kernels.attend_block(queries, chunk_of(id), next, attended);
            }
        }
        for (out, softmax) in attended.chunks_exact_mut(dim).zip(running) {
            divide(out, softmax.total);
        }
    });
}

impl Layer<'_> {
    /// Positions of a block that token `m` sees: see [`Queries::seen`].
    fn seen(&self, m: usize, block: usize) -> isize {
        (self.start + m + 1) as isize - (block * BLOCK) as isize
    }

    /// What a block of one head costs for some queries: its bytes, or the operations.
    fn cost(&self, queries: usize) -> usize {
        self.cache.shape().chunk_lines() * 64 * queries.div_ceil(TILE)
    }
}

/// `cpu_ref::attention` of one token `q[H,D]` over keys and values `[S,G,D]`, stored in `format`
/// first; for judging kernels.
///
/// # Errors
/// If there is no memory for the positions.
pub fn attention(
    kernels: &dyn Kernels,
    q: &[f32],
    (keys, values): (&[f32], &[f32]),
    heads: Heads,
    format: KvFormat,
) -> Result<Vec<f32>> {
    let Heads { query, kv, dim } = heads;
    let shape = KvShape { layers: 1, heads: kv, dim, format };
    let mut cache = KvCache::new(shape);
    let positions = keys.len() / (kv * dim);
    let blocks = positions.div_ceil(BLOCK);
    cache.apply(Prepared { copy: None, blocks })?;
    for (index, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
        let (position, head) = (index / kv, index % kv);
        let chunks = cache.layer_mut((position / BLOCK) as u32, 0);
        let chunk = &mut chunks[head * shape.chunk_lines()..][..shape.chunk_lines()];
        let chunk = HeadChunkMut::of(chunk, &shape);
        kernels.store_head(key, value, position % BLOCK, chunk);
    }
    let mut out = vec![0.0; q.len()];
    let mut softmax = vec![Softmax::default(); query];
    let per_group = query / kv;
    let groups = q.chunks_exact(per_group * dim).zip(out.chunks_exact_mut(per_group * dim));
    for (group, ((q, out), softmax)) in groups.zip(softmax.chunks_exact_mut(per_group)).enumerate()
    {
        for block in 0..blocks {
            let seen = (positions - block * BLOCK) as isize;
            let queries = Queries { q, stride: q.len(), heads: per_group, tokens: 1, seen };
            let attended = Attended { softmax, out, stride: per_group };
            kernels.attend_block(queries, cache.head(block as u32, 0, group), None, attended);
        }
        for (out, softmax) in out.chunks_exact_mut(dim).zip(softmax) {
            divide(out, softmax.total);
        }
    }
    Ok(out)
}

fn divide(out: &mut [f32], total: f32) {
    for out in out {
        *out /= total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_those_of_the_definition() {
        for bits in 0..=u16::MAX {
            let (expected, found) = (cpu_ref::kv::f16_value(bits), widen_half(bits));
            assert_eq!(expected.to_bits(), found.to_bits(), "{bits:#x}");
        }
        let edges =
            [0.0, 6.0e-5, 6.103_515_6e-5, 6.1e-5, 65519.0, 65520.0, f32::MAX, f32::INFINITY];
        let mut random = crate::random::Random::new(1);
        let near = (0..20_000).map(|_| f32::from_bits(random.below(u32::MAX as usize) as u32));
        let values: Vec<f32> =
            edges.into_iter().flat_map(|x| [x, -x]).chain(near).chain([f32::NAN]).collect();
        let mut found = vec![0; values.len()];
        narrow(&values, &mut found);
        for (value, found) in values.iter().zip(found) {
            assert_eq!(cpu_ref::kv::f16_bits(*value), found, "{value}");
        }
    }
}
