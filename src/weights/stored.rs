//! A table that is still in its file.

use std::ops::Range;

use bytemuck::Pod;
use rayon::prelude::*;

use super::{Codes, TableData};
use crate::error::{Error, Result};
use crate::format::float::{Float, first_non_finite};
use crate::format::ggml::FloatType;
use crate::format::{Elements, StoredTensor};
use crate::shape::MatShape;

/// Bytes of a table that are mapped or read at a time: those of the file never stand in memory as a whole.
const PIECE_BYTES: usize = 4 << 20;

/// The rows of a float table in their file, quantised or not, to be read when they are needed.
#[derive(Debug, Clone)]
pub struct StoredRows {
    tensor: StoredTensor,
    shape: MatShape,
    ty: FloatType,
    row_bytes: usize,
}

impl StoredRows {
    /// The rows of a tensor `[N, K]`.
    ///
    /// # Errors
    /// [`Error::TensorValue`] if rows are no whole blocks.
    ///
    /// # Panics
    /// If the tensor is not as long as its shape and type say.
    pub(crate) fn new(tensor: StoredTensor, shape: MatShape, ty: FloatType) -> Result<Self> {
        let Some(row_bytes) = ty.row_bytes(shape.k()) else {
            let found = format!("{} columns", shape.k());
            return Err(value_error(&tensor, "rows of whole blocks", found));
        };
        assert_eq!(tensor.info().len_bytes, row_bytes as u64 * shape.n() as u64);
        Ok(Self { tensor, shape, ty, row_bytes })
    }

    /// How a row is packed.
    pub fn ty(&self) -> FloatType {
        self.ty
    }

    /// `[N, K]`.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// Bytes in the file.
    pub(super) fn len_bytes(&self) -> u64 {
        self.tensor.info().len_bytes
    }

    /// The table as the file has it, if it can be read there: mapped or in memory, aligned, of plain
    /// floats in the byte order of this machine.
    pub(crate) fn in_place(&self) -> Result<Option<TableData>> {
        let Some(float) = self.ty.plain() else { return Ok(None) };
        if !self.tensor.is_in_place() || cfg!(target_endian = "big") {
            return Ok(None);
        }
        let bytes = self.tensor.slice(0..self.tensor.info().len_bytes as usize)?;
        Ok(match float {
            Float::Bf16 => Elements::in_place(&bytes).map(TableData::Bf16),
            Float::F16 => Elements::in_place(&bytes).map(TableData::F16),
            Float::F32 => Elements::in_place(&bytes).map(TableData::F32),
        })
    }

    /// Reads all plain floats once, to see that they are finite.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for NaN or infinity.
    pub(crate) fn check(&self) -> Result<()> {
        let pieces: Vec<_> = self.pieces(0..self.shape.n()).collect();
        let check = |rows: Range<usize>| {
            let bytes = self.bytes(&rows)?;
            match self.ty.plain() {
                Some(Float::Bf16) => self.check_floats(rows.start, &bytes, Bf16),
                Some(Float::F16) => self.check_floats(rows.start, &bytes, F16),
                Some(Float::F32) => self.check_floats(rows.start, &bytes, F32),
                None => Ok(()),
            }
        };
        pieces.into_par_iter().try_for_each(check)
    }

    /// Some rows in memory.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for NaN or infinity, [`Error::Io`] if there is not the memory, or as
    /// reading the file.
    ///
    /// # Panics
    /// If the rows are not inside the table.
    pub(crate) fn read(&self, rows: Range<usize>) -> Result<TableData> {
        assert!(rows.start <= rows.end && rows.end <= self.shape.n());
        Ok(match self.ty.plain() {
            Some(Float::Bf16) => TableData::Bf16(self.floats(rows, Bf16)?.into()),
            Some(Float::F16) => TableData::F16(self.floats(rows, F16)?.into()),
            Some(Float::F32) => TableData::F32(self.floats(rows, F32)?.into()),
            None => TableData::Codes(self.codes(rows)?),
        })
    }

    /// Rows of a piece.
    fn piece_rows(&self) -> usize {
        (PIECE_BYTES / self.row_bytes).max(1)
    }

    fn pieces(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (step, end) = (self.piece_rows(), rows.end);
        rows.step_by(step).map(move |first| first..end.min(first + step))
    }

    fn bytes(&self, rows: &Range<usize>) -> Result<crate::format::Bytes> {
        self.tensor.slice(rows.start * self.row_bytes..rows.end * self.row_bytes)
    }

    /// Calls `read` for each piece: at once where the bytes are in place, else one after another, because
    /// a reader belongs to this thread.
    fn for_each<T: Send>(
        &self,
        pieces: Vec<T>,
        read: impl Fn(T) -> Result<()> + Send + Sync,
    ) -> Result<()> {
        match self.tensor.is_in_place() {
            true => pieces.into_par_iter().try_for_each(read),
            false => pieces.into_iter().try_for_each(read),
        }
    }

    /// Memory for so many elements of the rows: the file says how many.
    fn zeros<T: Pod>(&self, len: usize) -> Result<Vec<T>> {
        let mut zeros = Vec::new();
        zeros.try_reserve_exact(len).map_err(|_| Error::Io {
            path: self.tensor.file().into(),
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        zeros.resize(len, T::zeroed());
        Ok(zeros)
    }

    fn floats<E: Element<SIZE>, const SIZE: usize>(
        &self,
        rows: Range<usize>,
        element: E,
    ) -> Result<Vec<E::Bits>> {
        let k = self.shape.k();
        let mut floats = self.zeros(rows.len() * k)?;
        let pieces: Vec<_> =
            self.pieces(rows).zip(floats.chunks_mut(self.piece_rows() * k)).collect();
        self.for_each(pieces, |(rows, floats)| {
            let bytes = self.bytes(&rows)?;
            self.check_floats(rows.start, &bytes, element)?;
            for (float, &bytes) in floats.iter_mut().zip(bytes.as_chunks().0) {
                *float = E::from_le_bytes(bytes);
            }
            Ok(())
        })?;
        Ok(floats)
    }

    fn check_floats<E: Element<SIZE>, const SIZE: usize>(
        &self,
        first_row: usize,
        bytes: &[u8],
        _: E,
    ) -> Result<()> {
        let elements = bytes.as_chunks().0.iter().map(|&bytes| E::from_le_bytes(bytes));
        // No early exit: the loop vectorises, and the answer is nearly always "all".
        if elements.clone().fold(true, |finite, element| finite & E::is_finite(element)) {
            return Ok(());
        }
        let at = elements.take_while(|&element| E::is_finite(element)).count();
        let (row, k) = (first_row + at / self.shape.k(), at % self.shape.k());
        let found = format!("NaN or infinity at row {row}, column {k}");
        Err(value_error(&self.tensor, "finite elements", found))
    }

    /// Quantised rows as int8 codes.
    fn codes(&self, rows: Range<usize>) -> Result<Codes> {
        let (n, k) = (rows.len(), self.shape.k());
        let group = self.ty.group().expect("the type is quantised");
        let groups = k / group;
        let has_min = self.has_min();
        let mut codes = self.zeros(n * k)?;
        let mut scale = self.zeros(n * groups)?;
        let mut min = self.zeros(if has_min { n * groups } else { 0 })?;
        let step = self.piece_rows();
        let mut mins = min.chunks_mut(step * groups);
        let parts = codes.chunks_mut(step * k).zip(scale.chunks_mut(step * groups));
        let pieces: Vec<_> = self
            .pieces(rows)
            .zip(parts)
            // Empty where there are none.
            .map(|(rows, (codes, scale))| (rows, codes, scale, mins.next().unwrap_or_default()))
            .collect();
        self.for_each(pieces, |(rows, codes, scale, min)| {
            let bytes = self.bytes(&rows)?;
            let mut unused: Vec<f32> = vec![0.0; groups];
            let of_rows = codes.chunks_exact_mut(k).zip(scale.chunks_exact_mut(groups));
            let of_rows = of_rows.zip(bytes.chunks_exact(self.row_bytes)).enumerate();
            for (row, ((codes, scale), bytes)) in of_rows {
                let min = match has_min {
                    true => &mut min[row * groups..][..groups],
                    false => &mut unused[..],
                };
                self.ty.decode_codes(bytes, codes, scale, min);
                if let Some(g) = first_non_finite(scale).or_else(|| first_non_finite(min)) {
                    let (row, k) = (rows.start + row, g * group);
                    let found = format!("NaN or infinity at row {row}, column {k}");
                    return Err(value_error(&self.tensor, "finite scales", found));
                }
            }
            Ok(())
        })?;
        Ok(Codes { group, codes, scale, min })
    }

    /// Whether codes have a minimum beside their scale.
    pub(crate) fn has_min(&self) -> bool {
        self.ty == FloatType::Q4K
    }
}

/// A plain float of `SIZE` bytes as [`TableData`] holds it.
trait Element<const SIZE: usize>: Copy + Sync {
    type Bits: Pod + Send + Sync;
    fn from_le_bytes(bytes: [u8; SIZE]) -> Self::Bits;
    fn is_finite(bits: Self::Bits) -> bool;
}

#[derive(Clone, Copy)]
struct Bf16;
#[derive(Clone, Copy)]
struct F16;
#[derive(Clone, Copy)]
struct F32;

impl Element<2> for Bf16 {
    type Bits = u16;
    fn from_le_bytes(bytes: [u8; 2]) -> u16 {
        u16::from_le_bytes(bytes)
    }
    fn is_finite(bits: u16) -> bool {
        bits & 0x7f80 != 0x7f80
    }
}

impl Element<2> for F16 {
    type Bits = u16;
    fn from_le_bytes(bytes: [u8; 2]) -> u16 {
        u16::from_le_bytes(bytes)
    }
    fn is_finite(bits: u16) -> bool {
        bits & 0x7c00 != 0x7c00
    }
}

impl Element<4> for F32 {
    type Bits = f32;
    fn from_le_bytes(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }
    fn is_finite(bits: f32) -> bool {
        bits.is_finite()
    }
}

fn value_error(tensor: &StoredTensor, expected: &'static str, found: String) -> Error {
    let (file, tensor) = (tensor.file().to_owned(), tensor.info().name.clone());
    Error::TensorValue { file, tensor, expected, found }
}
