use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{MatMut, MatRef, Par};

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

#[cfg(test)]
mod tests {
    use super::*;

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
