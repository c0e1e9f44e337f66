//! `residual_add`: the residual stream.

/// `out[i] = hidden[i] + y[i]`.
pub fn residual_add(hidden: &[f32], y: &[f32]) -> Vec<f32> {
    assert_eq!(hidden.len(), y.len());
    hidden.iter().zip(y).map(|(&a, &b)| a + b).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn adds_element_by_element() {
        assert_eq!(super::residual_add(&[1.0, 2.0], &[0.5, -2.0]), [1.5, 0.0]);
    }
}
