use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Accum, Mat, Par};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};

use crate::block_product::multiply;
use crate::{MatrixView, UpperTriangle};

/// How often the damping may grow before a matrix is given up.
const ATTEMPTS: usize = 12;
/// First damping, relative to the mean diagonal, of a matrix that does not factor without any.
const FIRST_DAMPING: f64 = 1e-9;
/// Columns that are eliminated at a time, and rows that one task updates.
const BLOCK: usize = 128;

/// The upper triangular R with `A + damping · I = R Rᵀ`: the Cholesky factor of A with rows and
/// columns in reverse order, read backwards. `R⁻¹` is the factor of the inverse, `A⁻¹ = R⁻ᵀ R⁻¹`.
#[derive(Clone, Debug)]
pub struct UpperCholesky {
    /// R.
    pub factor: UpperTriangle<f64>,
    /// What was really added to the diagonal: the damping asked for, or a power of ten times it.
    pub damping: f64,
}

impl UpperCholesky {
    /// Factors a symmetric `[n, n]` matrix with `damping` added to its diagonal. `fill(i, row)` writes row `i` from the
    /// diagonal on; what is left of it is not read. A matrix that is not numerically positive definite is tried again
    /// with ten times the damping.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED` when the matrix is not finite, or far from positive definite.
    pub fn new(
        n: usize,
        damping: f64,
        fill: impl Fn(usize, &mut [f64]) + Sync + Send,
        pool: &ThreadPool,
    ) -> Result<Self> {
        let mut factor = UpperTriangle::zeros(n);
        let mut used = damping;
        for _ in 0..ATTEMPTS {
            pool.for_each_chunk(&mut factor.parts_mut(1), 1, |i, part| {
                let part = &mut part[0];
                fill(i, &mut part.values[i - part.column..]);
            });
            let broken = |i: usize| factor.row(i).iter().any(|value| !value.is_finite());
            if !used.is_finite() || pool.map(n, broken).contains(&true) {
                return Err(Error::new(ErrorCode::SolverFailed, "the matrix to factor is not finite")
                    .subject("Cholesky")
                    .hint("Check the calibration activations for overflow"));
            }
            let mean = (factor.diagonal().iter().sum::<f64>() / n.max(1) as f64).max(0.0);
            if factor_in_place(&mut factor, used, pool).is_some() {
                return Ok(UpperCholesky { factor, damping: used });
            }
            used = (used * 10.0).max(FIRST_DAMPING * mean).max(f64::MIN_POSITIVE);
        }
        Err(Error::new(
            ErrorCode::SolverFailed,
            format!("a {n}×{n} second moment does not factor even with {used:e} added to its diagonal"),
        )
        .subject("Cholesky")
        .hint("Calibrate with more tokens or raise the damping"))
    }
}

/// Right-looking, from the last block of columns to the first: factor the block on the diagonal, solve for the panel
/// above it, subtract the product of the panel with itself from what is left. Tasks are bands of rows, so that threads
/// change no bit.
fn factor_in_place(a: &mut UpperTriangle<f64>, damping: f64, pool: &ThreadPool) -> Option<()> {
    let n = a.side();
    (0..n).for_each(|i| a.row_mut(i)[0] += damping);
    let diagonal = a.diagonal();
    let mut panel = vec![0.0; n * BLOCK];
    for start in (0..n).step_by(BLOCK).rev() {
        let size = BLOCK.min(n - start);
        let block = factor_block(a, start, size, &diagonal)?;
        let mut above = a.parts_mut(BLOCK);
        above.truncate(start / BLOCK);
        let mut parts: Vec<_> = above.iter_mut().zip(panel.chunks_mut(BLOCK * size)).collect();
        pool.for_each_chunk(&mut parts, 1, |_, part| {
            let (band, panel) = &mut part[0];
            solve_upper_triangular_in_place(
                block.as_ref(),
                band.columns(start..start + size).0.transpose_mut(),
                Par::Seq,
            );
            let offset = start - band.column;
            for (row, panel) in band.values.chunks_exact(band.stride).zip(panel.chunks_exact_mut(size)) {
                panel.copy_from_slice(&row[offset..offset + size]);
            }
        });
        let panel = MatrixView::new(&panel[..start * size], start, size);
        pool.for_each_chunk(&mut above, 1, |_, band| {
            let band = &mut band[0];
            let first = band.first;
            let (left, right) = (panel.row_range(first..first + band.height()), panel.row_range(first..start));
            multiply(band.columns(first..start).0, Accum::Add, left.0, right.0.transpose(), -1.0);
        });
    }
    (0..n).all(|i| a.row(i).iter().all(|value| value.is_finite())).then_some(())
}

/// Factors the block on the diagonal in place and returns it; `None` when it is not positive definite.
fn factor_block(a: &mut UpperTriangle<f64>, start: usize, size: usize, diagonal: &[f64]) -> Option<Mat<f64>> {
    let last = start + size - 1;
    let mut reversed = Mat::from_fn(size, size, |i, j| if i < j { 0.0 } else { a.at(last - i, last - j) });
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(size, Par::Seq, Default::default()));
    let stack = MemStack::new(&mut memory);
    cholesky_in_place(reversed.as_mut(), Default::default(), Par::Seq, stack, Default::default()).ok()?;
    // A pivot that is rounding noise of its own diagonal element carries no information: the matrix is singular.
    let noise = a.side() as f64 * f64::EPSILON;
    let sound = |i: usize| reversed[(i, i)] * reversed[(i, i)] > noise * diagonal[last - i];
    if !(0..size).all(sound) {
        return None;
    }
    let block = Mat::from_fn(size, size, |i, j| if i <= j { reversed[(size - 1 - i, size - 1 - j)] } else { 0.0 });
    for i in 0..size {
        for (j, value) in a.row_mut(start + i)[..size - i].iter_mut().enumerate() {
            *value = block[(i, i + j)];
        }
    }
    Some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Xᵀ X` of `rows` pseudo-random rows.
    fn gram(rows: usize, n: usize) -> Vec<f64> {
        let x: Vec<f64> = (0..rows * n).map(|i| ((i * i) as f64 * 0.37 + i as f64).sin()).collect();
        let mut out = vec![0.0; n * n];
        for row in x.chunks_exact(n) {
            for i in 0..n {
                for j in 0..n {
                    out[i * n + j] += row[i] * row[j];
                }
            }
        }
        out
    }

    fn factor(a: &[f64], n: usize, damping: f64, threads: usize) -> Result<UpperCholesky> {
        let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&a[i * n + i..(i + 1) * n]);
        UpperCholesky::new(n, damping, fill, &ThreadPool::with_threads(threads))
    }

    /// Largest element of `A + damping I − R Rᵀ`.
    fn defect(a: &[f64], n: usize, result: &UpperCholesky) -> f64 {
        let r = |i: usize, j: usize| if i <= j { result.factor.at(i, j) } else { 0.0 };
        let mut worst = 0.0f64;
        for i in 0..n {
            for j in 0..n {
                let value: f64 = (0..n).map(|l| r(i, l) * r(j, l)).sum();
                let expected = a[i * n + j] + if i == j { result.damping } else { 0.0 };
                worst = worst.max((value - expected).abs());
            }
        }
        worst
    }

    #[test]
    fn the_factor_reproduces_the_matrix_over_any_number_of_blocks() {
        for n in [1, 2, 17, 128, 130, 300] {
            let a = gram(2 * n + 3, n);
            let result = factor(&a, n, 0.5, 2).unwrap();
            assert_eq!(result.damping, 0.5);
            // Backward error of a Cholesky factorization: n rounding units of the diagonal, which is about n here.
            let bound = (n * n) as f64 * f64::EPSILON * 4.0;
            assert!(defect(&a, n, &result) < bound, "{n}: {}", defect(&a, n, &result));
            assert!(result.factor.diagonal().iter().all(|&value| value > 0.0));
        }
    }

    #[test]
    fn a_singular_matrix_is_repaired_and_the_repair_reported() {
        for (rank, n) in [(7, 40), (50, 200)] {
            let a = gram(rank, n);
            let mean = (0..n).map(|i| a[i * n + i]).sum::<f64>() / n as f64;
            let result = factor(&a, n, 0.0, 2).unwrap();
            assert!(result.damping >= FIRST_DAMPING * mean && result.damping < 1e-5 * mean, "{}", result.damping);
            assert!(defect(&a, n, &result) < 1e-9);
            let untouched = factor(&a, n, 0.01 * mean, 2).unwrap();
            assert_eq!(untouched.damping, 0.01 * mean);
        }
    }

    #[test]
    fn hopeless_matrices_are_refused() {
        let (nan, infinite) = (f64::NAN, f64::INFINITY);
        for a in [[1.0, 1e6, 1e6, 1.0], [-1.0, 0.0, 0.0, 1.0], [nan, 0.0, 0.0, 1.0], [1.0, infinite, infinite, 1.0]] {
            assert_eq!(factor(&a, 2, 0.0, 1).unwrap_err().code, ErrorCode::SolverFailed, "{a:?}");
        }
        assert!(factor(&[], 0, 0.0, 1).unwrap().factor.side() == 0);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let n = 290;
        let a = gram(n + 5, n);
        let one = factor(&a, n, 0.1, 1).unwrap().factor;
        assert_eq!(one, factor(&a, n, 0.1, 2).unwrap().factor);
        assert_eq!(one, factor(&a, n, 0.1, 5).unwrap().factor);
    }
}
