/// The transpose of a row-major matrix `[rows, columns]`, moved in blocks that stay in the cache.
///
/// # Panics
/// When the number of values does not fit.
pub fn transposed<T: Copy + Default>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    const BLOCK: usize = 32;
    assert_eq!(values.len(), rows * columns, "the values are those of the matrix");
    let mut out = vec![T::default(); values.len()];
    for top in (0..rows).step_by(BLOCK) {
        for left in (0..columns).step_by(BLOCK) {
            for row in top..rows.min(top + BLOCK) {
                for column in left..columns.min(left + BLOCK) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns_within_blocks_and_across_them() {
        for (rows, columns) in [(0, 3), (1, 5), (3, 2), (33, 70), (64, 31)] {
            let values: Vec<usize> = (0..rows * columns).collect();
            let turned = transposed(&values, rows, columns);
            assert!((0..rows * columns).all(|at| turned[at % columns * rows + at / columns] == at));
        }
    }
}
