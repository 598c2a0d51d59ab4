use faer::Accum;
use kintsugi_runtime::ThreadPool;

use crate::block_product::multiply;
use crate::{MatrixView, MatrixViewMut, Scalar, UpperTriangle};

/// Columns of a result that one task computes, as many as a band of an [`UpperTriangle`] has rows. Fixed, so that the
/// cut never depends on the threads.
const BAND: usize = 256;

/// `a · b` where `a` has few rows, `[a.rows, b.columns]` row-major: shared out by columns, so that a dozen rows keep
/// every thread busy.
///
/// # Panics
/// When the shapes do not fit.
pub fn product_by_columns<T: Scalar>(a: MatrixView<'_, T>, b: MatrixView<'_, T>, pool: &ThreadPool) -> Vec<T> {
    assert_eq!(a.columns(), b.rows(), "the inner sizes of a product must agree");
    by_columns(a.rows(), b.columns(), pool, |first, mut out| {
        let width = out.0.ncols();
        multiply(out.0.as_mut(), Accum::Replace, a.0, b.column_range(first..first + width).0, T::ONE);
    })
}

/// `m · S` for a symmetric S where `m` has few rows, `[m.rows, n]` row-major: shared out by columns.
///
/// # Panics
/// When the shapes do not fit.
pub fn times_symmetric_by_columns<T: Scalar>(m: MatrixView<'_, T>, s: &UpperTriangle<T>, pool: &ThreadPool) -> Vec<T> {
    let n = s.side();
    assert_eq!(m.columns(), n, "m has a column per row of S");
    by_columns(m.rows(), n, pool, |start, mut out| {
        let width = out.0.ncols();
        for index in 0..s.bands() {
            let (first, band) = s.band(index);
            if first > start {
                break;
            }
            let rows = m.column_range(first..first + band.rows());
            if first < start {
                let right = band.column_range(start - first..start - first + width);
                multiply(out.0.as_mut(), Accum::Add, rows.0, right.0, T::ONE);
                continue;
            }
            let block = symmetric_block(band);
            let block = MatrixView::new(&block, width, width);
            multiply(out.0.as_mut(), Accum::Add, rows.0, block.0, T::ONE);
            let (behind, right) = (m.column_range(start + width..n), band.column_range(width..n - start));
            multiply(out.0.as_mut(), Accum::Add, behind.0, right.transposed().0, T::ONE);
        }
    })
}

/// The symmetric block on the diagonal at the left of a band, whole.
fn symmetric_block<T: Scalar>(band: MatrixView<'_, T>) -> Vec<T> {
    let width = band.rows();
    let at = |i: usize, j: usize| band.0[(i.min(j), i.max(j))];
    (0..width).flat_map(|i| (0..width).map(move |j| at(i, j))).collect()
}

/// A `[rows, columns]` matrix whose columns from `first` on are written by `fill(first, out)`, over zeros.
fn by_columns<T: Scalar>(
    rows: usize,
    columns: usize,
    pool: &ThreadPool,
    fill: impl Fn(usize, MatrixViewMut<'_, T>) + Sync + Send,
) -> Vec<T> {
    let bands = pool.map(columns.div_ceil(BAND), |index| {
        let first = index * BAND;
        let width = BAND.min(columns - first);
        let mut band = vec![T::ZERO; rows * width];
        fill(first, MatrixViewMut::new(&mut band, rows, width));
        band
    });
    let mut out = vec![T::ZERO; rows * columns];
    for (index, band) in bands.iter().enumerate() {
        let (first, width) = (index * BAND, BAND.min(columns - index * BAND));
        for (row, values) in band.chunks_exact(width).enumerate() {
            out[row * columns + first..][..width].copy_from_slice(values);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{product, times_symmetric};

    /// Small integers: every product below is exact.
    fn integers(count: usize, seed: usize) -> Vec<f64> {
        (0..count).map(|i| (((i + seed) * 7919 + (i * i) % 31) % 17) as f64 - 8.0).collect()
    }

    #[test]
    fn they_agree_with_products_by_rows_on_ragged_shapes() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (20, 256, 257), (7, 600, 513), (160, 30, 256)] {
            let (a, b, s) = (integers(m * k, 1), integers(k * n, 2), integers(n * n, 3));
            let (a, b) = (MatrixView::new(&a, m, k), MatrixView::new(&b, k, n));
            let mut expected = vec![0.0; m * n];
            product(a, b, &mut expected, &ThreadPool::with_threads(1));
            for threads in [1, 2, 5] {
                assert_eq!(product_by_columns(a, b, &ThreadPool::with_threads(threads)), expected, "{m}×{k}×{n}");
            }
            let s = UpperTriangle::of(&s, n);
            let left = MatrixView::new(&expected, m, n);
            let mut weighted = vec![0.0; m * n];
            times_symmetric(left, &s, &mut weighted, &ThreadPool::with_threads(1));
            for threads in [1, 2, 5] {
                let found = times_symmetric_by_columns(left, &s, &ThreadPool::with_threads(threads));
                assert_eq!(found, weighted, "{m}×{n}");
            }
        }
    }
}
