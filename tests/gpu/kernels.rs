//! Every kernel against its twin in `cpu-ref`: random shapes and edges.

use cpu_ref::attention::Heads;
use cpu_ref::mlp::Activation;
use libtest_mimic::Failed;
use sterna::backend::gpu::kernels::{self, DenseFormat, DenseShard, Variant, padded_rows};
use sterna::backend::gpu::{Gpu, PassParams, row_offsets, self_test};
use sterna::layout::Packed;
use sterna::random::Random;
use sterna::shape::MatShape;

use crate::util::{as_f32, as_i32, close, run_guarded, same};
use crate::{Body, Case};

/// f32 machine epsilon: the relative error of one correctly rounded operation is half of it.
const EPS: f32 = f32::EPSILON;

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |name: String, case: Body| {
        cases.push((name, case));
    };
    for variant in Variant::ALL {
        let (gemv, gemm) = (variant.gemv().name, variant.gemm().name);
        add(format!("{gemv}::shapes"), Box::new(move |gpu| gemv_shapes(gpu, variant)));
        add(format!("{gemv}::extremes"), Box::new(move |gpu| gemv_extremes(gpu, variant)));
        add(
            format!("{gemv}::a_corrupted_weight_is_caught"),
            Box::new(move |gpu| corrupted_weight(gpu, variant)),
        );
        add(format!("{gemm}::shapes"), Box::new(move |gpu| gemm_shapes(gpu, variant)));
        add(format!("{gemm}::shards_and_guards"), Box::new(move |gpu| shards(gpu, variant)));
        add(format!("quantize_absmax::{gemv}"), Box::new(move |gpu| quantize(gpu, variant)));
        add(
            format!("self_test::{gemv}"),
            Box::new(move |gpu| self_test::check(gpu, variant).map_err(Failed::from)),
        );
    }
    add("rmsnorm".into(), Box::new(rmsnorm));
    add("rope".into(), Box::new(rope));
    add("attention".into(), Box::new(attention));
    add("gated_activation".into(), Box::new(gated_activation));
    add("residual_add".into(), Box::new(residual_add));
    add("embedding_and_lm_head".into(), Box::new(embedding_and_lm_head));
    add("argmax".into(), Box::new(argmax));
    cases
}

fn tokens(n: usize) -> PassParams {
    PassParams { n_tokens: n as u32, ..PassParams::default() }
}

/// One block, partial tiles and chunks, K below and above a workgroup's slices, 2B4T's and the
/// longest K in scope.
const SHAPES: &[(usize, usize)] = &[
    (1, 1),
    (1, 64),
    (31, 63),
    (32, 64),
    (33, 65),
    (100, 100),
    (96, 512),
    (7, 577),
    (640, 2560),
    (64, 6912),
    (3, 23040),
];

fn gemv_shapes(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    for (seed, &(n, k)) in SHAPES.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let shape = MatShape::new(n, k)?;
        let (w, x) = (random.trits(n * k), random.codes(k));
        let packed = Packed::pack(variant.layout(), shape, &w);
        let found = self_test::multiply(gpu, variant, &packed, &x, 1)?;
        let what = format!("{} {shape} seed {seed}", variant.gemv().name);
        same(&what, &found, &cpu_ref::gemv::gemv(&w, &x))?;
    }
    Ok(())
}

fn gemv_extremes(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let shape = MatShape::new(33, 2600)?;
    for weight in [-1i8, 0, 1] {
        for code in [-128i8, -1, 0, 127] {
            let (w, x) = (vec![weight; shape.len()], vec![code; shape.k()]);
            let packed = Packed::pack(variant.layout(), shape, &w);
            let found = self_test::multiply(gpu, variant, &packed, &x, 1)?;
            let what = format!("{} all {weight} × all {code}", variant.gemv().name);
            same(&what, &found, &cpu_ref::gemv::gemv(&w, &x))?;
        }
    }
    Ok(())
}

/// The judge must object when a single trit is wrong.
fn corrupted_weight(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(99);
    let shape = MatShape::new(70, 300)?;
    let mut w = random.trits(shape.len());
    let x: Vec<i8> = (0..shape.k()).map(|_| random.below(100) as i8 + 1).collect();
    let expected = cpu_ref::gemv::gemv(&w, &x);
    let at = 41 * shape.k() + 222;
    w[at] = if w[at] == 1 { 0 } else { w[at] + 1 };
    let packed = Packed::pack(variant.layout(), shape, &w);
    let found = self_test::multiply(gpu, variant, &packed, &x, 1)?;
    match same("corrupted", &found, &expected) {
        Ok(()) => Err("a wrong weight went unnoticed".into()),
        Err(_) => Ok(()),
    }
}

fn gemm_shapes(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    for (seed, &(n, k)) in SHAPES.iter().enumerate() {
        let m = [2, 3, 4, 5, 8, 9, 17, 2, 7, 6, 2][seed];
        let mut random = Random::new(1000 + seed as u64);
        let shape = MatShape::new(n, k)?;
        let (w, x) = (random.trits(n * k), random.codes(m * k));
        let packed = Packed::pack(variant.layout(), shape, &w);
        let found = self_test::multiply(gpu, variant, &packed, &x, m)?;
        let what = format!("{} {shape} M {m} seed {seed}", variant.gemm().name);
        same(&what, &found, &cpu_ref::gemm::gemm(&w, &x, k))?;
    }
    Ok(())
}

/// A matrix in three shards of tiles, the accumulator between guard words.
fn shards(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(7);
    let (shape, m) = (MatShape::new(150, 130)?, 5);
    let (w, x) = (random.trits(shape.len()), random.codes(m * shape.k()));
    let packed = Packed::pack(variant.layout(), shape, &w);
    let offsets = row_offsets(&packed);
    let n_pad = padded_rows(shape.n());
    let codes = gpu.upload("x", &self_test::encode_codes(variant, &x, shape.k()))?;
    let sums: Vec<i32> =
        x.chunks_exact(shape.k()).map(|t| t.iter().map(|&q| i32::from(q)).sum()).collect();
    let code_sum = gpu.upload("code_sum", &sums)?;
    let expected = cpu_ref::gemm::gemm(&w, &x, shape.k());
    let tile_words = packed.words().len() / (n_pad / 32);
    for (base, count) in [(0, 2), (2, 1), (3, 2)] {
        let words = &packed.words()[base * tile_words..(base + count) * tile_words];
        let words = gpu.upload("w", words)?;
        let offset = gpu.upload("offset", &offsets[base * 32..(base + count) * 32])?;
        let call = kernels::gemm(variant, shape, base, count);
        let mut inputs = vec![&words, &codes, &offset];
        if variant.needs_code_sum() {
            inputs.push(&code_sum);
        }
        let acc = run_guarded(gpu, &call, tokens(m), &inputs, &[m * n_pad])?.remove(0);
        for token in 0..m {
            let rows = base * 32..((base + count) * 32).min(shape.n());
            let found = as_i32(&acc[token * n_pad..][rows.clone()]);
            let expected = &expected[token * shape.n()..][rows];
            same(&format!("{} shard {base} token {token}", call.kernel.name), &found, expected)?;
        }
    }
    Ok(())
}

fn quantize(gpu: &Gpu, variant: Variant) -> Result<(), Failed> {
    let mut random = Random::new(3);
    for k in [1, 63, 64, 65, 256, 2560, 6913] {
        let m = 3;
        let mut x = random.floats(m * k, 3.0);
        // The second token is all zero, the third below the floor.
        x[k..2 * k].fill(0.0);
        x[2 * k..].iter_mut().for_each(|value| *value *= 1e-7);
        let found = self_test::quantize(gpu, variant, &x, m)?;
        for (token, values) in x.chunks_exact(k).enumerate() {
            let expected = cpu_ref::quantize_absmax::quantize_absmax(values);
            let what = format!("quantize_absmax K {k} token {token}");
            close(&what, &[found.act_scale[token]], &[expected.act_scale], |_| {
                2.5 * EPS * expected.act_scale
            })?;
            let codes = self_test::decode_codes(variant, found.token(token), k);
            let inv_act_scale = 1.0 / expected.act_scale;
            for (at, (&code, &reference)) in codes.iter().zip(&expected.codes).enumerate() {
                // 127/absmax may be 2.5 ULP off: a value that close to a tie may go either way.
                let scaled = values[at] * inv_act_scale;
                let from_tie = (scaled - scaled.floor() - 0.5).abs();
                let at_tie = from_tie <= 4.0 * EPS * scaled.abs();
                let off = (i32::from(code) - i32::from(reference)).abs();
                if off > 1 || (off == 1 && !at_tie) {
                    return Err(format!("{what}: [{at}]: {code}, expected {reference}").into());
                }
            }
            let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
            same(&format!("{what}: sum"), &[found.code_sum[token]], &[sum])?;
        }
    }
    // Exact ties and a NaN.
    let ties = [127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 126.5, -126.5];
    let found = self_test::quantize(gpu, variant, &ties, 1)?;
    let expected = cpu_ref::quantize_absmax::quantize_absmax(&ties).codes;
    same("ties", &self_test::decode_codes(variant, found.token(0), ties.len()), &expected)?;
    let found = self_test::quantize(gpu, variant, &[1.0, f32::NAN, 2.0], 1)?;
    if !found.act_scale[0].is_nan() {
        return Err(format!("NaN was hidden: act_scale {}", found.act_scale[0]).into());
    }
    Ok(())
}

fn rmsnorm(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(11);
    for (k, m) in [(1, 1), (64, 3), (255, 2), (2560, 2), (6912, 1)] {
        let (x, w) = (random.floats(m * k, 4.0), random.floats(k, 2.0));
        let (x_buffer, w_buffer) = (gpu.upload("x", &x)?, gpu.upload("w", &w)?);
        let call = kernels::rmsnorm(k, 1e-5, false);
        let out = run_guarded(gpu, &call, tokens(m), &[&x_buffer, &w_buffer], &[m * k])?;
        let expected: Vec<f32> =
            x.chunks_exact(k).flat_map(|x| cpu_ref::rmsnorm::rmsnorm(x, &w, 1e-5)).collect();
        // The f32 sum of K squares: each lane adds K/256, the tree 8 more; 2 ULP from inverseSqrt.
        let relative = (k as f32 / 256.0 + 8.0 + 6.0) * EPS;
        let what = format!("rmsnorm K {k} M {m}");
        close(&what, &as_f32(&out[0]), &expected, |at| relative * expected[at].abs())?;
        // Only the last token's row, for the head.
        let call = kernels::rmsnorm(k, 1e-5, true);
        let first_logit_row = m as u32 - 1;
        let params = PassParams { first_logit_row, n_logit_rows: 1, ..tokens(m) };
        let out = run_guarded(gpu, &call, params, &[&x_buffer, &w_buffer], &[k])?;
        let expected = &expected[(m - 1) * k..];
        close(&what, &as_f32(&out[0]), expected, |at| relative * expected[at].abs())?;
    }
    Ok(())
}

/// Accumulators and scales of a matrix result.
struct Sums {
    acc: Vec<i32>,
    weight_scale: Vec<f32>,
    act_scale: Vec<f32>,
    n: usize,
}

impl Sums {
    fn random(random: &mut Random, m: usize, n: usize) -> Self {
        let acc = (0..m * padded_rows(n)).map(|_| random.below(200_001) as i32 - 100_000);
        Self {
            acc: acc.collect(),
            weight_scale: (0..n).map(|_| 0.5 + random.unit().abs()).collect(),
            act_scale: (0..m).map(|_| 0.01 + 0.01 * random.unit().abs()).collect(),
            n,
        }
    }

    /// The scaled result of token `m`.
    fn row(&self, m: usize) -> Vec<f32> {
        let acc = &self.acc[m * padded_rows(self.n)..][..self.n];
        cpu_ref::gemv::dequantize(acc, &self.weight_scale, self.act_scale[m])
    }
}

fn rope(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(13);
    for heads in [
        Heads { query: 4, kv: 2, dim: 32 },
        Heads { query: 3, kv: 1, dim: 100 },
        Heads { query: 2, kv: 2, dim: 256 },
        Heads { query: 1, kv: 1, dim: 2 },
    ] {
        let (m, start, capacity) = (3, 5, 9);
        let (query_size, kv_size) = (heads.query * heads.dim, heads.kv * heads.dim);
        let sums = Sums::random(&mut random, m, query_size + 2 * kv_size);
        let inv_freq =
            cpu_ref::rope::frequencies(10_000.0, heads.dim, cpu_ref::rope::Scaling::None);
        let angles: Vec<[f32; 2]> = (0..capacity)
            .flat_map(|position| {
                let (cos, sin) = cpu_ref::rope::angles(position, &inv_freq);
                cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin]).collect::<Vec<_>>()
            })
            .collect();
        let inputs = [
            gpu.upload("acc", &sums.acc)?,
            gpu.upload("weight_scale", &sums.weight_scale)?,
            gpu.upload("act_scale", &sums.act_scale)?,
            gpu.upload("angles", &angles)?,
        ];
        let params = PassParams { start: start as u32, ..tokens(m) };
        let lens = [m * query_size, capacity * kv_size, capacity * kv_size];
        let out = run_guarded(gpu, &kernels::rope(heads), params, &inputs.each_ref(), &lens)?;
        let [query, keys, values] = [0, 1, 2].map(|i| as_f32(&out[i]));
        for token in 0..m {
            let mut row = sums.row(token);
            let largest = row.iter().fold(0.0f32, |max, value| max.max(value.abs()));
            // Two products and a sum of values up to `largest`, each scaled by two products.
            let bound = |_| 8.0 * EPS * largest;
            let (cos, sin) = cpu_ref::rope::angles(start + token, &inv_freq);
            for head in row[..query_size + kv_size].chunks_exact_mut(heads.dim) {
                cpu_ref::rope::rotate(head, &cos, &sin);
            }
            let (expected_query, rest) = row.split_at(query_size);
            let (expected_keys, expected_values) = rest.split_at(kv_size);
            let what = format!("rope {heads:?} token {token}");
            let slot = (start + token) * kv_size..(start + token + 1) * kv_size;
            close(&what, &query[token * query_size..][..query_size], expected_query, bound)?;
            close(&what, &keys[slot.clone()], expected_keys, bound)?;
            close(&what, &values[slot], expected_values, bound)?;
        }
        // Positions of other tokens keep what they had: the guard pattern.
        let untouched = f32::from_bits(0xDEAD_BEEF);
        same("rope: other positions", &keys[..start * kv_size], &vec![untouched; start * kv_size])?;
    }
    Ok(())
}

fn attention(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(17);
    for (heads, start, m) in [
        (Heads { query: 1, kv: 1, dim: 2 }, 0, 1),
        (Heads { query: 4, kv: 2, dim: 32 }, 0, 5),
        (Heads { query: 8, kv: 2, dim: 64 }, 126, 4),
        (Heads { query: 3, kv: 1, dim: 100 }, 40, 2),
        (Heads { query: 4, kv: 4, dim: 96 }, 255, 1),
        (Heads { query: 20, kv: 5, dim: 128 }, 300, 2),
        (Heads { query: 2, kv: 1, dim: 256 }, 130, 1),
    ] {
        let (query_size, kv_size) = (heads.query * heads.dim, heads.kv * heads.dim);
        let positions = start + m;
        let query = random.floats(m * query_size, 3.0);
        let (keys, values) =
            (random.floats(positions * kv_size, 2.0), random.floats(positions * kv_size, 5.0));
        let inputs = [gpu.upload("q", &query)?, gpu.upload("k", &keys)?, gpu.upload("v", &values)?];
        let params = PassParams { start: start as u32, ..tokens(m) };
        let call = kernels::attention(heads);
        let out = run_guarded(gpu, &call, params, &inputs.each_ref(), &[m * query_size])?;
        let found = as_f32(&out[0]);
        for token in 0..m {
            let seen = (start + token + 1) * kv_size;
            let expected = cpu_ref::attention::attention(
                &query[token * query_size..][..query_size],
                &keys[..seen],
                &values[..seen],
                heads,
            );
            // Scores up to 6·√D with f32 sums over D: their error, about √D·D ULP at most and far
            // less on average, is the relative error of a weight; values are up to 5.
            let bound = 5.0 * (32.0 + heads.dim as f32) * EPS;
            let what = format!("attention {heads:?} position {}", start + token);
            close(&what, &found[token * query_size..][..query_size], &expected, |_| bound)?;
        }
    }
    Ok(())
}

fn gated_activation(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(19);
    for activation in [Activation::Relu2, Activation::Silu] {
        for (intermediate, m) in [(1, 1), (33, 2), (768, 3)] {
            let mut sums = Sums::random(&mut random, m, 2 * intermediate);
            if activation == Activation::Silu {
                // Gates between −20 and 20, where SiLU is neither 0 nor the identity.
                sums.acc.iter_mut().for_each(|acc| *acc /= 100);
            }
            let inputs = [
                gpu.upload("acc", &sums.acc)?,
                gpu.upload("weight_scale", &sums.weight_scale)?,
                gpu.upload("act_scale", &sums.act_scale)?,
            ];
            let call = kernels::gated_activation(intermediate, activation);
            let inputs = inputs.each_ref();
            let out = run_guarded(gpu, &call, tokens(m), &inputs, &[m * intermediate])?;
            let expected: Vec<f32> = (0..m)
                .flat_map(|token| {
                    let row = sums.row(token);
                    let (gate, up) = row.split_at(intermediate);
                    cpu_ref::mlp::gated_activation(gate, up, activation)
                })
                .collect();
            // exp(x) to 3 + 2|x| ULP with |x| up to 20, and a few roundings.
            let relative = match activation {
                Activation::Relu2 => 8.0 * EPS,
                Activation::Silu => 64.0 * EPS,
            };
            let what = format!("gated_activation {activation:?} F {intermediate} M {m}");
            close(&what, &as_f32(&out[0]), &expected, |at| {
                relative * expected[at].abs() + f32::MIN_POSITIVE
            })?;
        }
    }
    Ok(())
}

fn residual_add(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(23);
    for (n, m) in [(1, 1), (64, 2), (70, 3), (2560, 2)] {
        let sums = Sums::random(&mut random, m, n);
        let hidden = random.floats(m * n, 100.0);
        let inputs = [
            gpu.upload("hidden", &hidden)?,
            gpu.upload("acc", &sums.acc)?,
            gpu.upload("weight_scale", &sums.weight_scale)?,
            gpu.upload("act_scale", &sums.act_scale)?,
        ];
        let call = kernels::residual_add(n);
        let out = run_guarded(gpu, &call, tokens(m), &inputs.each_ref(), &[m * n])?;
        let rows: Vec<f32> = (0..m).flat_map(|token| sums.row(token)).collect();
        let expected = cpu_ref::residual::residual_add(&hidden, &rows);
        close(&format!("residual_add N {n} M {m}"), &as_f32(&out[0]), &expected, |at| {
            2.0 * EPS * (hidden[at].abs() + rows[at].abs())
        })?;
    }
    Ok(())
}

/// A dense table as the device stores it, and the values it stands for.
fn table(format: DenseFormat, random: &mut Random, n: usize, k: usize) -> (Vec<u32>, Vec<f32>) {
    let mut words = Vec::new();
    let mut values = Vec::new();
    for _ in 0..n {
        let mut row: Vec<u16> = Vec::new();
        for _ in 0..k {
            let value = random.unit();
            match format {
                DenseFormat::Bf16 => {
                    let bits = (value.to_bits() >> 16) as u16;
                    values.push(f32::from_bits(u32::from(bits) << 16));
                    row.push(bits);
                }
                DenseFormat::F16 => {
                    // A multiple of 1/512 below 1 is an f16: 10 bits of fraction.
                    let steps = (value * 512.0).round_ties_even();
                    values.push(steps / 512.0);
                    row.push(f16_bits(steps / 512.0));
                }
                DenseFormat::F32 => {
                    values.push(value);
                    row.extend([value.to_bits() as u16, (value.to_bits() >> 16) as u16]);
                }
            }
        }
        row.resize(format.units(k) * 8, 0);
        words.extend(row.chunks_exact(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16));
    }
    (words, values)
}

/// The f16 bits of a value that is exactly representable and normal or zero.
fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    if value == 0.0 {
        return sign;
    }
    let exponent = (bits >> 23 & 0xff) as i32 - 127 + 15;
    sign | (exponent as u16) << 10 | (bits >> 13 & 0x3ff) as u16
}

fn embedding_and_lm_head(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(29);
    for format in [DenseFormat::Bf16, DenseFormat::F16, DenseFormat::F32] {
        for (n, k) in [(1, 1), (9, 8), (50, 37), (300, 256), (17, 2560)] {
            let (words, values) = table(format, &mut random, n, k);
            let ids: Vec<u32> = (0..4).map(|_| random.below(n) as u32).collect();
            let x = random.floats(2 * k, 2.0);
            let row_words = format.units(k) * 4;
            let split = n / 2;
            let shards: Vec<_> = [(0, split), (split, n - split)]
                .into_iter()
                .filter(|&(_, rows)| rows > 0)
                .map(|(base, rows)| DenseShard { format, k, base, rows })
                .collect();
            let what = format!("{format:?} {n}×{k}");
            let tokens_buffer = gpu.upload("tokens", &ids)?;
            let x_buffer = gpu.upload("x", &x)?;
            for shard in shards {
                let rows = &words[shard.base * row_words..][..shard.rows * row_words];
                let rows = gpu.upload("table", rows)?;
                let call = kernels::embedding(shard);
                let lens = [ids.len() * k];
                let inputs = [&tokens_buffer, &rows];
                let out = run_guarded(gpu, &call, tokens(ids.len()), &inputs, &lens)?.remove(0);
                let mine = shard.base..shard.base + shard.rows;
                for (m, &id) in
                    ids.iter().enumerate().filter(|(_, id)| mine.contains(&(**id as usize)))
                {
                    let expected = cpu_ref::embedding::embedding(&values, k, id as usize);
                    same(&format!("embedding {what}"), &as_f32(&out[m * k..][..k]), &expected)?;
                }

                let params = PassParams { n_logit_rows: 2, ..tokens(2) };
                let call = kernels::lm_head(shard, n);
                let out = run_guarded(gpu, &call, params, &[&x_buffer, &rows], &[2 * n])?.remove(0);
                for (m, x) in x.chunks_exact(k).enumerate() {
                    let expected = cpu_ref::lm_head::lm_head(&values, x);
                    let found = as_f32(&out[m * n..][mine.clone()]);
                    // Σ|table·x| ≤ 2K; each lane adds K/32 terms in f32, the tree 5.
                    let bound = 2.0 * k as f32 * (k as f32 / 32.0 + 8.0) * EPS;
                    close(&format!("lm_head {what}"), &found, &expected[mine.clone()], |_| bound)?;
                }
            }
        }
    }
    Ok(())
}

fn argmax(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(31);
    let check = |what: &str, logits: &[f32], rows: usize| -> Result<(), Failed> {
        let v = logits.len() / rows;
        let buffer = gpu.upload("logits", logits)?;
        let params = PassParams { n_logit_rows: rows as u32, ..tokens(rows) };
        let out = run_guarded(gpu, &kernels::argmax(v), params, &[&buffer], &[1])?;
        let expected = cpu_ref::argmax::argmax(&logits[(rows - 1) * v..]);
        same(what, &out[0], &[expected.map_or(u32::MAX, |token| token as u32)])
    };
    for v in [1, 2, 255, 256, 257, 1000, 32_002] {
        check(&format!("argmax V {v}"), &random.floats(v, 10.0), 1)?;
    }
    check("argmax of the last row", &[9.0, 1.0, 2.0, 3.0, 8.0, 1.0], 2)?;
    check("argmax, first of equals", &[1.0, 5.0, 5.0, 5.0], 1)?;
    check(
        "argmax, equals far apart",
        &{
            let mut logits = vec![0.0; 1000];
            logits[300] = 2.0;
            logits[812] = 2.0;
            logits
        },
        1,
    )?;
    check("argmax of negatives", &[-3.0, -2.0, -7.0], 1)?;
    check("argmax of both zeros", &[-1.0, -0.0, 0.0], 1)?;
    check("argmax of infinities", &[f32::NEG_INFINITY, f32::NEG_INFINITY], 1)?;
    check("argmax of NaN", &[1.0, f32::NAN, 2.0], 1)?;
    check("argmax of −NaN", &[1.0, -f32::NAN], 1)
}
