//! Matrices on the device: linear layers packed for their kernels, tables in shards.

use std::ops::Range;

use cpu_ref::layout::{TILE_ROWS, k_chunks};

use super::buffer::Slice;
use super::device::Gpu;
use super::kernels::{
    DenseFormat, DenseShard, GroupMatrix, LinearRows, MAX_HADAMARD_BLOCK, MAX_INT8_GROUP, RowOrder,
    RowsOut, SumPlans, padded_rows,
};
use super::shader::{self, Kernel};
use crate::error::{Error, Result};
use crate::format::float::Float;
use crate::layout::{Layout, Packed, Signs, i2, planes};
use crate::shape::MatShape;
use crate::weights::{
    Codes, Input, PackedRun, Rotation, RunScales, StoredRows, Table, TableData, TernaryMatrix,
    WeightScale, is_binary, runs_of_input,
};

/// How a matrix is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// One scale a matrix: int8 activations, i32 sums.
    Sums(SumPlans),
    /// Scales of groups of inputs: f32 results.
    Groups {
        /// Whether activations are int8 with a scale a group; else f32.
        int8: bool,
    },
}

impl Method {
    /// Its kernel for one token.
    pub fn gemv(self) -> Kernel {
        match self {
            Self::Sums(plans) => plans.gemv.variant.gemv(),
            Self::Groups { int8: false } => shader::GROUP_GEMV,
            Self::Groups { int8: true } => shader::GROUP_GEMV_INT8,
        }
    }
}

/// Packed weights on the host.
enum Weights {
    Ternary(Packed),
    Binary(Packed<Signs>),
}

/// A run of matrices as its kernels read it, still on the host.
pub struct HostMatrix {
    weights: Weights,
    kind: Kind,
    /// What lies beside the weights of each tile: the constants that a variant adds to each row, or
    /// the scales of groups.
    beside: Vec<u32>,
    /// `[N]`, empty where groups have scales.
    weight_scale: Vec<f32>,
}

/// A matrix's method with what it needs to know.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// See [`Method::Sums`].
    Sums(SumPlans, MatShape),
    /// See [`Method::Groups`].
    Groups(GroupMatrix, bool),
}

impl Kind {
    /// `[N, K]`.
    pub fn shape(self) -> MatShape {
        match self {
            Self::Sums(_, shape) => shape,
            Self::Groups(matrix, _) => matrix.shape,
        }
    }
}

impl HostMatrix {
    /// Packs the rows of a run one after another.
    ///
    /// # Errors
    /// If a row is malformed, or a group too long for its kernels.
    pub fn pack(method: Method, run: &[&TernaryMatrix], order: RowOrder) -> Result<Self> {
        let rows = order.rows(run.iter().map(|part| part.shape().n()).sum());
        let source = |n| order.source(n);
        match (method, run[0].scale()) {
            (Method::Groups { int8: true }, WeightScale::Groups { group })
                if group > MAX_INT8_GROUP =>
            {
                let name = "inputs a scale, with int8 activations on a GPU";
                Err(Error::Dimension { name, found: group, max: MAX_INT8_GROUP })
            }
            (Method::Groups { .. }, _) if is_binary(run) => {
                let PackedRun { packed, scales } = PackedRun::pack_rows(run, Signs, rows, source)?;
                let shape = packed.shape();
                Ok(Self::new(method, shape, Weights::Binary(packed), scales))
            }
            _ => {
                let layout = match method {
                    Method::Sums(plans) => plans.gemv.variant.layout(),
                    Method::Groups { .. } => Layout::Planes,
                };
                let PackedRun { packed, scales } = PackedRun::pack_rows(run, layout, rows, source)?;
                let shape = packed.shape();
                Ok(Self::new(method, shape, Weights::Ternary(packed), scales))
            }
        }
    }

    fn new(method: Method, shape: MatShape, weights: Weights, scales: RunScales) -> Self {
        match (method, scales, &weights) {
            (Method::Sums(plans), RunScales::Rows(weight_scale), Weights::Ternary(packed)) => {
                let beside = bytemuck::cast_vec(row_offsets(packed));
                Self { kind: Kind::Sums(plans, shape), beside, weight_scale, weights }
            }
            (Method::Groups { int8 }, RunScales::Groups { group, words: beside }, _) => {
                let binary = matches!(weights, Weights::Binary(_));
                let kind = Kind::Groups(GroupMatrix { shape, group, binary }, int8);
                Self { kind, beside, weight_scale: Vec::new(), weights }
            }
            _ => unreachable!("the method follows the scales"),
        }
    }

    fn words(&self) -> &[u32] {
        match &self.weights {
            Weights::Ternary(packed) => packed.words(),
            Weights::Binary(packed) => packed.words(),
        }
    }

    fn tiles(&self) -> usize {
        padded_rows(self.kind.shape().n()) / TILE_ROWS
    }

    /// Tile ranges whose words fit a binding.
    fn shards(&self, max_binding: u64) -> Vec<Range<usize>> {
        let tiles = self.tiles();
        let tile_words = self.words().len() / tiles;
        let fit = usize::try_from(max_binding / 4).unwrap_or(usize::MAX) / tile_words;
        // Tiles of gate and up stay together. What does not fit at all is refused by name when it is
        // uploaded.
        let fit = if fit > 1 { fit - fit % 2 } else { 1 };
        (0..tiles).step_by(fit).map(|first| first..(first + fit).min(tiles)).collect()
    }

    /// The words of some tiles, and what lies beside them.
    fn shard(&self, tiles: &Range<usize>) -> [&[u32]; 2] {
        [self.words(), &self.beside].map(|all| {
            let tile_words = all.len() / self.tiles();
            &all[tiles.start * tile_words..tiles.end * tile_words]
        })
    }

    /// The arrays to upload, in the order that [`GpuMatrix::from_slices`] takes them back.
    pub fn parts(&self, gpu: &Gpu) -> Vec<&[u32]> {
        self.shards(gpu.max_binding()).iter().flat_map(|tiles| self.shard(tiles)).collect()
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

/// A matrix on the device.
pub struct GpuMatrix {
    /// What its kernels need to know.
    pub kind: Kind,
    /// Tiles, words and what lies beside them, of each shard.
    pub shards: Vec<(Range<usize>, Slice, Slice)>,
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
        Self { kind: host.kind, shards }
    }

    /// Uploads a matrix, each shard to buffers of its own.
    ///
    /// # Errors
    /// [`Error::GpuLimit`] if a tile does not fit a binding.
    pub fn upload(gpu: &Gpu, what: &str, host: &HostMatrix) -> Result<Self> {
        let mut slices = Vec::new();
        for part in host.parts(gpu) {
            let slice = gpu.weights(what, part.len())?;
            for (i, words) in part.chunks(UPLOAD_BYTES / 4).enumerate() {
                let offset = (i * UPLOAD_BYTES) as u64;
                gpu.write_weights(&slice, offset, bytemuck::cast_slice(words));
                gpu.queue.submit([]);
                gpu.wait("upload a table")?;
            }
            slices.push(slice);
        }
        Ok(Self::from_slices(gpu, host, &mut slices.into_iter()))
    }

    /// Where a shard's rows go in an output that has this matrix's rows from `base` on.
    pub fn rows_out(&self, tiles: &Range<usize>, base: usize, stride: usize) -> RowsOut {
        let rows = tiles.start * TILE_ROWS..(tiles.end * TILE_ROWS).min(self.kind.shape().n());
        RowsOut { base: base + rows.start, rows: rows.len(), stride }
    }
}

/// Matrices that read the same vector, still on the host: one for each run of the same input.
pub struct HostLinear {
    runs: Vec<(Input, HostMatrix)>,
    rows: LinearRows,
    /// In the order of the accumulator's rows; 0 where groups have scales.
    weight_scale: Vec<f32>,
    /// Offset and scale of each row, for the fused steps; empty where there are none.
    fused_rows: Vec<[u32; 2]>,
}

impl HostLinear {
    /// Packs matrices that read the same vector; `method` says how a run is multiplied.
    ///
    /// # Errors
    /// If a row is malformed, or a rotation or group is too long for its kernel.
    pub fn pack(
        parts: &[&TernaryMatrix],
        act_stride: usize,
        order: RowOrder,
        method: impl Fn(WeightScale) -> Method,
    ) -> Result<Self> {
        let mut runs = Vec::new();
        let split = runs_of_input(parts);
        // Only a single run of sums is read in another order.
        let is_sums = matches!(parts[0].scale(), WeightScale::Tensor(_));
        let order = if split.len() == 1 && is_sums { order } else { RowOrder::Natural };
        let mut rows = LinearRows { runs: Vec::new(), act_stride, order };
        let mut weight_scale = Vec::new();
        for run in split {
            let input = run[0].input().clone();
            check_rotation(input.rotation.as_deref())?;
            let method = method(run[0].scale());
            let matrix = HostMatrix::pack(method, run, order)?;
            rows.runs.push((matrix.kind.shape().n(), matches!(method, Method::Groups { .. })));
            weight_scale.extend_from_slice(&matrix.weight_scale);
            weight_scale.resize(rows.padded(), 0.0);
            runs.push((input, matrix));
        }
        let fused_rows = match runs.as_slice() {
            [(input, matrix)] if is_sums && *input == Input::default() => {
                let pairs = matrix.beside.iter().zip(&weight_scale);
                pairs.map(|(&offset, scale)| [offset, scale.to_bits()]).collect()
            }
            _ => Vec::new(),
        };
        Ok(Self { runs, rows, weight_scale, fused_rows })
    }

    /// The arrays to upload, in the order that [`GpuLinear::from_slices`] takes them back.
    pub fn parts(&self, gpu: &Gpu) -> Vec<&[u32]> {
        let mut parts = Vec::new();
        for (input, matrix) in &self.runs {
            parts.extend(matrix.parts(gpu));
            parts.extend(input.norm.as_deref().map(bytemuck::cast_slice::<f32, u32>));
            let signs = input.rotation.as_ref().map(|rotation| rotation.signs.as_slice());
            parts.extend(signs.map(bytemuck::cast_slice::<f32, u32>));
        }
        parts.push(bytemuck::cast_slice(&self.weight_scale));
        for tiles in self.fused_shards(gpu) {
            let rows = tiles.start * TILE_ROWS..tiles.end * TILE_ROWS;
            parts.push(bytemuck::cast_slice(&self.fused_rows[rows]));
        }
        parts
    }

    /// The shards that have rows for the fused steps.
    fn fused_shards(&self, gpu: &Gpu) -> Vec<Range<usize>> {
        if self.fused_rows.is_empty() {
            return Vec::new();
        }
        self.runs[0].1.shards(gpu.max_binding())
    }
}

fn check_rotation(rotation: Option<&Rotation>) -> Result<()> {
    match rotation {
        Some(rotation) if rotation.block > MAX_HADAMARD_BLOCK => {
            let name = "values a block of a Hadamard rotation on a GPU";
            Err(Error::Dimension { name, found: rotation.block, max: MAX_HADAMARD_BLOCK })
        }
        _ => Ok(()),
    }
}

/// A rotation on the device.
pub struct GpuRotation {
    /// Values a block.
    pub block: usize,
    /// ±1, `[K]`.
    pub signs: Slice,
}

/// A run of a [`GpuLinear`].
pub struct GpuRun {
    /// The weights.
    pub matrix: GpuMatrix,
    /// The norm of its input.
    pub norm: Option<Slice>,
    /// The rotation of its input, after the norm.
    pub rotation: Option<GpuRotation>,
}

/// Matrices that read the same vector, on the device.
pub struct GpuLinear {
    /// One for each way to take the vector.
    pub runs: Vec<GpuRun>,
    /// How their rows lie in the accumulator.
    pub rows: LinearRows,
    /// In the order of the accumulator's rows.
    pub weight_scale: Slice,
    /// Offset and scale of each row, for each shard of a single run; empty where the fused steps do
    /// not run.
    pub fused_rows: Vec<Slice>,
}

impl GpuLinear {
    /// The matrices whose [`HostLinear::parts`] were uploaded to the next of `slices`.
    pub fn from_slices(
        gpu: &Gpu,
        host: &HostLinear,
        slices: &mut impl Iterator<Item = Slice>,
    ) -> Self {
        const EACH: &str = "as many slices as parts";
        let mut runs = Vec::new();
        for (input, matrix) in &host.runs {
            let matrix = GpuMatrix::from_slices(gpu, matrix, slices);
            let norm = input.norm.as_ref().map(|_| slices.next().expect(EACH));
            let rotation = input.rotation.as_ref().map(|rotation| GpuRotation {
                block: rotation.block,
                signs: slices.next().expect(EACH),
            });
            runs.push(GpuRun { matrix, norm, rotation });
        }
        let weight_scale = slices.next().expect(EACH);
        let shards = host.fused_shards(gpu).len();
        let fused_rows = (0..shards).map(|_| slices.next().expect(EACH)).collect();
        Self { runs, rows: host.rows.clone(), weight_scale, fused_rows }
    }
}

/// A table on the device.
pub struct GpuTable {
    /// Its elements.
    pub data: GpuTableData,
    /// The rotation that its rows are stored in.
    pub rotation: Option<GpuRotation>,
}

/// The elements of a [`GpuTable`].
pub enum GpuTableData {
    /// Rows of 16-byte units.
    Dense(Vec<DenseRows>),
    /// Packed as a matrix.
    Groups(GroupMatrix, GpuMatrix),
}

/// A shard of a dense table.
pub struct DenseRows {
    /// Which rows, and their format.
    pub shard: DenseShard,
    /// Units, scales and minima of the rows; one word each where the format has none.
    pub buffers: [Slice; 3],
}

/// Bytes written in one go: bounds the staging memory of an upload.
pub(super) const UPLOAD_BYTES: usize = 8 << 20;

impl GpuTable {
    /// Uploads a table in shards that fit a binding, rows padded to 16 bytes. One that is still in its file
    /// is read piece by piece.
    ///
    /// # Errors
    /// [`crate::Error::GpuLimit`] if a row does not fit, [`crate::Error::Dimension`] for a rotation
    /// in too large blocks.
    pub async fn upload(gpu: &Gpu, what: &str, table: &Table) -> Result<Self> {
        check_rotation(table.rotation().map(AsRef::as_ref))?;
        let rotation = table.rotation().map(|rotation| {
            let signs = gpu.upload_weights("rotation", &rotation.signs)?;
            Ok::<_, Error>(GpuRotation { block: rotation.block, signs })
        });
        let data = match table.data() {
            TableData::Bf16(_) => upload_dense(gpu, what, table, DenseFormat::Bf16).await?,
            TableData::F16(_) => upload_dense(gpu, what, table, DenseFormat::F16).await?,
            TableData::F32(_) => upload_dense(gpu, what, table, DenseFormat::F32).await?,
            TableData::Codes(Codes { group, min, .. }) => {
                let format = DenseFormat::Codes { group: *group, has_min: !min.is_empty() };
                upload_dense(gpu, what, table, format).await?
            }
            TableData::Stored(rows) => upload_dense(gpu, what, table, stored_format(rows)).await?,
            TableData::Groups(matrix) => {
                let host =
                    HostMatrix::pack(Method::Groups { int8: false }, &[matrix], RowOrder::Natural)?;
                let Kind::Groups(group_matrix, _) = host.kind else {
                    unreachable!("packed as groups")
                };
                GpuTableData::Groups(group_matrix, GpuMatrix::upload(gpu, what, &host)?)
            }
        };
        Ok(Self { data, rotation: rotation.transpose()? })
    }
}

fn stored_format(rows: &StoredRows) -> DenseFormat {
    match (rows.ty().plain(), rows.ty().group()) {
        (Some(Float::Bf16), _) => DenseFormat::Bf16,
        (Some(Float::F16), _) => DenseFormat::F16,
        (Some(Float::F32), _) => DenseFormat::F32,
        (None, group) => {
            let group = group.expect("floats or codes with a scale a group");
            DenseFormat::Codes { group, has_min: rows.has_min() }
        }
    }
}

async fn upload_dense(
    gpu: &Gpu,
    what: &str,
    table: &Table,
    format: DenseFormat,
) -> Result<GpuTableData> {
    let (n, k) = (table.shape().n(), table.shape().k());
    let row_bytes = format.units(k) * 16;
    let fit = usize::try_from(gpu.max_binding()).unwrap_or(usize::MAX) / row_bytes;
    let fit = fit.max(1);
    let [row_scales, row_mins] = match format {
        DenseFormat::Codes { group, has_min } => [k / group, if has_min { k / group } else { 0 }],
        DenseFormat::Bf16 | DenseFormat::F16 | DenseFormat::F32 => [0; 2],
    };
    let mut shards = Vec::new();
    for base in (0..n).step_by(fit) {
        let rows = fit.min(n - base);
        let slice = gpu.weights(what, rows * row_bytes / 4)?;
        let beside = |words| match words {
            0 => gpu.storage(what, 1),
            words => gpu.weights(what, rows * words),
        };
        let [scales, mins] = [beside(row_scales)?, beside(row_mins)?];
        let batch = (UPLOAD_BYTES / row_bytes).max(1);
        let mut bytes = vec![0u8; batch.min(rows) * row_bytes];
        for first in (0..rows).step_by(batch) {
            let count = batch.min(rows - first);
            let read = table.rows(base + first..base + first + count)?;
            let (data, start) = read.data();
            let at = base + first - start;
            for (row, out) in bytes.chunks_exact_mut(row_bytes).take(count).enumerate() {
                let row = row_of(data, at + row, k);
                out[..row.len()].copy_from_slice(row);
            }
            let offset = (first * row_bytes) as u64;
            gpu.write_weights(&slice, offset, &bytes[..count * row_bytes]);
            if let TableData::Codes(Codes { scale, min, .. }) = data {
                for (slice, values, each) in [(&scales, scale, row_scales), (&mins, min, row_mins)]
                {
                    if each == 0 {
                        continue;
                    }
                    let values = &values[at * each..(at + count) * each];
                    let offset = (first * each * size_of::<f32>()) as u64;
                    gpu.write_weights(slice, offset, bytemuck::cast_slice(values));
                }
            }
            gpu.queue.submit([]);
            // What has been written waits in memory until the device has taken it.
            gpu.done("upload a table").await?;
        }
        let shard = DenseShard { format, k, base, rows };
        shards.push(DenseRows { shard, buffers: [slice, scales, mins] });
    }
    Ok(GpuTableData::Dense(shards))
}

/// The bytes of row `n` of a table that is stored row by row.
fn row_of(data: &TableData, n: usize, k: usize) -> &[u8] {
    let at = n * k..(n + 1) * k;
    match data {
        TableData::Bf16(bits) | TableData::F16(bits) => bytemuck::cast_slice(&bits[at]),
        TableData::F32(values) => bytemuck::cast_slice(&values[at]),
        TableData::Codes(Codes { codes, .. }) => bytemuck::cast_slice(&codes[at]),
        TableData::Groups(_) => unreachable!("packed in tiles"),
        TableData::Stored(_) => unreachable!("rows have been read"),
    }
}
