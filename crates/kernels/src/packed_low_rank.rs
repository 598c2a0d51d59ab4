use crate::packed_matrix::PackedMatrix;
use crate::vector::LANES;

/// A low-rank update in the layout that [`Kernels::accumulate_low_ranks`](crate::Kernels::accumulate_low_ranks) reads:
/// an adapter that is chosen per request and therefore stays outside of the panels of the weight.
#[derive(Clone, Debug)]
pub struct PackedLowRank {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) scaling: f32,
    /// `None` at rank 0.
    pub(crate) factors: Option<PackedFactors>,
}

/// A and B of an update.
#[derive(Clone, Debug)]
pub(crate) struct PackedFactors {
    pub(crate) a: FoldedMatrix,
    /// `[out, rank]`
    pub(crate) b: PackedMatrix,
}

/// A matrix of few rows that would leave most of a panel empty, folded: its columns are cut into `folds` runs of equal
/// length, and the runs lie below one another, each in `32 / folds` rows of a panel. A row of x, cut alike, is then `folds`
/// rows, and of each only the rows of its own run count.
#[derive(Clone, Debug)]
pub(crate) struct FoldedMatrix {
    pub(crate) matrix: PackedMatrix,
    /// Rows before it was folded.
    pub(crate) rows: usize,
    /// 1 where it is not folded.
    pub(crate) folds: usize,
}

impl FoldedMatrix {
    /// Columns before it was folded.
    pub(crate) fn columns(&self) -> usize {
        self.matrix.columns * self.folds
    }

    /// The product `[count, rows]` from that of the folded matrix, `[count · folds, 32]`. The runs are added in their order.
    pub(crate) fn unfold(&self, y: Vec<f32>) -> Vec<f32> {
        if self.folds == 1 {
            return y;
        }
        let run_rows = LANES / self.folds;
        let mut unfolded = vec![0.0; y.len() / (self.folds * LANES) * self.rows];
        for (out, y) in unfolded.chunks_exact_mut(self.rows).zip(y.chunks_exact(self.folds * LANES)) {
            for (run, y) in y.chunks_exact(LANES).enumerate() {
                out.iter_mut().zip(&y[run * run_rows..]).for_each(|(out, y)| *out += y);
            }
        }
        unfolded
    }
}

impl PackedLowRank {
    /// Number of outputs.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Number of inputs.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Columns of B and rows of A.
    pub fn rank(&self) -> usize {
        self.factors.as_ref().map_or(0, |factors| factors.a.rows)
    }

    /// Bytes that the factors take in memory.
    pub fn memory_bytes(&self) -> usize {
        self.factors.as_ref().map_or(0, |PackedFactors { a, b }| a.matrix.memory_bytes() + b.memory_bytes())
    }
}
