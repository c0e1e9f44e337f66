//! Matrices of one input, packed as one.

use super::{Alphabet, TernaryMatrix, WeightScale};
use crate::error::Result;
use crate::layout::{Layout, Packed, Pieces};
use crate::shape::MatShape;

/// The rows of several matrices of the same K, one after another, packed with their scales.
pub struct PackedRun<L = Layout> {
    /// `[N, K]`.
    pub packed: Packed<L>,
    /// What multiplies the trits.
    pub scales: RunScales,
}

/// The scales of a [`PackedRun`].
#[derive(Debug, Clone, PartialEq)]
pub enum RunScales {
    /// `[N]`: that of the matrix a row came from.
    Rows(Vec<f32>),
    /// IEEE halves, `[N, K/group]`, as `cpu_ref::layout::group_scales` lays them out.
    Groups {
        /// Inputs a scale.
        group: usize,
        /// The packed halves.
        words: Vec<u32>,
    },
}

impl RunScales {
    /// Whether there is one a group.
    pub fn is_of_groups(&self) -> bool {
        matches!(self, Self::Groups { .. })
    }
}

impl<L: Pieces> PackedRun<L> {
    /// Packs a run of [`super::runs_of_input`], decoding row by row.
    ///
    /// # Errors
    /// [`crate::Error::TensorValue`] for a code that stands for no weight.
    ///
    /// # Panics
    /// If there is no matrix, they differ in K or groups, or a row with a 0 is to
    /// be packed as [`crate::layout::Signs`].
    pub fn pack(run: &[&TernaryMatrix], layout: L) -> Result<Self> {
        let rows = run.iter().map(|part| part.shape().n()).sum();
        Self::pack_rows(run, layout, rows, Some)
    }

    /// The same with `rows` rows in another order: `source(n)` is the row of the run that is packed
    /// as row `n`, or `None` for one of zeros.
    ///
    /// # Errors
    /// As [`PackedRun::pack`].
    ///
    /// # Panics
    /// As [`PackedRun::pack`], or if a source is past the last row.
    pub fn pack_rows(
        run: &[&TernaryMatrix],
        layout: L,
        rows: usize,
        source: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        let (k, groups) = (run[0].shape().k(), run[0].groups());
        assert!(run.iter().all(|part| part.shape().k() == k && part.groups() == groups));
        let rows_of = |part: &TernaryMatrix| 0..part.shape().n();
        let natural: Vec<_> =
            run.iter().flat_map(|&part| rows_of(part).map(move |n| (part, n))).collect();
        let origin: Vec<_> = (0..rows).map(|n| source(n).map(|n| natural[n])).collect();
        let shape = MatShape::new(rows, k)?;
        let (packed, words) =
            Packed::try_pack_with_scales(layout, shape, groups, |n, trits, scales| {
                let Some((part, n)) = origin[n] else {
                    trits.fill(0);
                    scales.fill(0);
                    return Ok(());
                };
                part.row_with_scales(n, trits, scales)
            })?;
        let row_scale = |origin: &Option<(&TernaryMatrix, usize)>| match origin {
            None => Some(0.0),
            Some((part, _)) => match part.scale() {
                WeightScale::Tensor(scale) => Some(scale),
                WeightScale::Groups { .. } => None,
            },
        };
        let scales = match run[0].scale() {
            WeightScale::Tensor(_) => {
                RunScales::Rows(origin.iter().filter_map(row_scale).collect())
            }
            WeightScale::Groups { group } => RunScales::Groups { group, words },
        };
        Ok(Self { packed, scales })
    }
}

/// Whether all weights of a run are −1 or +1.
pub fn is_binary(run: &[&TernaryMatrix]) -> bool {
    run.iter().all(|part| part.alphabet() == Alphabet::Binary)
}

#[cfg(test)]
mod tests {
    use super::super::runs_of_input;
    use super::*;
    use crate::layout::Signs;

    fn groups(n: usize, group: usize, alphabet: Alphabet) -> TernaryMatrix {
        let shape = MatShape::new(n, 128).unwrap();
        let scale = WeightScale::Groups { group };
        TernaryMatrix::synthetic(shape, n as u64, scale, alphabet)
    }

    #[test]
    fn a_run_is_its_matrices_one_after_another() {
        let parts = [groups(3, 64, Alphabet::Binary), groups(40, 64, Alphabet::Binary)];
        let run: Vec<_> = parts.iter().collect();
        assert!(is_binary(&run));
        let packed = PackedRun::pack(&run, Signs).unwrap();
        let RunScales::Groups { group: 64, words } = &packed.scales else { panic!("groups") };
        let (mut expected, mut scales, mut found) = ([0; 128], [0; 2], [0; 128]);
        for row in 0..43 {
            let (part, n) = if row < 3 { (0, row) } else { (1, row - 3) };
            parts[part].row_with_scales(n, &mut expected, &mut scales).unwrap();
            packed.packed.unpack_row(row, &mut found);
            assert_eq!(found, expected);
            let get = |g| cpu_ref::layout::group_scales::get(words, 2, row, g);
            assert_eq!([get(0), get(1)], scales);
        }
    }

    #[test]
    fn a_run_has_one_kind_of_scale() {
        let parts = [
            groups(1, 64, Alphabet::Ternary),
            groups(2, 128, Alphabet::Ternary),
            groups(3, 128, Alphabet::Binary),
            TernaryMatrix::from_trits(MatShape::new(1, 128).unwrap(), vec![0; 128], 1.0),
            TernaryMatrix::from_trits(MatShape::new(1, 128).unwrap(), vec![0; 128], 2.0),
        ];
        let all: Vec<_> = parts.iter().collect();
        let runs = runs_of_input(&all);
        assert_eq!(runs.iter().map(|run| run.len()).collect::<Vec<_>>(), [1, 2, 2]);
        assert!(!is_binary(runs[1]));
        let packed = PackedRun::pack(runs[2], Layout::I2).unwrap();
        assert_eq!(packed.scales, RunScales::Rows(vec![1.0, 2.0]));
    }
}
