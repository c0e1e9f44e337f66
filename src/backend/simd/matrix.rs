//! Weights as the backend keeps them.

use cpu_ref::layout::TILE_ROWS;

use super::columns::Columns;
use super::{CHUNK_WORDS, GroupLayout, GroupWeights, Kernels, TableRows};
use crate::error::Result;
use crate::layout::{Layout, Packed, Pieces, Signs};
use crate::shape::MatShape;
use crate::weights::{
    Input, PackedRun, RunScales, Table, TableData, TernaryMatrix, WeightScale, is_binary,
    runs_of_input,
};

/// Matrices that read the same vector, `[N, K]` one after another.
pub(super) struct Linears {
    runs: Vec<Matrix>,
    columns: Option<Columns>,
}

impl Linears {
    /// Packs the rows of `parts`.
    pub(super) fn pack(parts: &[&TernaryMatrix]) -> Result<Self> {
        let runs = runs_of_input(parts).into_iter().map(Matrix::pack).collect::<Result<_>>()?;
        Ok(Self { runs, columns: None })
    }

    /// With the matrix by columns beside itself, if there is one alone and its inputs are codes.
    pub(super) fn with_columns(self) -> Self {
        let columns = match &self.runs[..] {
            [Matrix { scales: Scales::Rows(_), weights: Weights::I2(packed), .. }] => {
                Some(Columns::pack(packed))
            }
            _ => None,
        };
        Self { columns, ..self }
    }

    /// The matrix by columns.
    pub(super) fn columns(&self) -> Option<&Columns> {
        self.columns.as_ref()
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
    Signs(Packed<Signs>),
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

    /// `[tiles][chunks][32][4]`.
    pub(super) fn words(&self) -> &[u32] {
        match &self.weights {
            Weights::I2(packed) => packed.words(),
            Weights::Signs(packed) => packed.words(),
        }
    }

    pub(crate) fn layout(&self) -> GroupLayout {
        match self.weights {
            Weights::I2(_) => GroupLayout::I2,
            Weights::Signs(_) => GroupLayout::Signs,
        }
    }

    /// Chunks along K.
    pub(super) fn chunks(&self) -> usize {
        self.shape.k().div_ceil(self.layout().chunk_k())
    }

    /// Words of a tile of 32 rows.
    pub(super) fn tile_words(&self) -> usize {
        self.chunks() * CHUNK_WORDS
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
    }
}
