//! The LM head once more as int8 rows: see `cpu_ref::head_int8`.

use std::ops::Range;

use cpu_ref::head_int8::{MAX_K, Row, coarse, coarse_row, quantize_row, rest};
use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS, int8_rows, piece_index, split_rows};
use rayon::prelude::*;

use super::{Rows, Table, TableData};
use crate::error::Result;
use crate::format::float::Float;
use crate::layout::Line;

/// Smallest normal f16: a GPU may read smaller ones as 0.
const LEAST_F16: f32 = 6.103_515_6e-5;

/// A float [`Table`] as int8 codes with a scale a row, packed as `cpu_ref::layout::int8_rows` says, or
/// `cpu_ref::layout::split_rows`.
#[derive(Clone, Copy)]
pub struct Int8Rows<'a> {
    table: &'a Table,
    least_normal: f32,
}

impl<'a> Int8Rows<'a> {
    /// `None` for a table that is quantised already, or of more than
    /// [`MAX_K`](cpu_ref::head_int8::MAX_K) columns.
    pub fn of(table: &'a Table) -> Option<Self> {
        let least_normal = match table.data() {
            // Of these a GPU may flush what an f32 is too small for, which the bounds cover.
            TableData::Bf16(_) | TableData::F32(_) => 0.0,
            TableData::F16(_) => LEAST_F16,
            TableData::Codes(_) | TableData::Groups(_) => return None,
            TableData::Stored(rows) => match rows.ty().plain()? {
                Float::Bf16 | Float::F32 => 0.0,
                Float::F16 => LEAST_F16,
            },
        };
        (table.shape().k() <= MAX_K).then_some(Self { table, least_normal })
    }

    /// Tiles of 32 rows.
    pub fn tiles(self) -> usize {
        self.table.shape().n().div_ceil(TILE_ROWS)
    }

    /// Words of a tile.
    pub fn tile_words(self) -> usize {
        int8_rows::tile_words(self.table.shape().k())
    }

    /// The words of some tiles, packed in parallel.
    ///
    /// # Errors
    /// None of a float table that is in memory: those of [`Table::rows`].
    ///
    /// # Panics
    /// If the tiles are not inside the table.
    pub fn pack(self, tiles: Range<usize>) -> Result<Vec<u32>> {
        assert!(tiles.end <= self.tiles());
        let mut words = vec![0; tiles.len() * self.tile_words()];
        let chunks = int8_rows::chunks(self.table.shape().k());
        let mut parts = words.chunks_mut(BLOCK * self.tile_words());
        self.each_block(tiles, |block| {
            let words = parts.next().expect("a part for each block");
            let tiles = words.par_chunks_exact_mut(self.tile_words()).enumerate();
            tiles.try_for_each(|(tile, words)| {
                let codes_len = chunks * int8_rows::CHUNK_K;
                self.each_row((block, tile), codes_len, |lane, _, row, codes| {
                    for (chunk, codes) in codes.chunks_exact(int8_rows::CHUNK_K).enumerate() {
                        let piece = int8_rows::piece_index(chunks, lane, chunk);
                        put_bytes(&mut words[piece..], codes.iter().map(|&code| code as u8));
                    }
                    let values = [row.scale, row.error, row.norm];
                    put_values(&mut words[int8_rows::piece_index(chunks, lane, chunks)..], &values);
                })
            })
        })?;
        Ok(words)
    }

    /// Words of all tiles as `cpu_ref::layout::split_rows` says: of the coarse parts, and of the rests.
    pub fn split_len(self) -> [usize; 2] {
        let k = self.table.shape().k();
        [split_rows::coarse_tile_words(k), split_rows::rest_tile_words(k)]
            .map(|words| self.tiles() * words)
    }

    /// The words of all tiles, in two parts ([`Int8Rows::split_len`]) after one another, packed in parallel.
    ///
    /// # Errors
    /// As [`Int8Rows::pack`].
    pub fn pack_split(self) -> Result<Vec<Line>> {
        const PIECES: usize = split_rows::COARSE_PIECES;
        let k = self.table.shape().k();
        let groups = split_rows::groups(k);
        let lens = [split_rows::coarse_tile_words(k), split_rows::rest_tile_words(k)];
        let [coarse_len, rest_len] = self.split_len();
        let mut lines = vec![Line([0; LINE_WORDS]); (coarse_len + rest_len) / LINE_WORDS];
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut lines);
        let (coarse_words, rest_words) = words.split_at_mut(coarse_len);
        let mut parts =
            coarse_words.chunks_mut(BLOCK * lens[0]).zip(rest_words.chunks_mut(BLOCK * lens[1]));
        self.each_block(0..self.tiles(), |block| {
            let (coarse_words, rest_words) = parts.next().expect("a part for each block");
            let tiles = coarse_words.par_chunks_exact_mut(lens[0]);
            let tiles = tiles.zip(rest_words.par_chunks_exact_mut(lens[1])).enumerate();
            tiles.try_for_each(|(tile, (coarse_words, rest_words))| {
                let codes_len = groups * split_rows::GROUP_K;
                self.each_row((block, tile), codes_len, |lane, w, row, codes| {
                    for (group, codes) in
                        codes.as_chunks::<{ split_rows::GROUP_K }>().0.iter().enumerate()
                    {
                        let fields = codes.as_chunks::<16>().0;
                        for p in 0..PIECES {
                            let piece = split_rows::coarse_piece(groups, lane, group, p);
                            let last = |b: usize| coarse(fields[PIECES][b]) >> (2 * p) & 3;
                            let bytes = (0..16).map(|b| coarse(fields[p][b]) | last(b) << 6);
                            put_bytes(&mut coarse_words[piece..], bytes);
                        }
                        let rests =
                            (0..16).map(|b| (0..4).map(|j| rest(fields[j][b]) << (2 * j)).sum());
                        put_bytes(&mut rest_words[piece_index(groups, lane, group)..], rests);
                    }
                    let error = coarse_row(w, self.least_normal, row, &codes[..k]).error;
                    let last = split_rows::row_index(groups, lane);
                    let values = [row.scale, error, row.norm, row.error];
                    put_values(&mut coarse_words[last..], &values);
                })
            })
        })?;
        Ok(lines)
    }

    /// Calls `pack` with some tiles' rows after the other, so that few of a mapped or stored table stand in
    /// memory at a time.
    fn each_block(
        self,
        tiles: Range<usize>,
        mut pack: impl FnMut(Block<'_>) -> Result<()>,
    ) -> Result<()> {
        let n = self.table.shape().n();
        for first in tiles.clone().step_by(BLOCK) {
            let last = tiles.end.min(first + BLOCK);
            let rows = self.table.rows(first * TILE_ROWS..n.min(last * TILE_ROWS))?;
            pack(Block { first, rows: &rows })?;
            self.table.release();
        }
        Ok(())
    }

    /// Calls `put(lane, w[K], row, codes)` with each row of a block's tile; the codes are as many as asked
    /// for, 0 after the first K.
    fn each_row(
        self,
        (block, tile): (Block<'_>, usize),
        codes_len: usize,
        mut put: impl FnMut(usize, &[f32], Row, &[i8]),
    ) -> Result<()> {
        let (n, k) = (self.table.shape().n(), self.table.shape().k());
        let (mut w, mut codes) = (vec![0.0; k], vec![0; codes_len]);
        let start = (block.first + tile) * TILE_ROWS;
        for lane in 0..TILE_ROWS.min(n - start) {
            block.rows.row(start + lane, &mut w)?;
            let row = quantize_row(&w, self.least_normal, &mut codes[..k]);
            put(lane, &w, row, &codes);
        }
        Ok(())
    }
}

/// Tiles packed at once.
const BLOCK: usize = 64;

const LINE_WORDS: usize = size_of::<Line>() / size_of::<u32>();

/// The rows of some tiles.
#[derive(Clone, Copy)]
struct Block<'a> {
    /// The first tile.
    first: usize,
    rows: &'a Rows<'a>,
}

/// A piece's 16 bytes.
fn put_bytes(piece: &mut [u32], bytes: impl Iterator<Item = u8>) {
    let words: &mut [u8] = bytemuck::cast_slice_mut(&mut piece[..PIECE_WORDS]);
    for (to, byte) in words.iter_mut().zip(bytes) {
        *to = byte;
    }
    piece[..PIECE_WORDS].iter_mut().for_each(|word| *word = u32::from_le(*word));
}

/// What belongs to a row, in a piece.
fn put_values(piece: &mut [u32], values: &[f32]) {
    for (word, value) in piece.iter_mut().zip(values) {
        *word = value.to_bits();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::shape::MatShape;
    use crate::weights::Codes;

    #[test]
    fn every_code_is_where_the_layout_says() {
        let (n, k) = (70, 130);
        let shape = MatShape::new(n, k).unwrap();
        let values = Random::new(1).floats(n * k, 2.0);
        let table = Table::new(shape, TableData::F32(values.clone().into()));
        let rows = Int8Rows::of(&table).unwrap();
        let words = rows.pack(0..3).unwrap();
        assert_eq!(words.len(), 3 * rows.tile_words());
        assert_eq!(words[rows.tile_words()..], rows.pack(1..3).unwrap());
        let chunks = int8_rows::chunks(k);
        let mut codes = vec![0; k];
        for (n, w) in values.chunks_exact(k).enumerate() {
            let row = quantize_row(w, 0.0, &mut codes);
            let found: Vec<i8> = (0..k).map(|k| int8_rows::get(&words, chunks, n, k)).collect();
            assert_eq!(found, codes, "row {n}");
            let found = int8_rows::row(&words, chunks, n);
            assert_eq!(found, [row.scale, row.error, row.norm], "row {n}");
        }
        // Padding of a row, and rows of padding.
        assert!((k..chunks * 16).all(|k| int8_rows::get(&words, chunks, 69, k) == 0));
        assert_eq!(int8_rows::row(&words, chunks, 70), [0.0; 3]);
    }

    #[test]
    fn every_code_is_in_two_parts_where_the_layout_says() {
        let (n, k) = (70, 130);
        let shape = MatShape::new(n, k).unwrap();
        let values = Random::new(1).floats(n * k, 2.0);
        let table = Table::new(shape, TableData::F32(values.clone().into()));
        let rows = Int8Rows::of(&table).unwrap();
        let lines = rows.pack_split().unwrap();
        let words = Line::words(&lines);
        let [coarse_len, rest_len] = rows.split_len();
        assert_eq!(words.len(), coarse_len + rest_len);
        let (coarse_words, rest_words) = words.split_at(coarse_len);
        let groups = split_rows::groups(k);
        let code = |n, k| {
            let coarse = i32::from(split_rows::coarse(coarse_words, groups, n, k));
            4 * coarse + i32::from(split_rows::rest(rest_words, groups, n, k)) - 128
        };
        let mut codes = vec![0; k];
        for (n, w) in values.chunks_exact(k).enumerate() {
            let row = quantize_row(w, 0.0, &mut codes);
            for (k, &expected) in codes.iter().enumerate() {
                assert_eq!(code(n, k), i32::from(expected), "row {n}, column {k}");
            }
            let error = coarse_row(w, 0.0, row, &codes).error;
            let found = split_rows::row(coarse_words, groups, n);
            assert_eq!(found, [row.scale, error, row.norm, row.error], "row {n}");
        }
        // Padding of a row, and rows of padding.
        assert!((k..groups * 64).all(|k| code(69, k) == 0));
        assert_eq!(split_rows::row(coarse_words, groups, 70), [0.0; 4]);
    }

    #[test]
    fn half_rows_allow_for_flushed_weights() {
        let shape = MatShape::new(1, 2).unwrap();
        // 1 and 2⁻¹⁵, a subnormal f16; 2⁻¹⁵ as bf16.
        let error = |data| {
            let table = Table::new(shape, data);
            int8_rows::row(&Int8Rows::of(&table).unwrap().pack(0..1).unwrap(), 8, 0)[1]
        };
        let least = 2f32.powi(-15);
        assert!(error(TableData::F16(vec![0x3c00, 0x0200].into())) >= 2.0 * least);
        assert!(error(TableData::Bf16(vec![0x3f80, 0x3800].into())) < 1.1 * least);
    }

    #[test]
    fn quantised_tables_keep_their_own_head() {
        let shape = MatShape::new(1, 16).unwrap();
        let codes = Codes { group: 16, codes: vec![1; 16], scale: vec![1.0], min: Vec::new() };
        assert!(Int8Rows::of(&Table::new(shape, TableData::Codes(codes))).is_none());
        let shape = MatShape::new(1, MAX_K + 1).unwrap();
        assert!(
            Int8Rows::of(&Table::new(shape, TableData::Bf16(vec![0; MAX_K + 1].into()))).is_none()
        );
    }
}
