//! `hadamard`: the blockwise rotation of weights that are stored in a rotated basis.
//!
//! Such a file holds `W' = W·diag(s)·H` for a normalised Sylvester–Hadamard matrix H and signs s, so
//! that `W·x = W'·(H·(s∘x))`, because H is its own inverse. Source: GGUF metadata
//! `prism.hadamard.*`; BitNet v2, arXiv:2504.18415.

/// What a rotated matrix wants as input: `x → H(s∘x)`, in blocks of `block` values.
///
/// `signs[K]` are ±1; `block` is a power of two that divides K. Additions go through the usual
/// butterflies, nearest neighbours first, and the factor `1/√block` comes last: the order is part of
/// the specification.
pub fn rotate(x: &[f32], signs: &[f32], block: usize) -> Vec<f32> {
    assert_eq!(x.len(), signs.len());
    let mut y: Vec<f32> = x.iter().zip(signs).map(|(x, sign)| x * sign).collect();
    transform(&mut y, block);
    y
}

/// A row of a rotated table back in its own basis: `z → s∘H(z)`.
pub fn rotate_back(z: &[f32], signs: &[f32], block: usize) -> Vec<f32> {
    assert_eq!(z.len(), signs.len());
    let mut y = z.to_vec();
    transform(&mut y, block);
    y.iter().zip(signs).map(|(y, sign)| y * sign).collect()
}

/// `H` on each block in place.
fn transform(x: &mut [f32], block: usize) {
    assert!(block.is_power_of_two() && x.len().is_multiple_of(block));
    let factor = inv_sqrt(block);
    for x in x.chunks_exact_mut(block) {
        let mut step = 1;
        while step < block {
            for i in (0..block).filter(|i| i & step == 0) {
                let (a, b) = (x[i], x[i + step]);
                (x[i], x[i + step]) = (a + b, a - b);
            }
            step *= 2;
        }
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// `1/√block` in f32.
pub fn inv_sqrt(block: usize) -> f32 {
    1.0 / (block as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_example() {
        let y = rotate(&[1.0, 2.0, 3.0, 4.0], &[1.0; 4], 4);
        assert_eq!(y, [5.0, -1.0, -2.0, 0.0]);
        assert_eq!(rotate_back(&y, &[1.0; 4], 4), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn signs_come_first_going_in_and_last_coming_back() {
        let signs = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0];
        let x = [1.0, 2.0, 3.0, 4.0, -5.0, 6.0, 7.0, 8.0];
        let y = rotate(&x, &signs, 4);
        assert_eq!(y[0], (1.0 - 2.0 - 3.0 + 4.0) / 2.0);
        assert_eq!(y[4], (-5.0 + 6.0 - 7.0 - 8.0) / 2.0);
        assert_eq!(rotate_back(&y, &signs, 4), x);
    }
}
