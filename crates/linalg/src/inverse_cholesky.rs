use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_upper_triangular;
use faer::{Mat, MatRef, Par};
use kintsugi_runtime::{Error, ErrorCode, Result};

/// How often the damping may grow before a matrix is given up.
const ATTEMPTS: usize = 12;
/// First damping, relative to the mean diagonal, of a matrix that does not factor without any.
const FIRST_DAMPING: f64 = 1e-9;

/// The upper triangular U with `(A + damping · I)⁻¹ = Uᵀ U`, `[n, n]` row-major.
///
/// It is made without forming the inverse: the Cholesky factor of A with rows and columns in reverse order is, read
/// backwards, an upper triangular R with `A = R Rᵀ`, and `U = R⁻¹`.
#[derive(Clone, Debug)]
pub struct InverseCholesky {
    /// U; zeros below the diagonal.
    pub upper: Vec<f64>,
    /// What was really added to the diagonal: the damping asked for, or a power of ten times it.
    pub damping: f64,
}

impl InverseCholesky {
    /// Factors the symmetric `[n, n]` matrix `a` with `damping` added to its diagonal. A matrix that is not
    /// numerically positive definite is tried again with ten times the damping.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED` when the matrix is not finite, or far from positive definite.
    ///
    /// # Panics
    /// When `a` is not `[n, n]`.
    pub fn new(a: &[f64], n: usize, damping: f64) -> Result<Self> {
        assert_eq!(a.len(), n * n, "the matrix is [n, n]");
        if !damping.is_finite() || a.iter().any(|value| !value.is_finite()) {
            return Err(Error::new(ErrorCode::SolverFailed, "the matrix to factor is not finite")
                .subject("Cholesky")
                .hint("Check the calibration activations for overflow"));
        }
        let mean = ((0..n).map(|i| a[i * n + i]).sum::<f64>() / n.max(1) as f64).max(0.0);
        let mut used = damping;
        for _ in 0..ATTEMPTS {
            if let Some(upper) = factor(a, n, used) {
                return Ok(InverseCholesky { upper, damping: used });
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

fn factor(a: &[f64], n: usize, damping: f64) -> Option<Vec<f64>> {
    if n == 0 {
        return Some(Vec::new());
    }
    let a = MatRef::from_row_major_slice(a, n, n);
    let mut reversed = Mat::from_fn(n, n, |i, j| {
        let value = a[(n - 1 - i, n - 1 - j)];
        if i == j { value + damping } else { value }
    });
    let diagonal: Vec<f64> = (0..n).map(|i| reversed[(i, i)]).collect();
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
    let stack = MemStack::new(&mut memory);
    cholesky_in_place(reversed.as_mut(), Default::default(), Par::Seq, stack, Default::default()).ok()?;
    // A pivot that is rounding noise of its own diagonal element carries no information: the matrix is singular.
    let noise = n as f64 * f64::EPSILON;
    let sound = (0..n).all(|i| reversed[(i, i)] * reversed[(i, i)] > noise * diagonal[i]);
    if !sound {
        return None;
    }
    let mut upper = Mat::zeros(n, n);
    invert_upper_triangular(upper.as_mut(), reversed.as_ref().reverse_rows_and_cols(), Par::Seq);
    let mut out = vec![0.0; n * n];
    for i in 0..n {
        for j in i..n {
            out[i * n + j] = upper[(i, j)];
        }
    }
    out.iter().all(|value| value.is_finite()).then_some(out)
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

    /// Largest element of `(A + damping I) Uᵀ U − I`.
    fn defect(a: &[f64], n: usize, result: &InverseCholesky) -> f64 {
        let u = &result.upper;
        let mut worst = 0.0f64;
        for i in 0..n {
            // Row i of A · Uᵀ, then times U.
            let mut row = a[i * n..(i + 1) * n].to_vec();
            row[i] += result.damping;
            let half: Vec<f64> = (0..n).map(|j| (0..n).map(|l| row[l] * u[j * n + l]).sum()).collect();
            for j in 0..n {
                let value: f64 = (0..n).map(|l| half[l] * u[l * n + j]).sum();
                worst = worst.max((value - f64::from(u8::from(i == j))).abs());
            }
        }
        worst
    }

    #[test]
    fn the_factor_reproduces_the_inverse() {
        for n in [1, 2, 17, 130] {
            let a = gram(2 * n + 3, n);
            let result = InverseCholesky::new(&a, n, 0.5).unwrap();
            assert_eq!(result.damping, 0.5);
            assert!(defect(&a, n, &result) < 1e-9, "{n}: {}", defect(&a, n, &result));
            assert!((0..n).all(|i| (0..i).all(|j| result.upper[i * n + j] == 0.0)));
        }
    }

    #[test]
    fn a_singular_matrix_is_repaired_and_the_repair_reported() {
        let n = 40;
        let a = gram(7, n);
        let mean = (0..n).map(|i| a[i * n + i]).sum::<f64>() / n as f64;
        let result = InverseCholesky::new(&a, n, 0.0).unwrap();
        assert!(result.damping >= FIRST_DAMPING * mean && result.damping < 1e-5 * mean, "{}", result.damping);
        assert!(defect(&a, n, &result) < 1e-4);
        let untouched = InverseCholesky::new(&a, n, 0.01 * mean).unwrap();
        assert_eq!(untouched.damping, 0.01 * mean);
    }

    #[test]
    fn hopeless_matrices_are_refused() {
        let (nan, infinite) = (f64::NAN, f64::INFINITY);
        for a in [[1.0, 1e6, 1e6, 1.0], [-1.0, 0.0, 0.0, 1.0], [nan, 0.0, 0.0, 1.0], [1.0, infinite, infinite, 1.0]] {
            assert_eq!(InverseCholesky::new(&a, 2, 0.0).unwrap_err().code, ErrorCode::SolverFailed, "{a:?}");
        }
        assert!(InverseCholesky::new(&[], 0, 0.0).unwrap().upper.is_empty());
    }
}
