//! The int8 head: its kernels against their twins, and its greedy token against the exact head's.

use std::ops::Range;

use cpu_ref::head_int8::{self, Input, Row};
use cpu_ref::layout::{TILE_ROWS, int8_rows};
use libtest_mimic::Failed;
use sterna::backend::gpu::kernels::LogitTile;
use sterna::backend::gpu::self_test::{self, Heads};
use sterna::backend::gpu::{Capabilities, Gpu, LOGIT_ROWS, PassParams, Slice, kernels};
use sterna::format::float::{bf16_to_f32, f16_to_f32};
use sterna::random::Random;
use sterna::shape::MatShape;
use sterna::weights::{Int8Rows, Table, TableData};

use crate::util::{as_f32, close, open, run_guarded, same};
use crate::{Body, Case};

pub fn cases(capabilities: Capabilities) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    if capabilities == Capabilities::Adapter {
        // The same kernels with the same constants.
        return cases;
    }
    let mut add = |name: String, case: Body| cases.push((name, case));
    add("head_input::shapes".into(), Box::new(input_shapes));
    add("head_input::edges".into(), Box::new(input_edges));
    add("head_int8::shapes".into(), Box::new(int8_shapes));
    add("head_int8::extremes".into(), Box::new(int8_extremes));
    for format in Format::ALL {
        let name = format!("{format:?}").to_lowercase();
        add(
            format!("head_rerank::random::{name}"),
            Box::new(move |gpu| random_tables(gpu, format)),
        );
        add(
            format!("head_rerank::shards::{name}"),
            Box::new(move |_| {
                // A quarter of the exact table: one shard more than are read at once.
                let (v, k) = SHAPE;
                let bytes = v.div_ceil(4) * k.next_multiple_of(8) * format.bytes();
                let gpu = open(capabilities)?.with_max_binding(bytes as u64);
                near_rows(&gpu, format, (v, k), 2)
            }),
        );
        add(
            format!("head_rerank::near_rows::{name}"),
            Box::new(move |gpu| near_rows(gpu, format, SHAPE, 6)),
        );
    }
    add("head_int8::many_rows".into(), Box::new(int8_many_rows));
    add("head_rerank::many_rows".into(), Box::new(rerank_many_rows));
    add("head_rerank::equal_rows".into(), Box::new(equal_rows));
    add("head_rerank::rounding".into(), Box::new(rounding));
    add("head_rerank::outliers".into(), Box::new(outliers));
    add("head_rerank::non_finite".into(), Box::new(non_finite));
    add("head_rerank::penalty".into(), Box::new(penalty));
    add("head_rerank::few_candidates".into(), Box::new(few_candidates));
    for rows in [1, 2, LOGIT_ROWS] {
        let check = move |gpu: &Gpu| self_test::check_head(gpu, rows).map_err(Failed::from);
        add(format!("self_test::head::{rows}"), Box::new(check));
    }
    cases
}

/// V and K of the tests of which neither is the point, so that their kernels are compiled once for all:
/// several blocks of candidates, the last of them not whole, and rows that end within a unit.
const SHAPE: (usize, usize) = (700, 333);

/// The float formats of a table.
#[derive(Debug, Clone, Copy)]
enum Format {
    Bf16,
    F16,
    F32,
}

impl Format {
    const ALL: [Self; 3] = [Self::Bf16, Self::F16, Self::F32];

    fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The bits of a random weight below 1, most of them about 0.1: subnormal ones, too.
    fn weight(self, random: &mut Random) -> u32 {
        let bits = random.bits();
        let (sign, fraction) = (bits as u32 & 1, (bits >> 32) as u32);
        let exponent = if random.below(500) == 0 { 0 } else { 4 - random.below(4).min(3) as u32 };
        match self {
            Self::Bf16 => {
                sign << 15 | [0, 120, 122, 123, 124][exponent as usize] << 7 | fraction & 0x7f
            }
            Self::F16 => {
                sign << 15 | [0, 8, 10, 11, 12][exponent as usize] << 10 | fraction & 0x3ff
            }
            Self::F32 => {
                sign << 31 | [0, 120, 122, 123, 124][exponent as usize] << 23 | fraction & 0x7f_ffff
            }
        }
    }

    fn value(self, bits: u32) -> f32 {
        match self {
            Self::Bf16 => bf16_to_f32(bits as u16),
            Self::F16 => f16_to_f32(bits as u16),
            Self::F32 => f32::from_bits(bits),
        }
    }
}

/// A table as the bits of its weights.
#[derive(Clone)]
struct Bits {
    format: Format,
    k: usize,
    bits: Vec<u32>,
}

impl Bits {
    fn random(format: Format, random: &mut Random, n: usize, k: usize) -> Self {
        Self { format, k, bits: (0..n * k).map(|_| format.weight(random)).collect() }
    }

    fn row(&self, n: usize) -> Vec<f32> {
        self.bits[n * self.k..][..self.k].iter().map(|&bits| self.format.value(bits)).collect()
    }

    fn row_mut(&mut self, n: usize) -> &mut [u32] {
        &mut self.bits[n * self.k..][..self.k]
    }

    fn copy_row(&mut self, from: usize, to: usize) {
        self.bits.copy_within(from * self.k..(from + 1) * self.k, to * self.k);
    }

    fn table(&self) -> Result<Table, Failed> {
        let halves = || self.bits.iter().map(|&bits| bits as u16).collect::<Vec<_>>();
        let data = match self.format {
            Format::Bf16 => TableData::Bf16(halves().into()),
            Format::F16 => TableData::F16(halves().into()),
            Format::F32 => TableData::F32(
                self.bits.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>().into(),
            ),
        };
        Ok(Table::new(MatShape::new(self.bits.len() / self.k, self.k)?, data))
    }
}

fn one_row() -> PassParams {
    PassParams { n_tokens: 1, n_logit_rows: 1, ..PassParams::default() }
}

/// `head_input` on the last of M tokens: y, and the words of the token.
fn head_input(
    gpu: &Gpu,
    x: &[f32],
    norm: Option<(&[f32], f32)>,
    k: usize,
) -> Result<(Vec<f32>, Vec<u32>), Failed> {
    let m = x.len() / k;
    let params = PassParams { n_tokens: m as u32, first_logit_row: m as u32 - 1, ..one_row() };
    let x = gpu.upload("x", if norm.is_some() { x } else { &x[(m - 1) * k..] })?;
    let weight = gpu.upload("norm", norm.map_or(&[][..], |(weight, _)| weight))?;
    let (y, token) = head_input_rows(gpu, params, [&x, &weight], k, norm.map(|(_, eps)| eps))?;
    Ok((y, token))
}

/// `head_input` on `[M, K]`: y and the words of all wanted tokens.
fn head_input_rows(
    gpu: &Gpu,
    params: PassParams,
    [x, weight]: [&Slice; 2],
    k: usize,
    eps: Option<f32>,
) -> Result<(Vec<f32>, Vec<u32>), Failed> {
    let call = kernels::head_input(k, eps);
    let rows = params.n_logit_rows as usize;
    let lens = [rows * k, rows * (8 * int8_rows::chunks(k) + 4)];
    let mut out = run_guarded(gpu, &call, params, &[x, weight], &lens)?;
    let token = out.remove(1);
    Ok((as_f32(&out[0]), token))
}

/// Compares the words of a token with the twin's codes of the same `y`.
fn check_input(what: &str, y: &[f32], token: &[u32]) -> Result<(), Failed> {
    let k = y.len();
    let expected = head_int8::quantize_input(y);
    let (limbs, rest) = token.split_at(token.len() - 4);
    let bytes: Vec<i8> =
        limbs.iter().flat_map(|word| word.to_le_bytes()).map(|byte| byte as i8).collect();
    let (hi, lo) = bytes.split_at(bytes.len() / 2);
    same(&format!("{what}: hi"), &hi[..k], &expected.hi)?;
    same(&format!("{what}: lo"), &lo[..k], &expected.lo)?;
    let is_padded = hi[k..].iter().chain(&lo[k..]).all(|&limb| limb == 0);
    let [scale, bound, step] = [0, 1, 2].map(|i| f32::from_bits(rest[i]));
    if !is_padded || rest[3] != 0 || scale.to_bits() << 1 != expected.scale.to_bits() << 1 {
        return Err(format!("{what}: scale {scale}, expected {}", expected.scale).into());
    }
    if expected.bound.is_infinite() {
        return same(&format!("{what}: bound"), &[bound], &[f32::INFINITY]);
    }
    let norm = y.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    let half_step = (k as f64).sqrt() / 2.0 * f64::from(scale);
    let gamma = k as f64 / f64::from(1 << 23);
    let is_bound = f64::from(bound) >= norm + half_step && f64::from(bound) <= norm * 1.02;
    if !is_bound || f64::from(step) < half_step + gamma * norm {
        return Err(format!("{what}: bound {bound} of {norm}, rest {step}").into());
    }
    close(&format!("{what}: rest"), &[step], &[expected.rest], |_| expected.rest * 1e-5)
}

fn input_shapes(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(61);
    for k in [1, 3, 16, 63, 64, 100, 128, 130, 256, 257, 2560, 6913] {
        let (m, eps) = (3, 1e-5);
        let mut x = random.floats(m * k, 3.0);
        x[2 * k + k / 2] *= 40.0;
        let weight = random.floats(k, 2.0);
        let (y, token) = head_input(gpu, &x, Some((&weight, eps)), k)?;
        check_input(&format!("head_input K {k}"), &y, &token)?;
        // The same bits as the norm that the exact head has.
        let inputs = [&gpu.upload("x", &x)?, &gpu.upload("norm", &weight)?];
        let params = PassParams { n_tokens: 3, first_logit_row: 2, ..one_row() };
        let normed = run_guarded(gpu, &kernels::rmsnorm(k, eps, true), params, &inputs, &[k])?;
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        same(&format!("head_input K {k}: norm"), &bits(&y), &normed[0])?;
        let (y, token) = head_input(gpu, &x, None, k)?;
        same(&format!("head_input K {k}: no norm"), &bits(&y), &bits(&x[2 * k..]))?;
        check_input(&format!("head_input K {k} without norm"), &y, &token)?;
    }
    Ok(())
}

fn input_edges(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(62);
    let k = 70;
    for (label, largest) in [
        ("0", 0.0),
        ("32512", 32512.0),
        ("above 32512", 32513.0),
        ("1", 1.0),
        ("2⁻⁴⁰", 2f32.powi(-40)),
        ("below 2⁻⁴⁰", 9e-13),
        ("2⁴⁰", 2f32.powi(40)),
        ("above 2⁴⁰", 1.2e12),
        ("2⁻¹⁰⁰", 2f32.powi(-100)),
        ("below 2⁻¹⁰⁰", 7e-31),
        ("the largest", f32::MAX),
        ("infinity", f32::INFINITY),
        ("NaN", f32::NAN),
        ("−NaN", -f32::NAN),
    ] {
        let scale = if largest > 1e30 || !largest.is_finite() { 1.0 } else { largest };
        let mut x = random.floats(k, scale);
        x[33] = largest;
        x[34] = -scale;
        x[35] = scale / 32512.0;
        let (y, token) = head_input(gpu, &x, None, k)?;
        check_input(&format!("head_input of at most {label}"), &y, &token)?;
    }
    Ok(())
}

/// The order of f32 in u32: see `shared/ordered.wgsl`.
fn ordered(value: f32) -> u32 {
    let bits = value.to_bits();
    match (value.is_nan(), value == 0.0) {
        (true, _) => u32::MAX,
        (_, true) => 1 << 31,
        _ if bits >> 31 == 1 => !bits,
        _ => bits | 1 << 31,
    }
}

fn unordered(bits: u32) -> f32 {
    f32::from_bits(if bits >> 31 == 1 { bits & 0x7fff_ffff } else { !bits })
}

/// `head_int8` of a table in shards of two tiles against its twin.
fn check_int8(
    gpu: &Gpu,
    what: &str,
    table: &Table,
    token: &[u32],
    (seen, penalty): (&[u32], f32),
) -> Result<(), Failed> {
    check_int8_rows(gpu, what, table, (token, 1), (seen, penalty), LogitTile::One)
}

/// The same for several logit rows, as many a lane as `tile` says.
fn check_int8_rows(
    gpu: &Gpu,
    what: &str,
    table: &Table,
    (tokens, rows): (&[u32], usize),
    (seen, penalty): (&[u32], f32),
    tile: LogitTile,
) -> Result<(), Failed> {
    let (v, tiles) = (table.shape().n(), table.shape().n().div_ceil(TILE_ROWS));
    let host = Int8Rows::of(table).ok_or("a float table")?;
    let inputs = [&gpu.upload("token", tokens)?, &gpu.upload("seen", seen)?];
    let (n_tokens, n_logit_rows) = (rows as u32, rows as u32);
    let params = PassParams { n_tokens, n_logit_rows, penalty, ..one_row() };
    for first in (0..tiles).step_by(2) {
        let shard = first..(first + 2).min(tiles);
        let call = kernels::head_int8(table.shape(), shard.clone(), tile);
        let words = gpu.upload("table", &host.pack(shard.clone())?)?;
        let lens = [rows * v, rows * 33 * tiles];
        let out = run_guarded(gpu, &call, params, &[&words, inputs[0], inputs[1]], &lens)?;
        for row in 0..rows {
            let token = &tokens[row * tokens.len() / rows..][..tokens.len() / rows];
            let seen = &seen[row * seen.len() / rows..][..seen.len() / rows];
            let out = [&out[0][row * v..][..v], &out[1][row * 33 * tiles..][..33 * tiles]];
            let what = format!("{what} logit row {row} of {rows}, {tile:?} a lane");
            judge_int8(&what, table, shard.clone(), token, (seen, penalty), out)?;
        }
    }
    Ok(())
}

/// Compares logits and bounds of a shard with the twin's.
fn judge_int8(
    what: &str,
    table: &Table,
    shard: Range<usize>,
    token: &[u32],
    (seen, penalty): (&[u32], f32),
    out: [&[u32]; 2],
) -> Result<(), Failed> {
    let (v, k) = (table.shape().n(), table.shape().k());
    let rows = Int8Rows::of(table).ok_or("a float table")?;
    let (tiles, chunks) = (rows.tiles(), int8_rows::chunks(k));
    let packed = rows.pack(0..tiles)?;
    let bytes: Vec<i8> =
        token.iter().flat_map(|word| word.to_le_bytes()).map(|byte| byte as i8).collect();
    let [scale, bound, rest] = [0, 1, 2].map(|i| f32::from_bits(token[8 * chunks + i]));
    let (hi, lo) = (bytes[..k].to_vec(), bytes[16 * chunks..][..k].to_vec());
    let x = Input { hi, lo, scale, bound, rest, sums: [0; 2] };
    let mine = shard.start * TILE_ROWS..(shard.end * TILE_ROWS).min(v);
    for tile in shard {
        let mut largest = 0;
        for n in (tile * TILE_ROWS..(tile + 1) * TILE_ROWS).filter(|n| mine.contains(n)) {
            let what = format!("{what} row {n}");
            let [scale, error, norm] = int8_rows::row(&packed, chunks, n);
            let row = Row { scale, error, norm };
            let codes: Vec<i8> = (0..k).map(|k| int8_rows::get(&packed, chunks, n, k)).collect();
            let logit = head_int8::logit(row, &x, head_int8::sums(&codes, &x));
            let found = f32::from_bits(out[0][n]);
            if found != logit && !(found.is_nan() && logit.is_nan()) {
                return Err(format!("{what}: logit {found}, expected {logit}").into());
            }
            let penalised = |logit| {
                let is_seen = penalty != 1.0 && seen[n / 32] >> (n % 32) & 1 == 1;
                if is_seen { head_int8::penalised(logit, penalty) } else { logit }
            };
            let upper = out[1][n];
            match head_int8::bounds(row, &x, logit) {
                None => same(&format!("{what}: upper bound"), &[upper], &[u32::MAX])?,
                Some([low, high]) => {
                    // A few roundings of the largest of both.
                    let bound = |_| 4e-6 * (high.abs() + low.abs()) * penalty.max(1.0 / penalty);
                    let (low, high) = (penalised(low), penalised(high));
                    close(&format!("{what}: upper bound"), &[unordered(upper)], &[high], bound)?;
                    if unordered(upper) < high {
                        return Err(format!("{what}: upper bound too low").into());
                    }
                    largest = largest.max(ordered(low));
                }
            }
        }
        let lower = out[1][32 * tiles + tile];
        let what = format!("{what} tile {tile}: lower bound");
        if largest == 0 {
            same(&what, &[lower], &[0])?;
        } else {
            let expected = unordered(largest);
            let bound = |_| 1e-5 * expected.abs() + f32::MIN_POSITIVE;
            close(&what, &[unordered(lower)], &[expected], bound)?;
            if unordered(lower) > expected {
                return Err(format!("{what} too high").into());
            }
        }
    }
    Ok(())
}

fn int8_shapes(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(63);
    for (v, k) in
        [(1, 1), (31, 15), (32, 16), (33, 17), (70, 100), (100, 128), (97, 130), (65, 2560)]
    {
        let mut w = random.floats(v * k, 0.2);
        // Rows of 0, of outliers, of very small and very large weights, of NaN and infinity.
        for (n, row) in w.chunks_exact_mut(k).enumerate().skip(3) {
            match n {
                3 => row.fill(0.0),
                4 => row[k / 2] = 1e6,
                5 => row.iter_mut().for_each(|w| *w *= 1e-20),
                6 => row.iter_mut().for_each(|w| *w *= 1e-38),
                7 => row.iter_mut().for_each(|w| *w *= 1e30),
                8 => row[k - 1] = f32::NAN,
                9 => row[0] = f32::NEG_INFINITY,
                10 => row.fill(f32::MAX),
                11 => {
                    row.iter_mut().enumerate().for_each(|(i, w)| *w *= 0.5f32.powi(i as i32 % 90))
                }
                _ => {}
            }
        }
        let table = Table::new(MatShape::new(v, k)?, TableData::F32(w.into()));
        let seen: Vec<u32> = (0..v.div_ceil(32)).map(|_| random.bits() as u32).collect();
        for (label, magnitude) in [("", 5.0), (" tiny x", 1e-10), (" large x", 1e9)] {
            let (_, token) = head_input(gpu, &random.floats(k, magnitude), None, k)?;
            for penalty in [1.0, 1.3, 0.7] {
                let what = format!("head_int8 {v}×{k}{label} penalty {penalty}");
                check_int8(gpu, &what, &table, &token, (&seen, penalty))?;
            }
        }
    }
    Ok(())
}

/// 1 to 8 logit rows at once, each with a penalty of its own tokens, by every number a lane.
fn int8_many_rows(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(72);
    for rows in 1..=LOGIT_ROWS {
        // One shape for each: every check compiles its kernels.
        let (v, k) = [(33, 17), (97, 130), (70, 640)][rows % 3];
        let table =
            Table::new(MatShape::new(v, k)?, TableData::F32(random.floats(v * k, 0.2).into()));
        // The last of them are wanted.
        let (before, eps) = (2, 1e-5);
        let x = random.floats((before + rows) * k, 3.0);
        let norm = random.floats(k, 2.0);
        let params = PassParams {
            n_tokens: (before + rows) as u32,
            first_logit_row: before as u32,
            n_logit_rows: rows as u32,
            ..PassParams::default()
        };
        let inputs = [&gpu.upload("x", &x)?, &gpu.upload("norm", &norm)?];
        let (y, tokens) = head_input_rows(gpu, params, inputs, k, Some(eps))?;
        let each = y.chunks_exact(k).zip(tokens.chunks_exact(tokens.len() / rows));
        for (row, (y, token)) in each.enumerate() {
            let what = format!("head_input K {k}, row {row} of {rows}");
            check_input(&what, y, token)?;
            let x = &x[..(before + row + 1) * k];
            let (alone, alone_token) = head_input(gpu, x, Some((&norm, eps)), k)?;
            same(&what, y, &alone)?;
            same(&what, token, &alone_token)?;
        }
        let seen: Vec<u32> = (0..rows * v.div_ceil(32)).map(|_| random.bits() as u32).collect();
        for tile in LogitTile::ALL {
            let penalty = if rows % 4 == 2 { 1.0 } else { 1.3 };
            let what = format!("head_int8 {v}×{k} penalty {penalty}");
            check_int8_rows(gpu, &what, &table, (&tokens, rows), (&seen, penalty), tile)?;
        }
    }
    Ok(())
}

/// 1 to 8 logit rows at once choose what each chooses alone, and what the exact head does; with a
/// penalty of tokens of their own.
fn rerank_many_rows(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(73);
    for format in Format::ALL {
        let (v, k) = SHAPE;
        let mut bits = Bits::random(format, &mut random, v, k);
        let (near, _) = make_near_rows(&mut bits, v);
        let norm = vec![1.0; k];
        let heads = Heads::new(gpu, &bits.table()?, Some((&norm, 1e-5)))?;
        for rows in 1..=LOGIT_ROWS {
            let mut hidden = random.floats(rows * k, 3.0);
            hidden[(rows - 1) * k..].copy_from_slice(&near);
            let seen: Vec<u32> = (0..rows * v.div_ceil(32)).map(|_| random.bits() as u32).collect();
            let exact = heads.find_exact_rows(&hidden)?;
            for penalty in [1.0, 1.4] {
                let found = heads.find_int8_rows(&hidden, &seen, penalty)?;
                for (row, (found, candidates)) in found.iter().enumerate() {
                    let what = format!("{format:?} penalty {penalty}, row {row} of {rows}");
                    let seen = &seen[row * v.div_ceil(32)..][..v.div_ceil(32)];
                    let token = expected(&exact[row].logits, seen, penalty);
                    same(&what, &[found.token], &[token])?;
                    let hidden = &hidden[row * k..][..k];
                    let (alone, alone_candidates) = heads.find_int8(hidden, seen, penalty)?;
                    same(&what, &found.logits, &alone.logits)?;
                    same(&what, &[*candidates], &[alone_candidates])?;
                    let alone = heads.find_exact(hidden)?;
                    same(&what, &exact[row].logits, &alone.logits)?;
                    same(&what, &[exact[row].token], &[alone.token])?;
                }
            }
        }
    }
    Ok(())
}

/// The largest sums there are, and inputs without bounds.
fn int8_extremes(gpu: &Gpu) -> Result<(), Failed> {
    for k in [100, 4096, head_int8::MAX_K] {
        let mut w = vec![0.0; 4 * k];
        for (n, row) in w.chunks_exact_mut(k).enumerate() {
            let value = |i: usize| {
                [127.0, -127.0, 1.0, if i.is_multiple_of(2) { 127.0 } else { -127.0 }][n]
            };
            row.iter_mut().enumerate().for_each(|(i, w)| *w = value(i));
        }
        let table = Table::new(MatShape::new(4, k)?, TableData::F32(w.into()));
        for value in [32512.0, -32512.0, 32384.0, -32384.0, 127.0, f32::NAN, f32::INFINITY, 0.0] {
            let mut x = vec![value; k];
            // The scale is 1.
            x[0] = if value == 127.0 { 32512.0 } else { value };
            let (_, token) = head_input(gpu, &x, None, k)?;
            check_int8(gpu, &format!("head_int8 K {k} of {value}"), &table, &token, (&[0], 1.0))?;
        }
    }
    Ok(())
}

/// What the exact head would choose with a penalty.
fn expected(logits: &[f32], seen: &[u32], penalty: f32) -> u32 {
    let is_seen = |n: usize| penalty != 1.0 && seen[n / 32] >> (n % 32) & 1 == 1;
    let penalised = |(n, &logit): (usize, &f32)| {
        if is_seen(n) { head_int8::penalised(logit, penalty) } else { logit }
    };
    let logits: Vec<f32> = logits.iter().enumerate().map(penalised).collect();
    cpu_ref::argmax::argmax(&logits).map_or(u32::MAX, |token| token as u32)
}

/// What is known of a choice.
struct Found {
    token: u32,
    /// The argmax of the approximate logits.
    int8_token: u32,
    candidates: usize,
}

/// Fails unless both heads choose the same token.
fn check_choice(what: &str, heads: &Heads<'_>, hidden: &[f32]) -> Result<Found, Failed> {
    let exact = heads.find_exact(hidden)?;
    let none = vec![0; exact.logits.len().div_ceil(32)];
    let (found, candidates) = heads.find_int8(hidden, &none, 1.0)?;
    if found.token != exact.token || candidates == 0 {
        let (token, expected) = (found.token, exact.token);
        return Err(format!("{what}: token {token} of {candidates}, expected {expected}").into());
    }
    let int8_token = expected(&found.logits, &none, 1.0);
    Ok(Found { token: found.token, int8_token, candidates })
}

fn random_tables(gpu: &Gpu, format: Format) -> Result<(), Failed> {
    let mut random = Random::new(64);
    for (v, k) in [(1, 1), (2, 3), (33, 17), (256, 64), (257, 100), SHAPE, (2000, 640)] {
        let bits = Bits::random(format, &mut random, v, k);
        let norm = random.floats(k, 2.0);
        let heads = Heads::new(gpu, &bits.table()?, Some((&norm, 1e-5)))?;
        for seed in 0..10 {
            let hidden = random.floats(k, 3.0);
            check_choice(&format!("{format:?} {v}×{k} hidden {seed}"), &heads, &hidden)?;
        }
    }
    Ok(())
}

/// Rows of a table that differ by less than int8 can tell, the best of them last, along x; where
/// they are.
fn make_near_rows(bits: &mut Bits, v: usize) -> (Vec<f32>, Vec<usize>) {
    let x: Vec<f32> = bits.row(v / 9).iter().map(|w| w * 40.0).collect();
    let rows: Vec<usize> = (0..9).map(|i| v / 9 + i * (v - 1 - v / 9) / 8).collect();
    // The weights that move are small, so that the scale stays and a unit in the last place is less
    // than a step of int8.
    let is_small = |w: &f32| (0.035..0.06).contains(&w.abs());
    let at: Vec<usize> = (0..bits.k).filter(|&k| is_small(&bits.row(rows[0])[k])).collect();
    for (step, &n) in rows.iter().enumerate().skip(1) {
        bits.copy_row(rows[0], n);
        let units = if matches!(bits.format, Format::F32) { 1 << 15 } else { 1 };
        for &k in &at[..step.min(at.len())] {
            bits.row_mut(n)[k] += units;
        }
    }
    (x, rows)
}

fn near_rows(
    gpu: &Gpu,
    format: Format,
    (v, k): (usize, usize),
    tables: usize,
) -> Result<(), Failed> {
    let mut random = Random::new(65);
    let mut wrong = 0;
    for seed in 0..tables {
        let mut bits = Bits::random(format, &mut random, v, k);
        let (x, rows) = make_near_rows(&mut bits, v);
        let heads = Heads::new(gpu, &bits.table()?, None)?;
        let what = format!("{format:?} {v}×{k} near rows {seed}");
        let found = check_choice(&what, &heads, &x)?;
        same(&what, &[found.token as usize], &rows[8..])?;
        if found.candidates < rows.len() || found.candidates > v / 4 {
            return Err(format!("{what}: {} candidates", found.candidates).into());
        }
        wrong += usize::from(found.int8_token != found.token);
        // Noise on top of the input.
        for _ in 0..5 {
            let x: Vec<f32> = x.iter().map(|x| x + random.unit()).collect();
            check_choice(&what, &heads, &x)?;
        }
    }
    // Without the exact rows the choice is often a wrong one: the judge has something to judge.
    if 2 * wrong < tables {
        return Err(format!("{format:?}: int8 alone is wrong in {wrong} of {tables}").into());
    }
    Ok(())
}

fn equal_rows(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(66);
    for format in Format::ALL {
        let (v, k) = SHAPE;
        let mut bits = Bits::random(format, &mut random, v, k);
        let x: Vec<f32> = bits.row(699).iter().map(|w| w * 10.0).collect();
        for to in [511, 37, 38, 300] {
            bits.copy_row(699, to);
        }
        let heads = Heads::new(gpu, &bits.table()?, None)?;
        let what = format!("{format:?} equal rows");
        let found = check_choice(&what, &heads, &x)?;
        same(&what, &[found.token], &[37])?;
        // All rows, all logits 0.
        let found = check_choice(&format!("{format:?} zeros"), &heads, &vec![0.0; k])?;
        same(&what, &[found.token as usize, found.candidates], &[0, v])?;
    }
    Ok(())
}

/// Rows whose logits differ by less than their own rounding: the best is the exact head's only if its
/// sums have the same bits.
fn rounding(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(71);
    let mut found = Vec::new();
    for (v, k) in [(257, 100), SHAPE, (400, 1024)] {
        let mut bits = Bits::random(Format::F32, &mut random, v, k);
        for n in 1..v {
            bits.copy_row(0, n);
            bits.row_mut(n).iter_mut().for_each(|w| *w ^= random.bits() as u32 & 1);
        }
        let norm = random.floats(k, 2.0);
        let heads = Heads::new(gpu, &bits.table()?, Some((&norm, 1e-5)))?;
        for seed in 0..8 {
            let what = format!("rounding {v}×{k} hidden {seed}");
            let choice = check_choice(&what, &heads, &random.floats(k, 3.0))?;
            same(&what, &[choice.candidates], &[v])?;
            found.push(choice.token);
        }
    }
    found.sort_unstable();
    found.dedup();
    if found.len() < 12 {
        return Err(format!("only {} different tokens: nothing was decided", found.len()).into());
    }
    Ok(())
}

/// The best row has a weight that leaves nothing of the others in int8, where the input is 0.
fn outliers(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(67);
    for (seed, outlier) in [1.0f32, 1e3, -1e6, 1e20].into_iter().enumerate() {
        let (v, k) = SHAPE;
        let mut bits = Bits::random(Format::F32, &mut random, v, k);
        let mut x: Vec<f32> = bits.row(400).iter().map(|w| w * 40.0).collect();
        x[77] = 0.0;
        // A runner-up that int8 has to prefer, once the outlier is large.
        bits.copy_row(400, 123);
        bits.row_mut(123).iter_mut().step_by(3).for_each(|w| *w ^= 1 << 31);
        bits.row_mut(400)[77] = outlier.to_bits();
        let heads = Heads::new(gpu, &bits.table()?, None)?;
        let what = format!("outlier {outlier} seed {seed}");
        let found = check_choice(&what, &heads, &x)?;
        same(&what, &[found.token], &[400])?;
        if outlier.abs() > 100.0 {
            same(&format!("{what}: int8 alone"), &[found.int8_token == 400], &[false])?;
        }
    }
    Ok(())
}

fn non_finite(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(68);
    let (v, k) = SHAPE;
    for weight in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-44] {
        let mut bits = Bits::random(Format::F32, &mut random, v, k);
        bits.row_mut(222)[50] = weight.to_bits();
        let heads = Heads::new(gpu, &bits.table()?, None)?;
        for first in [1.0, 1e-20, 1e30, f32::MAX, f32::NAN, f32::INFINITY] {
            let mut x = random.floats(k, 1.0);
            (x[0], x[50]) = (first, 4.0);
            let what = format!("a weight of {weight}, a value of {first}");
            let found = check_choice(&what, &heads, &x)?;
            if weight.is_nan() || first.is_nan() {
                same(&what, &[found.token], &[u32::MAX])?;
            }
        }
        // Products out of range on both sides.
        for magnitude in [1e-42, 1e-25, 1e-13, 1e13, 1e36] {
            let x = random.floats(k, magnitude);
            check_choice(&format!("a weight of {weight}, values of {magnitude}"), &heads, &x)?;
        }
    }
    Ok(())
}

fn penalty(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(69);
    for format in Format::ALL {
        let (v, k) = SHAPE;
        let mut bits = Bits::random(format, &mut random, v, k);
        let (along, rows) = make_near_rows(&mut bits, v);
        let heads = Heads::new(gpu, &bits.table()?, None)?;
        let against: Vec<f32> = along.iter().map(|x| -x).collect();
        for (seed, hidden) in
            [along, against, random.floats(k, 3.0), vec![0.0; k]].into_iter().enumerate()
        {
            let logits = heads.find_exact(&hidden)?.logits;
            let winner = expected(&logits, &[], 1.0) as usize;
            let bit_of = |n: usize| {
                (0..v.div_ceil(32)).map(move |w| if w == n / 32 { 1 << (n % 32) } else { 0u32 })
            };
            let only_winner: Vec<u32> = bit_of(winner).collect();
            let some: Vec<u32> = (0..v.div_ceil(32)).map(|_| random.bits() as u32).collect();
            let near = rows.iter().fold(vec![0; v.div_ceil(32)], |seen, &n| {
                seen.iter().zip(bit_of(n)).map(|(a, b)| a | b).collect()
            });
            for seen in [&only_winner, &some, &near, &vec![u32::MAX; v.div_ceil(32)]] {
                for penalty in [1.0, 1.1, 1.000_001, 2.0, 0.5, 1e6] {
                    let (found, candidates) = heads.find_int8(&hidden, seen, penalty)?;
                    let expected = expected(&logits, seen, penalty);
                    let what =
                        format!("{format:?} hidden {seed} penalty {penalty} of {candidates}");
                    same(&what, &[found.token], &[expected])?;
                }
            }
            // The penalty has changed the choice.
            let (found, _) = heads.find_int8(&hidden, &only_winner, 1e6)?;
            if seed < 3 && logits[winner] > 0.0 && found.token as usize == winner {
                return Err(format!("{format:?} hidden {seed}: the penalty changes nothing").into());
            }
        }
    }
    Ok(())
}

/// Gaussian rows, as a head's are: the exact table is hardly read.
fn few_candidates(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(70);
    let (v, k) = (4000, 2560);
    let gaussian = |random: &mut Random| {
        let bits = random.bits();
        let sum: i32 = (0..8).map(|i| i32::from((bits >> (8 * i)) as u8)).sum();
        (sum - 1020) as f32 / 209.0
    };
    let halves = (0..v * k).map(|_| ((0.02 * gaussian(&mut random)).to_bits() >> 16) as u16);
    let table =
        Table::new(MatShape::new(v, k)?, TableData::Bf16(halves.collect::<Vec<_>>().into()));
    let heads = Heads::new(gpu, &table, None)?;
    for seed in 0..4 {
        let hidden: Vec<f32> = (0..k).map(|_| gaussian(&mut random)).collect();
        let found = check_choice(&format!("Gaussian {seed}"), &heads, &hidden)?;
        if found.candidates > 100 {
            return Err(format!("{} candidates of {v}", found.candidates).into());
        }
    }
    Ok(())
}
