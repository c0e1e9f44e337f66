//! Ternary matrix ↔ packed words.
//!
//! All layouts share the tiling that `cpu_ref::layout` defines (32 rows × 64 columns, or 128 of
//! binary ones, 16 bytes a row and chunk); they differ in how the 16 bytes of a piece hold the
//! weights. Packing goes row by row, so that a matrix never has to stand unpacked in memory. Scales
//! of groups of inputs lie beside it. [`PackedBase3`] has fewer bytes, in an order of its own.

mod base3;
pub mod group_scales;
pub mod i2;
pub mod planes;
mod signs;

use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS, piece_index};
use rayon::prelude::*;

use crate::format::{Bytes, Elements};
use crate::shape::MatShape;

pub use base3::{PackedBase3, len_bytes as base3_len_bytes};

/// Columns of the longest chunk of a layout.
const MAX_CHUNK_K: usize = cpu_ref::layout::signs::CHUNK_K;

/// How the 16 bytes of a piece hold the weights of a row's chunk.
pub trait Pieces: Copy + Sync {
    /// Columns of a chunk.
    const CHUNK_K: usize;
    /// The weight of padding rows and columns; 1 where there is no 0.
    const PADDING: i8;

    /// Packs the trits of one chunk; a 0 is as good as the padding.
    fn pack_piece(self, trits: &[i8]) -> [u32; PIECE_WORDS];

    /// Unpacks the first trits of one piece into `out`, at most a chunk.
    fn unpack_piece(self, piece: [u32; PIECE_WORDS], out: &mut [i8]);

    /// Chunks along K.
    fn k_chunks(k: usize) -> usize {
        k.div_ceil(Self::CHUNK_K)
    }
}

/// Which packed layout of ternary matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// 2-bit codes, four fields a byte: see `cpu_ref::layout::i2`.
    I2,
    /// Non-zero plane and sign plane: see `cpu_ref::layout::planes`.
    Planes,
}

impl Pieces for Layout {
    const CHUNK_K: usize = cpu_ref::layout::CHUNK_K;
    const PADDING: i8 = 0;

    fn pack_piece(self, trits: &[i8]) -> [u32; PIECE_WORDS] {
        let trits = trits.try_into().expect("a whole chunk");
        match self {
            Self::I2 => i2::pack_piece(trits),
            Self::Planes => planes::pack_piece(trits),
        }
    }

    fn unpack_piece(self, piece: [u32; PIECE_WORDS], out: &mut [i8]) {
        let trits = match self {
            Self::I2 => i2::unpack_piece(piece),
            Self::Planes => planes::unpack_piece(piece),
        };
        out.copy_from_slice(&trits[..out.len()]);
    }
}

/// The packed layout of binary matrices, one bit a weight: see `cpu_ref::layout::signs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signs;

impl Pieces for Signs {
    const CHUNK_K: usize = cpu_ref::layout::signs::CHUNK_K;
    const PADDING: i8 = 1;

    fn pack_piece(self, trits: &[i8]) -> [u32; PIECE_WORDS] {
        signs::pack_piece(trits.try_into().expect("a whole chunk"))
    }

    fn unpack_piece(self, piece: [u32; PIECE_WORDS], out: &mut [i8]) {
        out.copy_from_slice(&signs::unpack_piece(piece)[..out.len()]);
    }
}

/// A cache line of packed weights: a matrix that starts on one never has a load across two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct Line(pub(crate) [u32; 16]);

impl Line {
    /// The words of some lines.
    pub fn words(lines: &[Self]) -> &[u32] {
        bytemuck::cast_slice(lines)
    }
}

/// A packed matrix: ternary in a [`Layout`], binary in [`Signs`]. N is padded to whole tiles of 32
/// rows, K to whole chunks of columns, both with [`Pieces::PADDING`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed<L = Layout> {
    layout: L,
    shape: MatShape,
    lines: Elements<Line>,
}

impl<L: Pieces> Packed<L> {
    /// Packs `shape.n()` rows that `row(n, trits)` writes, in parallel tiles.
    ///
    /// `row` fills all `shape.k()` trits of row `n`, each in {−1, 0, +1}; its first error ends the
    /// packing.
    ///
    /// # Errors
    /// Whatever `row` returns.
    ///
    /// # Panics
    /// If the layout is [`Signs`] and a trit is 0.
    pub fn try_pack<E: Send>(
        layout: L,
        shape: MatShape,
        row: impl Fn(usize, &mut [i8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        Self::try_pack_with_scales(layout, shape, 0, |n, trits, _| row(n, trits))
            .map(|(packed, _)| packed)
    }

    /// [`Packed::try_pack`] of rows that come with the f16 bits of `groups` scales each:
    /// `row(n, trits, scales)`. The scales are returned as `cpu_ref::layout::group_scales` lays them
    /// out.
    ///
    /// # Errors
    /// Whatever `row` returns.
    ///
    /// # Panics
    /// As [`Packed::try_pack`].
    pub fn try_pack_with_scales<E: Send>(
        layout: L,
        shape: MatShape,
        groups: usize,
        row: impl Fn(usize, &mut [i8], &mut [u16]) -> Result<(), E> + Sync,
    ) -> Result<(Self, Vec<u32>), E> {
        let chunks = L::k_chunks(shape.k());
        let tile_words = chunks * TILE_ROWS * PIECE_WORDS;
        let tiles = shape.n().div_ceil(TILE_ROWS);
        let mut lines = vec![Line([0; 16]); tiles * tile_words / 16];
        let mut scale_words = vec![0; cpu_ref::layout::group_scales::len_words(shape.n(), groups)];
        let mut rest = &mut scale_words[..];
        let scale_tiles: Vec<&mut [u32]> = (0..tiles)
            .map(|_| rest.split_off_mut(..groups * TILE_ROWS / 2).expect("a tile's scales"))
            .collect();
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut lines);
        let packed_tiles = words.par_chunks_exact_mut(tile_words).zip(scale_tiles).enumerate();
        packed_tiles.try_for_each(|(tile, (out, out_scales))| {
            // Columns past K stay zero for every row.
            let mut trits = vec![0i8; chunks * L::CHUNK_K];
            let mut scales = vec![0; groups];
            for in_tile in 0..TILE_ROWS {
                let n = tile * TILE_ROWS + in_tile;
                if n < shape.n() {
                    let trits = &mut trits[..shape.k()];
                    row(n, trits, &mut scales)?;
                    let binary = L::PADDING != 0;
                    assert!(!binary || !trits.contains(&0), "row {n}: 0 is no binary weight");
                    group_scales::pack_row(in_tile, &scales, out_scales);
                } else {
                    trits.fill(0);
                }
                for (chunk, group) in trits.chunks_exact(L::CHUNK_K).enumerate() {
                    let at = piece_index(chunks, in_tile, chunk);
                    out[at..at + PIECE_WORDS].copy_from_slice(&layout.pack_piece(group));
                }
            }
            Ok(())
        })?;
        Ok((Self { layout, shape, lines: lines.into() }, scale_words))
    }

    /// Packs plain trits `[N, K]`.
    ///
    /// # Panics
    /// If the length does not match the shape; as [`Packed::try_pack`].
    pub fn pack(layout: L, shape: MatShape, trits: &[i8]) -> Self {
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
        assert!(out.len() == self.shape.k());
        self.for_each_chunk(n, |first, trits| {
            out[first..first + trits.len()].copy_from_slice(trits);
        });
    }

    /// Calls `f(first column, trits)` with each chunk of row `n`, as far as K goes.
    ///
    /// # Panics
    /// If `n` is not below N.
    pub fn for_each_chunk(&self, n: usize, mut f: impl FnMut(usize, &[i8])) {
        assert!(n < self.shape.n());
        let (k, chunks) = (self.shape.k(), L::k_chunks(self.shape.k()));
        let mut trits = [0; MAX_CHUNK_K];
        for (chunk, first) in (0..k).step_by(L::CHUNK_K).enumerate() {
            let at = piece_index(chunks, n, chunk);
            let piece = self.words()[at..].first_chunk().expect("a piece is four words");
            let trits = &mut trits[..L::CHUNK_K.min(k - first)];
            self.layout.unpack_piece(*piece, trits);
            f(first, trits);
        }
    }

    /// The same matrix in another layout.
    ///
    /// # Panics
    /// As [`Packed::try_pack`].
    pub fn repack<M: Pieces>(&self, layout: M) -> Packed<M> {
        let repacked: Result<_, std::convert::Infallible> =
            Packed::try_pack(layout, self.shape, |n, out| {
                self.unpack_row(n, out);
                Ok(())
            });
        match repacked {
            Ok(repacked) => repacked,
            Err(never) => match never {},
        }
    }

    /// A matrix whose words have been packed before; `None` if they are not as many as the shape needs, or
    /// not on a cache line's boundary.
    pub(crate) fn of_words(layout: L, shape: MatShape, words: &Bytes) -> Option<Self> {
        let len_words =
            shape.n().div_ceil(TILE_ROWS) * L::k_chunks(shape.k()) * TILE_ROWS * PIECE_WORDS;
        let fits = words.len() == size_of::<u32>() * len_words;
        let lines = Elements::in_place(words).filter(|_| fits)?;
        Some(Self { layout, shape, lines })
    }

    /// Which layout.
    pub fn layout(&self) -> L {
        self.layout
    }

    /// `[N, K]` without the padding.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// `words[ceil(N/32)][chunks][32][4]`; the first is on a cache line's boundary.
    pub fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.lines)
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

    /// Every place of the padded matrix, against the definition.
    fn check_places<L: Pieces + std::fmt::Debug>(packed: &Packed<L>, plain: &[i8], get: Get) {
        let (n, k) = (packed.shape().n(), packed.shape().k());
        for row in 0..n.next_multiple_of(32) {
            for column in 0..k.next_multiple_of(L::CHUNK_K) {
                let inside = row < n && column < k;
                let expected = if inside { plain[row * k + column] } else { L::PADDING };
                let found = get(packed.words(), L::k_chunks(k), row, column);
                assert_eq!(found, Some(expected), "{:?} {}", packed.layout(), packed.shape());
            }
        }
    }

    type Get = fn(&[u32], usize, usize, usize) -> Option<i8>;

    const SHAPES: [(usize, usize); 9] =
        [(1, 1), (1, 64), (31, 63), (32, 64), (33, 65), (7, 130), (100, 100), (64, 5), (33, 257)];

    #[test]
    fn packing_is_exact_for_every_shape() {
        for (n, k) in SHAPES {
            let shape = MatShape::new(n, k).unwrap();
            let plain = trits(n * k, (n * 1000 + k) as u64);
            let layouts: [(_, Get); 2] = [
                (Layout::I2, cpu_ref::layout::i2::get),
                (Layout::Planes, cpu_ref::layout::planes::get),
            ];
            for (layout, get) in layouts {
                let packed = Packed::pack(layout, shape, &plain);
                assert_eq!(packed.words().len(), cpu_ref::layout::len_words(n, k));
                assert_eq!(packed.unpack(), plain, "{layout:?} {shape}");
                check_places(&packed, &plain, get);
                for other in [Layout::I2, Layout::Planes] {
                    assert_eq!(packed.repack(other), Packed::pack(other, shape, &plain));
                }
            }
            let binary: Vec<i8> = plain.iter().map(|&trit| if trit < 0 { -1 } else { 1 }).collect();
            let packed = Packed::pack(Signs, shape, &binary);
            assert_eq!(packed.words().len(), cpu_ref::layout::signs::len_words(n, k));
            assert_eq!(packed.unpack(), binary, "{shape}");
            check_places(&packed, &binary, |words, chunks, n, k| {
                Some(cpu_ref::layout::signs::get(words, chunks, n, k))
            });
            assert_eq!(packed.repack(Layout::I2), Packed::pack(Layout::I2, shape, &binary));
            assert_eq!(packed.repack(Layout::I2).repack(Signs), packed);
        }
    }

    #[test]
    fn scales_are_where_the_definition_has_them() {
        for (n, groups) in [(1, 1), (31, 3), (32, 2), (33, 1), (100, 5)] {
            let shape = MatShape::new(n, 64 * groups).unwrap();
            let bits: Vec<u16> = (0..n * groups).map(|i| (i * 40_503) as u16).collect();
            let (packed, words) =
                Packed::try_pack_with_scales(Layout::I2, shape, groups, |n, trits, scales| {
                    trits.fill(-1);
                    scales.copy_from_slice(&bits[n * groups..][..groups]);
                    Ok::<(), ()>(())
                })
                .unwrap();
            assert_eq!(packed, Packed::pack(Layout::I2, shape, &vec![-1; shape.len()]));
            assert_eq!(words, group_scales::pack(n, groups, &bits));
            for row in 0..n.next_multiple_of(32) {
                for g in 0..groups {
                    let expected = bits.get(row * groups + g).copied().unwrap_or(0);
                    let found = cpu_ref::layout::group_scales::get(&words, groups, row, g);
                    assert_eq!(found, expected, "{shape}, row {row}, group {g}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "0 is no binary weight")]
    fn a_zero_is_not_packed_as_a_sign() {
        Packed::pack(Signs, MatShape::new(1, 2).unwrap(), &[1, 0]);
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
