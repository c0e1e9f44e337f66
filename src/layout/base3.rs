//! The base-3 layout; `cpu_ref::layout::base3` is its definition.
//!
//! The first four digits of a byte are the four fields of a byte of [`Layout::I2`], so that either
//! becomes the other byte by byte.

use std::ops::Range;

use cpu_ref::layout::base3::{GROUP_CHUNKS, GROUP_PIECES, digits, pieces, tile_words};
use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS, k_chunks};
use rayon::prelude::*;

use super::{Layout, Line, Packed};
use crate::format::{Bytes, Elements};
use crate::shape::MatShape;

/// Words of a piece: 32 rows × 16 bytes.
const CHUNK_WORDS: usize = TILE_ROWS * PIECE_WORDS;

/// What stands for a code that is no weight.
const NONE: u8 = 255;

/// The byte of digits 0 to 3 as I2 has them, for each digit 4.
static BYTES: [[u8; 256]; 3] = bytes();

const fn bytes() -> [[u8; 256]; 3] {
    let mut bytes = [[NONE; 256]; 3];
    let mut byte = 0;
    while byte < 256 {
        if let Some([a, b, c, d, last]) = digits(byte as u8) {
            bytes[last as usize][(a | b << 2 | c << 4 | d << 6) as usize] = byte as u8;
        }
        byte += 1;
    }
    bytes
}

/// The four digits of each byte as I2 has them, and digit 4.
static FIELDS: [(u8, u8); 256] = fields();

const fn fields() -> [(u8, u8); 256] {
    let mut fields = [(NONE, 3); 256];
    let mut byte = 0;
    while byte < 256 {
        if let Some([a, b, c, d, last]) = digits(byte as u8) {
            fields[byte] = (a | b << 2 | c << 4 | d << 6, last);
        }
        byte += 1;
    }
    fields
}

/// A ternary matrix of five weights a byte. N is padded to whole tiles of 32 rows, K to whole chunks
/// of 64 columns, both with weight 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedBase3 {
    shape: MatShape,
    lines: Elements<Line>,
}

impl PackedBase3 {
    /// Packs `[N, K]` from `block(rows)`, these rows of it in [`Layout::I2`]: so that the whole matrix never
    /// stands in memory twice.
    ///
    /// # Errors
    /// Whatever `block` returns.
    ///
    /// # Panics
    /// If a block has another shape or layout.
    pub fn try_of_blocks<E>(
        shape: MatShape,
        block: impl Fn(Range<usize>) -> Result<Packed, E>,
    ) -> Result<Self, E> {
        /// Tiles of a block: work for many threads, and a few MB.
        const BLOCK: usize = 64;
        let chunks = k_chunks(shape.k());
        let tiles = shape.n().div_ceil(TILE_ROWS);
        let mut lines = vec![Line([0; 16]); tiles * tile_words(chunks) / 16];
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut lines);
        for (i, out) in words.chunks_mut(BLOCK * tile_words(chunks)).enumerate() {
            let first = i * BLOCK * TILE_ROWS;
            let rows = first..shape.n().min(first + BLOCK * TILE_ROWS);
            let packed = block(rows.clone())?;
            assert_eq!((packed.shape().n(), packed.shape().k()), (rows.len(), shape.k()));
            Self::pack(&packed, out);
        }
        Ok(Self { shape, lines: lines.into() })
    }

    /// The same matrix in this layout.
    ///
    /// # Panics
    /// If the matrix is not in [`Layout::I2`].
    pub fn of(packed: &Packed) -> Self {
        let shape = packed.shape();
        let mut lines = vec![Line([0; 16]); len_bytes(shape) / size_of::<Line>()];
        Self::pack(packed, bytemuck::cast_slice_mut(&mut lines));
        Self { shape, lines: lines.into() }
    }

    fn pack(packed: &Packed, out: &mut [u32]) {
        assert_eq!(packed.layout(), Layout::I2);
        let chunks = k_chunks(packed.shape().k());
        out.par_chunks_exact_mut(tile_words(chunks))
            .zip(packed.words().par_chunks_exact(chunks * CHUNK_WORDS))
            .for_each(|(out, i2)| pack_tile(i2.as_chunks().0, out.as_chunks_mut().0));
    }

    /// A matrix whose words have been packed before; `None` if they are not as many as the shape needs, or
    /// not on a cache line's boundary.
    pub(crate) fn of_words(shape: MatShape, words: &Bytes) -> Option<Self> {
        let lines = Elements::in_place(words).filter(|_| words.len() == len_bytes(shape))?;
        Some(Self { shape, lines })
    }

    /// The same matrix in [`Layout::I2`].
    pub fn to_i2(&self) -> Packed {
        let chunks = k_chunks(self.shape.k());
        let tiles = self.shape.n().div_ceil(TILE_ROWS);
        let mut lines = vec![Line([0; 16]); tiles * chunks * CHUNK_WORDS / 16];
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut lines);
        words
            .par_chunks_exact_mut(chunks * CHUNK_WORDS)
            .zip(self.words().par_chunks_exact(tile_words(chunks)))
            .for_each(|(out, tile)| unpack_tile(tile.as_chunks().0, out.as_chunks_mut().0));
        Packed { layout: Layout::I2, shape: self.shape, lines: lines.into() }
    }

    /// `[N, K]` without the padding.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// `words[ceil(N/32)][pieces][4][32]`; the first is on a cache line's boundary.
    pub fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.lines)
    }
}

/// Bytes of a packed matrix `[N, K]`.
pub fn len_bytes(shape: MatShape) -> usize {
    shape.n().div_ceil(TILE_ROWS) * tile_words(k_chunks(shape.k())) * size_of::<u32>()
}

type Chunk = [u32; CHUNK_WORDS];

/// One tile of I2 → its pieces.
fn pack_tile(i2: &[Chunk], out: &mut [Chunk]) {
    assert_eq!(out.len(), pieces(i2.len()));
    for (chunks, pieces) in i2.chunks(GROUP_CHUNKS).zip(out.chunks_mut(GROUP_PIECES)) {
        for (p, piece) in pieces.iter_mut().enumerate() {
            for (at, i2) in chunks[p].iter().enumerate() {
                let (row, word) = (at / PIECE_WORDS, at % PIECE_WORDS);
                // Without a fifth chunk, digit 4 is that of weight 0.
                let fifth = chunks.get(GROUP_PIECES).map_or(0x5555_5555, |chunk| chunk[at]);
                let last = (fifth >> (2 * p) & 0x0303_0303).to_le_bytes();
                let i2 = i2.to_le_bytes();
                let bytes =
                    std::array::from_fn(|b| BYTES[usize::from(last[b])][usize::from(i2[b])]);
                piece[word * TILE_ROWS + row] = u32::from_le_bytes(bytes);
            }
        }
    }
}

/// The inverse of [`pack_tile`].
fn unpack_tile(pieces: &[Chunk], out: &mut [Chunk]) {
    for (pieces, chunks) in pieces.chunks(GROUP_PIECES).zip(out.chunks_mut(GROUP_CHUNKS)) {
        for (p, piece) in pieces.iter().enumerate() {
            for at in 0..CHUNK_WORDS {
                let (row, word) = (at / PIECE_WORDS, at % PIECE_WORDS);
                let bytes = piece[word * TILE_ROWS + row].to_le_bytes();
                let fields = bytes.map(|byte| FIELDS[usize::from(byte)]);
                chunks[p][at] = u32::from_le_bytes(fields.map(|(four, _)| four));
                if let Some(fifth) = chunks.get_mut(GROUP_PIECES) {
                    fifth[at] |= u32::from_le_bytes(fields.map(|(_, last)| last)) << (2 * p);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn every_weight_is_where_the_definition_has_it() {
        for (n, k) in [(1, 1), (31, 63), (32, 64), (33, 256), (5, 320), (70, 321), (33, 700)] {
            let shape = MatShape::new(n, k).unwrap();
            let trits = Random::new((n * 1000 + k) as u64).trits(n * k);
            let i2 = Packed::pack(Layout::I2, shape, &trits);
            let packed = PackedBase3::of(&i2);
            assert_eq!(4 * packed.words().len(), len_bytes(shape));
            assert_eq!(packed.to_i2(), i2, "{shape}");
            let chunks = k_chunks(k);
            for row in 0..n.next_multiple_of(TILE_ROWS) {
                for column in 0..chunks * 64 {
                    let inside = row < n && column < k;
                    let expected = if inside { trits[row * k + column] } else { 0 };
                    let found = cpu_ref::layout::base3::get(packed.words(), chunks, row, column);
                    assert_eq!(found, Some(expected), "{shape}, row {row}, column {column}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_rows_are_the_whole_matrix() {
        let (n, k) = (5000, 100);
        let trits = Random::new(3).trits(n * k);
        let pack = |rows: Range<usize>| {
            let shape = MatShape::new(rows.len(), k).unwrap();
            Packed::pack(Layout::I2, shape, &trits[rows.start * k..rows.end * k])
        };
        let shape = MatShape::new(n, k).unwrap();
        let of_blocks = PackedBase3::try_of_blocks(shape, |rows| Ok::<_, ()>(pack(rows)));
        assert_eq!(of_blocks.unwrap(), PackedBase3::of(&pack(0..n)));
        let first_fails = |rows: Range<usize>| match rows.start {
            0 => Err("the first"),
            _ => Ok(pack(rows)),
        };
        assert_eq!(PackedBase3::try_of_blocks(shape, first_fails), Err("the first"));
    }

    #[test]
    fn five_weights_a_byte() {
        let bytes = |n, k| len_bytes(MatShape::new(n, k).unwrap());
        assert_eq!(bytes(32, 2560), 32 * 2560 / 5);
        // 108 chunks are 21 groups and 3 pieces.
        assert_eq!(bytes(32, 6912), 32 * 16 * (21 * 4 + 3));
        assert_eq!(bytes(1, 1), 512);
    }
}
