//! Matrices on the device: ternary ones packed for a variant, dense tables in shards.

use std::ops::Range;

use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS, k_chunks};

use super::buffer::Slice;
use super::device::Gpu;
use super::kernels::{DenseFormat, DenseShard, Variant, padded_rows};
use crate::error::{Error, Result};
use crate::layout::{Layout, Packed, i2, planes};
use crate::shape::MatShape;
use crate::weights::{Input, Table, TableData, TernaryMatrix, WeightScale};

/// A ternary matrix as its variant reads it, still on the host.
pub struct HostMatrix {
    packed: Packed,
    /// The constant of each row that the variant adds.
    offset: Vec<i32>,
    weight_scale: Vec<f32>,
}

impl HostMatrix {
    /// Packs the rows of `parts` one after another.
    ///
    /// # Errors
    /// If a row is malformed.
    pub fn pack(variant: Variant, parts: &[&TernaryMatrix]) -> Result<Self> {
        let k = parts[0].shape().k();
        let n = parts.iter().map(|part| part.shape().n()).sum();
        let shape = MatShape::new(n, k)?;
        let packed = Packed::try_pack(variant.layout(), shape, |row, out| {
            let mut row = row;
            for part in parts {
                if row < part.shape().n() {
                    return part.row(row, out);
                }
                row -= part.shape().n();
            }
            unreachable!("rows are below the sum of the parts")
        })?;
        let mut weight_scale = Vec::with_capacity(n);
        for part in parts {
            let WeightScale::Tensor(scale) = part.scale() else {
                return Err(unsupported("scales of groups of inputs"));
            };
            if part.input() != &Input::default() {
                return Err(unsupported("a norm or rotation inside linear layers"));
            }
            weight_scale.extend(std::iter::repeat_n(scale, part.shape().n()));
        }
        Ok(Self { offset: row_offsets(&packed), packed, weight_scale })
    }

    /// Words of a tile of 32 rows.
    fn tile_words(&self) -> usize {
        k_chunks(self.packed.shape().k()) * TILE_ROWS * PIECE_WORDS
    }

    /// Tile ranges whose words fit a binding.
    fn shards(&self, max_binding: u64) -> Vec<Range<usize>> {
        let tiles = padded_rows(self.packed.shape().n()) / TILE_ROWS;
        let fit = usize::try_from(max_binding / 4).unwrap_or(usize::MAX) / self.tile_words();
        // A tile that does not fit at all is refused by name when it is uploaded.
        let fit = fit.max(1);
        (0..tiles).step_by(fit).map(|first| first..(first + fit).min(tiles)).collect()
    }

    /// The arrays to upload, in the order that [`GpuMatrix::from_slices`] takes them back.
    pub fn parts(&self, gpu: &Gpu) -> Vec<&[u32]> {
        let tile_words = self.tile_words();
        let mut parts = Vec::new();
        for tiles in self.shards(gpu.max_binding()) {
            parts.push(&self.packed.words()[tiles.start * tile_words..tiles.end * tile_words]);
            let rows = tiles.start * TILE_ROWS..tiles.end * TILE_ROWS;
            parts.push(bytemuck::cast_slice(&self.offset[rows]));
        }
        parts.push(bytemuck::cast_slice(&self.weight_scale));
        parts
    }
}

/// What a variant adds to each row's sum: see the headers of the GEMV kernels.
pub fn row_offsets(packed: &Packed) -> Vec<i32> {
    let chunks = k_chunks(packed.shape().k());
    match packed.layout() {
        Layout::Planes => planes::negatives(packed.words(), chunks),
        Layout::I2 => {
            i2::code_sums(packed.words(), chunks).into_iter().map(|sum| -128 * sum).collect()
        }
    }
}

/// A ternary matrix on the device.
pub struct GpuMatrix {
    /// `[N, K]`.
    pub shape: MatShape,
    /// Tiles, words and row offsets of each shard.
    pub shards: Vec<(Range<usize>, Slice, Slice)>,
    /// `[N]`.
    pub weight_scale: Slice,
}

impl GpuMatrix {
    /// The matrix whose [`HostMatrix::parts`] were uploaded to the next of `slices`.
    pub fn from_slices(
        gpu: &Gpu,
        host: &HostMatrix,
        slices: &mut impl Iterator<Item = Slice>,
    ) -> Self {
        let mut next = || slices.next().expect("as many slices as parts");
        let ranges = host.shards(gpu.max_binding());
        let shards = ranges.into_iter().map(|tiles| (tiles, next(), next())).collect();
        Self { shape: host.packed.shape(), shards, weight_scale: next() }
    }
}

/// A full-precision table on the device.
pub struct GpuTable {
    /// Each shard and its rows.
    pub shards: Vec<(DenseShard, Slice)>,
}

/// Rows written in one go: bounds the staging memory of an upload.
const UPLOAD_BYTES: usize = 8 << 20;

impl GpuTable {
    /// Uploads a table in shards that fit a binding, rows padded to 16 bytes.
    ///
    /// # Errors
    /// [`crate::Error::GpuLimit`] if a row does not fit.
    pub fn upload(gpu: &Gpu, what: &str, table: &Table) -> Result<Self> {
        let format = match table.data() {
            TableData::Bf16(_) => DenseFormat::Bf16,
            TableData::F16(_) => DenseFormat::F16,
            TableData::F32(_) => DenseFormat::F32,
            TableData::Codes(_) | TableData::Groups(_) => {
                return Err(unsupported("a packed embedding table"));
            }
        };
        let (n, k) = (table.shape().n(), table.shape().k());
        let row_bytes = format.units(k) * 16;
        let fit = usize::try_from(gpu.max_binding()).unwrap_or(usize::MAX) / row_bytes;
        let fit = fit.max(1);
        let mut shards = Vec::new();
        for base in (0..n).step_by(fit) {
            let rows = fit.min(n - base);
            let slice = gpu.storage(what, rows * row_bytes / 4)?;
            let batch = (UPLOAD_BYTES / row_bytes).max(1);
            let mut bytes = vec![0u8; batch.min(rows) * row_bytes];
            for first in (0..rows).step_by(batch) {
                let count = batch.min(rows - first);
                for (row, out) in bytes.chunks_exact_mut(row_bytes).take(count).enumerate() {
                    let at = (base + first + row) * k..(base + first + row + 1) * k;
                    match table.data() {
                        TableData::Bf16(bits) | TableData::F16(bits) => {
                            out[..2 * k].copy_from_slice(bytemuck::cast_slice(&bits[at]));
                        }
                        TableData::F32(values) => {
                            out[..4 * k].copy_from_slice(bytemuck::cast_slice(&values[at]));
                        }
                        TableData::Codes(_) | TableData::Groups(_) => {
                            unreachable!("refused above")
                        }
                    }
                }
                let offset = (first * row_bytes) as u64;
                gpu.queue.write_buffer(&slice.buffer, offset, &bytes[..count * row_bytes]);
                gpu.queue.submit([]);
                gpu.wait("upload a table")?;
            }
            shards.push((DenseShard { format, k, base, rows }, slice));
        }
        Ok(Self { shards })
    }
}

fn unsupported(what: &'static str) -> Error {
    Error::UnsupportedOnDevice { device: "the GPU backend", what }
}
