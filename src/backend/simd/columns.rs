//! Matrix × vector for vectors that are mostly 0: a column whose input is 0 is not read.
//!
//! With relu² most inputs of `down_proj` are 0 exactly ([`crate::sparsity`]). The matrix is packed a
//! second time, by columns (`cpu_ref::layout::columns`), and the integers are those of the product
//! with all columns: what is left out is 0.

use cpu_ref::layout::columns::{LINE_WORDS, STRIPE_ROWS, place};
use rayon::prelude::*;

use super::Level;
use crate::layout::{Line, Packed};

/// Percents of non-zero inputs up to which a level is faster by columns (`cargo bench --bench gemv`,
/// `gemv_columns`); `None`: never, or not measured.
pub(super) fn most_nonzeros(level: Level) -> Option<usize> {
    match level {
        Level::Avx512Vbmi | Level::Avx512Vnni => Some(40),
        Level::AvxVnni | Level::Avx2 => Some(30),
        Level::NeonI8mm | Level::NeonDotprod | Level::Neon => None,
        Level::RelaxedSimd | Level::Simd128 | Level::Scalar => None,
    }
}

impl Line {
    /// 256 weights, a stripe's share of a column or a part of a row; all 0.
    pub(super) const EMPTY: Self = Self([0x5555_5555; LINE_WORDS]);
}

/// Inputs a step of the kernels takes.
pub(super) const STEP: usize = 4;

/// A matrix `[N, K]` by columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    k: usize,
    /// `[stripes][K]`.
    lines: Vec<Line>,
}

impl Columns {
    /// Packs a matrix again.
    pub fn pack(matrix: &Packed) -> Self {
        let (n, k) = (matrix.shape().n(), matrix.shape().k());
        let mut lines = vec![Line::EMPTY; n.div_ceil(STRIPE_ROWS) * k];
        lines.par_chunks_exact_mut(k).enumerate().for_each(|(stripe, lines)| {
            let first = stripe * STRIPE_ROWS;
            for row in 0..STRIPE_ROWS.min(n - first) {
                let (byte, field) = place(row);
                let shift = 8 * (byte % 4) + 2 * field;
                matrix.for_each_chunk(first + row, |first, trits| {
                    for (line, trit) in lines[first..].iter_mut().zip(trits) {
                        // From the code 1 of a weight 0.
                        line.0[byte / 4] ^= u32::from((trit + 1) as u8 ^ 1) << shift;
                    }
                });
            }
        });
        Self { k, lines }
    }

    /// Columns.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Rows, a whole number of stripes.
    pub fn rows(&self) -> usize {
        self.lines.len() / self.k * STRIPE_ROWS
    }

    /// `[stripes][K][16]`.
    pub fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.lines)
    }

    /// What it takes.
    pub fn len_bytes(&self) -> usize {
        size_of_val(&self.lines[..])
    }

    /// What a column takes.
    pub(super) fn column_bytes(&self) -> usize {
        self.rows() / STRIPE_ROWS * size_of::<Line>()
    }

    /// Stripes `first..first + n`.
    pub(super) fn stripes(&self, first: usize, n: usize) -> &[Line] {
        &self.lines[first * self.k..][..n * self.k]
    }

    /// All of it.
    pub fn whole(&self) -> &[Line] {
        &self.lines
    }
}

/// The inputs of one token that are not 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NonZeros {
    /// Their columns and codes, padded to whole steps with codes of 0.
    columns: Vec<[u32; STEP]>,
    codes: Vec<[i8; STEP]>,
    /// How many.
    len: usize,
    /// All inputs.
    k: usize,
}

impl NonZeros {
    /// Room for `k` inputs.
    pub fn new(k: usize) -> Self {
        let steps = k.div_ceil(STEP);
        Self { columns: vec![[0; STEP]; steps], codes: vec![[0; STEP]; steps], len: 0, k }
    }

    /// Those of `codes[K]`.
    ///
    /// # Panics
    /// If there was made room for another number of inputs.
    pub fn collect(&mut self, codes: &[i8]) {
        assert_eq!(codes.len(), self.k, "as many codes as there is room for");
        let (columns, kept) = (self.columns.as_flattened_mut(), self.codes.as_flattened_mut());
        let mut len = 0;
        for (k, &code) in (0..).zip(codes) {
            // Without a branch: the next one overwrites a 0. `len` is at most `k`.
            (columns[len], kept[len]) = (k, code);
            len += usize::from(code != 0);
        }
        for pad in len..len.next_multiple_of(STEP).min(kept.len()) {
            (columns[pad], kept[pad]) = (0, 0);
        }
        self.len = len;
    }

    /// How many are not 0.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether all are 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All inputs, 0 or not.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Whether there are at most so many percents.
    pub(super) fn at_most(&self, percents: usize) -> bool {
        self.len * 100 <= self.k * percents
    }

    /// Columns and codes, a step each.
    pub(super) fn steps(&self) -> (&[[u32; STEP]], &[[i8; STEP]]) {
        let steps = self.len.div_ceil(STEP);
        (&self.columns[..steps], &self.codes[..steps])
    }

    /// `Σ x`: what the codes `w + 1` add too much.
    pub(super) fn code_sum(&self) -> i32 {
        self.steps().1.as_flattened().iter().map(|&code| i32::from(code)).sum()
    }
}

/// Columns whose sums fit i16: each adds a code ≤ 2 times an activation.
const FLUSH_STEPS: usize = 31;
const _: () = assert!(FLUSH_STEPS * STEP * 2 * 128 <= 1 << 15);

/// One stripe, `Σ (w + 1)·x`, by plain loops: sums lie by field and byte until the end.
#[inline(always)]
pub(super) fn stripe_sums(
    lines: &[Line],
    columns: &[[u32; STEP]],
    codes: &[[i8; STEP]],
    sums: &mut [i32; STRIPE_ROWS],
) {
    const BYTES: usize = 4 * LINE_WORDS;
    let mut wide = [[0i32; BYTES]; 4];
    for (columns, codes) in columns.chunks(FLUSH_STEPS).zip(codes.chunks(FLUSH_STEPS)) {
        let mut short = [[0i16; BYTES]; 4];
        for (&column, &code) in columns.as_flattened().iter().zip(codes.as_flattened()) {
            let bytes: &[u8; BYTES] = bytemuck::cast_ref(&lines[column as usize]);
            for (field, short) in short.iter_mut().enumerate() {
                for (sum, byte) in short.iter_mut().zip(bytes) {
                    *sum += i16::from(byte >> (2 * field) & 3) * i16::from(code);
                }
            }
        }
        for (wide, short) in wide.as_flattened_mut().iter_mut().zip(short.as_flattened()) {
            *wide += i32::from(*short);
        }
    }
    for (row, sum) in sums.iter_mut().enumerate() {
        let (byte, field) = place(row);
        *sum = wide[field][byte];
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
        for (n, k) in [(1, 1), (255, 7), (256, 64), (300, 65), (513, 130)] {
            let trits = Random::new(n as u64).trits(n * k);
            let packed = Packed::pack(Layout::I2, MatShape::new(n, k).unwrap(), &trits);
            let columns = Columns::pack(&packed);
            assert_eq!(columns.words().len(), cpu_ref::layout::columns::len_words(n, k));
            for row in 0..n.next_multiple_of(STRIPE_ROWS) {
                for column in 0..k {
                    let expected = trits.get(row * k + column).filter(|_| row < n).copied();
                    let found = cpu_ref::layout::columns::get(columns.words(), k, row, column);
                    assert_eq!(found, Some(expected.unwrap_or(0)), "{row} {column}");
                }
            }
        }
    }

    #[test]
    fn zeros_are_left_out() {
        let mut inputs = NonZeros::new(7);
        inputs.collect(&[0, 3, 0, -1, 0, 0, 2]);
        assert_eq!(inputs.steps(), (&[[1, 3, 6, 0]][..], &[[3, -1, 2, 0]][..]));
        assert_eq!((inputs.len(), inputs.code_sum()), (3, 4));
        inputs.collect(&[1; 7]);
        assert_eq!((inputs.len(), inputs.code_sum()), (7, 7));
        inputs.collect(&[0; 7]);
        assert!(inputs.is_empty() && inputs.steps().0.is_empty());
    }
}
