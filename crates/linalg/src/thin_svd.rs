use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Mat, MatRef, Par};
use kintsugi_runtime::{Error, ErrorCode, Result};

/// `A = Uᵀ diag(values) V` with the singular vectors as rows, largest singular value first.
#[derive(Clone, Debug)]
pub struct ThinSvd {
    /// `[min(m, n)]`, descending, not negative.
    pub values: Vec<f64>,
    /// `[min(m, n), m]`: row `i` is the left singular vector of `values[i]`.
    pub left: Vec<f64>,
    /// `[min(m, n), n]`: row `i` is the right singular vector of `values[i]`.
    pub right: Vec<f64>,
}

impl ThinSvd {
    /// Decomposes the row-major `[m, n]` matrix `a`.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED` when the matrix is not finite or the iteration does not converge.
    ///
    /// # Panics
    /// When the number of values does not fit.
    pub fn new(a: &[f64], m: usize, n: usize) -> Result<Self> {
        assert_eq!(a.len(), m * n, "the matrix is [m, n]");
        let failed =
            |message: &str| Err(Error::new(ErrorCode::SolverFailed, message).subject("singular value decomposition"));
        if !a.iter().all(|value| value.is_finite()) {
            return failed("the matrix to decompose is not finite");
        }
        let size = m.min(n);
        let largest = a.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        if size == 0 || largest == 0.0 {
            let unit = |width: usize| {
                (0..size * width).map(|i| f64::from(u8::from(i % width.max(1) == i / width.max(1)))).collect()
            };
            return Ok(ThinSvd { values: vec![0.0; size], left: unit(m), right: unit(n) });
        }
        // Squares of elements must stay in range; a power of two changes no digit.
        let exponent = (largest.log2().floor() as i32).clamp(-1000, 1000);
        let (down, up) = (f64::from(-exponent).exp2(), f64::from(exponent).exp2());
        let source = MatRef::from_row_major_slice(a, m, n);
        let scaled = Mat::from_fn(m, n, |i, j| source[(i, j)] * down);
        let (mut left, mut right) = (Mat::<f64>::zeros(m, size), Mat::<f64>::zeros(n, size));
        let mut values = Diag::<f64>::zeros(size);
        let thin = ComputeSvdVectors::Thin;
        let scratch = svd_scratch::<f64>(m, n, thin, thin, Par::Seq, Default::default());
        let mut memory = MemBuffer::new(scratch);
        let outcome = svd(
            scaled.as_ref(),
            values.as_mut(),
            Some(left.as_mut()),
            Some(right.as_mut()),
            Par::Seq,
            MemStack::new(&mut memory),
            Default::default(),
        );
        if outcome.is_err() {
            return failed("the singular value iteration does not converge");
        }
        let values = values.column_vector();
        Ok(ThinSvd {
            values: (0..size).map(|i| values[i] * up).collect(),
            left: (0..size).flat_map(|i| (0..m).map(move |row| (row, i))).map(|at| left[at]).collect(),
            right: (0..size).flat_map(|i| (0..n).map(move |row| (row, i))).map(|at| right[at]).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reproduces_the_matrix_with_orthonormal_vectors() {
        for (m, n) in [(1, 1), (4, 9), (9, 4), (70, 70), (3, 0)] {
            for (kind, scale) in [("dense", 1.0), ("rank 1", 1.0), ("zero", 0.0), ("dense", 1e180), ("dense", 1e-180)] {
                let at = |i: usize, j: usize| match kind {
                    "dense" => ((i * (j + 3)) as f64 * 0.7 + i as f64).sin() * scale,
                    _ => ((i + 1) as f64).sin() * ((j + 1) as f64).cos() * scale,
                };
                let a: Vec<f64> = (0..m).flat_map(|i| (0..n).map(move |j| at(i, j))).collect();
                let svd = ThinSvd::new(&a, m, n).unwrap();
                let size = m.min(n);
                assert!(svd.values.windows(2).all(|pair| pair[0] >= pair[1]) && svd.values.iter().all(|&v| v >= 0.0));
                for i in 0..m {
                    for j in 0..n {
                        let sum: f64 =
                            (0..size).map(|l| svd.left[l * m + i] * svd.values[l] * svd.right[l * n + j]).sum();
                        assert!((sum - a[i * n + j]).abs() <= 1e-12 * scale, "{kind} {m}×{n}");
                    }
                }
                for (vectors, width) in [(&svd.left, m), (&svd.right, n)] {
                    for i in 0..size {
                        for j in 0..size {
                            let dot: f64 = (0..width).map(|l| vectors[i * width + l] * vectors[j * width + l]).sum();
                            assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-12, "{kind} {m}×{n}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_broken_matrix_is_refused() {
        assert_eq!(ThinSvd::new(&[f64::NAN], 1, 1).unwrap_err().code, ErrorCode::SolverFailed);
    }
}
