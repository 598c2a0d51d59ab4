use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::{Conj, Mat, MatRef, Par};

/// `A = Q R` of a tall matrix by Householder reflections: Q is orthonormal to rounding whatever the rank of A.
#[derive(Clone, Debug)]
pub struct ThinQr {
    /// `[rows, columns]`, orthonormal columns.
    pub q: Vec<f64>,
    /// `[columns, columns]`, upper triangular.
    pub r: Vec<f64>,
}

impl ThinQr {
    /// Factors the row-major `[rows, columns]` matrix `a` with `rows ≥ columns`.
    ///
    /// # Panics
    /// When the number of values does not fit or the matrix is wide.
    pub fn new(a: &[f64], rows: usize, columns: usize) -> Self {
        assert!(rows >= columns, "a thin QR needs at least as many rows as columns");
        let mut factors = MatRef::from_row_major_slice(a, rows, columns).to_owned();
        let block = recommended_block_size::<f64>(rows, columns);
        let mut coefficients = Mat::<f64>::zeros(block, columns);
        let scratch = qr_in_place_scratch::<f64>(rows, columns, block, Par::Seq, Default::default());
        let mut memory = MemBuffer::new(scratch);
        let stack = MemStack::new(&mut memory);
        qr_in_place(factors.as_mut(), coefficients.as_mut(), Par::Seq, stack, Default::default());

        let mut q = Mat::<f64>::identity(rows, columns);
        let scratch = apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(rows, block, columns);
        let mut memory = MemBuffer::new(scratch);
        apply_block_householder_sequence_on_the_left_in_place_with_conj(
            factors.as_ref(),
            coefficients.as_ref(),
            Conj::No,
            q.as_mut(),
            Par::Seq,
            MemStack::new(&mut memory),
        );
        let r = (0..columns * columns).map(|at| (at / columns, at % columns));
        ThinQr {
            q: (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|at| q[at]).collect(),
            r: r.map(|(i, j)| if i <= j { factors[(i, j)] } else { 0.0 }).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reproduces_the_matrix_with_orthonormal_columns_even_when_columns_are_zero_or_equal() {
        for (m, n) in [(1, 1), (5, 5), (40, 7), (130, 70), (3, 0)] {
            for kind in ["dense", "rank 1", "zero"] {
                let at = |i: usize, j: usize| match kind {
                    "dense" => ((i * (j + 3)) as f64 * 0.7 + i as f64).sin(),
                    "rank 1" => (i as f64).sin(),
                    _ => 0.0,
                };
                let a: Vec<f64> = (0..m).flat_map(|i| (0..n).map(move |j| at(i, j))).collect();
                let qr = ThinQr::new(&a, m, n);
                for i in 0..m {
                    for j in 0..n {
                        let value: f64 = (0..n).map(|l| qr.q[i * n + l] * qr.r[l * n + j]).sum();
                        assert!((value - a[i * n + j]).abs() < 1e-12, "{kind} {m}×{n}");
                    }
                }
                for i in 0..n {
                    assert!((0..i).all(|j| qr.r[i * n + j] == 0.0));
                    for j in 0..n {
                        let dot: f64 = (0..m).map(|l| qr.q[l * n + i] * qr.q[l * n + j]).sum();
                        assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-13, "{kind} {m}×{n}");
                    }
                }
            }
        }
    }
}
