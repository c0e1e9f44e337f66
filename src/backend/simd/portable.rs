//! The kernels that need no intrinsics: loops over fixed lanes, compiled once per level.
//!
//! Every function is `inline(always)`, so that it takes the vector width of the
//! `#[target_feature]` function it is called from. Sums run in a fixed number of lanes that are
//! added in a fixed tree, and Rust never contracts `a·b + c`: **all levels return the same bits**,
//! whatever the machine and the number of threads.

use cpu_ref::layout::TILE_ROWS;
use cpu_ref::mlp::Activation;
use cpu_ref::quantize_absmax::ABSMAX_FLOOR;

use super::{CacheHead, TableRows};

/// Lanes of an f32 sum: two 512-bit registers, so that two additions are always in flight.
pub(super) const LANES: usize = 32;

/// Lanes of an f64 sum.
const F64_LANES: usize = 16;

/// Adding and subtracting 1.5·2²³ rounds |x| ≤ 2²² to the nearest integer, ties to even, and
/// leaves the integer in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// One token's scale and code sum, as [`quantize_absmax`] leaves them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TokenScale {
    /// `max(absmax, 1e-5) / 127`: multiplies a code back to a real value.
    pub act_scale: f32,
    /// `Σ codes`: what the unsigned weight codes `w + 1` have added too much.
    pub code_sum: i32,
}

/// Sums the lanes pairwise: lane `i` with lane `i + LANES/2`, and so on.
#[inline(always)]
fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ widen(row[k])·x[k]`, lane `k % LANES`.
///
/// Bound against the exact sum: `(K/LANES + 7)·2⁻²⁴·Σ|row[k]·x[k]|`: one rounding a product, one
/// an addition in the lane, five in the tree.
#[inline(always)]
pub(super) fn dot<T: Copy>(row: &[T], x: &[f32], widen: impl Fn(T) -> f32) -> f32 {
    let (row_groups, row_tail) = row.as_chunks::<LANES>();
    let (x_groups, x_tail) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for (row, x) in row_groups.iter().zip(x_groups) {
        for i in 0..LANES {
            lanes[i] += widen(row[i]) * x[i];
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(row_tail).zip(x_tail) {
        *lane += widen(a) * b;
    }
    tree(lanes)
}

/// bfloat16 → f32, exact.
#[inline(always)]
fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// IEEE half → f32, exact, without a branch: the exponent is rebased by a multiplication, which
/// also normalises subnormals; infinity and NaN get the full exponent back.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    const REBASE: f32 = f32::from_bits((127 + 127 - 15) << 23);
    let magnitude = u32::from(bits & 0x7fff);
    let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    let value = f32::from_bits(magnitude << 13) * REBASE;
    f32::from_bits(value.to_bits() | special | u32::from(bits & 0x8000) << 16)
}

/// `1/√(mean(x²) + eps)`, summed in f64 as the reference does.
///
/// Bound: the f64 sums differ in order only (relative 2⁻⁴⁰ for K ≤ 2¹²), so the narrowed result is
/// the reference's or, for a sum next to a rounding boundary, its neighbour.
#[inline(always)]
pub(super) fn inv_rms(x: &[f32], eps: f32) -> f32 {
    let (groups, tail) = x.as_chunks::<F64_LANES>();
    let mut lanes = [0.0f64; F64_LANES];
    for group in groups {
        for i in 0..F64_LANES {
            lanes[i] += f64::from(group[i]) * f64::from(group[i]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane += f64::from(value) * f64::from(value);
    }
    let mean = lanes.iter().sum::<f64>() / x.len() as f64;
    (1.0 / (mean + f64::from(eps)).sqrt()) as f32
}

/// Twin of `cpu_ref::rmsnorm`, with the bound of [`inv_rms`]: at most one step of `r`, so
/// `2⁻²²·|y|`.
#[inline(always)]
pub(super) fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let r = inv_rms(x, eps);
    for ((y, &value), &w) in y.iter_mut().zip(x).zip(weight) {
        *y = w * (value * r);
    }
}

/// Twin of `cpu_ref::quantize_absmax`, exact: codes and scale are equal. Codes past the values are
/// zero, as the padding of K requires.
#[inline(always)]
pub(super) fn quantize_absmax(
    values: impl Iterator<Item = f32> + Clone,
    codes: &mut [i8],
    len: usize,
) -> TokenScale {
    // |x| as bits orders like the number, with NaN above infinity: NaN survives the maximum.
    let absmax_bits = values.clone().fold(0, |max, value| value.abs().to_bits().max(max));
    let absmax = f32::from_bits(absmax_bits);
    let absmax = if absmax < ABSMAX_FLOOR { ABSMAX_FLOOR } else { absmax };
    let act_scale = absmax / 127.0;
    let (codes, padding) = codes.split_at_mut(len);
    padding.fill(0);
    if !absmax.is_finite() {
        // x·(127/∞) is 0 or NaN, and a NaN converts to 0.
        codes.fill(0);
        return TokenScale { act_scale, code_sum: 0 };
    }
    let inv_act_scale = 127.0 / absmax;
    // |x·inv_act_scale| ≤ 127·(1 + 2⁻²³)²: within the range of ROUND, and no clamp can act.
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (value * inv_act_scale + ROUND).to_bits() as i8;
    }
    TokenScale { act_scale, code_sum: codes.iter().map(|&code| i32::from(code)).sum() }
}

/// [`rmsnorm`] (where there is a weight), then [`quantize_absmax`], without storing the norm.
#[inline(always)]
pub(super) fn norm_quantize(
    x: &[f32],
    weight: Option<&[f32]>,
    eps: f32,
    codes: &mut [i8],
) -> TokenScale {
    match weight {
        Some(weight) => {
            let r = inv_rms(x, eps);
            let normed = x.iter().zip(weight).map(move |(&value, &w)| w * (value * r));
            quantize_absmax(normed, codes, x.len())
        }
        None => quantize_absmax(x.iter().copied(), codes, x.len()),
    }
}

/// Twin of `cpu_ref::gemv::dequantize` for token `m` of `acc[tile][M][32]`, exact:
/// `y[n] = f32(acc[n]) · (weight_scale[n] · act_scale)`.
#[inline(always)]
pub(super) fn dequantize(
    acc: &[i32],
    (m, n_tokens): (usize, usize),
    weight_scale: &[f32],
    act_scale: f32,
    y: &mut [f32],
) {
    let tiles = acc.chunks_exact(n_tokens * TILE_ROWS).map(|tile| &tile[m * TILE_ROWS..]);
    let rows = y.chunks_mut(TILE_ROWS).zip(weight_scale.chunks(TILE_ROWS));
    for (tile, (y, scale)) in tiles.zip(rows) {
        for ((y, &sum), &scale) in y.iter_mut().zip(tile).zip(scale) {
            *y = sum as f32 * (scale * act_scale);
        }
    }
}

/// Twin of `cpu_ref::residual::residual_add`, exact: `hidden[i] += y[i]`.
#[inline(always)]
pub(super) fn residual_add(hidden: &mut [f32], y: &[f32]) {
    for (hidden, &y) in hidden.iter_mut().zip(y) {
        *hidden += y;
    }
}

/// Twin of `cpu_ref::rope::rotate`, exact, for each head of `heads[.., D]`.
#[inline(always)]
pub(super) fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b) = (*low, *high);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}

/// Twin of `cpu_ref::mlp::gated_activation`: exact for relu², within `2⁻²⁰·|z|` for silu, whose
/// [`exp`] is within 2⁻²² relative, plus one rounding each for the sum, quotient and product.
/// Below x = −88 silu is −0 here, and between −10⁻³⁶ and −0 in the reference.
#[inline(always)]
pub(super) fn gated_activation(gate: &[f32], up: &[f32], activation: Activation, z: &mut [f32]) {
    let gate_up = gate.iter().zip(up);
    match activation {
        Activation::Relu2 => {
            for (z, (&gate, &up)) in z.iter_mut().zip(gate_up) {
                *z = Activation::Relu2.apply(gate) * up;
            }
        }
        Activation::Silu => {
            for (z, (&gate, &up)) in z.iter_mut().zip(gate_up) {
                let e = if -gate > 88.0 { f32::INFINITY } else { exp(-gate) };
                *z = gate / (1.0 + e) * up;
            }
        }
    }
}

/// `eˣ` within 2⁻²² relative for −87 ≤ x ≤ 88, constant outside; NaN stays NaN.
///
/// `x = n·ln2 + r`, |r| ≤ ln2/2; a polynomial for `eʳ`, then n goes into the exponent. Source:
/// Cephes `expf` (Moshier). ln2 is split so that `n·LN2_HIGH` is exact.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + coefficient;
    }
    let value = p * (r * r) + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    value * f32::from_bits(exponent << 23)
}

/// Positions whose scores are computed before their values are read.
const BLOCK: usize = 32;

/// Twin of `cpu_ref::attention` for one query head: `out = softmax(q·Kᵀ/√D)·V`.
///
/// The softmax runs online: blocks of positions, and what has been summed is rescaled when a block
/// raises the maximum, so that no scores need to be stored (Milakov & Gimelshein 2018,
/// arXiv:1805.02867).
///
/// Bound: with `e` the largest [`dot`] error of a score (÷√D), weights are within
/// `2e + (S/32 + 48)·2⁻²⁴` relative, and so is the result against `max|value|`, with as many
/// roundings again for the sum of S values: `(2e + (2·S + 64)·2⁻²⁴)·max|value|` is safe.
#[inline(always)]
pub(super) fn attend_head(q: &[f32], cache: CacheHead<'_>, out: &mut [f32]) {
    let CacheHead { keys, values, stride, len } = cache;
    let dim = q.len();
    let inv_sqrt_dim = 1.0 / (dim as f32).sqrt();
    let (mut max, mut total) = (f32::NEG_INFINITY, 0.0f32);
    out.fill(0.0);
    for start in (0..len).step_by(BLOCK) {
        let positions = BLOCK.min(len - start);
        let mut weights = [f32::NEG_INFINITY; BLOCK];
        let mut new_max = max;
        for (i, weight) in weights[..positions].iter_mut().enumerate() {
            *weight = dot(q, &keys[(start + i) * stride..][..dim], |value| value) * inv_sqrt_dim;
            if *weight > new_max {
                new_max = *weight;
            }
        }
        for weight in &mut weights {
            *weight = exp(*weight - new_max);
        }
        // exp is constant below −87: the first block, and those that are not there, weigh nothing.
        weights[positions..].fill(0.0);
        if new_max > max {
            let rescale = if max == f32::NEG_INFINITY { 0.0 } else { exp(max - new_max) };
            total *= rescale;
            for out in out.iter_mut() {
                *out *= rescale;
            }
            max = new_max;
        }
        total += tree(weights);
        let mut at = start;
        while at < start + positions {
            let group = 4.min(start + positions - at);
            let w = &weights[at - start..];
            if group == 4 {
                let [a, b, c, d] = [0, 1, 2, 3].map(|i| &values[(at + i) * stride..][..dim]);
                for i in 0..dim {
                    out[i] += (w[0] * a[i] + w[1] * b[i]) + (w[2] * c[i] + w[3] * d[i]);
                }
            } else {
                for (i, &w) in w[..group].iter().enumerate() {
                    let value = &values[(at + i) * stride..][..dim];
                    for (out, &value) in out.iter_mut().zip(value) {
                        *out += w * value;
                    }
                }
            }
            at += group;
        }
    }
    let inv_total = 1.0 / total;
    for out in out.iter_mut() {
        *out *= inv_total;
    }
}

/// Twin of `cpu_ref::lm_head` for a stripe of rows and M tokens `x[M,K]`, into
/// `logits[tile][M][32]`; rows that are not there stay as they are. Bound: that of [`dot`].
#[inline(always)]
pub(super) fn lm_head(table: TableRows<'_>, x: &[f32], k: usize, logits: &mut [f32]) {
    match table {
        TableRows::Bf16(table) => lm_head_rows(table, x, k, logits, widen_bf16),
        TableRows::F16(table) => lm_head_rows(table, x, k, logits, widen_f16),
        TableRows::F32(table) => lm_head_rows(table, x, k, logits, |value| value),
    }
}

#[inline(always)]
fn lm_head_rows<T: Copy>(
    table: &[T],
    x: &[f32],
    k: usize,
    logits: &mut [f32],
    widen: impl Fn(T) -> f32 + Copy,
) {
    let n_tokens = x.len() / k;
    for (n, row) in table.chunks_exact(k).enumerate() {
        let tile = &mut logits[n / TILE_ROWS * n_tokens * TILE_ROWS..];
        for (m, x) in x.chunks_exact(k).enumerate() {
            tile[m * TILE_ROWS + n % TILE_ROWS] = dot(row, x, widen);
        }
    }
}

/// Twin of `cpu_ref::argmax`, exact: the first of the largest logits, `None` if one is NaN.
#[inline(always)]
pub(super) fn argmax(logits: &[f32]) -> Option<usize> {
    let mut max = f32::NEG_INFINITY;
    let mut nan = false;
    for &logit in logits {
        nan |= logit.is_nan();
        max = if logit > max { logit } else { max };
    }
    if nan { None } else { logits.iter().position(|&logit| logit == max) }
}
