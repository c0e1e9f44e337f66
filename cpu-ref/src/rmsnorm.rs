//! `rmsnorm`: root-mean-square normalisation of one token.

use crate::reduce::{NORM_LANES, lane_sum};

/// `y[i] = w[i] · (x[i] · r)`, `r = 1/√(mean(x²) + eps)`; no mean subtraction, no bias.
///
/// Squares are summed over 256 lanes ([`crate::reduce`]). Source: Zhang & Sennrich 2019,
/// arXiv:1910.07467; order of the products as in transformers `modeling_bitnet.py`.
pub fn rmsnorm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    assert_eq!(x.len(), weight.len());
    let sum = lane_sum::<NORM_LANES>(x.iter().map(|&value| value * value));
    let r = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    x.iter().zip(weight).map(|(&value, &w)| w * (value * r)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_root_mean_square() {
        let y = rmsnorm(&[3.0, 4.0], &[1.0, -2.0], 0.0);
        let rms = (12.5f32).sqrt();
        assert!((y[0] - 3.0 / rms).abs() < 1e-6);
        assert!((y[1] + 8.0 / rms).abs() < 1e-6);
    }

    #[test]
    fn eps_keeps_zero_finite() {
        assert_eq!(rmsnorm(&[0.0; 4], &[1.0; 4], 1e-5), [0.0; 4]);
    }
}
