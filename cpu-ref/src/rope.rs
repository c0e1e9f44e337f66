//! `rope`: rotary position embedding, half-split ("NeoX") form.

/// `inv_freq[i] = theta^(−2i/D)` for `i < D/2`, in f32 as the published code computes it.
///
/// Source: Su et al. 2021, arXiv:2104.09864; transformers `modeling_rope_utils.py`.
pub fn inv_frequencies(theta: f32, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1.0 / theta.powf((2 * i) as f32 / head_dim as f32)).collect()
}

/// `(cos, sin)` of `position · inv_freq[i]`, each `[D/2]`.
///
/// The angle is rounded to f32 first, then its cosine and sine are taken in f64.
pub fn angles(position: usize, inv_freq: &[f32]) -> (Vec<f32>, Vec<f32>) {
    inv_freq
        .iter()
        .map(|&frequency| {
            let angle = f64::from(position as f32 * frequency);
            (angle.cos() as f32, angle.sin() as f32)
        })
        .unzip()
}

/// Rotates one head in place: for `i < D/2`,
/// `(x[i], x[i+D/2]) → (x[i]·cos − x[i+D/2]·sin, x[i+D/2]·cos + x[i]·sin)`.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    assert!(head.len() == 2 * half && cos.len() == half && sin.len() == half);
    for i in 0..half {
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_example() {
        let (cos, sin) = angles(1, &inv_frequencies(10_000.0, 4));
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut head, &cos, &sin);
        for (found, expected) in head.iter().zip([-1.98411, 1.95990, 2.46238, 4.01980]) {
            assert!((found - expected).abs() < 1e-5, "{head:?}");
        }
    }

    #[test]
    fn position_zero_is_the_identity() {
        let (cos, sin) = angles(0, &inv_frequencies(500_000.0, 8));
        let mut head = [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0];
        rotate(&mut head, &cos, &sin);
        assert_eq!(head, [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]);
    }
}
