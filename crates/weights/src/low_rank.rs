use crate::ElementType;

/// A low-rank update `ΔW ≈ B · A` with `B [out, rank]` and `A [rank, in]`, both row-major.
///
/// Ranks are nested when the solver orders them: the first `r` columns of B and rows of A are the best update of
/// rank `r` of the same problem.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    out_features: usize,
    in_features: usize,
    rank: usize,
    b: Vec<f32>,
    a: Vec<f32>,
    factor_type: ElementType,
}

impl LowRank {
    /// Rounds both factors to `factor_type` and keeps the rounded values.
    ///
    /// # Panics
    /// When a length does not fit.
    pub fn new(
        out_features: usize,
        in_features: usize,
        rank: usize,
        mut b: Vec<f32>,
        mut a: Vec<f32>,
        factor_type: ElementType,
    ) -> Self {
        assert_eq!(b.len(), out_features * rank, "B is [out, rank]");
        assert_eq!(a.len(), rank * in_features, "A is [rank, in]");
        for value in b.iter_mut().chain(a.iter_mut()) {
            *value = factor_type.round(*value);
        }
        LowRank { out_features, in_features, rank, b, a, factor_type }
    }

    /// Rows of the update.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of the update.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Number of columns of B and rows of A.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `[out, rank]`, row-major.
    pub fn b(&self) -> &[f32] {
        &self.b
    }

    /// `[rank, in]`, row-major.
    pub fn a(&self) -> &[f32] {
        &self.a
    }

    /// The type that the factors are rounded to.
    pub fn factor_type(&self) -> ElementType {
        self.factor_type
    }

    /// The first `rank` directions only.
    #[must_use]
    pub fn prefix(&self, rank: usize) -> LowRank {
        let rank = rank.min(self.rank);
        let b = self.b.chunks_exact(self.rank.max(1)).flat_map(|row| &row[..rank]).copied().collect();
        let a = self.a[..rank * self.in_features].to_vec();
        LowRank { rank, b, a, ..self.clone_shape() }
    }

    /// Bits that the factors take when stored.
    pub fn stored_bits(&self) -> u64 {
        ((self.b.len() + self.a.len()) * self.factor_type.bits()) as u64
    }

    fn clone_shape(&self) -> LowRank {
        LowRank {
            out_features: self.out_features,
            in_features: self.in_features,
            rank: 0,
            b: Vec::new(),
            a: Vec::new(),
            factor_type: self.factor_type,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_rounded_and_prefixes_are_nested() {
        let b = vec![1.001, 2.0, 3.0, 4.0, 5.0, 6.0];
        let a = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let factors = LowRank::new(3, 4, 2, b, a, ElementType::Bf16);
        assert_eq!(factors.b()[0], 1.0);
        let first = factors.prefix(1);
        assert_eq!(first.rank(), 1);
        assert_eq!(first.b(), [1.0, 3.0, 5.0]);
        assert_eq!(first.a(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(factors.prefix(9), factors);
        assert_eq!(factors.stored_bits(), (6 + 8) * 16);
    }
}
