//! `gemv`: ternary matrix × int8 vector (decode).

/// `y[n] = Σ_k w[n,k]·x[k]`, by adding, subtracting or skipping: exact in i32 for K ≤ 16,777,215.
///
/// Shapes: `w[N,K]` in {−1, 0, +1}, `x[K]`.
pub fn gemv(w: &[i8], x: &[i8]) -> Vec<i32> {
    let k = x.len();
    assert!(k > 0 && w.len().is_multiple_of(k), "w holds {} values, not rows of {k}", w.len());
    w.chunks_exact(k).map(|row| ternary_dot(row, x)).collect()
}

/// One row: `Σ_k w[k]·x[k]`.
pub fn ternary_dot(row: &[i8], x: &[i8]) -> i32 {
    assert_eq!(row.len(), x.len());
    let mut sum = 0i32;
    for (&weight, &activation) in row.iter().zip(x) {
        match weight {
            1 => sum += i32::from(activation),
            -1 => sum -= i32::from(activation),
            0 => {}
            other => panic!("{other} is not a ternary weight"),
        }
    }
    sum
}

/// The BitLinear result: `y[n] = f32(acc[n]) · (weight_scale[n] · act_scale)`.
///
/// `weight_scale[N]` holds the scale of the matrix each row came from.
pub fn dequantize(acc: &[i32], weight_scale: &[f32], act_scale: f32) -> Vec<f32> {
    assert_eq!(acc.len(), weight_scale.len());
    acc.iter().zip(weight_scale).map(|(&sum, &scale)| sum as f32 * (scale * act_scale)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_example() {
        let w = [1, 0, -1, 1, -1, -1, 0, 0, 0, 1, 1, -1];
        let acc = gemv(&w, &[32, -64, 16, 127]);
        assert_eq!(acc, [143, 32, -175]);
        let y = dequantize(&acc, &[1.25; 3], 2.0 / 127.0);
        for (found, expected) in y.iter().zip([2.814_961, 0.629_921, -3.444_882]) {
            assert!((found - expected).abs() < 1e-5);
        }
    }

    #[test]
    fn the_longest_row_in_scope_does_not_overflow() {
        let k = 23_040;
        assert_eq!(gemv(&vec![-1; k], &vec![-128; k]), [128 * k as i32]);
    }

    #[test]
    #[should_panic(expected = "not a ternary weight")]
    fn a_fourth_value_is_refused() {
        gemv(&[2], &[1]);
    }
}
