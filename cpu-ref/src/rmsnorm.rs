//! `rmsnorm`: root-mean-square normalisation of one token.

/// `y[i] = w[i] · (x[i] · r)`, `r = 1/√(mean(x²) + eps)`; no mean subtraction, no bias.
///
/// The mean is accumulated in f64 and `r` narrowed to f32. Source: Zhang & Sennrich 2019,
/// arXiv:1910.07467; order of operations as in transformers `modeling_bitnet.py`.
pub fn rmsnorm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    assert_eq!(x.len(), weight.len());
    let sum: f64 = x.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    let mean = sum / x.len() as f64;
    let r = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
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
