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
    /// The compensation of what compression broke; its constant part, if it has one, is in `bias`.
    pub low_rank: Option<LowRank>,
}

impl LinearWeight {
    /// A Linear without bias and compensation.
    pub fn plain(matrix: WeightMatrix) -> Self {
        LinearWeight { matrix, bias: None, low_rank: None }
    }

    /// Adds the update of a compensation: its factors beside those that are there, its constant part to the bias.
    pub fn compensate(&mut self, update: LowRank) {
        let (factors, constant) = update.split_bias();
        self.low_rank = Some(match &self.low_rank {
            Some(there) => there.beside(&factors),
            None => factors,
        });
        self.bias = match (self.bias.take(), constant) {
            (Some(bias), Some(constant)) => Some(bias.iter().zip(&constant).map(|(a, b)| a + b).collect()),
            (bias, constant) => bias.or(constant),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DenseMatrix, DenseValues, ElementType, FactorBias};

    #[test]
    fn compensations_add_up() {
        let matrix = WeightMatrix::Dense(DenseMatrix::new(2, 1, DenseValues::F32(vec![1.0, 2.0])));
        let factors = LowRank::new(2, 1, 1, vec![1.0, 3.0], vec![2.0], ElementType::F32);
        let bias = FactorBias { values: vec![0.5, -0.5], centre: None };
        let mut linear = LinearWeight::plain(matrix);
        linear.compensate(factors.clone());
        assert_eq!((linear.bias.as_ref(), linear.low_rank.as_ref()), (None, Some(&factors)));
        linear.compensate(factors.clone().with_bias(bias.clone()));
        linear.compensate(factors.with_bias(bias));
        assert_eq!(linear.bias, Some(vec![1.0, -1.0]));
        let low_rank = linear.low_rank.unwrap();
        assert_eq!((low_rank.rank(), low_rank.bias()), (3, None));
    }
}
