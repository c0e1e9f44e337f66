//! `attention`: causal grouped-query attention of one token over the KV cache.

use crate::exp::exp;
use crate::reduce::{DOT_LANES, KEY_LANES, lane_sum};

/// Head counts and dimension of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// H, query heads; a multiple of `kv`.
    pub query: usize,
    /// G, key/value heads. Query head `h` reads key/value head `h / (H/G)`.
    pub kv: usize,
    /// D, values a head.
    pub dim: usize,
}

/// What a token may see of the KV cache, as it gives it back ([`crate::kv`]): all positions up to
/// the token's own, S ≥ 1.
#[derive(Debug, Clone, Copy)]
pub struct Cached<'a> {
    /// `[S, G, D]`.
    pub keys: &'a [f32],
    /// `[S, G, D]`.
    pub values: &'a [f32],
    /// `(keys, values)`: scales `[S, G]`; `None` where the format has none.
    pub scales: Option<(&'a [f32], &'a [f32])>,
}

/// `softmax(q·Kᵀ/√D)·V` for every query head of one token.
///
/// Shapes: `q[H,D]` after RoPE, result `[H,D]`. Positions are taken in blocks of 64 ([`KEY_LANES`]).
/// Of each block by itself: scores `s = (q·k)·(1/√D)·key_scale`, the dot product over 16 lanes; their
/// maximum *m*; `w = exp(s − m)`; *l*, the 64-lane sum of the *w*; `o = Σ (w·value_scale)·v`, in the
/// order of positions. Then blocks are merged in order into (M, L, O), at first (lowest f32, 0, 0):
///
/// ```text
/// M' = max(M, m);  a = exp(M − M');  b = exp(m − M');  L = L·a + l·b;  O = O·a + o·b;  M = M'
/// ```
///
/// and the result is O/L. So blocks may be computed apart, by anybody, and give the same bits.
///
/// Source: Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv:2305.13245; online softmax:
/// Milakov & Gimelshein 2018, arXiv:1805.02867; blocks apart: Dao et al. 2023, "Flash-Decoding".
pub fn attention(q: &[f32], cached: Cached<'_>, heads: Heads) -> Vec<f32> {
    let Heads { query, kv, dim } = heads;
    assert_eq!(q.len(), query * dim);
    assert!(kv > 0 && query.is_multiple_of(kv));
    let Cached { keys, values, scales } = cached;
    assert!(keys.len() == values.len() && keys.len().is_multiple_of(kv * dim));
    let positions = keys.len() / (kv * dim);
    assert!(positions > 0);
    if let Some((key_scale, value_scale)) = scales {
        assert!(key_scale.len() == positions * kv && value_scale.len() == positions * kv);
    }
    let mut out = Vec::with_capacity(query * dim);
    for (head, q_head) in q.chunks_exact(dim).enumerate() {
        let group = head / (query / kv);
        let at = |position: usize| (position * kv + group) * dim;
        let key_scale = |position: usize| scales.map_or(1.0, |(s, _)| s[position * kv + group]);
        let value_scale = |position: usize| scales.map_or(1.0, |(_, s)| s[position * kv + group]);
        let score = |position: usize| {
            let key = &keys[at(position)..][..dim];
            let products = q_head.iter().zip(key).map(|(&a, &b)| a * b);
            lane_sum::<DOT_LANES>(products) * inv_sqrt_dim(dim) * key_scale(position)
        };
        let mut merged_max = f32::MIN;
        let mut total = 0.0f32;
        let mut sums = vec![0.0f32; dim];
        for block in (0..positions).step_by(KEY_LANES) {
            let end = (block + KEY_LANES).min(positions);
            let scores: Vec<f32> = (block..end).map(score).collect();
            let block_max = scores.iter().fold(f32::MIN, |max, &score| maximum(max, score));
            let weights: Vec<f32> = scores.iter().map(|&score| exp(score - block_max)).collect();
            let block_total = lane_sum::<KEY_LANES>(weights.iter().copied());
            let new_max = maximum(merged_max, block_max);
            let decay = exp(merged_max - new_max);
            let growth = exp(block_max - new_max);
            total = total * decay + block_total * growth;
            for (d, sum) in sums.iter_mut().enumerate() {
                let mut block_sum = 0.0f32;
                for (position, &weight) in (block..end).zip(&weights) {
                    block_sum += (weight * value_scale(position)) * values[at(position) + d];
                }
                *sum = *sum * decay + block_sum * growth;
            }
            merged_max = new_max;
        }
        out.extend(sums.iter().map(|sum| sum / total));
    }
    out
}

/// `1/√D`, both operations in f32.
pub fn inv_sqrt_dim(dim: usize) -> f32 {
    1.0 / (dim as f32).sqrt()
}

/// The larger value; NaN if either is (`f32::max` would drop it).
fn maximum(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain<'a>(keys: &'a [f32], values: &'a [f32]) -> Cached<'a> {
        Cached { keys, values, scales: None }
    }

    #[test]
    fn one_position_returns_its_value() {
        let heads = Heads { query: 4, kv: 2, dim: 2 };
        let out = attention(&[9.0; 8], plain(&[1.0; 4], &[1.0, 2.0, 3.0, 4.0]), heads);
        assert_eq!(out, [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]);
    }

    #[test]
    fn many_blocks_agree_with_the_plain_softmax() {
        let heads = Heads { query: 1, kv: 1, dim: 3 };
        let wave = |i: usize| (i as f32 * 0.37).sin() * 3.0;
        let keys: Vec<f32> = (0..3 * 400).map(wave).collect();
        let values: Vec<f32> = (0..3 * 400).map(|i| wave(i + 7)).collect();
        let q = [0.5f32, -1.0, 2.0];
        let scores = keys.chunks_exact(3).map(|key| {
            let dot: f64 = q.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            (dot / 3f64.sqrt()).exp()
        });
        let total: f64 = scores.clone().sum();
        for (d, found) in attention(&q, plain(&keys, &values), heads).into_iter().enumerate() {
            let terms = scores.clone().enumerate().map(|(s, w)| w * f64::from(values[3 * s + d]));
            let expected = terms.sum::<f64>() / total;
            assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn scales_multiply_back() {
        let heads = Heads { query: 1, kv: 1, dim: 2 };
        let (keys, values) = ([1.0, -2.0, 3.0, 4.0], [5.0, 6.0, -7.0, 8.0]);
        let (halved, doubled) = (keys.map(|k| 0.5 * k), values.map(|v| 2.0 * v));
        let q = [0.25, 0.5];
        let scales = Some((&[2.0f32; 2][..], &[0.5f32; 2][..]));
        let found = attention(&q, Cached { keys: &halved, values: &doubled, scales }, heads);
        assert_eq!(found, attention(&q, plain(&keys, &values), heads));
    }

    #[test]
    fn two_positions_mix_by_softmax() {
        let heads = Heads { query: 1, kv: 1, dim: 1 };
        // Scores 0 and ln 3: weights 1/4 and 3/4.
        let out = attention(&[1.0], plain(&[0.0, 3.0f32.ln()], &[0.0, 4.0]), heads);
        assert!((out[0] - 3.0).abs() < 1e-6);
    }
}
