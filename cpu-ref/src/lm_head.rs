//! `lm_head`: final hidden state → logits.

/// One logit: `Σ_k row[k]·x[k]` in f64, narrowed once.
pub fn logit(row: &[f32], x: &[f32]) -> f32 {
    assert_eq!(row.len(), x.len());
    row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}

/// `logits[v] = Σ_k table[v,k]·x[k]` for the table `[V,K]` and the normalised hidden state `x[K]`.
pub fn lm_head(table: &[f32], x: &[f32]) -> Vec<f32> {
    table.chunks_exact(x.len()).map(|row| logit(row, x)).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_dot_product_a_row() {
        assert_eq!(super::lm_head(&[1.0, 2.0, 3.0, 4.0], &[1.0, -1.0]), [-1.0, -1.0]);
    }
}
