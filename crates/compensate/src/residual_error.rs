use kintsugi_calibration::Calibration;
use kintsugi_linalg::{MatrixView, quadratic_trace};
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::{DenseMatrix, QuantizedMatrix};
use serde::{Deserialize, Serialize};

/// Output errors of a compressed Linear on its calibration inputs X, relative: `‖· X‖ / ‖W X‖` (Frobenius).
///
/// Where the original weight has no output at all (`‖W X‖ = 0`), the numerators stand alone, so that every figure is
/// finite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualError {
    /// Of the quantized weight: `(W − Ŵ) X`.
    pub quantized: f64,
    /// Of the quantized and compensated weight, with the factors as stored: `(W − Ŵ − B A) X`.
    pub compensated: f64,
    /// The smallest error that any factors of this rank can leave, in exact arithmetic.
    pub bound: f64,
}

/// `‖M X‖² = tr(M S Mᵀ)` of a row-major `[rows, calibration.width]` matrix.
///
/// # Panics
/// When the number of values does not fit.
pub fn output_energy(matrix: &[f32], rows: usize, calibration: &Calibration, pool: &ThreadPool) -> f64 {
    let matrix: Vec<f64> = matrix.iter().map(|&value| f64::from(value)).collect();
    energy(&matrix, rows, calibration, pool)
}

/// `‖(W − Ŵ) X‖ / ‖W X‖` without compensation; the numerator alone where `‖W X‖ = 0`.
///
/// # Panics
/// When the shapes differ.
pub fn residual_error(
    weight: &DenseMatrix,
    quantized: &QuantizedMatrix,
    calibration: &Calibration,
    pool: &ThreadPool,
) -> f64 {
    let original = output_energy(&weight.to_f32(), weight.rows(), calibration, pool);
    relative(energy(&residual(weight, quantized), weight.rows(), calibration, pool), original)
}

/// `tr(M S Mᵀ)` of a row-major `[rows, calibration.width]` matrix.
pub(crate) fn energy(matrix: &[f64], rows: usize, calibration: &Calibration, pool: &ThreadPool) -> f64 {
    quadratic_trace(MatrixView::new(matrix, rows, calibration.width()), calibration.second_moment(), pool)
}

/// `Δ = W − Ŵ`, row-major.
pub(crate) fn residual(weight: &DenseMatrix, quantized: &QuantizedMatrix) -> Vec<f64> {
    assert_eq!((weight.rows(), weight.columns()), (quantized.rows(), quantized.columns()), "one Linear, one shape");
    let pairs = weight.to_f32().into_iter().zip(quantized.to_f32());
    pairs.map(|(original, quantized)| f64::from(original) - f64::from(quantized)).collect()
}

/// `√(energy / original)`, or `√energy` where the original has none.
pub(crate) fn relative(energy: f64, original: f64) -> f64 {
    if original > 0.0 { energy.sqrt() / original.sqrt() } else { energy.sqrt() }
}
