//! The int8 LM head on the CPU: twin of `cpu_ref::head_int8`, exact.
//!
//! Half the bytes of a bf16 table or less for draws, three quarters of that for greedy tokens, which are still
//! those of the model's own rows: six bits of the codes bound every logit, eight bits those of the rows that may
//! be the largest then, and each that still may be is computed from the model's own.

use cpu_ref::head_int8::{self, Input, Row, coarse_logit, gamma, half_sqrt, penalised};
use cpu_ref::layout::split_rows::{self, COARSE_PIECES, GROUP_K, LINE_ROWS};
use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS};
use cpu_ref::reduce::{NORM_LANES, tree_sum};

use super::matrix::table_rows;
use super::pool::{Pool, Split};
use super::{CHUNK_WORDS, Kernels};
use crate::backend::HeadWork;
use crate::error::Result;
use crate::format::{Bytes, Elements};
use crate::layout::Line;
use crate::sampler::Sampler;
use crate::weights::{Int8Rows, Table};

/// Sums of a tile's rows with the high and the low limbs of an input.
pub(super) type LimbSums = [[i32; TILE_ROWS]; 2];

/// The int8 rows, in two parts, and what a pass needs beside them.
pub(super) struct Int8Head {
    rows: usize,
    k: usize,
    lines: Elements<Line>,
    /// How many of the words are coarse parts.
    coarse_len: usize,
    inputs: Vec<Input>,
    /// `[tiles][M][2][32]`: logits by six bits, and how far the exact ones can be from them.
    screened: Vec<f32>,
    /// Rows that may be the greedy token, and their upper bounds or exact logits.
    candidates: Vec<u32>,
    values: Vec<f32>,
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
        let lines = int8.pack_split()?;
        Ok(Some(Self::new(int8, table, lines.into(), max_tokens)))
    }

    /// The same of words that have been packed before; `None` if they are not as many as the table needs.
    pub(super) fn of_words(table: &Table, words: &Bytes, max_tokens: usize) -> Option<Self> {
        let fits = words.len() == Self::len_bytes(table);
        let lines = Elements::in_place(words).filter(|_| fits)?;
        Some(Self::new(Int8Rows::of(table)?, table, lines, max_tokens))
    }

    /// Bytes of a table's packed words; 0 for one that is quantised already.
    pub(super) fn len_bytes(table: &Table) -> usize {
        Int8Rows::of(table).map_or(0, |int8| {
            let [coarse, rest] = int8.split_len();
            (coarse + rest) * size_of::<u32>()
        })
    }

    /// The packed words.
    pub(super) fn words(&self) -> &[u32] {
        Line::words(&self.lines)
    }

    fn new(int8: Int8Rows<'_>, table: &Table, lines: Elements<Line>, max_tokens: usize) -> Self {
        let (rows, k) = (table.shape().n(), table.shape().k());
        let codes = split_rows::groups(k) * GROUP_K;
        let limbs = || vec![0; codes];
        let input =
            Input { hi: limbs(), lo: limbs(), scale: 0.0, bound: 0.0, rest: 0.0, sums: [0; 2] };
        Self {
            rows,
            k,
            lines,
            coarse_len: int8.split_len()[0],
            inputs: vec![input; max_tokens],
            screened: vec![0.0; int8.tiles() * max_tokens * 2 * TILE_ROWS],
            candidates: Vec::with_capacity(rows),
            values: vec![0.0; rows],
            work: HeadWork::default(),
        }
    }

    /// Bytes that greedy tokens take, of the rows, and that draws take.
    pub(super) fn bytes(&self) -> [u64; 2] {
        [&self.words()[..self.coarse_len], self.words()].map(|words| size_of_val(words) as u64)
    }

    /// How it has chosen so far.
    pub(super) fn work(&self) -> HeadWork {
        self.work
    }

    /// The logits of the int8 codes for the normalised hidden states `x[M, K]`, into `[tiles][M][32]`.
    pub(super) fn logits(
        &mut self,
        pool: &mut Pool,
        kernels: &dyn Kernels,
        x: &[f32],
        logits: &mut [f32],
    ) {
        let inputs = quantize(kernels, x, self.k, &mut self.inputs);
        let (coarse, rest) = Line::words(&self.lines).split_at(self.coarse_len);
        let lens = [split_rows::coarse_tile_words(self.k), split_rows::rest_tile_words(self.k)];
        let len = inputs.len() * TILE_ROWS;
        let split = Split { len, cost: tile_cost(inputs, lens[0] + lens[1]) };
        pool.stripes(logits, split, |first, logits| {
            let tiles = logits.len() / len;
            let coarse = &coarse[first * lens[0]..][..tiles * lens[0]];
            let rest = &rest[first * lens[1]..][..tiles * lens[1]];
            kernels.head_int8([coarse, rest], inputs, logits);
        });
    }

    /// The logits of the coarse parts for the normalised hidden states `x[M, K]`, and how good they are,
    /// for [`Int8Head::greedy`].
    pub(super) fn screen(&mut self, pool: &mut Pool, kernels: &dyn Kernels, x: &[f32]) {
        let inputs = quantize(kernels, x, self.k, &mut self.inputs);
        let coarse = &Line::words(&self.lines)[..self.coarse_len];
        let tile_words = split_rows::coarse_tile_words(self.k);
        let len = 2 * inputs.len() * TILE_ROWS;
        let screened = &mut self.screened[..self.rows.div_ceil(TILE_ROWS) * len];
        let split = Split { len, cost: tile_cost(inputs, tile_words) };
        pool.stripes(screened, split, |first, screened| {
            let tiles = screened.len() / len;
            let coarse = &coarse[first * tile_words..][..tiles * tile_words];
            kernels.head_coarse(coarse, inputs, screened);
        });
    }

    /// The greedy token of logit row `m` of the last [`Int8Head::screen`]'s M: the argmax of the exact
    /// logits, with the sampler's penalty of what it has seen. `None` if one is NaN.
    ///
    /// The exact logit of the row with the largest lower bound comes first: as a rule it is the token, and
    /// few others reach it. Those get bounds of all eight bits before their own rows are asked for, which
    /// may have to come from a file.
    pub(super) fn greedy(
        &mut self,
        (pool, kernels): (&mut Pool, &dyn Kernels),
        table: &Table,
        (m, n_tokens): (usize, usize),
        x: &[f32],
        sampler: &Sampler,
    ) -> Option<usize> {
        let (k, rows) = (self.k, self.rows);
        let tile_at = |n: usize| (n / TILE_ROWS * n_tokens + m) * 2 * TILE_ROWS;
        let penalty = sampler.repetition_penalty();
        // Only what is known of the others counts, until there are logits to lower.
        for n in sampler.seen().map(|token| token as usize).filter(|&n| n < rows) {
            self.screened[tile_at(n) + TILE_ROWS + n % TILE_ROWS] = f32::INFINITY;
        }
        let with_penalty = |n: usize, logit: f32| match sampler.has_seen(n as u32) {
            true if penalty != 1.0 => penalised(logit, penalty),
            _ => logit,
        };
        let exact = |n: usize| {
            let mut exact = [0.0; TILE_ROWS];
            kernels.lm_head(table_rows(table).rows(k, n, n + 1), x, k, &mut exact);
            with_penalty(n, exact[0])
        };

        let screened = &self.screened[..];
        let tiles = (0..rows).step_by(TILE_ROWS).map(|n| {
            let (logits, margins) = screened[tile_at(n)..][..2 * TILE_ROWS].split_at(TILE_ROWS);
            (n, &logits[..TILE_ROWS.min(rows - n)], margins)
        });
        let (mut first, mut least) = (0, f32::NEG_INFINITY);
        for (n, logits, margins) in tiles.clone() {
            let lower = |lane: usize| lowered(logits[lane] - margins[lane]);
            let most = (0..logits.len()).map(lower).fold(f32::NEG_INFINITY, f32::max);
            if most > least {
                first = n + (0..logits.len()).position(|lane| lower(lane) == most).unwrap_or(0);
                least = most;
            }
        }
        // `max` leaves a NaN out; its row is a candidate.
        least = least.max(exact(first));
        self.candidates.clear();
        for (n, logits, margins) in tiles {
            let upper = |lane: usize| logits[lane] + margins[lane];
            if (0..logits.len()).any(|lane| reaches(upper(lane), least)) {
                let lanes = (0..logits.len()).filter(|&lane| reaches(upper(lane), least));
                self.candidates.extend(lanes.map(|lane| (n + lane) as u32));
            }
        }

        let (coarse, rest) = Line::words(&self.lines).split_at(self.coarse_len);
        let tile_words = split_rows::rest_tile_words(k);
        let (input, candidates) = (&self.inputs[m], &self.candidates[..]);
        let uppers = &mut self.values[..candidates.len()];
        pool.stripes(uppers, Split { len: 1, cost: tile_words }, |first, uppers| {
            for (upper, &n) in uppers.iter_mut().zip(&candidates[first..]) {
                let (n, lane) = (n as usize, n as usize % TILE_ROWS);
                let tile = &rest[n / TILE_ROWS * tile_words..][..tile_words];
                let sums = kernels.head_rest(tile, lane, input);
                let screened = screened[tile_at(n) + lane];
                *upper = with_penalty(n, self::upper(coarse, (n, k), input, screened, sums));
            }
        });
        let mut uppers = uppers.iter();
        self.candidates.retain(|_| uppers.next().is_none_or(|&upper| reaches(upper, least)));
        let candidates = &self.candidates[..];
        let logits = &mut self.values[..candidates.len()];
        pool.stripes(logits, Split { len: 1, cost: 2 * k }, |first, logits| {
            for (logit, &n) in logits.iter_mut().zip(&candidates[first..]) {
                *logit = exact(n as usize);
            }
        });
        let count = candidates.len() as u64;
        self.work.tokens += 1;
        self.work.candidates += count;
        self.work.most = self.work.most.max(count);
        kernels.argmax(logits).map(|at| candidates[at] as usize)
    }
}

/// The inputs of a head, in room that is there.
fn quantize<'a>(
    kernels: &dyn Kernels,
    x: &[f32],
    k: usize,
    inputs: &'a mut [Input],
) -> &'a [Input] {
    let inputs = &mut inputs[..x.len() / k];
    for (x, input) in x.chunks_exact(k).zip(inputs.iter_mut()) {
        kernels.head_input(x, input);
    }
    inputs
}

/// [`Split::cost`] of a tile.
fn tile_cost(inputs: &[Input], words: usize) -> usize {
    inputs.len() * words * size_of::<u32>()
}

/// The upper bound of the exact logit of row `n` of `K` columns, by all eight bits: by six, and the rest's sums;
/// ∞ if there is none.
fn upper(coarse: &[u32], (n, k): (usize, usize), x: &Input, logit: f32, rest: [i32; 2]) -> f32 {
    let [scale, _, norm, error] = split_rows::row(coarse, split_rows::groups(k), n);
    let row = Row { scale, error, norm };
    let above = std::array::from_fn(|limb| 2 * rest[limb] - 3 * x.sums[limb]);
    let logit = logit + coarse_logit(row, x, above);
    head_int8::bounds(row, x, logit).map_or(f32::INFINITY, |[_, upper]| upper)
}

/// Bounds are wider than they are by what `cpu_ref::head_int8::greedy` adds.
fn lowered(lower: f32) -> f32 {
    lower - lower.abs() * 1e-6
}

/// A row of which nothing is known, not even that it is a number, does.
fn reaches(upper: f32, least: f32) -> bool {
    upper.is_nan() || upper + upper.abs() * 1e-6 >= least
}

/// Twin of `cpu_ref::head_int8::quantize_input`, into codes that are there, zero past K.
#[inline(always)]
pub(super) fn head_input(x: &[f32], input: &mut Input) {
    let absmax = x.iter().fold(0, |max: u32, value| max.max(value.abs().to_bits()));
    let absmax = f32::from_bits(absmax);
    input.hi.fill(0);
    input.lo.fill(0);
    input.sums = [0; 2];
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
    input.sums =
        [&input.hi, &input.lo].map(|limbs| limbs.iter().map(|&limb| i32::from(limb)).sum());
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

/// Twin of `cpu_ref::head_int8::{coarse_sums, coarse_logit, margin}` for whole tiles and M inputs;
/// `tile_sums` gets a tile's pieces and the limbs, for `Σ coarse·x`.
#[inline(always)]
pub(super) fn head_coarse(
    words: &[u32],
    inputs: &[Input],
    screened: &mut [f32],
    tile_sums: impl Fn(&[[u32; CHUNK_WORDS]], &Input, &mut LimbSums),
) {
    let tile_len = 2 * inputs.len() * TILE_ROWS;
    let tile_words = words.len() / (screened.len() / tile_len).max(1);
    let tiles = words.chunks_exact(tile_words).zip(screened.chunks_exact_mut(tile_len));
    for (tile, screened) in tiles {
        let (rows, pieces) = tile.as_chunks::<CHUNK_WORDS>().0.split_last().expect("row values");
        for (input, screened) in inputs.iter().zip(screened.chunks_exact_mut(2 * TILE_ROWS)) {
            let mut sums = [[0; TILE_ROWS]; 2];
            tile_sums(pieces, input, &mut sums);
            let (logits, margins) = screened.split_at_mut(TILE_ROWS);
            for (n, row) in rows.as_chunks().0.iter().enumerate() {
                let row = row_values(row);
                // Their difference fits, and so it is right whatever wraps before.
                let middles = std::array::from_fn(|limb| {
                    let whole = 8i32.wrapping_mul(sums[limb][n]);
                    whole.wrapping_sub(253i32.wrapping_mul(input.sums[limb]))
                });
                logits[n] = coarse_logit(row, input, middles);
                margins[n] = head_int8::margin(row, input).unwrap_or(f32::INFINITY);
            }
        }
    }
}

/// Twin of `cpu_ref::head_int8::{sums, logit}` for whole tiles and M inputs; the functions get a tile's
/// pieces and the limbs, for `Σ coarse·x` and `Σ rest·x`.
#[inline(always)]
pub(super) fn head_int8(
    [coarse, rest]: [&[u32]; 2],
    inputs: &[Input],
    logits: &mut [f32],
    coarse_sums: impl Fn(&[[u32; CHUNK_WORDS]], &Input, &mut LimbSums),
    rest_sums: impl Fn(&[[u32; CHUNK_WORDS]], &Input, &mut LimbSums),
) {
    let tile_len = inputs.len() * TILE_ROWS;
    let tiles = (logits.len() / tile_len).max(1);
    let coarse = coarse.chunks_exact(coarse.len() / tiles);
    let tiles = coarse.zip(rest.chunks_exact(rest.len() / tiles));
    for ((coarse, rest), logits) in tiles.zip(logits.chunks_exact_mut(tile_len)) {
        let (rows, coarse) = coarse.as_chunks().0.split_last().expect("row values");
        for (input, logits) in inputs.iter().zip(logits.chunks_exact_mut(TILE_ROWS)) {
            let mut sums = [[[0; TILE_ROWS]; 2]; 2];
            let [coarse_part, rest_part] = &mut sums;
            coarse_sums(coarse, input, coarse_part);
            rest_sums(rest.as_chunks().0, input, rest_part);
            for (n, (logit, row)) in logits.iter_mut().zip(rows.as_chunks().0).enumerate() {
                let codes = std::array::from_fn(|limb| {
                    4 * sums[0][limb][n] + sums[1][limb][n] - 128 * input.sums[limb]
                });
                *logit = head_int8::logit(row_values(row), input, codes);
            }
        }
    }
}

/// What belongs to a row whose coarse parts make the logit.
fn row_values(row: &[u32; PIECE_WORDS]) -> Row {
    let [scale, error, norm] = [0, 1, 2].map(|i| f32::from_bits(row[i]));
    Row { scale, error, norm }
}

/// `Σ rest·x` of row `n` of a tile, for the two limbs of x.
#[inline(always)]
pub(super) fn head_rest(tile: &[u32], n: usize, x: &Input) -> [i32; 2] {
    let mut sums = [[0i32; 16]; 2];
    let limbs = x.hi.as_chunks::<GROUP_K>().0.iter().zip(x.lo.as_chunks::<GROUP_K>().0);
    for (piece, (hi, lo)) in tile.as_chunks::<CHUNK_WORDS>().0.iter().zip(limbs) {
        let codes = rest_codes(row_pieces(std::array::from_ref(piece), n));
        for (sums, limbs) in sums.iter_mut().zip([hi, lo]) {
            for (codes, limbs) in codes.iter().zip(limbs.as_chunks::<16>().0) {
                for ((sum, &code), &limb) in sums.iter_mut().zip(codes).zip(limbs) {
                    *sum += i32::from(code) * i32::from(limb);
                }
            }
        }
    }
    sums.map(|sums| sums.iter().sum())
}

/// `Σ coarse·x` of one tile, by plain loops.
#[inline(always)]
pub(super) fn coarse_sums(pieces: &[[u32; CHUNK_WORDS]], x: &Input, sums: &mut LimbSums) {
    each_group(pieces.as_chunks().0, x, sums, coarse_codes);
}

/// The coarse parts of a row's 64 codes.
#[inline(always)]
fn coarse_codes([a, b, c]: [[u8; 16]; COARSE_PIECES]) -> [[u8; 16]; GROUP_K / 16] {
    let last = |i: usize| a[i] >> 6 | b[i] >> 6 << 2 | c[i] >> 6 << 4;
    [a.map(|a| a & 63), b.map(|b| b & 63), c.map(|c| c & 63), std::array::from_fn(last)]
}

/// The rests of a row's 64 codes.
#[inline(always)]
fn rest_codes([a]: [[u8; 16]; 1]) -> [[u8; 16]; GROUP_K / 16] {
    [a.map(|a| a & 3), a.map(|a| a >> 2 & 3), a.map(|a| a >> 4 & 3), a.map(|a| a >> 6)]
}

/// The pieces of row `n` of a group of a tile: where the first is, and then one in each line.
#[inline(always)]
fn row_pieces<const P: usize>(group: &[[u32; CHUNK_WORDS]; P], n: usize) -> [[u8; 16]; P] {
    let pieces = group.as_flattened().as_chunks::<PIECE_WORDS>().0;
    let first = n / LINE_ROWS * LINE_ROWS * P + n % LINE_ROWS;
    std::array::from_fn(|p| {
        let words = pieces[first + p * LINE_ROWS].map(u32::to_le_bytes);
        bytemuck::cast::<[[u8; 4]; PIECE_WORDS], [u8; 16]>(words)
    })
}

/// `Σ rest·x` of one tile, by plain loops.
#[inline(always)]
pub(super) fn rest_sums(pieces: &[[u32; CHUNK_WORDS]], x: &Input, sums: &mut LimbSums) {
    each_group(pieces.as_chunks().0, x, sums, rest_codes);
}

/// Sums of a tile whose groups have `P` pieces, which `unpack` makes codes of.
#[inline(always)]
fn each_group<const P: usize>(
    groups: &[[[u32; CHUNK_WORDS]; P]],
    x: &Input,
    sums: &mut LimbSums,
    unpack: impl Fn([[u8; 16]; P]) -> [[u8; 16]; GROUP_K / 16],
) {
    let limbs = x.hi.as_chunks::<GROUP_K>().0.iter().zip(x.lo.as_chunks::<GROUP_K>().0);
    let [high_sums, low_sums] = sums;
    for (group, (hi, lo)) in groups.iter().zip(limbs) {
        for (n, (high_sum, low_sum)) in high_sums.iter_mut().zip(&mut *low_sums).enumerate() {
            let codes = unpack(row_pieces(group, n));
            let (mut high, mut low) = (0i32, 0i32);
            for ((&code, &hi), &lo) in codes.as_flattened().iter().zip(hi).zip(lo) {
                high += i32::from(code) * i32::from(hi);
                low += i32::from(code) * i32::from(lo);
            }
            *high_sum += high;
            *low_sum += low;
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
            head.screen(&mut pool, kernels.as_ref(), &x);
            for (token, x) in x.chunks_exact(k).enumerate() {
                let seen = |n: usize| penalty != 1.0 && [3, 77, 199].contains(&n);
                let with = |n, logit| if seen(n) { penalised(logit, penalty) } else { logit };
                let exact =
                    (0..n).map(|n| with(n, cpu_ref::lm_head::logit(&rows[n * k..][..k], x)));
                let expected = cpu_ref::argmax::argmax(&exact.collect::<Vec<_>>());
                let found =
                    head.greedy((&mut pool, kernels.as_ref()), &table, (token, m), x, &sampler);
                assert_eq!(found, expected, "seed {seed}, token {token}");
                let at = |n: usize| (n / TILE_ROWS * m + token) * TILE_ROWS + n % TILE_ROWS;
                let approximate: Vec<f32> = (0..n).map(|n| with(n, logits[at(n)])).collect();
                misled += usize::from(cpu_ref::argmax::argmax(&approximate) != expected);
            }
        }
        // Without the exact rows the token would often be another.
        assert!(misled > 20, "{misled}");
        // Nothing is above the 0 of the rows that fill up a tile.
        let negative = TableData::F32(vec![-2.0, -1.0, -1.5].into());
        let negative = Table::new(MatShape::new(3, 1).unwrap(), negative);
        let mut head = Int8Head::pack(&negative, 1).unwrap().unwrap();
        head.screen(&mut pool, kernels.as_ref(), &[3.0]);
        let both = (&mut pool, kernels.as_ref());
        assert_eq!(head.greedy(both, &negative, (0, 1), &[3.0], &Sampler::default()), Some(1));
        let nan = Table::new(
            MatShape::new(2, 2).unwrap(),
            TableData::F32(vec![1.0, f32::NAN, 1.0, 1.0].into()),
        );
        let mut head = Int8Head::pack(&nan, 1).unwrap().unwrap();
        head.screen(&mut pool, kernels.as_ref(), &[1.0, 1.0]);
        let both = (&mut pool, kernels.as_ref());
        let token = head.greedy(both, &nan, (0, 1), &[1.0, 1.0], &Sampler::default());
        assert_eq!(token, None);
    }
}
