//! Matrix × vector of which few outputs are wanted: a row that nobody asks for is not read.
//!
//! With relu² a row of `up_proj` whose gate is not positive is multiplied by 0. The matrix is packed a
//! second time, by rows (`cpu_ref::layout::rows`), and the integers of the rows that are asked for are
//! those of the whole product. The gates of the others are closed: `0·up` is 0, and only its sign could
//! depend on `up`, which no code of it keeps ([`is_finite`] rules out the products that are no numbers).

use std::ops::Range;

use cpu_ref::layout::CHUNK_K;
use cpu_ref::layout::rows::{LINE_K, LINE_WORDS};
use rayon::prelude::*;

use super::Level;
use crate::layout::{Line, Packed};

/// Percents of open gates up to which a level is faster by rows (`cargo bench --bench gemv`,
/// `gemv_rows`); `None`: never, or not measured.
pub(super) fn most_open(level: Level) -> Option<usize> {
    match level {
        Level::Avx512Vbmi | Level::Avx512Vnni | Level::AvxVnni | Level::Avx2 => Some(55),
        Level::NeonI8mm | Level::NeonDotprod | Level::Neon => None,
        Level::RelaxedSimd | Level::Simd128 | Level::Scalar => None,
    }
}

/// The 256 activations that a line meets, by field.
pub(super) type LineCodes = [[i8; CHUNK_K]; LINE_CHUNKS];

/// Chunks of 64 columns of a line, a field each.
pub(super) const LINE_CHUNKS: usize = LINE_K / CHUNK_K;

/// A matrix `[N, K]` by rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    k: usize,
    /// `[N][K/256]`.
    lines: Vec<Line>,
}

impl Rows {
    /// Packs some rows of a matrix again.
    ///
    /// # Panics
    /// If it has fewer.
    pub fn pack(matrix: &Packed, rows: Range<usize>) -> Self {
        let k = matrix.shape().k();
        let row_lines = k.div_ceil(LINE_K);
        let mut lines = vec![Line::EMPTY; rows.len() * row_lines];
        lines.par_chunks_exact_mut(row_lines).zip(rows).for_each(|(lines, row)| {
            matrix.for_each_chunk(row, |first, trits| {
                let (line, field) = (&mut lines[first / LINE_K], first % LINE_K / CHUNK_K);
                for (byte, trit) in trits.iter().enumerate() {
                    let shift = 8 * (byte % 4) + 2 * field;
                    // From the code 1 of a weight 0.
                    line.0[byte / 4] ^= u32::from((trit + 1) as u8 ^ 1) << shift;
                }
            });
        });
        Self { k, lines }
    }

    /// K.
    pub fn k(&self) -> usize {
        self.k
    }

    /// N.
    pub fn n(&self) -> usize {
        self.lines.len() / self.row_lines()
    }

    /// `[N][K/256][16]`.
    pub fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.lines)
    }

    /// What it takes.
    pub fn len_bytes(&self) -> usize {
        size_of_val(&self.lines[..])
    }

    /// What a row takes.
    pub fn row_bytes(&self) -> usize {
        self.row_lines() * size_of::<Line>()
    }

    /// Chunks of 64 activations that a product takes: whole lines.
    pub fn chunks(&self) -> usize {
        self.row_lines() * LINE_CHUNKS
    }

    /// Lines of a row.
    fn row_lines(&self) -> usize {
        self.k.div_ceil(LINE_K)
    }

    /// The lines of row `n`.
    ///
    /// # Panics
    /// If there is none.
    #[inline(always)]
    pub(super) fn row(&self, n: u32) -> &[Line] {
        &self.lines[n as usize * self.row_lines()..][..self.row_lines()]
    }
}

/// The gates of one token that are open: those that are positive, or NaN.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Open {
    rows: Vec<u32>,
    len: usize,
}

impl Open {
    /// Room for `n` gates.
    pub fn new(n: usize) -> Self {
        Self { rows: vec![0; n], len: 0 }
    }

    /// Those of `gates[N]`.
    ///
    /// # Panics
    /// If there was made room for another number of gates.
    pub fn collect(&mut self, gates: &[f32]) {
        assert_eq!(gates.len(), self.rows.len(), "as many gates as there is room for");
        let mut len = 0;
        for (n, &gate) in (0..).zip(gates) {
            // Without a branch: the next one overwrites a closed one. `len` is at most `n`.
            self.rows[len] = n;
            let is_closed = gate <= 0.0;
            len += usize::from(!is_closed);
        }
        self.len = len;
    }

    /// Their rows, in order.
    pub fn rows(&self) -> &[u32] {
        &self.rows[..self.len]
    }

    /// Whether there are at most so many percents.
    pub(super) fn at_most(&self, percents: usize) -> bool {
        self.len * 100 <= self.rows.len() * percents
    }
}

/// Whether every output of a product is finite, whatever the weights: K activations of `act_scale`, and no
/// row's scale beyond `weight_scale`. Then a closed gate times an output is 0.
pub(super) fn is_finite(k: usize, act_scale: f32, weight_scale: f32) -> bool {
    // As a kernel scales: the largest sum of codes of at most 128, times both scales.
    let largest = 128.0 * k as f64 * f64::from(weight_scale * act_scale).abs();
    largest < f64::from(f32::MAX) / 2.0
}

/// The scale of the largest magnitude; NaN if one is.
pub(super) fn largest(scales: &[f32]) -> f32 {
    f32::from_bits(scales.iter().fold(0, |max, scale| max.max(scale.abs().to_bits())))
}

/// `Σ (w + 1)·x` of each row in `open`, by plain loops.
#[inline(always)]
pub(super) fn open_sums(rows: &Rows, x: &[LineCodes], open: &[u32], sums: &mut [i32]) {
    const BYTES: usize = 4 * LINE_WORDS;
    for (sum, &row) in sums.iter_mut().zip(open) {
        let mut wide = [0i32; BYTES];
        for (line, x) in rows.row(row).iter().zip(x) {
            let bytes: &[u8; BYTES] = bytemuck::cast_ref(line);
            for (b, wide) in wide.iter_mut().enumerate() {
                // At most 4·2·128.
                let mut short = 0i16;
                for (field, x) in x.iter().enumerate() {
                    short += i16::from(bytes[b] >> (2 * field) & 3) * i16::from(x[b]);
                }
                *wide += i32::from(short);
            }
        }
        *sum = wide.iter().sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::random::Random;
    use crate::shape::MatShape;

    #[test]
    fn packing_is_that_of_the_definition() {
        for (n, k) in [(1, 1), (3, 64), (5, 255), (33, 256), (40, 700)] {
            let trits = Random::new(n as u64).trits(n * k);
            let packed = Packed::pack(Layout::I2, MatShape::new(n, k).unwrap(), &trits);
            let first = n / 2;
            let rows = Rows::pack(&packed, first..n);
            assert_eq!((rows.n(), rows.k()), (n - first, k));
            assert_eq!(rows.words().len(), cpu_ref::layout::rows::len_words(n - first, k));
            for row in first..n {
                for column in 0..k.next_multiple_of(LINE_K) {
                    let expected = if column < k { trits[row * k + column] } else { 0 };
                    let found = cpu_ref::layout::rows::get(rows.words(), k, row - first, column);
                    assert_eq!(found, Some(expected), "{row} {column}");
                }
            }
        }
    }

    #[test]
    fn closed_gates_are_left_out() {
        let mut open = Open::new(7);
        open.collect(&[0.0, 3.0, -0.0, f32::NAN, -1.0, f32::INFINITY, 1e-40]);
        assert_eq!(open.rows(), [1, 3, 5, 6]);
        assert!(open.at_most(58) && !open.at_most(57));
        open.collect(&[1.0; 7]);
        assert_eq!(open.rows().len(), 7);
        open.collect(&[-1.0; 7]);
        assert!(open.rows().is_empty());
    }

    #[test]
    fn outputs_that_may_be_no_numbers_are_told() {
        assert!(is_finite(2560, 1e-3, 1.0) && is_finite(1, 1e35, -1.0));
        assert!(!is_finite(2560, 1e35, 1.0) && !is_finite(1, 1e30, -1e30));
        for scale in [f32::NAN, f32::INFINITY] {
            assert!(!is_finite(1, scale, 1.0) && !is_finite(1, 1.0, scale));
        }
        assert_eq!(largest(&[1.0, -3.0, 2.0]), 3.0);
        assert!(largest(&[1.0, -f32::NAN, f32::INFINITY]).is_nan());
    }
}
