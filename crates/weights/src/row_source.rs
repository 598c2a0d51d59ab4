use crate::{DenseMatrix, LinearWeight, QuantizedMatrix, WeightMatrix};

/// A matrix that gives its rows as f32, whatever form it has.
pub trait RowSource: Sync {
    /// Number of rows (outputs).
    fn rows(&self) -> usize;

    /// Number of columns (inputs).
    fn columns(&self) -> usize;

    /// Writes row `row` into `out` (`columns` long).
    fn row_to_f32(&self, row: usize, out: &mut [f32]);
}

/// The three methods of a type that has them already.
macro_rules! row_source {
    ($($matrix:ty),*) => {$(
        impl RowSource for $matrix {
            fn rows(&self) -> usize {
                self.rows()
            }

            fn columns(&self) -> usize {
                self.columns()
            }

            fn row_to_f32(&self, row: usize, out: &mut [f32]) {
                self.row_to_f32(row, out);
            }
        }
    )*};
}

row_source!(DenseMatrix, QuantizedMatrix, WeightMatrix);

/// What the Linear multiplies with: its matrix and its compensation, `W + B A`.
impl RowSource for LinearWeight {
    fn rows(&self) -> usize {
        self.matrix.rows()
    }

    fn columns(&self) -> usize {
        self.matrix.columns()
    }

    fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        self.matrix.row_to_f32(row, out);
        if let Some(factors) = &self.low_rank {
            let (rank, columns) = (factors.rank(), factors.in_features());
            for (l, &b) in factors.b()[row * rank..(row + 1) * rank].iter().enumerate() {
                for (value, &a) in out.iter_mut().zip(&factors.a()[l * columns..(l + 1) * columns]) {
                    *value += b * a;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ElementType, LowRank};

    #[test]
    fn a_linear_gives_its_matrix_with_its_compensation() {
        let matrix = WeightMatrix::Dense(DenseMatrix::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let low_rank = LowRank::new(2, 3, 1, vec![2.0, -1.0], vec![1.0, 0.0, 3.0], ElementType::F32);
        let linear = LinearWeight { low_rank: Some(low_rank), ..LinearWeight::plain(matrix) };
        let mut row = [0.0; 3];
        linear.row_to_f32(1, &mut row);
        assert_eq!((RowSource::rows(&linear), RowSource::columns(&linear), row), (2, 3, [3.0, 5.0, 3.0]));
    }
}
