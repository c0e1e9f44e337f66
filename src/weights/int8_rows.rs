//! The LM head once more as int8 rows: see `cpu_ref::head_int8`.

use std::ops::Range;

use cpu_ref::head_int8::{MAX_K, quantize_row};
use cpu_ref::layout::{TILE_ROWS, int8_rows};
use rayon::prelude::*;

use super::{Rows, Table, TableData};
use crate::error::Result;
use crate::format::float::Float;

/// Smallest normal f16: a GPU may read smaller ones as 0.
const LEAST_F16: f32 = 6.103_515_6e-5;

/// A float [`Table`] as int8 codes with a scale a row, packed as `cpu_ref::layout::int8_rows` says.
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
        /// Tiles whose rows of a mapped or stored table stand in memory at a time.
        const BLOCK: usize = 64;
        let mut words = vec![0; tiles.len() * self.tile_words()];
        for (block, words) in words.chunks_mut(BLOCK * self.tile_words()).enumerate() {
            let first = tiles.start + block * BLOCK;
            let last = first + words.len() / self.tile_words();
            let n = self.table.shape().n();
            let rows = self.table.rows(first * TILE_ROWS..n.min(last * TILE_ROWS))?;
            words
                .par_chunks_exact_mut(self.tile_words())
                .enumerate()
                .try_for_each(|(tile, words)| self.pack_tile(&rows, first + tile, words))?;
            self.table.release();
        }
        Ok(words)
    }

    fn pack_tile(self, rows: &Rows<'_>, tile: usize, words: &mut [u32]) -> Result<()> {
        let (n, k) = (self.table.shape().n(), self.table.shape().k());
        let chunks = int8_rows::chunks(k);
        let mut w = vec![0.0; k];
        let mut codes = vec![0; chunks * int8_rows::CHUNK_K];
        for lane in 0..TILE_ROWS.min(n - tile * TILE_ROWS) {
            rows.row(tile * TILE_ROWS + lane, &mut w)?;
            let row = quantize_row(&w, self.least_normal, &mut codes[..k]);
            for (chunk, codes) in codes.chunks_exact(int8_rows::CHUNK_K).enumerate() {
                let piece = &mut words[int8_rows::piece_index(chunks, lane, chunk)..][..4];
                for (word, codes) in piece.iter_mut().zip(codes.chunks_exact(4)) {
                    *word = u32::from_le_bytes(std::array::from_fn(|b| codes[b] as u8));
                }
            }
            let last = int8_rows::piece_index(chunks, lane, chunks);
            words[last..last + 3].copy_from_slice(&[
                row.scale.to_bits(),
                row.error.to_bits(),
                row.norm.to_bits(),
            ]);
        }
        Ok(())
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
