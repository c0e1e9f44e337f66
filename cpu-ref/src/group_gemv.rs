//! `group_gemv`: a matrix of {−1, 0, +1} with one scale for each group of inputs × a vector.
//!
//! The weights of Bonsai (binary and ternary, 128 inputs a scale), of TQ1_0 and TQ2_0 (256) and of
//! MLX packs. A group is `K / scales.len()` consecutive inputs of one row.

use crate::gemv::ternary_dot;
use crate::quantize_absmax::quantize_absmax;
use crate::reduce::{GROUP_LANES, lane_sum};

/// One row with float activations, as these models define it:
/// `y = Σ_g d[g] · Σ_{k∈g} w[k]·x[k]`, in f64, narrowed once.
///
/// Nothing is rounded to integers after it, so that a backend may sum in any order; it stays within
/// [`bound`].
pub fn group_dot(row: &[i8], scales: &[f32], x: &[f32]) -> f32 {
    let group = group_len(row, scales);
    assert_eq!(row.len(), x.len());
    let groups = row.chunks_exact(group).zip(x.chunks_exact(group)).zip(scales);
    let sums = groups.map(|((row, x), &scale)| {
        let mut sum = 0.0;
        for (&weight, &activation) in row.iter().zip(x) {
            match weight {
                1 => sum += f64::from(activation),
                -1 => sum -= f64::from(activation),
                0 => {}
                other => panic!("{other} is not a ternary weight"),
            }
        }
        f64::from(scale) * sum
    });
    sums.sum::<f64>() as f32
}

/// How far a float sum of the same row may be from [`group_dot`]: `K·2⁻²⁴·Σ|d·w·x|`, the bound of
/// any order of K additions that are rounded to f32.
pub fn bound(row: &[i8], scales: &[f32], x: &[f32]) -> f32 {
    let group = group_len(row, scales);
    let terms = row.iter().zip(x).enumerate();
    let magnitude: f64 = terms
        .map(|(k, (&w, &x))| f64::from(scales[k / group].abs() * f32::from(w.abs()) * x.abs()))
        .sum();
    (row.len() as f64 * magnitude / f64::from(1 << 24)) as f32
}

/// One row with int8 activations, each group with its own `act_scale`:
/// `y = Σ_g f32(acc[g]) · (d[g] · act_scale[g])`, `acc[g] = Σ_{k∈g} w[k]·q[k]` exact in i32; the
/// groups are summed over 8 lanes ([`crate::reduce`]).
pub fn group_dot_int8(row: &[i8], scales: &[f32], codes: &[i8], act_scales: &[f32]) -> f32 {
    let group = group_len(row, scales);
    assert!(row.len() == codes.len() && scales.len() == act_scales.len());
    let groups = row.chunks_exact(group).zip(codes.chunks_exact(group));
    let scaled = groups.zip(scales.iter().zip(act_scales));
    lane_sum::<GROUP_LANES>(
        scaled.map(|((row, codes), (d, act))| ternary_dot(row, codes) as f32 * (d * act)),
    )
}

/// `quantize_absmax` of each group of `group` inputs: codes `[K]`, `act_scale[K/group]`.
pub fn quantize_absmax_groups(x: &[f32], group: usize) -> (Vec<i8>, Vec<f32>) {
    assert!(group > 0 && x.len().is_multiple_of(group));
    let groups: Vec<_> = x.chunks_exact(group).map(quantize_absmax).collect();
    let codes = groups.iter().flat_map(|group| group.codes.iter().copied()).collect();
    (codes, groups.iter().map(|group| group.act_scale).collect())
}

fn group_len(row: &[i8], scales: &[f32]) -> usize {
    assert!(!scales.is_empty() && row.len().is_multiple_of(scales.len()), "rows of whole groups");
    row.len() / scales.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_example() {
        // Two groups of two: 0.5·(1 − 2) + 2·(0 + 4).
        assert_eq!(group_dot(&[1, -1, 0, 1], &[0.5, 2.0], &[1.0, 2.0, 3.0, 4.0]), 7.5);
        let (codes, scales) = quantize_absmax_groups(&[1.0, 2.0, 3.0, 4.0], 2);
        assert_eq!(codes, [64, 127, 95, 127]);
        assert_eq!(scales, [2.0 / 127.0, 4.0 / 127.0]);
        let y = group_dot_int8(&[1, -1, 0, 1], &[0.5, 2.0], &codes, &scales);
        assert!((y - 7.5).abs() < 0.01, "{y}");
    }

    #[test]
    fn binary_rows_are_ternary_rows_without_zeros() {
        let row: Vec<i8> = (0..256).map(|k| if k % 3 == 0 { 1 } else { -1 }).collect();
        let x: Vec<f32> = (0..256).map(|k| (k as f32 - 100.0) / 7.0).collect();
        let expected: f32 = row.iter().zip(&x).map(|(&w, &x)| 0.25 * f32::from(w) * x).sum();
        let found = group_dot(&row, &[0.25; 2], &x);
        assert!((found - expected).abs() <= bound(&row, &[0.25; 2], &x));
    }
}
