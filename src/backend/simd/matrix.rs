//! Weights as the backend keeps them.

use cpu_ref::layout::TILE_ROWS;

use super::columns::Columns;
use super::rows::{self, Rows};
use super::{CHUNK_WORDS, GroupLayout, GroupWeights, Kernels, TableRows};
use crate::error::Result;
use crate::format::Bytes;
use crate::layout::{Layout, Packed, PackedBase3, Pieces, Signs, base3_len_bytes};
use crate::shape::MatShape;
use crate::weights::{
    Input, PackedRun, RunScales, Table, TableData, TernaryMatrix, WeightScale, is_binary,
    runs_of_input,
};

/// Matrices that read the same vector, `[N, K]` one after another.
pub(super) struct Linears {
    runs: Vec<Matrix>,
    columns: Option<Columns>,
    up: Option<UpRows>,
}

/// `up_proj` by rows, beside the matrix of which it is the second half.
pub(super) struct UpRows {
    pub(super) rows: Rows,
    /// The largest of its rows' scales.
    pub(super) largest_scale: f32,
}

impl Linears {
    fn new(runs: Vec<Matrix>) -> Self {
        Self { runs, columns: None, up: None }
    }

    /// Packs the rows of `parts`, with five weights a byte where `base3` says so and one number
    /// scales the matrix.
    pub(super) fn pack(parts: &[&TernaryMatrix], base3: bool) -> Result<Self> {
        let pack = |run: &[&TernaryMatrix]| match Matrix::base3_scales(run).filter(|_| base3) {
            Some(scales) => Matrix::pack_base3(run, scales),
            None => Matrix::pack(run),
        };
        runs_of_input(parts).into_iter().map(pack).collect::<Result<_>>().map(Self::new)
    }

    /// The one matrix `[N, K]` of words and scales (f32 `[N]`) that were packed before; `None` if they are
    /// not as many as it needs.
    pub(super) fn of_words(
        shape: MatShape,
        base3: bool,
        words: &Bytes,
        scales: &Bytes,
    ) -> Option<Self> {
        let weights = match is_base3(shape, base3) {
            true => Weights::Base3(PackedBase3::of_words(shape, words)?),
            false => Weights::I2(Packed::of_words(Layout::I2, shape, words)?),
        };
        let scales: Vec<f32> = bytemuck::try_cast_slice(scales).ok()?.to_vec();
        let scales = (scales.len() == shape.n()).then_some(Scales::Rows(scales))?;
        Some(Self::new(vec![Matrix { shape, scales, input: Input::default(), weights }]))
    }

    /// Words and scales to make it again from; `None` if it is more than one matrix, or one that takes
    /// more to make.
    pub(super) fn sections(&self) -> Option<[&[u8]; 2]> {
        match &self.runs[..] {
            [matrix] if !matrix.has_input() => match &matrix.scales {
                Scales::Rows(scales) => {
                    Some([bytemuck::cast_slice(matrix.words()), bytemuck::cast_slice(scales)])
                }
                Scales::Groups { .. } => None,
            },
            _ => None,
        }
    }

    /// The lengths of [`Linears::sections`] of `[N, K]`, in bytes.
    pub(super) fn section_lens(shape: MatShape, base3: bool) -> [usize; 2] {
        let words = match is_base3(shape, base3) {
            true => base3_len_bytes(shape),
            false => size_of::<u32>() * cpu_ref::layout::len_words(shape.n(), shape.k()),
        };
        [words, size_of::<f32>() * shape.n()]
    }

    /// With the matrix by columns beside itself, if there is one alone and its inputs are codes.
    pub(super) fn add_columns(&mut self) {
        self.columns = match &self.runs[..] {
            [Matrix { scales: Scales::Rows(_), weights, .. }] => match weights {
                Weights::I2(packed) => Some(Columns::pack(packed)),
                Weights::Base3(packed) => Some(Columns::pack(&packed.to_i2())),
                Weights::Signs(_) => None,
            },
            _ => None,
        };
    }

    /// The matrix by columns.
    pub(super) fn columns(&self) -> Option<&Columns> {
        self.columns.as_ref()
    }

    /// With the second half of its rows by themselves, too: those of `up_proj`, after as many of
    /// `gate_proj`. If there is one matrix alone, its input goes into codes as it is, and the halves
    /// meet between two tiles.
    pub(super) fn add_up_rows(&mut self) {
        let [matrix] = &self.runs[..] else { return };
        let (n, half) = (matrix.shape.n(), matrix.shape.n() / 2);
        let Scales::Rows(scales) = &matrix.scales else { return };
        if matrix.has_input() || !n.is_multiple_of(2 * TILE_ROWS) {
            return;
        }
        let rows = match &matrix.weights {
            Weights::I2(packed) => Rows::pack(packed, half..n),
            Weights::Base3(packed) => Rows::pack(&packed.to_i2(), half..n),
            Weights::Signs(_) => return,
        };
        self.up = Some(UpRows { rows, largest_scale: rows::largest(&scales[half..]) });
    }

    /// The second half by rows.
    pub(super) fn up(&self) -> Option<&UpRows> {
        self.up.as_ref()
    }

    /// The matrices, each of which takes its input in one way.
    pub(super) fn runs(&self) -> &[Matrix] {
        &self.runs
    }

    /// K.
    pub(super) fn k(&self) -> usize {
        self.runs[0].shape.k()
    }

    /// N of all together.
    pub(super) fn n(&self) -> usize {
        self.runs.iter().map(|run| run.shape.n()).sum()
    }
}

/// A packed matrix `[N, K]`.
pub(crate) struct Matrix {
    pub(crate) shape: MatShape,
    pub(super) scales: Scales,
    /// What happens to the vector before it is multiplied.
    pub(super) input: Input,
    weights: Weights,
}

/// What multiplies the trits: [`RunScales`], of a matrix.
pub(super) type Scales = RunScales;

/// The trits in the layout that the kernels want.
enum Weights {
    I2(Packed),
    Base3(PackedBase3),
    Signs(Packed<Signs>),
}

/// Most columns of a matrix with five weights a byte: a sum of two digits in five, each at most 2, times
/// 64 and an activation, fits an i32.
const MAX_BASE3_K: usize = 1 << 18;
const _: () = assert!((MAX_BASE3_K as u64 / 5 + 64) * 2 * 2 * 64 * 128 < 1 << 31);

/// Whether a matrix that one number scales has five weights a byte where `base3` asks for it.
fn is_base3(shape: MatShape, base3: bool) -> bool {
    base3 && shape.k() <= MAX_BASE3_K
}

impl Matrix {
    /// Packs a run of [`runs_of_input`]: binary ones with long groups as signs.
    pub(crate) fn pack(run: &[&TernaryMatrix]) -> Result<Self> {
        let input = run[0].input().clone();
        let as_signs = match run[0].scale() {
            WeightScale::Tensor(_) => false,
            WeightScale::Groups { group } => is_binary(run) && group.is_multiple_of(Signs::CHUNK_K),
        };
        Ok(if as_signs {
            let PackedRun { packed, scales } = PackedRun::pack(run, Signs)?;
            Self { shape: packed.shape(), scales, input, weights: Weights::Signs(packed) }
        } else {
            let PackedRun { packed, scales } = PackedRun::pack(run, Layout::I2)?;
            Self { shape: packed.shape(), scales, input, weights: Weights::I2(packed) }
        })
    }

    /// The scale of each row of a run that can have five weights a byte.
    fn base3_scales(run: &[&TernaryMatrix]) -> Option<Vec<f32>> {
        let mut scales = Vec::new();
        for part in run {
            match part.scale() {
                WeightScale::Tensor(scale) if is_base3(part.shape(), true) => {
                    scales.resize(scales.len() + part.shape().n(), scale);
                }
                WeightScale::Tensor(_) | WeightScale::Groups { .. } => return None,
            }
        }
        Some(scales)
    }

    /// Packs a run with five weights a byte.
    fn pack_base3(run: &[&TernaryMatrix], scales: Vec<f32>) -> Result<Self> {
        let shape = MatShape::new(scales.len(), run[0].shape().k())?;
        let packed = PackedBase3::try_of_blocks(shape, |rows| {
            let (first, len) = (rows.start, rows.len());
            PackedRun::pack_rows(run, Layout::I2, len, |n| Some(first + n)).map(|run| run.packed)
        })?;
        let (scales, weights) = (Scales::Rows(scales), Weights::Base3(packed));
        Ok(Self { shape, scales, input: run[0].input().clone(), weights })
    }

    /// Whether it has five weights a byte.
    pub(super) fn is_base3(&self) -> bool {
        matches!(self.weights, Weights::Base3(_))
    }

    /// Whole tiles: `[tiles][chunks][32][4]`, or as `cpu_ref::layout::base3` has them.
    pub(super) fn words(&self) -> &[u32] {
        match &self.weights {
            Weights::I2(packed) => packed.words(),
            Weights::Base3(packed) => packed.words(),
            Weights::Signs(packed) => packed.words(),
        }
    }

    pub(crate) fn layout(&self) -> GroupLayout {
        match self.weights {
            Weights::I2(_) | Weights::Base3(_) => GroupLayout::I2,
            Weights::Signs(_) => GroupLayout::Signs,
        }
    }

    /// Bytes of the weights, their scales, and the norm of their own input.
    pub(super) fn bytes(&self) -> u64 {
        let scales = match &self.scales {
            Scales::Rows(scales) => size_of_val(scales.as_slice()),
            Scales::Groups { words, .. } => size_of_val(words.as_slice()),
        };
        let norm = self.input.norm.as_ref().map_or(0, |norm| size_of_val(&norm[..]));
        (size_of_val(self.words()) + scales + norm) as u64
    }

    /// Chunks along K.
    pub(super) fn chunks(&self) -> usize {
        self.shape.k().div_ceil(self.layout().chunk_k())
    }

    /// Words of a tile of 32 rows.
    pub(super) fn tile_words(&self) -> usize {
        match self.weights {
            Weights::Base3(_) => cpu_ref::layout::base3::tile_words(self.chunks()),
            Weights::I2(_) | Weights::Signs(_) => self.chunks() * CHUNK_WORDS,
        }
    }

    pub(super) fn tiles(&self) -> usize {
        self.shape.n().div_ceil(TILE_ROWS)
    }

    /// Scales a row; 0 where one number scales the matrix.
    pub(super) fn groups(&self) -> usize {
        match self.scales {
            Scales::Rows(_) => 0,
            Scales::Groups { group, .. } => self.shape.k() / group,
        }
    }

    /// Whether the vector is changed before it is multiplied.
    pub(super) fn has_input(&self) -> bool {
        self.input != Input::default()
    }

    /// A matrix with scales of groups, as the kernels take it.
    pub(crate) fn group_weights(&self) -> GroupWeights<'_> {
        let Scales::Groups { group, words } = &self.scales else {
            unreachable!("only asked of matrices with scales of groups")
        };
        GroupWeights::new(self.layout(), (self.words(), words), self.shape.k(), *group)
    }

    /// The name of the kernel that multiplies it.
    pub(super) fn kernel(&self) -> &'static str {
        match (&self.scales, &self.weights) {
            (_, Weights::Base3(_)) => "gemv_base3",
            (Scales::Rows(_), _) => "gemv_i2",
            (_, Weights::I2(_)) => "group_gemv_i2",
            (_, Weights::Signs(_)) => "group_gemv_signs",
        }
    }

    /// Row `n` of a matrix with scales of groups, as f32, a chunk at a time.
    pub(crate) fn row(&self, n: usize, out: &mut [f32]) {
        match &self.weights {
            Weights::I2(packed) => self.row_of(packed, n, out),
            Weights::Signs(packed) => self.row_of(packed, n, out),
            Weights::Base3(_) => unreachable!("one number scales it"),
        }
    }

    fn row_of<L: Pieces>(&self, packed: &Packed<L>, n: usize, out: &mut [f32]) {
        let Scales::Groups { group, words } = &self.scales else {
            unreachable!("only asked of matrices with scales of groups")
        };
        let groups = self.groups();
        packed.for_each_chunk(n, |first, trits| {
            let g = first / group;
            let bits = cpu_ref::layout::group_scales::get(words, groups, n, g);
            let scale = super::portable::widen_f16(bits);
            for (out, &trit) in out[first..].iter_mut().zip(trits) {
                *out = scale * f32::from(trit);
            }
        });
    }
}

/// The embedding table or the LM head.
pub(super) enum Head {
    /// In the precision of the file.
    Plain(Table),
    /// Binary or ternary with scales of groups.
    Packed {
        matrix: Matrix,
        /// What the rows are stored in.
        rotation: Option<std::sync::Arc<crate::weights::Rotation>>,
    },
}

impl Head {
    /// Packs a table if it is one of trits.
    pub(super) fn pack(table: Table) -> Result<Self> {
        let matrix = match table.data() {
            TableData::Groups(matrix) => Some(Matrix::pack(&[matrix])?),
            _ => None,
        };
        Ok(match matrix {
            Some(matrix) => Self::Packed { matrix, rotation: table.rotation().cloned() },
            None => Self::Plain(table),
        })
    }

    /// Bytes of the rows.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Plain(table) => table.bytes(),
            Self::Packed { matrix, .. } => matrix.bytes(),
        }
    }

    /// Copies a table out of a mapped file.
    pub(super) fn take_into_memory(&mut self) {
        if let Self::Plain(table) = self {
            table.take_into_memory();
        }
    }

    fn rotation(&self) -> Option<&crate::weights::Rotation> {
        match self {
            Self::Plain(table) => table.rotation().map(AsRef::as_ref),
            Self::Packed { rotation, .. } => rotation.as_deref(),
        }
    }

    /// Row `n` in its own basis, into `out[K]`.
    pub(super) fn row(&self, kernels: &dyn Kernels, n: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Plain(table) => table.row(n, out)?,
            Self::Packed { matrix, .. } => matrix.row(n, out),
        }
        if let Some(rotation) = self.rotation() {
            kernels.rotate_back(out, &rotation.signs, rotation.block);
        }
        Ok(())
    }

    /// Takes a head's input into the basis that its rows are stored in.
    pub(super) fn rotate(&self, kernels: &dyn Kernels, x: &mut [f32]) {
        if let Some(rotation) = self.rotation() {
            kernels.rotate(x, &rotation.signs, rotation.block);
        }
    }
}

/// The whole of a plain table, as the kernels take it.
pub(super) fn table_rows(table: &Table) -> TableRows<'_> {
    match table.data() {
        TableData::Bf16(rows) => TableRows::Bf16(rows),
        TableData::F16(rows) => TableRows::F16(rows),
        TableData::F32(rows) => TableRows::F32(rows),
        TableData::Codes(crate::weights::Codes { group, codes, scale, min }) => {
            TableRows::Codes { group: *group, codes, scale, min }
        }
        TableData::Groups(_) => unreachable!("`Head::pack` packs it"),
        TableData::Stored(_) => unreachable!("not of `embedding` and `lm_head`"),
    }
}
