//! The int8 LM head on the CPU: twin of `cpu_ref::head_int8`, exact.
//!
//! Half the bytes of a bf16 table or less, and the greedy token is still the one of the model's own
//! rows: every row that may be the largest is computed from those.

use cpu_ref::head_int8::{self, Input, Row, bounds, gamma, half_sqrt, logit, penalised};
use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS, int8_rows};
use cpu_ref::reduce::{NORM_LANES, tree_sum};

use super::Kernels;
use super::matrix::table_rows;
use super::pool::{Pool, Split};
use crate::backend::HeadWork;
use crate::error::Result;
use crate::format::{Bytes, Elements};
use crate::sampler::Sampler;
use crate::weights::{Int8Rows, Table};

/// Words of one chunk of a tile: 32 rows × 16 codes.
pub(super) const CODE_WORDS: usize = TILE_ROWS * PIECE_WORDS;

/// Sums of a tile's rows with the high and the low limbs of an input.
pub(super) type LimbSums = [[i32; TILE_ROWS]; 2];

/// The int8 rows, and what a pass needs beside them.
pub(super) struct Int8Head {
    rows: usize,
    k: usize,
    words: Elements<u32>,
    inputs: Vec<Input>,
    /// `[tiles][M][2][32]`: lower and upper bounds of the exact logits; −∞ and ∞ where there are none.
    bounds: Vec<f32>,
    work: HeadWork,
}

impl Int8Head {
    /// Quantises a table, for up to `max_tokens` rows of logits at once; `None` for one that is
    /// quantised already, whose own rows are the head.
    ///
    /// # Errors
    /// None of a float table.
    pub(super) fn pack(table: &Table, max_tokens: usize) -> Result<Option<Self>> {
        let Some(int8) = Int8Rows::of(table) else { return Ok(None) };
        let words = int8.pack(0..int8.tiles())?;
        Ok(Some(Self::new(int8, table, words.into(), max_tokens)))
    }

    /// The same of words that have been packed before; `None` if they are not as many as the table needs.
    pub(super) fn of_words(table: &Table, words: &Bytes, max_tokens: usize) -> Option<Self> {
        let fits = words.len() == Self::len_bytes(table);
        let words = Elements::in_place(words).filter(|_| fits)?;
        Some(Self::new(Int8Rows::of(table)?, table, words, max_tokens))
    }

    /// Bytes of a table's packed words; 0 for one that is quantised already.
    pub(super) fn len_bytes(table: &Table) -> usize {
        Int8Rows::of(table).map_or(0, |int8| int8.tiles() * int8.tile_words() * size_of::<u32>())
    }

    /// The packed words.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    fn new(int8: Int8Rows<'_>, table: &Table, words: Elements<u32>, max_tokens: usize) -> Self {
        let (rows, k) = (table.shape().n(), table.shape().k());
        let codes = int8_rows::chunks(k) * int8_rows::CHUNK_K;
        let input =
            Input { hi: vec![0; codes], lo: vec![0; codes], scale: 0.0, bound: 0.0, rest: 0.0 };
        Self {
            rows,
            k,
            words,
            inputs: vec![input; max_tokens],
            bounds: vec![0.0; int8.tiles() * max_tokens * 2 * TILE_ROWS],
            work: HeadWork::default(),
        }
    }

    /// Bytes of the rows.
    pub(super) fn bytes(&self) -> u64 {
        size_of_val(&*self.words) as u64
    }

    /// How it has chosen so far.
    pub(super) fn work(&self) -> HeadWork {
        self.work
    }

    /// Approximate logits of the normalised hidden states `x[M, K]`, into `[tiles][M][32]`, with bounds
    /// of the exact ones kept for [`Int8Head::greedy`].
    pub(super) fn logits(
        &mut self,
        pool: &mut Pool,
        kernels: &dyn Kernels,
        x: &[f32],
        logits: &mut [f32],
    ) {
        let n_tokens = x.len() / self.k;
        let inputs = &mut self.inputs[..n_tokens];
        for (x, input) in x.chunks_exact(self.k).zip(inputs.iter_mut()) {
            kernels.head_input(x, input);
        }
        let (inputs, words) = (&*inputs, &self.words[..]);
        let tile_words = int8_rows::tile_words(self.k);
        let tile_len = n_tokens * TILE_ROWS;
        let bounds = &mut self.bounds[..2 * logits.len()];
        let split = Split { len: tile_len, cost: n_tokens * tile_words * size_of::<u32>() };
        pool.stripes2(logits, split, bounds, 2 * tile_len, |first, logits, bounds| {
            let tiles = logits.len() / tile_len;
            let words = &words[first * tile_words..][..tiles * tile_words];
            kernels.head_int8(words, inputs, logits, bounds);
        });
    }

    /// The greedy token of logit row `m` of the last M: the argmax of the exact logits, with the
    /// sampler's penalty of what it has seen. `None` if one is NaN.
    pub(super) fn greedy(
        &mut self,
        kernels: &dyn Kernels,
        table: &Table,
        (m, n_tokens): (usize, usize),
        x: &[f32],
        sampler: &Sampler,
    ) -> Option<usize> {
        let at = |n: usize| ((n / TILE_ROWS * n_tokens + m) * 2) * TILE_ROWS + n % TILE_ROWS;
        let penalty = sampler.repetition_penalty();
        for token in sampler.seen().map(|token| token as usize).filter(|&n| n < self.rows) {
            for bound in [at(token), at(token) + TILE_ROWS] {
                self.bounds[bound] = penalised(self.bounds[bound], penalty);
            }
        }
        let tiles = self.bounds.chunks_exact(2 * TILE_ROWS).skip(m).step_by(n_tokens);
        let tiles = tiles.take(self.rows.div_ceil(TILE_ROWS));
        let least = tiles.clone().map(|tile| least(&tile[..TILE_ROWS]));
        let least = least.fold(f32::NEG_INFINITY, f32::max);
        let (mut best, mut candidates) = (None::<(usize, f32)>, 0u64);
        let mut is_nan = false;
        for (tile, bounds) in tiles.enumerate() {
            let upper = &bounds[TILE_ROWS..];
            if !upper.iter().any(|&upper| reaches(upper, least)) {
                continue;
            }
            for (lane, &upper) in upper.iter().enumerate() {
                let n = tile * TILE_ROWS + lane;
                if n >= self.rows || !reaches(upper, least) {
                    continue;
                }
                candidates += 1;
                let mut exact = [0.0; TILE_ROWS];
                let row = table_rows(table).rows(self.k, n, n + 1);
                kernels.lm_head(row, x, self.k, &mut exact);
                let is_seen = penalty != 1.0 && sampler.has_seen(n as u32);
                let exact = if is_seen { penalised(exact[0], penalty) } else { exact[0] };
                is_nan |= exact.is_nan();
                if best.is_none_or(|(_, most)| exact > most) {
                    best = Some((n, exact));
                }
            }
        }
        self.work.tokens += 1;
        self.work.candidates += candidates;
        self.work.most = self.work.most.max(candidates);
        best.map(|(n, _)| n).filter(|_| !is_nan)
    }
}

/// The largest of lower bounds, each a millionth lower, as `cpu_ref::head_int8::greedy` has it.
fn least(lower: &[f32]) -> f32 {
    lower.iter().map(|&lower| lower - lower.abs() * 1e-6).fold(f32::NEG_INFINITY, f32::max)
}

fn reaches(upper: f32, least: f32) -> bool {
    upper + upper.abs() * 1e-6 >= least
}

/// Twin of `cpu_ref::head_int8::quantize_input`, into codes that are there, zero past K.
#[inline(always)]
pub(super) fn head_input(x: &[f32], input: &mut Input) {
    let absmax = x.iter().fold(0, |max: u32, value| max.max(value.abs().to_bits()));
    let absmax = f32::from_bits(absmax);
    input.hi.fill(0);
    input.lo.fill(0);
    input.scale = if absmax.is_finite() { 0.0 } else { f32::NAN };
    (input.bound, input.rest) = (f32::INFINITY, f32::INFINITY);
    if !absmax.is_finite() || absmax < 2f32.powi(-100) {
        return;
    }
    input.scale = 2f32.powi(-126);
    while absmax > 32512.0 * input.scale {
        input.scale *= 2.0;
    }
    let scale = input.scale;
    for ((hi, lo), &value) in input.hi.iter_mut().zip(&mut input.lo).zip(x) {
        let v = (value / scale).round_ties_even() as i32;
        // An arithmetic shift is the division that rounds down.
        let high = (v + 128) >> 8;
        (*hi, *lo) = (high as i8, (v - 256 * high) as i8);
    }
    if (head_int8::LEAST..=1.0 / head_int8::LEAST).contains(&absmax) {
        let half_step = scale * half_sqrt(x.len());
        let mut lanes = [0.0f32; NORM_LANES];
        for x in x.chunks(NORM_LANES) {
            for (lane, &value) in lanes.iter_mut().zip(x) {
                *lane += value * value;
            }
        }
        input.bound = tree_sum(lanes).sqrt() * (1.0 + gamma(x.len())) + half_step;
        input.rest = half_step + gamma(x.len()) * input.bound;
    }
}

/// Twin of `cpu_ref::head_int8::{sums, logit, bounds}` for whole tiles and M inputs; `tile_sums`
/// gets a tile's chunks and the limbs.
#[inline(always)]
pub(super) fn head_int8(
    words: &[u32],
    inputs: &[Input],
    logits: &mut [f32],
    out_bounds: &mut [f32],
    tile_sums: impl Fn(&[[u32; CODE_WORDS]], &[i8], &[i8], &mut LimbSums),
) {
    let tile_len = inputs.len() * TILE_ROWS;
    let tiles = logits.len() / tile_len.max(1);
    let tile_words = words.len() / tiles.max(1);
    let outs = logits.chunks_exact_mut(tile_len).zip(out_bounds.chunks_exact_mut(2 * tile_len));
    for (tile, (logits, out_bounds)) in words.chunks_exact(tile_words).zip(outs) {
        let (rows, chunks) = tile.as_chunks::<CODE_WORDS>().0.split_last().expect("row values");
        let outs =
            logits.chunks_exact_mut(TILE_ROWS).zip(out_bounds.chunks_exact_mut(2 * TILE_ROWS));
        for (input, (logits, out_bounds)) in inputs.iter().zip(outs) {
            let mut sums = [[0; TILE_ROWS]; 2];
            tile_sums(chunks, &input.hi, &input.lo, &mut sums);
            let (lower, upper) = out_bounds.split_at_mut(TILE_ROWS);
            for (n, row) in rows.as_chunks::<PIECE_WORDS>().0.iter().enumerate() {
                let [scale, error, norm] = [0, 1, 2].map(|i| f32::from_bits(row[i]));
                let row = Row { scale, error, norm };
                logits[n] = logit(row, input, [sums[0][n], sums[1][n]]);
                [lower[n], upper[n]] =
                    bounds(row, input, logits[n]).unwrap_or([f32::NEG_INFINITY, f32::INFINITY]);
            }
        }
    }
}

/// Sums of one tile, by plain loops.
#[inline(always)]
pub(super) fn limb_sums(chunks: &[[u32; CODE_WORDS]], hi: &[i8], lo: &[i8], sums: &mut LimbSums) {
    let limbs = hi.as_chunks::<16>().0.iter().zip(lo.as_chunks::<16>().0);
    for (chunk, (hi, lo)) in chunks.iter().zip(limbs) {
        for (n, piece) in chunk.as_chunks::<PIECE_WORDS>().0.iter().enumerate() {
            let (mut high, mut low) = (0i32, 0i32);
            for (i, word) in piece.iter().enumerate() {
                for (b, code) in word.to_le_bytes().into_iter().enumerate() {
                    let code = i32::from(code as i8);
                    high += code * i32::from(hi[4 * i + b]);
                    low += code * i32::from(lo[4 * i + b]);
                }
            }
            sums[0][n] += high;
            sums[1][n] += low;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::simd::Level;
    use crate::random::Random;
    use crate::sampler::Sampling;
    use crate::shape::MatShape;
    use crate::weights::TableData;

    /// Rows that come in near copies, so that int8 codes cannot tell which is the best.
    fn table(random: &mut Random, n: usize, k: usize) -> Vec<f32> {
        let mut rows = random.floats(n * k, 1.0);
        for row in 1..n {
            if random.below(3) == 0 {
                let (before, row) = rows.split_at_mut(row * k);
                row[..k].copy_from_slice(&before[before.len() - k..]);
                row[random.below(k)] += 1e-4;
            }
        }
        rows
    }

    #[test]
    fn the_greedy_token_is_that_of_the_exact_rows() {
        let level = Level::available().next().unwrap();
        let kernels = level.kernels().unwrap();
        let mut pool = Pool::new(2).unwrap();
        let (n, k, m) = (200, 96, 3);
        let mut misled = 0;
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let rows = table(&mut random, n, k);
            let shape = MatShape::new(n, k).unwrap();
            let table = Table::new(shape, TableData::F32(rows.clone().into()));
            let mut head = Int8Head::pack(&table, m).unwrap().unwrap();
            let x = random.floats(m * k, 2.0);
            let penalty = if seed % 2 == 0 { 1.0 } else { 1.3 };
            let mut sampler = Sampler::new(Sampling::Greedy, penalty).unwrap();
            sampler.observe(&[3, 77, 199, 5000]);
            let mut logits = vec![0.0; n.next_multiple_of(TILE_ROWS) * m];
            head.logits(&mut pool, kernels.as_ref(), &x, &mut logits);
            for (token, x) in x.chunks_exact(k).enumerate() {
                let seen = |n: usize| penalty != 1.0 && [3, 77, 199].contains(&n);
                let with = |n, logit| if seen(n) { penalised(logit, penalty) } else { logit };
                let exact =
                    (0..n).map(|n| with(n, cpu_ref::lm_head::logit(&rows[n * k..][..k], x)));
                let expected = cpu_ref::argmax::argmax(&exact.collect::<Vec<_>>());
                let found = head.greedy(kernels.as_ref(), &table, (token, m), x, &sampler);
                assert_eq!(found, expected, "seed {seed}, token {token}");
                let at = |n: usize| (n / TILE_ROWS * m + token) * TILE_ROWS + n % TILE_ROWS;
                let approximate: Vec<f32> = (0..n).map(|n| with(n, logits[at(n)])).collect();
                misled += usize::from(cpu_ref::argmax::argmax(&approximate) != expected);
            }
        }
        // Without the exact rows the token would often be another.
        assert!(misled > 20, "{misled}");
        let nan = Table::new(
            MatShape::new(2, 2).unwrap(),
            TableData::F32(vec![1.0, f32::NAN, 1.0, 1.0].into()),
        );
        let mut head = Int8Head::pack(&nan, 1).unwrap().unwrap();
        head.logits(&mut pool, kernels.as_ref(), &[1.0, 1.0], &mut [0.0; TILE_ROWS]);
        let token = head.greedy(kernels.as_ref(), &nan, (0, 1), &[1.0, 1.0], &Sampler::default());
        assert_eq!(token, None);
    }
}
