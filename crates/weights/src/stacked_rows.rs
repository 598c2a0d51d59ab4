use crate::RowSource;

/// Matrices of the same inputs as one: the rows of the first, then those of the second, and so on.
pub struct StackedRows<'a> {
    parts: Vec<&'a dyn RowSource>,
    rows: usize,
    columns: usize,
}

impl<'a> StackedRows<'a> {
    /// Stacks matrices.
    ///
    /// # Panics
    /// When their widths differ.
    pub fn new(parts: Vec<&'a dyn RowSource>) -> Self {
        let columns = parts.first().map_or(0, |part| part.columns());
        assert!(parts.iter().all(|part| part.columns() == columns), "matrices of the same inputs are as wide");
        StackedRows { rows: parts.iter().map(|part| part.rows()).sum(), columns, parts }
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
        for part in &self.parts {
            if row < part.rows() {
                return part.row_to_f32(row, out);
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
        let stacked = StackedRows::new(parts.iter().map(|part| part as &dyn RowSource).collect());
        assert_eq!((stacked.rows(), stacked.columns()), (3, 2));
        for (row, expected) in [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]].into_iter().enumerate() {
            let mut out = [0.0; 2];
            stacked.row_to_f32(row, &mut out);
            assert_eq!(out, expected);
        }
    }

    #[test]
    #[should_panic(expected = "as wide")]
    fn widths_that_differ_are_a_defect_of_the_caller() {
        let parts = [2, 3].map(|columns| DenseMatrix::from_f32(1, columns, vec![0.0; columns]));
        StackedRows::new(vec![&parts[0], &parts[1]]);
    }
}
