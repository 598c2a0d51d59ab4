use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Mat, MatMut, Par};

/// `G⁻¹ X` for a symmetric positive definite `[n, n]` matrix G and `x` `[n, columns]`, row-major. `None` where G is
/// singular to rounding.
///
/// Rows and columns are first scaled to a diagonal of ones, so that sizes of any range do no harm.
///
/// # Panics
/// When the numbers of values do not fit.
pub fn solve_symmetric(g: &[f64], n: usize, mut x: Vec<f64>, columns: usize) -> Option<Vec<f64>> {
    assert_eq!(g.len(), n * n, "G is [n, n]");
    assert_eq!(x.len(), n * columns, "X is [n, columns]");
    let diagonal: Vec<f64> = (0..n).map(|i| g[i * (n + 1)]).collect();
    if !diagonal.iter().all(|&value| value > 0.0 && value.is_finite()) {
        return None;
    }
    let scale: Vec<f64> = diagonal.iter().map(|value| 1.0 / value.sqrt()).collect();
    let mut factor = Mat::from_fn(n, n, |i, j| if i < j { 0.0 } else { g[i * n + j] * scale[i] * scale[j] });
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
    let stack = MemStack::new(&mut memory);
    cholesky_in_place(factor.as_mut(), Default::default(), Par::Seq, stack, Default::default()).ok()?;
    // A pivot that is rounding noise: some row is a combination of others.
    let noise = n as f64 * f64::EPSILON;
    if !(0..n).all(|i| factor[(i, i)] * factor[(i, i)] > noise) {
        return None;
    }
    let rescale = |x: &mut [f64]| {
        for (row, scale) in x.chunks_exact_mut(columns.max(1)).zip(&scale) {
            row.iter_mut().for_each(|value| *value *= scale);
        }
    };
    rescale(&mut x);
    let mut view = MatMut::from_row_major_slice_mut(&mut x, n, columns);
    solve_lower_triangular_in_place(factor.as_ref(), view.as_mut(), Par::Seq);
    solve_upper_triangular_in_place(factor.as_ref().transpose(), view, Par::Seq);
    rescale(&mut x);
    x.iter().all(|value| value.is_finite()).then_some(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_solution_satisfies_the_equations_over_many_magnitudes() {
        let (n, columns) = (23, 4);
        let size = |i: usize| 10f64.powi(i as i32 % 9 - 4);
        let at = |i: usize, j: usize| if i == j { 2.0 } else { ((i + j) as f64 * 0.7).sin() / n as f64 };
        let g: Vec<f64> = (0..n * n).map(|l| at(l / n, l % n) * size(l / n) * size(l % n)).collect();
        let expected: Vec<f64> = (0..n * columns).map(|l| (l as f64).cos() / size(l / columns)).collect();
        let x = (0..n * columns)
            .map(|l| (0..n).map(|k| g[l / columns * n + k] * expected[k * columns + l % columns]).sum())
            .collect();
        let found = solve_symmetric(&g, n, x, columns).unwrap();
        for (l, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!((found - expected).abs() * size(l / columns) < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn singular_matrices_have_no_solution() {
        assert_eq!(solve_symmetric(&[1.0, 2.0, 2.0, 4.0], 2, vec![1.0, 2.0], 1), None);
        assert_eq!(solve_symmetric(&[0.0], 1, vec![1.0], 1), None);
        assert_eq!(solve_symmetric(&[f64::NAN], 1, vec![1.0], 1), None);
        assert_eq!(solve_symmetric(&[], 0, vec![], 3), Some(vec![]));
    }
}
