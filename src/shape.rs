//! Newtypes for shapes: checked once, trusted afterwards.

use crate::error::{Error, Result};

/// Most rows, columns or tokens that any dimension may have; keeps every product within u64 and
/// every index within u32.
pub(crate) const MAX_DIMENSION: usize = 1 << 24;

/// The shape of a matrix `[N, K]`: N output features (rows), K input features (columns).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatShape {
    n: usize,
    k: usize,
}

impl MatShape {
    /// A shape of `n` rows and `k` columns, both at least 1 and at most 2²⁴.
    ///
    /// # Errors
    /// [`Error::Dimension`] outside that range.
    pub fn new(n: usize, k: usize) -> Result<Self> {
        for (name, value) in [("rows", n), ("columns", k)] {
            if value == 0 || value > MAX_DIMENSION {
                return Err(Error::Dimension { name, found: value, max: MAX_DIMENSION });
            }
        }
        Ok(Self { n, k })
    }

    /// N, rows.
    pub fn n(self) -> usize {
        self.n
    }

    /// K, columns.
    pub fn k(self) -> usize {
        self.k
    }

    /// Weights: `N·K`.
    pub fn len(self) -> usize {
        self.n * self.k
    }

    /// Always false: both dimensions are at least 1.
    pub fn is_empty(self) -> bool {
        false
    }
}

impl std::fmt::Display for MatShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}]", self.n, self.k)
    }
}
