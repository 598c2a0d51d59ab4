use crate::RowSource;

/// Matrices of the same inputs as one: the rows of the first, then those of the second, and so on, each times a number.
pub struct StackedRows<'a> {
    parts: Vec<(&'a dyn RowSource, f32)>,
    rows: usize,
    columns: usize,
}

impl<'a> StackedRows<'a> {
    /// Stacks matrices.
    ///
    /// # Panics
    /// When their widths differ.
    pub fn new(parts: Vec<(&'a dyn RowSource, f32)>) -> Self {
        let columns = parts.first().map_or(0, |(part, _)| part.columns());
        assert!(parts.iter().all(|(part, _)| part.columns() == columns), "matrices of the same inputs are as wide");
        StackedRows { rows: parts.iter().map(|(part, _)| part.rows()).sum(), columns, parts }
    }
}

impl RowSource for StackedRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let mut row = row;
        for (part, scale) in &self.parts {
            if row < part.rows() {
                part.row_to_f32(row, out);
                if *scale != 1.0 {
                    out.iter_mut().for_each(|value| *value *= scale);
                }
                return;
            }
            row -= part.rows();
        }
        panic!("{} rows have no row {}", self.rows, self.rows + row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DenseMatrix;

    #[test]
    fn rows_come_from_their_part() {
        let parts = [(2, 1.0), (0, 0.0), (1, 5.0)]
            .map(|(rows, first)| DenseMatrix::from_f32(rows, 2, (0..2 * rows).map(|at| first + at as f32).collect()));
        let stacked =
            StackedRows::new(parts.iter().zip([1.0, 1.0, 0.5]).map(|(part, scale)| (part as _, scale)).collect());
        assert_eq!((stacked.rows(), stacked.columns()), (3, 2));
        for (row, expected) in [[1.0, 2.0], [3.0, 4.0], [2.5, 3.0]].into_iter().enumerate() {
            let mut out = [0.0; 2];
            stacked.row_to_f32(row, &mut out);
            assert_eq!(out, expected);
        }
    }

    #[test]
    #[should_panic(expected = "as wide")]
    fn widths_that_differ_are_a_defect_of_the_caller() {
        let parts = [2, 3].map(|columns| DenseMatrix::from_f32(1, columns, vec![0.0; columns]));
        StackedRows::new(vec![(&parts[0], 1.0), (&parts[1], 1.0)]);
    }
}
