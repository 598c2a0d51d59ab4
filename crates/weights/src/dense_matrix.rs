use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::ElementType;

/// The elements of a [`DenseMatrix`] in the type that they are stored in.
#[derive(Clone, Debug, PartialEq)]
pub enum DenseValues {
    /// binary32
    F32(Vec<f32>),
    /// binary16
    F16(Vec<f16>),
    /// bfloat16
    Bf16(Vec<bf16>),
}

/// A matrix of plain floats, row-major `[rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseMatrix {
    rows: usize,
    columns: usize,
    values: DenseValues,
}

impl DenseMatrix {
    /// A matrix over `values`, row after row.
    ///
    /// # Panics
    /// When the number of values is not `rows · columns`.
    pub fn new(rows: usize, columns: usize, values: DenseValues) -> Self {
        let matrix = DenseMatrix { rows, columns, values };
        assert_eq!(matrix.len(), rows * columns, "a {rows}×{columns} matrix needs that many values");
        matrix
    }

    /// A binary32 matrix.
    ///
    /// # Panics
    /// When the number of values is not `rows · columns`.
    pub fn from_f32(rows: usize, columns: usize, values: Vec<f32>) -> Self {
        Self::new(rows, columns, DenseValues::F32(values))
    }

    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (inputs).
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The stored values.
    pub fn values(&self) -> &DenseValues {
        &self.values
    }

    /// The stored values as bytes in the order of the machine.
    pub fn bytes(&self) -> &[u8] {
        match &self.values {
            DenseValues::F32(values) => bytemuck::cast_slice(values),
            DenseValues::F16(values) => bytemuck::cast_slice(values),
            DenseValues::Bf16(values) => bytemuck::cast_slice(values),
        }
    }

    /// The type of the stored values.
    pub fn element_type(&self) -> ElementType {
        match self.values {
            DenseValues::F32(_) => ElementType::F32,
            DenseValues::F16(_) => ElementType::F16,
            DenseValues::Bf16(_) => ElementType::Bf16,
        }
    }

    /// Writes row `row` as f32 into `out` (`columns` long).
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let range = row * self.columns..(row + 1) * self.columns;
        match &self.values {
            DenseValues::F32(values) => out.copy_from_slice(&values[range]),
            DenseValues::F16(values) => values[range].convert_to_f32_slice(out),
            DenseValues::Bf16(values) => values[range].convert_to_f32_slice(out),
        }
    }

    /// All values as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        match &self.values {
            DenseValues::F32(values) => out.copy_from_slice(values),
            DenseValues::F16(values) => values.convert_to_f32_slice(&mut out),
            DenseValues::Bf16(values) => values.convert_to_f32_slice(&mut out),
        }
        out
    }

    /// Rows as columns.
    #[must_use]
    pub fn transposed(&self) -> DenseMatrix {
        fn turn<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
            (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
        }
        let (rows, columns) = (self.rows, self.columns);
        let values = match &self.values {
            DenseValues::F32(values) => DenseValues::F32(turn(values, rows, columns)),
            DenseValues::F16(values) => DenseValues::F16(turn(values, rows, columns)),
            DenseValues::Bf16(values) => DenseValues::Bf16(turn(values, rows, columns)),
        };
        DenseMatrix::new(columns, rows, values)
    }

    /// Row and column of the first value that is NaN or infinite.
    pub fn first_not_finite(&self) -> Option<(usize, usize)> {
        let position = self.element_type().first_not_finite(self.bytes())?;
        Some((position / self.columns, position % self.columns))
    }

    fn len(&self) -> usize {
        match &self.values {
            DenseValues::F32(values) => values.len(),
            DenseValues::F16(values) => values.len(),
            DenseValues::Bf16(values) => values.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_that_is_not_finite_is_found_in_every_type() {
        let sound = [f32::MAX, -1.0, 0.0, f32::MIN_POSITIVE, -f32::MAX, 65504.0];
        let plain: Vec<f32> = (0..9000).map(|i| sound[i % sound.len()]).collect();
        let narrow = |values: &[f32]| values.iter().map(|&v| f16::from_f32(v.clamp(-65504.0, 65504.0))).collect();
        // Cut off, because rounding would turn the largest into infinity.
        let cut = |values: &[f32]| values.iter().map(|v| bf16::from_bits((v.to_bits() >> 16) as u16)).collect();
        let matrices = |values: Vec<f32>, f16s: Vec<f16>, bf16s: Vec<bf16>| {
            [DenseValues::F32(values), DenseValues::F16(f16s), DenseValues::Bf16(bf16s)]
                .map(|values| DenseMatrix::new(90, 100, values).first_not_finite())
        };
        assert_eq!(matrices(plain.clone(), narrow(&plain), cut(&plain)), [None; 3]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 4095, 4096, 8999] {
                let (mut wide, mut f16s, mut bf16s) = (plain.clone(), narrow(&plain), cut(&plain));
                (wide[at], f16s[at], bf16s[at]) = (bad, f16::from_f32(bad), bf16::from_f32(bad));
                (wide[8999], f16s[8999], bf16s[8999]) = (bad, f16::from_f32(bad), bf16::from_f32(bad));
                assert_eq!(matrices(wide, f16s, bf16s), [Some((at / 100, at % 100)); 3], "{bad} {at}");
            }
        }
    }

    #[test]
    fn a_transposed_matrix_has_rows_as_columns() {
        let matrix = DenseMatrix::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let turned = matrix.transposed();
        assert_eq!(turned, DenseMatrix::from_f32(3, 2, vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
        assert_eq!(turned.transposed(), matrix);
    }

    #[test]
    fn every_type_gives_the_same_small_integers() {
        let plain: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let matrices = [
            DenseMatrix::from_f32(2, 3, plain.clone()),
            DenseMatrix::new(2, 3, DenseValues::F16(plain.iter().map(|&v| f16::from_f32(v)).collect())),
            DenseMatrix::new(2, 3, DenseValues::Bf16(plain.iter().map(|&v| bf16::from_f32(v)).collect())),
        ];
        for matrix in matrices {
            assert_eq!(matrix.to_f32(), plain);
            let mut row = [0.0; 3];
            matrix.row_to_f32(1, &mut row);
            assert_eq!(row, [3.0, 4.0, 5.0]);
            assert_eq!(matrix.first_not_finite(), None);
        }
        let broken = DenseMatrix::from_f32(2, 2, vec![0.0, 1.0, f32::NAN, 2.0]);
        assert_eq!(broken.first_not_finite(), Some((1, 0)));
    }
}
