use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef, Par};
use kintsugi_runtime::{Error, ErrorCode, Result};

/// Eigenvalues and eigenvectors of a symmetric matrix, largest eigenvalue first.
#[derive(Clone, Debug)]
pub struct SymmetricEigen {
    /// `[n]`, descending.
    pub values: Vec<f64>,
    /// `[n, n]`: row `i` is the unit eigenvector of `values[i]`. Signs are as the algorithm leaves them.
    pub vectors: Vec<f64>,
}

impl SymmetricEigen {
    /// Decomposes the symmetric `[n, n]` matrix `a`.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED` when the matrix is not finite or the iteration does not converge.
    ///
    /// # Panics
    /// When `a` is not `[n, n]`.
    pub fn new(a: &[f64], n: usize) -> Result<Self> {
        assert_eq!(a.len(), n * n, "the matrix is [n, n]");
        let failed = |message: &str| {
            Err(Error::new(ErrorCode::SolverFailed, message)
                .subject("symmetric eigenproblem")
                .hint("Check weights and calibration activations for overflow"))
        };
        let largest = a.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        if !a.iter().all(|value| value.is_finite()) {
            return failed("the matrix to decompose is not finite");
        }
        if n <= 1 || largest == 0.0 {
            let vectors = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
            return Ok(SymmetricEigen { values: a.iter().copied().take(n).collect(), vectors });
        }
        // Squares of elements must stay in range; a power of two changes no digit.
        let exponent = (largest.log2().floor() as i32).clamp(-1000, 1000);
        let (down, up) = (f64::from(-exponent).exp2(), f64::from(exponent).exp2());
        let source = MatRef::from_row_major_slice(a, n, n);
        let scaled = Mat::from_fn(n, n, |i, j| source[(i, j)] * down);
        let mut values = Diag::<f64>::zeros(n);
        let mut vectors = Mat::<f64>::zeros(n, n);
        let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default());
        let mut memory = MemBuffer::new(scratch);
        let outcome = self_adjoint_evd(
            scaled.as_ref(),
            values.as_mut(),
            Some(vectors.as_mut()),
            Par::Seq,
            MemStack::new(&mut memory),
            Default::default(),
        );
        if outcome.is_err() {
            return failed("the eigenvalue iteration does not converge");
        }
        let (values, vectors) = (values.column_vector(), vectors.as_ref());
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
        Ok(SymmetricEigen {
            values: order.iter().map(|&i| values[i] * up).collect(),
            vectors: order.iter().flat_map(|&i| (0..n).map(move |row| vectors[(row, i)])).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Residual `max ‖A v − λ v‖∞ / ‖A‖` and departure of the vectors from orthonormality.
    fn defects(a: &[f64], n: usize, eigen: &SymmetricEigen) -> (f64, f64) {
        let norm = a.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        let (mut residual, mut skew) = (0.0f64, 0.0f64);
        for (i, v) in eigen.vectors.chunks_exact(n).enumerate() {
            for row in 0..n {
                let product: f64 = (0..n).map(|j| a[row * n + j] * v[j]).sum();
                residual = residual.max((product - eigen.values[i] * v[row]).abs() / norm);
            }
            for (j, w) in eigen.vectors.chunks_exact(n).enumerate() {
                let dot: f64 = v.iter().zip(w).map(|(a, b)| a * b).sum();
                skew = skew.max((dot - f64::from(u8::from(i == j))).abs());
            }
        }
        (residual, skew)
    }

    #[test]
    fn decomposes_dense_rank_deficient_diagonal_and_extreme_matrices() {
        for n in [1usize, 2, 3, 33, 120] {
            for (kind, scale) in
                [("dense", 1.0), ("rank 2", 1.0), ("diagonal", 1.0), ("dense", 1e180), ("dense", 1e-180)]
            {
                let at = |i: usize, j: usize| match kind {
                    "dense" => ((i * j) as f64 * 0.11 + (i + j) as f64).cos(),
                    "rank 2" => {
                        (i as f64).sin() * (j as f64).sin() + 3.0 * (i as f64 * 0.5).cos() * (j as f64 * 0.5).cos()
                    }
                    _ => f64::from(u8::from(i == j)) * (10.0f64).powi(i as i32 % 12),
                };
                let a: Vec<f64> = (0..n * n).map(|i| scale * at(i / n, i % n)).collect();
                let eigen = SymmetricEigen::new(&a, n).unwrap();
                let unit: Vec<f64> = a.iter().map(|v| v / scale).collect();
                let mut scaled = eigen.clone();
                scaled.values.iter_mut().for_each(|v| *v /= scale);
                let (residual, skew) = defects(&unit, n, &scaled);
                assert!(residual < 1e-13 && skew < 1e-12, "{kind} {n} {scale:e}: {residual:e} {skew:e}");
                assert!(eigen.values.windows(2).all(|pair| pair[0] >= pair[1]));
                let trace: f64 = (0..n).map(|i| unit[i * n + i]).sum();
                let sum: f64 = scaled.values.iter().sum();
                assert!((sum - trace).abs() <= 1e-12 * scaled.values.iter().map(|v| v.abs()).sum::<f64>());
            }
        }
    }

    #[test]
    fn zero_empty_and_broken_matrices() {
        assert_eq!(SymmetricEigen::new(&[], 0).unwrap().values, []);
        let zero = SymmetricEigen::new(&[0.0; 9], 3).unwrap();
        assert_eq!(zero.values, [0.0; 3]);
        assert_eq!(zero.vectors, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        let error = SymmetricEigen::new(&[1.0, f64::NAN, f64::NAN, 1.0], 2).unwrap_err();
        assert_eq!(error.code, ErrorCode::SolverFailed);
    }
}
