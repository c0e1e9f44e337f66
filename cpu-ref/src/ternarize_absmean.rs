//! `ternarize_absmean`: master weights → {−1, 0, +1} and one scale per matrix.

/// Smallest absmean: keeps an all-zero matrix from dividing by zero.
pub const ABSMEAN_FLOOR: f32 = 1e-5;

/// The scale of a whole matrix: `m = max(mean(|W|), 1e-5)`, summed in f64.
///
/// `t·m` is the effective weight. Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ",
/// figure 3.
pub fn absmean_scale(weights: impl IntoIterator<Item = f32>) -> f32 {
    let mut sum = 0.0f64;
    let mut count = 0u64;
    for weight in weights {
        sum += f64::from(weight.abs());
        count += 1;
    }
    if count == 0 {
        return ABSMEAN_FLOOR;
    }
    let mean = (sum / count as f64) as f32;
    // `max` would turn a NaN mean into the floor: let it through, so that the caller sees it.
    if mean < ABSMEAN_FLOOR { ABSMEAN_FLOOR } else { mean }
}

/// One weight: `clamp(round_half_even(w · (1/m)), −1, +1)`.
///
/// `inv_scale` is `1/m` computed in f32; the product (not `w/m`) is the published order, and the
/// two can differ on a value exactly at ±½.
pub fn ternarize(weight: f32, inv_scale: f32) -> i8 {
    (weight * inv_scale).round_ties_even().clamp(-1.0, 1.0) as i8
}

/// A whole matrix: its trits and its scale `m`.
pub fn ternarize_absmean(weights: &[f32]) -> (Vec<i8>, f32) {
    let scale = absmean_scale(weights.iter().copied());
    let inv_scale = 1.0 / scale;
    (weights.iter().map(|&weight| ternarize(weight, inv_scale)).collect(), scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_example() {
        let (trits, scale) = ternarize_absmean(&[0.9, -0.1, 0.4, -1.2, 0.05, 0.61]);
        assert_eq!(trits, [1, 0, 1, -1, 0, 1]);
        assert!((scale - 0.543_333_3).abs() < 1e-6);
    }

    #[test]
    fn a_tie_rounds_to_zero() {
        // Absmean 1: ±0.5 sits exactly on the threshold, half to even gives 0.
        let (trits, scale) = ternarize_absmean(&[0.5, -0.5, 1.5, -1.5]);
        assert_eq!(scale, 1.0);
        assert_eq!(trits, [0, 0, 1, -1]);
    }

    #[test]
    fn an_all_zero_matrix_keeps_the_floor() {
        assert_eq!(ternarize_absmean(&[0.0; 4]), (vec![0; 4], ABSMEAN_FLOOR));
    }

    #[test]
    fn a_nan_reaches_the_scale() {
        assert!(absmean_scale([1.0, f32::NAN]).is_nan());
    }
}
