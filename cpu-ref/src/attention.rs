//! `attention`: causal grouped-query attention of one token over the KV cache.

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

/// `softmax(q·Kᵀ/√D)·V` for every query head of one token.
///
/// Shapes: `q[H,D]` after RoPE, `keys[S,G,D]` and `values[S,G,D]` of all positions the token may
/// see (itself included, S ≥ 1), result `[H,D]`. Sums in f64. Source: Vaswani et al. 2017; GQA:
/// Ainslie et al. 2023, arXiv:2305.13245.
pub fn attention(q: &[f32], keys: &[f32], values: &[f32], heads: Heads) -> Vec<f32> {
    let Heads { query, kv, dim } = heads;
    assert_eq!(q.len(), query * dim);
    assert!(kv > 0 && query.is_multiple_of(kv));
    assert!(keys.len() == values.len() && keys.len().is_multiple_of(kv * dim));
    let positions = keys.len() / (kv * dim);
    assert!(positions > 0);
    let inv_sqrt_dim = 1.0 / (dim as f64).sqrt();
    let mut out = Vec::with_capacity(query * dim);
    for head in 0..query {
        let group = head / (query / kv);
        let q_head = &q[head * dim..][..dim];
        let at = |position: usize| (position * kv + group) * dim;
        let scores: Vec<f64> = (0..positions)
            .map(|position| {
                let key = &keys[at(position)..][..dim];
                let dot: f64 =
                    q_head.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                dot * inv_sqrt_dim
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|&score| (score - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..dim {
            let sum: f64 = weights
                .iter()
                .enumerate()
                .map(|(position, &weight)| weight * f64::from(values[at(position) + d]))
                .sum();
            out.push((sum / total) as f32);
        }
    }
    out
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
    fn two_positions_mix_by_softmax() {
        let heads = Heads { query: 1, kv: 1, dim: 1 };
        // Scores 0 and ln 3: weights 1/4 and 3/4.
        let out = attention(&[1.0], &[0.0, 3.0f32.ln()], &[0.0, 4.0], heads);
        assert!((out[0] - 3.0).abs() < 1e-6);
    }
}
