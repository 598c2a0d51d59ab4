use crate::{DenseMatrix, LowRank, QuantizedMatrix};

/// The main matrix of a Linear.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightMatrix {
    /// Plain floats.
    Dense(DenseMatrix),
    /// Integer codes.
    Quantized(QuantizedMatrix),
}

impl WeightMatrix {
    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        match self {
            WeightMatrix::Dense(matrix) => matrix.rows(),
            WeightMatrix::Quantized(matrix) => matrix.rows(),
        }
    }

    /// Number of columns (inputs).
    pub fn columns(&self) -> usize {
        match self {
            WeightMatrix::Dense(matrix) => matrix.columns(),
            WeightMatrix::Quantized(matrix) => matrix.columns(),
        }
    }

    /// Writes row `row` as f32 into `out`.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        match self {
            WeightMatrix::Dense(matrix) => matrix.row_to_f32(row, out),
            WeightMatrix::Quantized(matrix) => matrix.row_to_f32(row, out),
        }
    }

    /// All values as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            WeightMatrix::Dense(matrix) => matrix.to_f32(),
            WeightMatrix::Quantized(matrix) => matrix.to_f32(),
        }
    }
}

/// Everything that one Linear computes with: `y = W x + B (A x) + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearWeight {
    /// W, `[outFeatures, inFeatures]`.
    pub matrix: WeightMatrix,
    /// `[outFeatures]`.
    pub bias: Option<Vec<f32>>,
    /// The compensation of what compression broke.
    pub low_rank: Option<LowRank>,
}

impl LinearWeight {
    /// A Linear without bias and compensation.
    pub fn plain(matrix: WeightMatrix) -> Self {
        LinearWeight { matrix, bias: None, low_rank: None }
    }
}
