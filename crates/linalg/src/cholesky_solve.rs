use faer::Par;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use kintsugi_runtime::ThreadPool;

use crate::{MatrixView, MatrixViewMut, UpperCholesky};

/// Rows that one task solves for: each reads all of the factor.
const BAND: usize = 128;

impl UpperCholesky {
    /// Replaces row-major `[rows, n]` X by `X A⁻¹` for the matrix `A = R Rᵀ` that was factored, damping included. Shared
    /// out by rows, so that threads change no bit.
    ///
    /// # Panics
    /// When the rows are not whole.
    pub fn solve_rows(&self, x: &mut [f64], pool: &ThreadPool) {
        let n = self.factor.side();
        assert!(n > 0 && x.len().is_multiple_of(n), "X is [rows, n]");
        pool.for_each_chunk(x, BAND * n, |_, band| self.solve_band(band, n));
    }

    /// `Z Rᵀ = X` from the last columns to the first, then `Y R = Z` from the first to the last, a band of R at a time.
    fn solve_band(&self, x: &mut [f64], n: usize) {
        let rows = x.len() / n;
        for index in (0..self.factor.bands()).rev() {
            let (first, band) = self.factor.band(index);
            let size = band.rows();
            let (diagonal, right) = (band.column_range(0..size), band.column_range(size..band.columns()));
            let (behind, own) = (first + size..n, first..first + size);
            let solved = columns(x, n, behind);
            subtract(x, n, own.clone(), &solved, rows, right.transposed());
            let mut part = MatrixViewMut::new(x, rows, n).column_range(own);
            solve_upper_triangular_in_place(diagonal.0, part.0.as_mut().transpose_mut(), Par::Seq);
        }
        for index in 0..self.factor.bands() {
            let (first, band) = self.factor.band(index);
            let size = band.rows();
            let (diagonal, right) = (band.column_range(0..size), band.column_range(size..band.columns()));
            let (behind, own) = (first + size..n, first..first + size);
            let mut part = MatrixViewMut::new(x, rows, n).column_range(own.clone());
            solve_lower_triangular_in_place(diagonal.0.transpose(), part.0.as_mut().transpose_mut(), Par::Seq);
            let solved = columns(x, n, own);
            subtract(x, n, behind, &solved, rows, right);
        }
    }
}

/// A copy of some columns of row-major `[rows, n]` values, with the opposite sign.
fn columns(x: &[f64], n: usize, range: std::ops::Range<usize>) -> Vec<f64> {
    x.chunks_exact(n).flat_map(|row| row[range.clone()].iter().map(|value| -value)).collect()
}

/// Adds `left · right` to some columns; `left` has the opposite sign.
fn subtract(
    x: &mut [f64],
    n: usize,
    range: std::ops::Range<usize>,
    left: &[f64],
    rows: usize,
    right: MatrixView<'_, f64>,
) {
    if !range.is_empty() && right.rows() > 0 {
        let out = MatrixViewMut::new(x, rows, n).column_range(range);
        crate::add_product(out, MatrixView::new(left, rows, right.rows()), right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_times_the_matrix_are_what_was_given_whatever_the_threads() {
        for (n, rows) in [(1, 3), (40, 7), (256, 2), (300, 130), (600, 5)] {
            let value = |at: usize| ((at * at) as f64 * 0.37 + at as f64).sin();
            let at = |i: usize, j: usize| {
                let (low, high) = (i.min(j), i.max(j));
                if i == j { 2.0 + value(i).abs() } else { value(low * n + high) / n as f64 }
            };
            let fill = |i: usize, row: &mut [f64]| (i..n).zip(row).for_each(|(j, out)| *out = at(i, j));
            let x: Vec<f64> = (0..rows * n).map(value).collect();
            let solve = |threads| {
                let pool = ThreadPool::with_threads(threads);
                let mut y = x.clone();
                UpperCholesky::new(n, 0.5, fill, &pool).unwrap().solve_rows(&mut y, &pool);
                y
            };
            let y = solve(1);
            assert!(y == solve(3), "{n}: threads change bits");
            for (y, x) in y.chunks_exact(n).zip(x.chunks_exact(n)) {
                for j in 0..n {
                    let sum: f64 = (0..n).map(|i| y[i] * at(i, j)).sum::<f64>() + 0.5 * y[j];
                    assert!((sum - x[j]).abs() < 1e-12, "{n} {j}: {sum} {}", x[j]);
                }
            }
        }
    }
}
