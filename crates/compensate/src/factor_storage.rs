use kintsugi_weights::FactorBias;

use crate::FactorPrecision;

/// What the update of a Linear is stored in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FactorStorage {
    /// Of both factors.
    pub precision: FactorPrecision,
    /// Whether there is a bias beside them.
    pub affine: bool,
}

impl FactorStorage {
    /// Bits that the update of a Linear takes; of rank 0 there is none.
    pub fn stored_bits(self, rows: usize, columns: usize, rank: usize) -> u64 {
        let bias = if self.affine && rank > 0 { FactorBias::stored_bits(rows) } else { 0 };
        self.precision.stored_bits(rows, columns, rank) + bias
    }
}
