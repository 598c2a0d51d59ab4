use crate::packed_matrix::PackedMatrix;

/// A low-rank update in the layout that [`Kernels::accumulate_low_ranks`](crate::Kernels::accumulate_low_ranks) reads:
/// an adapter that is chosen per request and therefore stays outside of the panels of the weight.
#[derive(Clone, Debug)]
pub struct PackedLowRank {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) scaling: f32,
    /// A and B; `None` at rank 0.
    pub(crate) factors: Option<(PackedMatrix, PackedMatrix)>,
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
        self.factors.as_ref().map_or(0, |(a, _)| a.rows())
    }

    /// Bytes that the factors take in memory.
    pub fn memory_bytes(&self) -> usize {
        self.factors.as_ref().map_or(0, |(a, b)| a.memory_bytes() + b.memory_bytes())
    }
}
