//! The kernels that need no intrinsics: loops over fixed lanes, compiled once per level.
//!
//! Every function is `inline(always)`, so that it takes the vector width of the
//! `#[target_feature]` function it is called from. Sums run in a fixed number of lanes that are
//! added in a fixed tree, and Rust never contracts `a·b + c`: **all levels return the same bits**,
//! whatever the machine and the number of threads.

use cpu_ref::exp::{EXP_MAX, EXP_MIN};
use cpu_ref::layout::{TILE_ROWS, signs};
use cpu_ref::mlp::Activation;
use cpu_ref::quantize_absmax::ABSMAX_FLOOR;
use cpu_ref::reduce::{GROUP_LANES, NORM_LANES, tree_sum};

use super::{Activations, CHUNK_WORDS, GroupLayout, GroupScales, GroupWeights, TableRows};

/// Lanes of a logit's sum: two 512-bit registers, so that two additions are always in flight.
pub(super) const HEAD_LANES: usize = 32;

/// Adding and subtracting 1.5·2²³ rounds |x| ≤ 2²² to the nearest integer, ties to even, and
/// leaves the integer in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// One token's scale and code sum, as `quantize_absmax` leaves them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TokenScale {
    /// `max(absmax, 1e-5) / 127`: multiplies a code back to a real value.
    pub act_scale: f32,
    /// `Σ codes`: what the unsigned weight codes `w + 1` have added too much.
    pub code_sum: i32,
}

/// `Σ widen(row[k])·x[k]` in the order of `cpu_ref::reduce`: lane `k % L`, then the tree.
///
/// Bound against the exact sum: `(K/L + log₂L + 1)·2⁻²⁴·Σ|row[k]·x[k]|`: one rounding a product,
/// one an addition in the lane, and the tree.
#[inline(always)]
pub(super) fn dot<const L: usize, T: Copy>(row: &[T], x: &[f32], widen: impl Fn(T) -> f32) -> f32 {
    let (row_groups, row_tail) = row.as_chunks::<L>();
    let (x_groups, x_tail) = x.as_chunks::<L>();
    let mut lanes = [0.0f32; L];
    for (row, x) in row_groups.iter().zip(x_groups) {
        for i in 0..L {
            lanes[i] += widen(row[i]) * x[i];
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(row_tail).zip(x_tail) {
        *lane += widen(a) * b;
    }
    tree_sum(lanes)
}

/// bfloat16 → f32, exact.
#[inline(always)]
fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// IEEE half → f32, exact, without a branch: the exponent is rebased by a multiplication, which
/// also normalises subnormals; infinity and NaN get the full exponent back.
#[inline(always)]
pub(super) fn widen_f16(bits: u16) -> f32 {
    const REBASE: f32 = f32::from_bits((127 + 127 - 15) << 23);
    let magnitude = u32::from(bits & 0x7fff);
    let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    let value = f32::from_bits(magnitude << 13) * REBASE;
    f32::from_bits(value.to_bits() | special | u32::from(bits & 0x8000) << 16)
}

/// `1/√(mean(x²) + eps)`, exactly as `cpu_ref::rmsnorm` computes it.
#[inline(always)]
pub(super) fn inv_rms(x: &[f32], eps: f32) -> f32 {
    let sum = dot::<NORM_LANES, f32>(x, x, |value| value);
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// Twin of `cpu_ref::rmsnorm`, exact.
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

/// Twin of `cpu_ref::rmsnorm` for each head of `heads[.., D]`, exact.
#[inline(always)]
pub(super) fn rmsnorm_heads(heads: &mut [f32], weight: &[f32], eps: f32) {
    for head in heads.chunks_exact_mut(weight.len()) {
        let r = inv_rms(head, eps);
        for (value, &w) in head.iter_mut().zip(weight) {
            *value = w * (*value * r);
        }
    }
}

/// Twin of `cpu_ref::hadamard::rotate`, exact.
#[inline(always)]
pub(super) fn rotate(x: &mut [f32], signs: &[f32], block: usize) {
    for (x, &sign) in x.iter_mut().zip(signs) {
        *x *= sign;
    }
    hadamard(x, block);
}

/// Twin of `cpu_ref::hadamard::rotate_back`, exact.
#[inline(always)]
pub(super) fn rotate_back(z: &mut [f32], signs: &[f32], block: usize) {
    hadamard(z, block);
    for (z, &sign) in z.iter_mut().zip(signs) {
        *z *= sign;
    }
}

/// The normalised Hadamard transform of each block in place.
#[inline(always)]
fn hadamard(x: &mut [f32], block: usize) {
    let factor = cpu_ref::hadamard::inv_sqrt(block);
    let mut step = 1;
    while step < block {
        for pair in x.chunks_exact_mut(2 * step) {
            let (low, high) = pair.split_at_mut(step);
            for (low, high) in low.iter_mut().zip(high) {
                (*low, *high) = (*low + *high, *low - *high);
            }
        }
        step *= 2;
    }
    for x in x {
        *x *= factor;
    }
}

/// Token `m` of `tiled[tile][M][32]`.
#[inline(always)]
pub(super) fn untile(tiled: &[f32], (m, n_tokens): (usize, usize), y: &mut [f32]) {
    let tiles = tiled.chunks_exact(n_tokens * TILE_ROWS).map(|tile| &tile[m * TILE_ROWS..]);
    for (tile, y) in tiles.zip(y.chunks_mut(TILE_ROWS)) {
        y.copy_from_slice(&tile[..y.len()]);
    }
}

/// Twin of `cpu_ref::group_gemv::quantize_absmax_groups`, exact. For [`GroupLayout::Signs`] the 128
/// codes of a chunk come bit by bit: code `8·b + j` at `16·j + b`.
#[inline(always)]
pub(super) fn quantize_absmax_groups(
    x: &[f32],
    layout: GroupLayout,
    codes: &mut [i8],
    scales: &mut [TokenScale],
) {
    let group = x.len() / scales.len();
    let groups = x.chunks_exact(group).zip(codes.chunks_exact_mut(group));
    for ((x, codes), scale) in groups.zip(scales) {
        *scale = quantize_absmax(x.iter().copied(), codes, group);
    }
    if layout == GroupLayout::Signs {
        for chunk in codes.as_chunks_mut::<{ signs::CHUNK_K }>().0 {
            let plain = *chunk;
            for (i, code) in chunk.iter_mut().enumerate() {
                *code = plain[8 * (i % 16) + i / 16];
            }
        }
    }
}

/// Twin of `cpu_ref::group_gemv::group_dot_int8` for all rows and tokens, exact, into
/// `y[tile][M][32]`. `sums(chunks, x, acc)` adds up some chunks of a tile; `widen` is
/// [`widen_scales`].
#[inline(always)]
pub(super) fn group_gemm_int8(
    weights: GroupWeights<'_>,
    x: Activations<'_>,
    y: &mut [f32],
    sums: impl Fn(&[[u32; CHUNK_WORDS]], Activations<'_>, &mut [[i32; TILE_ROWS]]),
    widen: impl Fn(&GroupScales) -> [f32; TILE_ROWS],
) {
    /// Tokens whose lanes are kept at a time.
    const TOKENS: usize = 4;
    let (n_tokens, group_chunks) = (x.n_tokens(), weights.group_chunks());
    let tiles = y.as_chunks_mut::<TILE_ROWS>().0.chunks_exact_mut(n_tokens);
    for (tile, y) in tiles.enumerate() {
        let (chunks, scales) = weights.tile(tile);
        for (first, y) in (0..n_tokens).step_by(TOKENS).zip(y.chunks_mut(TOKENS)) {
            let mut lanes = [[[0.0f32; TILE_ROWS]; GROUP_LANES]; TOKENS];
            let groups = chunks.chunks_exact(group_chunks).zip(scales);
            for (g, (chunks, scales)) in groups.enumerate() {
                let mut acc = [[0i32; TILE_ROWS]; TOKENS];
                let x = x.part(first, y.len(), g);
                sums(chunks, x, &mut acc[..y.len()]);
                let d = widen(scales);
                for (t, acc) in acc[..y.len()].iter().enumerate() {
                    let act_scale = x.act_scale(t);
                    let lanes = &mut lanes[t][g % GROUP_LANES];
                    for row in 0..TILE_ROWS {
                        lanes[row] += acc[row] as f32 * (d[row] * act_scale);
                    }
                }
            }
            for (y, lanes) in y.iter_mut().zip(&mut lanes) {
                *y = tree_of_rows(lanes);
            }
        }
    }
}

/// `cpu_ref::reduce::tree_sum` of every row.
#[inline(always)]
fn tree_of_rows(lanes: &mut [[f32; TILE_ROWS]; GROUP_LANES]) -> [f32; TILE_ROWS] {
    let mut step = GROUP_LANES / 2;
    while step > 0 {
        let (low, high) = lanes.split_at_mut(step);
        for (low, high) in low.iter_mut().zip(high) {
            for (low, high) in low.iter_mut().zip(high) {
                *low += *high;
            }
        }
        step /= 2;
    }
    lanes[0]
}

/// The scales of a tile's rows as f32.
#[inline(always)]
pub(super) fn widen_scales(scales: &GroupScales) -> [f32; TILE_ROWS] {
    let mut wide = [0.0; TILE_ROWS];
    for (pair, &word) in wide.as_chunks_mut::<2>().0.iter_mut().zip(scales) {
        *pair = [widen_f16(word as u16), widen_f16((word >> 16) as u16)];
    }
    wide
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

/// Twin of `cpu_ref::mlp::gated_activation`, exact.
#[inline(always)]
pub(super) fn gated_activation(gate: &[f32], up: &[f32], activation: Activation, z: &mut [f32]) {
    let gate_up = gate.iter().zip(up);
    match activation {
        Activation::Relu2 => {
            for (z, (&gate, &up)) in z.iter_mut().zip(gate_up) {
                // A NaN is not below 0.
                let positive = if gate < 0.0 { 0.0 } else { gate };
                *z = positive * positive * up;
            }
        }
        Activation::Silu => {
            for (z, (&gate, &up)) in z.iter_mut().zip(gate_up) {
                *z = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
}

/// `cpu_ref::exp::exp`, bit for bit, without a branch: the result is chosen at the end, and
/// rounding to an integer is an addition.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let below = x < EXP_MIN;
    let x = if x > EXP_MAX { EXP_MAX } else { x };
    let t = x * std::f32::consts::LOG2_E;
    let n = (t + 0.5).floor();
    let f = t - n;
    let mut p = 1.525_273_4e-5;
    for coefficient in
        [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, 6.931_472e-1, 1.0]
    {
        p = p * f + coefficient;
    }
    // n is an integer of at most 8 bits, or meaningless where the result is not used.
    let exponent = ((n + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let value = p * f32::from_bits((exponent.wrapping_add(127) as u32) << 23);
    if below { 0.0 } else { value }
}

/// Twin of `cpu_ref::lm_head` for a stripe of rows and M tokens `x[M,K]`, into
/// `logits[tile][M][32]`; rows that are not there stay as they are. Bound: that of [`dot`].
#[inline(always)]
pub(super) fn lm_head(table: TableRows<'_>, x: &[f32], k: usize, logits: &mut [f32]) {
    match table {
        TableRows::Bf16(table) => lm_head_rows(table, x, k, logits, widen_bf16),
        TableRows::F16(table) => lm_head_rows(table, x, k, logits, widen_f16),
        TableRows::F32(table) => lm_head_rows(table, x, k, logits, |value| value),
        TableRows::Codes { group, codes, scale, min } => {
            let groups = k / group;
            for (n, codes) in codes.chunks_exact(k).enumerate() {
                let scale = &scale[n * groups..][..groups];
                let min = min.get(n * groups..).and_then(|min| min.get(..groups));
                let tile = &mut logits[n / TILE_ROWS * (x.len() / k) * TILE_ROWS..];
                for (m, x) in x.chunks_exact(k).enumerate() {
                    tile[m * TILE_ROWS + n % TILE_ROWS] = codes_dot(codes, scale, min, x);
                }
            }
        }
    }
}

/// Lanes of the sum over a row of codes: the shortest group.
pub(super) const CODE_LANES: usize = 16;

/// `Σ (scale·codes[k] + min)·x[k]`, value by value as `Table::row` has them. The bound is that of
/// [`dot`], with [`CODE_LANES`].
#[inline(always)]
fn codes_dot(codes: &[i8], scale: &[f32], min: Option<&[f32]>, x: &[f32]) -> f32 {
    let group = codes.len() / scale.len();
    let mut lanes = [0.0f32; CODE_LANES];
    let groups = codes.chunks_exact(group).zip(x.chunks_exact(group)).zip(scale);
    for (g, ((codes, x), &scale)) in groups.enumerate() {
        let min = min.map_or(0.0, |min| min[g]);
        for (codes, x) in codes.as_chunks::<CODE_LANES>().0.iter().zip(x.as_chunks().0) {
            let x: &[f32; CODE_LANES] = x;
            for i in 0..CODE_LANES {
                lanes[i] += (scale * f32::from(codes[i]) + min) * x[i];
            }
        }
    }
    tree_sum(lanes)
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
            tile[m * TILE_ROWS + n % TILE_ROWS] = dot::<HEAD_LANES, T>(row, x, widen);
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
