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

/// `softmax(q·Kᵀ/√D)·V` for every query head of one token, by online softmax.
///
/// Shapes: `q[H,D]` after RoPE, `keys[S,G,D]` and `values[S,G,D]` of all positions the token may
/// see (itself included, S ≥ 1), result `[H,D]`. Keys are taken 128 at a time: scores by 16-lane dot
/// products, their maximum, [`exp`] of the differences, a 128-lane sum of those weights; what was
/// summed before is scaled down to the new maximum, and the weighted values are added in order.
///
/// Source: Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv:2305.13245; online softmax:
/// Milakov & Gimelshein 2018, arXiv:1805.02867.
pub fn attention(q: &[f32], keys: &[f32], values: &[f32], heads: Heads) -> Vec<f32> {
    let Heads { query, kv, dim } = heads;
    assert_eq!(q.len(), query * dim);
    assert!(kv > 0 && query.is_multiple_of(kv));
    assert!(keys.len() == values.len() && keys.len().is_multiple_of(kv * dim));
    let positions = keys.len() / (kv * dim);
    assert!(positions > 0);
    let mut out = Vec::with_capacity(query * dim);
    for (head, q_head) in q.chunks_exact(dim).enumerate() {
        let group = head / (query / kv);
        let at = |position: usize| (position * kv + group) * dim;
        let score = |position: usize| {
            let key = &keys[at(position)..][..dim];
            let products = q_head.iter().zip(key).map(|(&a, &b)| a * b);
            lane_sum::<DOT_LANES>(products) * inv_sqrt_dim(dim)
        };
        let mut running_max = f32::MIN;
        let mut total = 0.0f32;
        let mut sums = vec![0.0f32; dim];
        for block in (0..positions).step_by(KEY_LANES) {
            let end = (block + KEY_LANES).min(positions);
            let scores: Vec<f32> = (block..end).map(score).collect();
            let new_max = scores.iter().fold(running_max, |max, &score| maximum(max, score));
            let weights: Vec<f32> = scores.iter().map(|&score| exp(score - new_max)).collect();
            let decay = exp(running_max - new_max);
            total = total * decay + lane_sum::<KEY_LANES>(weights.iter().copied());
            for (d, sum) in sums.iter_mut().enumerate() {
                *sum *= decay;
                for (position, &weight) in (block..end).zip(&weights) {
                    *sum += weight * values[at(position) + d];
                }
            }
            running_max = new_max;
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

    #[test]
    fn one_position_returns_its_value() {
        let heads = Heads { query: 4, kv: 2, dim: 2 };
        let out = attention(&[9.0; 8], &[1.0; 4], &[1.0, 2.0, 3.0, 4.0], heads);
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
        for (d, found) in attention(&q, &keys, &values, heads).into_iter().enumerate() {
            let terms = scores.clone().enumerate().map(|(s, w)| w * f64::from(values[3 * s + d]));
            let expected = terms.sum::<f64>() / total;
            assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn two_positions_mix_by_softmax() {
        let heads = Heads { query: 1, kv: 1, dim: 1 };
        // Scores 0 and ln 3: weights 1/4 and 3/4.
        let out = attention(&[1.0], &[0.0, 3.0f32.ln()], &[0.0, 4.0], heads);
        assert!((out[0] - 3.0).abs() < 1e-6);
    }
}
