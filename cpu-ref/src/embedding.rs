//! `embedding`: token id → hidden state.

/// Row `token` of the table `[V,K]`.
pub fn embedding(table: &[f32], k: usize, token: usize) -> Vec<f32> {
    table[token * k..][..k].to_vec()
}

#[cfg(test)]
mod tests {
    #[test]
    fn picks_a_row() {
        assert_eq!(super::embedding(&[1.0, 2.0, 3.0, 4.0], 2, 1), [3.0, 4.0]);
    }
}
