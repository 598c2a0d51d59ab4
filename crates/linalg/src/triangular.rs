use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{MatMut, MatRef, Par};
use kintsugi_runtime::ThreadPool;

/// Solves `Rᵀ Y = X` in place for an upper triangular R: `r` is `[n, n]`, `x` is `[n, columns]`, row-major. Rows of
/// `R⁻ᵀ X` are what rows of X are to the basis that R turns into an orthonormal one.
///
/// # Panics
/// When the numbers of values do not fit.
pub fn solve_transposed_upper(r: &[f64], n: usize, x: &mut [f64], columns: usize) {
    assert_eq!(r.len(), n * n, "R is [n, n]");
    assert_eq!(x.len(), n * columns, "X is [n, columns]");
    let lower = MatRef::from_row_major_slice(r, n, n).transpose();
    solve_lower_triangular_in_place(lower, MatMut::from_row_major_slice_mut(x, n, columns), Par::Seq);
}

/// Columns that one task solves for.
const BAND: usize = 256;

/// Solves `L Y = X` in place for a lower triangular L: `l` is `[n, n]`, `x` is `[n, columns]`, row-major. Shared out by
/// columns.
///
/// # Panics
/// When the numbers of values do not fit.
pub(crate) fn solve_lower_by_columns(l: &[f64], n: usize, x: &mut [f64], columns: usize, pool: &ThreadPool) {
    assert_eq!(l.len(), n * n, "L is [n, n]");
    assert_eq!(x.len(), n * columns, "X is [n, columns]");
    let lower = MatRef::from_row_major_slice(l, n, n);
    let mut rest = MatMut::from_row_major_slice_mut(x, n, columns);
    let mut bands = Vec::with_capacity(columns.div_ceil(BAND));
    while rest.ncols() > 0 {
        let width = BAND.min(rest.ncols());
        let (band, behind) = rest.split_at_col_mut(width);
        bands.push(band);
        rest = behind;
    }
    pool.for_each_chunk(&mut bands, 1, |_, band| {
        solve_lower_triangular_in_place(lower, band[0].as_mut(), Par::Seq);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_of_columns_are_solved_alike() {
        let (n, columns) = (20, 600);
        let value = |at: usize| ((at * at) as f64 * 0.3).sin();
        let l: Vec<f64> = (0..n * n)
            .map(|at| match (at / n).cmp(&(at % n)) {
                std::cmp::Ordering::Equal => 2.0,
                std::cmp::Ordering::Greater => value(at) / n as f64,
                std::cmp::Ordering::Less => 0.0,
            })
            .collect();
        let x: Vec<f64> = (0..n * columns).map(value).collect();
        let solve = |threads| {
            let mut y = x.clone();
            solve_lower_by_columns(&l, n, &mut y, columns, &ThreadPool::with_threads(threads));
            y
        };
        let y = solve(1);
        assert_eq!(y, solve(3));
        for at in 0..n * columns {
            let sum: f64 = (0..n).map(|k| l[at / columns * n + k] * y[k * columns + at % columns]).sum();
            assert!((sum - x[at]).abs() < 1e-13);
        }
    }

    #[test]
    fn the_solution_satisfies_the_equations() {
        let (n, columns) = (37, 5);
        let value = |i: usize| ((i * i) as f64 * 0.3).sin();
        let r: Vec<f64> = (0..n * n)
            .map(|at| {
                if at / n == at % n {
                    3.0
                } else if at / n < at % n {
                    value(at) / n as f64
                } else {
                    0.0
                }
            })
            .collect();
        let x: Vec<f64> = (0..n * columns).map(value).collect();
        let mut y = x.clone();
        solve_transposed_upper(&r, n, &mut y, columns);
        for i in 0..n {
            for j in 0..columns {
                let sum: f64 = (0..n).map(|l| r[l * n + i] * y[l * columns + j]).sum();
                assert!((sum - x[i * columns + j]).abs() < 1e-13);
            }
        }
    }
}
