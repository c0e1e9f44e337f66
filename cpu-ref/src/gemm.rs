//! `gemm`: ternary matrix × int8 matrix (prefill).

use crate::gemv::gemv;

/// `y[m,n] = Σ_k w[n,k]·x[m,k]`: [`gemv`] for each of the M tokens.
///
/// Shapes: `w[N,K]` in {−1, 0, +1}, `x[M,K]`, result `[M,N]`.
pub fn gemm(w: &[i8], x: &[i8], k: usize) -> Vec<i32> {
    assert!(k > 0 && x.len().is_multiple_of(k), "x holds {} values, not tokens of {k}", x.len());
    x.chunks_exact(k).flat_map(|token| gemv(w, token)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_independent() {
        let w = [1, -1, 0, 1];
        assert_eq!(gemm(&w, &[3, 5, -7, 11], 2), [-2, 5, -18, 11]);
    }
}
