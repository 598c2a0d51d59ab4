use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::Scalar;

/// Columns of a result, and terms of its sums, that one call computes: packed operands then stay in the caches of a core.
/// Wider calls reach 50 GFLOP/s in f32 and 20 in f64 where these reach 75 and 30 (Zen 3, one thread). Fixed, so that sums
/// have one order.
const COLUMNS: usize = 256;
const TERMS: usize = 512;

/// Rows from which on a product is cut into blocks, which are copied first: rows that lie a power of two apart would share
/// a few lines of each cache.
const LEAST_ROWS: usize = 48;

/// `out = factor · a · b`, or `out += …`, in the calling task.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn multiply<T: Scalar>(mut out: MatMut<'_, T>, accum: Accum, a: MatRef<'_, T>, b: MatRef<'_, T>, factor: T) {
    assert_eq!(a.ncols(), b.nrows(), "the inner sizes of a product must agree");
    let (terms, columns) = (a.ncols(), out.ncols());
    if terms.max(columns) <= COLUMNS || out.nrows() < LEAST_ROWS {
        return matmul(out, accum, a, b, factor, Par::Seq);
    }
    let (depth, width) = (TERMS.min(terms), COLUMNS.min(columns));
    let (mut left, mut right) = (vec![T::ZERO; a.nrows() * depth], vec![T::ZERO; depth * width]);
    // Without terms, too, what is replaced becomes zero.
    for term in (0..terms.max(1)).step_by(TERMS) {
        let depth = TERMS.min(terms - term);
        let accum = if term == 0 { accum } else { Accum::Add };
        let a = copy(a.subcols(term, depth), &mut left[..a.nrows() * depth]);
        for column in (0..columns).step_by(COLUMNS) {
            let width = COLUMNS.min(columns - column);
            let b = copy(b.submatrix(term, column, depth, width), &mut right[..depth * width]);
            matmul(out.as_mut().subcols_mut(column, width), accum, a, b, factor, Par::Seq);
        }
    }
}

/// The same numbers in the same order, without gaps.
fn copy<'a, T: Scalar>(block: MatRef<'_, T>, out: &'a mut [T]) -> MatRef<'a, T> {
    let (rows, columns) = (block.nrows(), block.ncols());
    if block.row_stride().unsigned_abs() >= block.col_stride().unsigned_abs() {
        MatMut::from_row_major_slice_mut(out, rows, columns).copy_from(block);
        MatRef::from_row_major_slice(out, rows, columns)
    } else {
        MatMut::from_column_major_slice_mut(out, rows, columns).copy_from(block);
        MatRef::from_column_major_slice(out, rows, columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_add_up_to_the_product() {
        for (rows, terms, columns) in [(1, 1, 1), (3, 0, 5), (5, 512, 256), (7, 513, 257), (33, 1300, 600), (0, 4, 300)]
        {
            let at = |i: usize| ((i * 7919 + i * i % 31) % 17) as f64 - 8.0;
            let a: Vec<f64> = (0..rows * terms).map(at).collect();
            let b: Vec<f64> = (0..terms * columns).map(|i| at(i + 5)).collect();
            for (accum, start) in [(Accum::Replace, 9.0), (Accum::Add, 3.0)] {
                let mut out = vec![start; rows * columns];
                let view = MatMut::from_row_major_slice_mut(&mut out, rows, columns);
                let (left, right) =
                    (MatRef::from_row_major_slice(&a, rows, terms), MatRef::from_row_major_slice(&b, terms, columns));
                multiply(view, accum, left, right, 2.0);
                for (at, found) in out.iter().enumerate() {
                    let (row, column) = (at / columns, at % columns);
                    let sum: f64 = (0..terms).map(|k| a[row * terms + k] * b[k * columns + column]).sum();
                    let kept = if accum == Accum::Add { start } else { 0.0 };
                    // Small integers: every sum is exact.
                    assert_eq!(*found, kept + 2.0 * sum, "{rows}×{terms}×{columns} at {row}, {column}");
                }
            }
        }
    }
}
