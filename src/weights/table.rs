//! The embedding table and the LM head.

use std::ops::Range;
use std::sync::Arc;

use super::{Rotation, StoredRows, TernaryMatrix, WeightScale};
use crate::error::Result;
use crate::format::Elements;
use crate::format::float::{bf16_to_f32, f16_to_f32};
use crate::shape::MatShape;

/// A matrix `[N, K]` that is read by row or multiplied with unquantised activations: the embedding
/// table or an untied LM head.
pub struct Table {
    shape: MatShape,
    data: TableData,
    rotation: Option<Arc<Rotation>>,
}

/// The elements of a [`Table`], row-major, in the precision of the file.
pub enum TableData {
    /// bfloat16 bit patterns.
    Bf16(Elements<u16>),
    /// IEEE half bit patterns.
    F16(Elements<u16>),
    /// IEEE single.
    F32(Elements<f32>),
    /// int8 codes with a scale for each group: Q8_0, Q6_K, Q4_0 and Q4_K, whose values they hold
    /// exactly.
    Codes(Codes),
    /// Binary or ternary with a scale for each group.
    Groups(Box<TernaryMatrix>),
    /// One of the others but the last, still in its file: only of
    /// [`WeightSource::stored_embedding`](super::WeightSource::stored_embedding) and its like.
    Stored(StoredRows),
}

/// Some rows of a [`Table`], in memory.
pub struct Rows<'a> {
    data: RowsData<'a>,
    shape: MatShape,
    /// The row of the table that the first of `data` is.
    first: usize,
}

enum RowsData<'a> {
    OfTable(&'a TableData),
    Read(TableData),
}

impl Rows<'_> {
    /// The elements, those of other rows too perhaps, and the row of the table that is their first.
    pub fn data(&self) -> (&TableData, usize) {
        match &self.data {
            RowsData::OfTable(data) => (data, 0),
            RowsData::Read(data) => (data, self.first),
        }
    }

    /// Row `n` of the table: see [`Table::row`].
    ///
    /// # Errors
    /// As [`Table::row`].
    ///
    /// # Panics
    /// If it is not among these rows.
    pub fn row(&self, n: usize, out: &mut [f32]) -> Result<()> {
        let (data, first) = self.data();
        row(data, self.shape.k(), n - first, out)
    }
}

/// `value[n, k] = scale[n, g]·codes[n, k] + min[n, g]`, `g = k / group`.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    /// Elements a scale: 16 or 32; divides K.
    pub group: usize,
    /// `[N, K]`.
    pub codes: Vec<i8>,
    /// `[N, K/group]`.
    pub scale: Vec<f32>,
    /// `[N, K/group]`, or empty where it is 0 everywhere.
    pub min: Vec<f32>,
}

impl Table {
    /// A table of finite elements.
    ///
    /// # Panics
    /// If the length does not match the shape.
    pub fn new(shape: MatShape, data: TableData) -> Self {
        match &data {
            TableData::Bf16(bits) | TableData::F16(bits) => assert_eq!(bits.len(), shape.len()),
            TableData::F32(values) => assert_eq!(values.len(), shape.len()),
            TableData::Codes(Codes { group, codes, scale, min }) => {
                assert!(*group > 0 && shape.k().is_multiple_of(*group));
                assert!(codes.len() == shape.len() && scale.len() == shape.len() / group);
                assert!(min.is_empty() || min.len() == scale.len());
            }
            TableData::Groups(matrix) => {
                assert_eq!(matrix.shape(), shape);
                assert!(matches!(matrix.scale(), WeightScale::Groups { .. }));
            }
            TableData::Stored(rows) => assert_eq!(rows.shape(), shape),
        }
        Self { shape, data, rotation: None }
    }

    /// The same table, whose rows are stored rotated.
    ///
    /// # Panics
    /// If the rotation is not of K values.
    pub fn with_rotation(self, rotation: Option<Arc<Rotation>>) -> Self {
        assert!(rotation.as_ref().is_none_or(|rotation| rotation.signs.len() == self.shape.k()));
        Self { rotation, ..self }
    }

    /// `[N, K]`.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// Bytes of the elements as they are held; of a ternary one, as two bits and a scale for each group.
    pub(crate) fn bytes(&self) -> u64 {
        (match &self.data {
            TableData::Bf16(bits) | TableData::F16(bits) => size_of_val(&**bits),
            TableData::F32(values) => size_of_val(&**values),
            TableData::Codes(Codes { codes, scale, min, .. }) => {
                codes.len() + size_of_val(scale.as_slice()) + size_of_val(min.as_slice())
            }
            TableData::Groups(matrix) => {
                self.shape.len() / 4 + 2 * matrix.groups() * self.shape.n()
            }
            TableData::Stored(rows) => return rows.len_bytes(),
        }) as u64
    }

    /// The elements `[N, K]`.
    pub fn data(&self) -> &TableData {
        &self.data
    }

    /// The elements `[N, K]`, to keep.
    pub fn into_data(self) -> TableData {
        self.data
    }

    /// Copies the elements out of a mapped file: for a table that is read as a whole again and again.
    pub fn take_into_memory(&mut self) {
        match &mut self.data {
            TableData::Bf16(bits) | TableData::F16(bits) => bits.take_into_memory(),
            TableData::F32(values) => values.take_into_memory(),
            TableData::Codes(_) | TableData::Groups(_) | TableData::Stored(_) => {}
        }
    }

    /// Gives memory back that a mapped table takes because it was read; rows can be read again.
    pub fn release(&self) {
        match &self.data {
            TableData::Bf16(bits) | TableData::F16(bits) => bits.release(),
            TableData::F32(values) => values.release(),
            TableData::Codes(_) | TableData::Groups(_) | TableData::Stored(_) => {}
        }
    }

    /// The rotation that rows are stored in. A row of the embedding is [`Rotation::rotate_back`] of
    /// the stored one; a head's input takes [`Rotation::rotate`].
    pub fn rotation(&self) -> Option<&Arc<Rotation>> {
        self.rotation.as_ref()
    }

    /// Row `n` as it is stored, as f32, into `out[K]`.
    ///
    /// # Errors
    /// If a binary or ternary row holds a code that stands for no weight.
    ///
    /// # Panics
    /// If `n` is not below N or `out` is not K long.
    pub fn row(&self, n: usize, out: &mut [f32]) -> Result<()> {
        assert!(n < self.shape.n());
        self.rows(n..n + 1)?.row(n, out)
    }

    /// Some rows, read if they are still in their file.
    ///
    /// # Errors
    /// If they cannot be read, or hold NaN or infinity.
    ///
    /// # Panics
    /// If they are not inside the table.
    pub fn rows(&self, rows: Range<usize>) -> Result<Rows<'_>> {
        assert!(rows.start <= rows.end && rows.end <= self.shape.n());
        let (data, first) = match &self.data {
            TableData::Stored(stored) => (RowsData::Read(stored.read(rows.clone())?), rows.start),
            data => (RowsData::OfTable(data), 0),
        };
        Ok(Rows { data, shape: self.shape, first })
    }
}

/// Row `n` of elements `[N, K]` as f32.
fn row(data: &TableData, k: usize, n: usize, out: &mut [f32]) -> Result<()> {
    assert_eq!(out.len(), k);
    let range = n * k..(n + 1) * k;
    match data {
        TableData::Bf16(bits) => {
            out.iter_mut().zip(&bits[range]).for_each(|(out, &bits)| *out = bf16_to_f32(bits));
        }
        TableData::F16(bits) => {
            out.iter_mut().zip(&bits[range]).for_each(|(out, &bits)| *out = f16_to_f32(bits));
        }
        TableData::F32(values) => out.copy_from_slice(&values[range]),
        TableData::Codes(Codes { group, codes, scale, min }) => {
            let groups = codes[range].chunks_exact(*group).zip(out.chunks_exact_mut(*group));
            for (g, (codes, out)) in (n * k / group..).zip(groups) {
                let min = min.get(g).copied().unwrap_or(0.0);
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = scale[g] * f32::from(code) + min;
                }
            }
        }
        TableData::Groups(matrix) => {
            let mut trits = vec![0; k];
            let mut scales = vec![0; matrix.groups()];
            matrix.row_with_scales(n, &mut trits, &mut scales)?;
            let group = k / scales.len();
            let groups = trits.chunks_exact(group).zip(out.chunks_exact_mut(group));
            for ((trits, out), &scale) in groups.zip(&scales) {
                let scale = f16_to_f32(scale);
                for (out, &trit) in out.iter_mut().zip(trits) {
                    *out = scale * f32::from(trit);
                }
            }
        }
        TableData::Stored(_) => unreachable!("rows have been read"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Alphabet;

    #[test]
    fn rows_keep_the_precision_of_the_file() {
        let shape = MatShape::new(2, 64).unwrap();
        let mut row = [0.0; 64];
        let rows = |zero, one, minus_three| {
            let mut rows = vec![zero; 128];
            (rows[64], rows[127]) = (one, minus_three);
            rows
        };
        let mut min = vec![0.0; 8];
        min[7] = -5.0;
        let mut codes = Codes { group: 16, codes: vec![0; 128], scale: vec![0.5; 8], min };
        (codes.codes[64], codes.codes[127]) = (2, 4);
        codes.codes[112..127].fill(10);
        let mut trits = vec![0i8; 128];
        (trits[64], trits[127]) = (1, -1);
        for data in [
            TableData::Bf16(rows(0, 0x3f80, 0xc040).into()),
            TableData::F16(rows(0, 0x3c00, 0xc200).into()),
            TableData::F32(rows2(1.0, -3.0).into()),
            TableData::Codes(codes),
        ] {
            let table = Table::new(shape, data);
            table.row(1, &mut row).unwrap();
            assert_eq!((row[0], row[1], row[63]), (1.0, 0.0, -3.0));
            table.row(0, &mut row).unwrap();
            assert_eq!(row, [0.0; 64]);
        }
        let scales = vec![0x3c00, 0x4200];
        let matrix = TernaryMatrix::from_groups(shape, trits, scales, 64, Alphabet::Ternary);
        Table::new(shape, TableData::Groups(Box::new(matrix))).row(1, &mut row).unwrap();
        assert_eq!((row[0], row[1], row[63]), (3.0, 0.0, -3.0));
    }

    fn rows2(one: f32, minus_three: f32) -> Vec<f32> {
        let mut rows = vec![0.0; 128];
        (rows[64], rows[127]) = (one, minus_three);
        rows
    }
}
