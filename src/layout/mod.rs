//! Ternary matrix ↔ packed words.
//!
//! Both layouts share the tiling that `cpu_ref::layout` defines (32 rows × 64 columns, 16 bytes a
//! row and chunk); they differ in how the 16 bytes of a piece hold 64 weights. Packing goes row by
//! row, so that a matrix never has to stand unpacked in memory.

pub mod i2;
pub mod planes;

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS, k_chunks, len_words, piece_index};
use rayon::prelude::*;

use crate::shape::MatShape;

/// Which packed layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// 2-bit codes, four fields a byte: see `cpu_ref::layout::i2`.
    I2,
    /// Non-zero plane and sign plane: see `cpu_ref::layout::planes`.
    Planes,
}

impl Layout {
    /// Packs 64 trits into one piece.
    fn pack_piece(self, trits: &[i8; CHUNK_K]) -> [u32; PIECE_WORDS] {
        match self {
            Self::I2 => i2::pack_piece(trits),
            Self::Planes => planes::pack_piece(trits),
        }
    }

    /// Unpacks one piece into 64 trits.
    fn unpack_piece(self, piece: [u32; PIECE_WORDS]) -> [i8; CHUNK_K] {
        match self {
            Self::I2 => i2::unpack_piece(piece),
            Self::Planes => planes::unpack_piece(piece),
        }
    }
}

/// A packed ternary matrix: N padded to whole tiles of 32 rows, K to whole chunks of 64 columns,
/// both with weight 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    layout: Layout,
    shape: MatShape,
    words: Vec<u32>,
}

impl Packed {
    /// Packs `shape.n()` rows that `row(n, trits)` writes, in parallel tiles.
    ///
    /// `row` fills all `shape.k()` trits of row `n`, each in {−1, 0, +1}; its first error ends the
    /// packing.
    ///
    /// # Errors
    /// Whatever `row` returns.
    pub fn try_pack<E: Send>(
        layout: Layout,
        shape: MatShape,
        row: impl Fn(usize, &mut [i8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let chunks = k_chunks(shape.k());
        let mut words = vec![0u32; len_words(shape.n(), shape.k())];
        let tile_words = chunks * TILE_ROWS * PIECE_WORDS;
        words.par_chunks_exact_mut(tile_words).enumerate().try_for_each(|(tile, out)| {
            // Columns past K stay zero for every row.
            let mut trits = vec![0i8; chunks * CHUNK_K];
            for in_tile in 0..TILE_ROWS {
                let n = tile * TILE_ROWS + in_tile;
                if n < shape.n() {
                    row(n, &mut trits[..shape.k()])?;
                } else {
                    trits.fill(0);
                }
                for (chunk, group) in trits.as_chunks::<CHUNK_K>().0.iter().enumerate() {
                    let at = piece_index(chunks, in_tile, chunk);
                    out[at..at + PIECE_WORDS].copy_from_slice(&layout.pack_piece(group));
                }
            }
            Ok(())
        })?;
        Ok(Self { layout, shape, words })
    }

    /// Packs plain trits `[N, K]`.
    ///
    /// # Panics
    /// If the length does not match the shape.
    pub fn pack(layout: Layout, shape: MatShape, trits: &[i8]) -> Self {
        assert_eq!(trits.len(), shape.len());
        let packed: Result<Self, std::convert::Infallible> =
            Self::try_pack(layout, shape, |n, out| {
                out.copy_from_slice(&trits[n * shape.k()..][..shape.k()]);
                Ok(())
            });
        match packed {
            Ok(packed) => packed,
            Err(never) => match never {},
        }
    }

    /// The plain trits `[N, K]`.
    pub fn unpack(&self) -> Vec<i8> {
        let k = self.shape.k();
        let mut trits = vec![0; self.shape.len()];
        for (n, row) in trits.chunks_exact_mut(k).enumerate() {
            self.unpack_row(n, row);
        }
        trits
    }

    /// Writes row `n`'s trits into `out[K]`.
    ///
    /// # Panics
    /// If `n` is not below N or `out` is not K long.
    pub fn unpack_row(&self, n: usize, out: &mut [i8]) {
        assert!(n < self.shape.n() && out.len() == self.shape.k());
        let chunks = k_chunks(self.shape.k());
        for (chunk, group) in out.chunks_mut(CHUNK_K).enumerate() {
            let at = piece_index(chunks, n, chunk);
            let piece = self.words[at..].first_chunk().expect("a piece is four words");
            group.copy_from_slice(&self.layout.unpack_piece(*piece)[..group.len()]);
        }
    }

    /// The same matrix in another layout.
    pub fn repack(&self, layout: Layout) -> Self {
        let repacked: Result<Self, std::convert::Infallible> =
            Self::try_pack(layout, self.shape, |n, out| {
                self.unpack_row(n, out);
                Ok(())
            });
        match repacked {
            Ok(repacked) => repacked,
            Err(never) => match never {},
        }
    }

    /// Which layout.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// `[N, K]` without the padding.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// `words[ceil(N/32)][ceil(K/64)][32][4]`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trits(len: usize, seed: u64) -> Vec<i8> {
        let mut state = seed;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_041);
                ((state >> 33) % 3) as i8 - 1
            })
            .collect()
    }

    fn get(packed: &Packed, n: usize, k: usize) -> Option<i8> {
        let chunks = k_chunks(packed.shape().k());
        match packed.layout() {
            Layout::I2 => cpu_ref::layout::i2::get(packed.words(), chunks, n, k),
            Layout::Planes => cpu_ref::layout::planes::get(packed.words(), chunks, n, k),
        }
    }

    #[test]
    fn packing_is_exact_for_every_shape() {
        for (n, k) in [(1, 1), (1, 64), (31, 63), (32, 64), (33, 65), (7, 130), (100, 100), (64, 5)]
        {
            let shape = MatShape::new(n, k).unwrap();
            let plain = trits(n * k, (n * 1000 + k) as u64);
            for layout in [Layout::I2, Layout::Planes] {
                let packed = Packed::pack(layout, shape, &plain);
                assert_eq!(packed.words().len(), len_words(n, k));
                assert_eq!(packed.unpack(), plain, "{layout:?} {shape}");
                // Every place of the padded matrix, against the definition.
                for row in 0..n.div_ceil(32) * 32 {
                    for column in 0..k.div_ceil(64) * 64 {
                        let inside = row < n && column < k;
                        let expected = if inside { plain[row * k + column] } else { 0 };
                        assert_eq!(get(&packed, row, column), Some(expected), "{layout:?} {shape}");
                    }
                }
                for other in [Layout::I2, Layout::Planes] {
                    assert_eq!(packed.repack(other), Packed::pack(other, shape, &plain));
                }
            }
        }
    }

    #[test]
    fn extremes() {
        for value in [-1, 0, 1] {
            let shape = MatShape::new(33, 66).unwrap();
            let plain = vec![value; shape.len()];
            for layout in [Layout::I2, Layout::Planes] {
                assert_eq!(Packed::pack(layout, shape, &plain).unpack(), plain);
            }
        }
    }

    #[test]
    fn a_row_error_ends_the_packing() {
        let shape = MatShape::new(40, 8).unwrap();
        let result =
            Packed::try_pack(
                Layout::I2,
                shape,
                |n, _| if n == 35 { Err("row 35") } else { Ok(()) },
            );
        assert_eq!(result.unwrap_err(), "row 35");
    }
}
