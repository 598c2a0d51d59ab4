use kintsugi_calibration::Calibration;
use kintsugi_linalg::{MatrixView, quadratic_trace, quadratic_trace_of};
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
    let columns = calibration.width();
    assert_eq!(matrix.len(), rows * columns, "the matrix is [rows, width]");
    energy_of(rows, |i, row| widen(&matrix[i * columns..(i + 1) * columns], row), calibration, pool)
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
    let fill = |i: usize, row: &mut [f64]| residual_row(weight, quantized, i, row);
    relative(energy_of(weight.rows(), fill, calibration, pool), weight_energy(weight, calibration, pool))
}

/// `‖W X‖²`.
pub(crate) fn weight_energy(weight: &DenseMatrix, calibration: &Calibration, pool: &ThreadPool) -> f64 {
    let fill = |i: usize, row: &mut [f64]| {
        let mut values = vec![0.0; row.len()];
        weight.row_to_f32(i, &mut values);
        widen(&values, row);
    };
    energy_of(weight.rows(), fill, calibration, pool)
}

/// `tr(M S Mᵀ)` of the matrix whose row `i` is written by `fill(i, row)`.
fn energy_of(
    rows: usize,
    fill: impl Fn(usize, &mut [f64]) + Sync + Send,
    calibration: &Calibration,
    pool: &ThreadPool,
) -> f64 {
    quadratic_trace_of(rows, fill, calibration.second_moment(), pool)
}

/// `tr(M S Mᵀ)` of a row-major `[rows, calibration.width]` matrix.
pub(crate) fn energy(matrix: &[f64], rows: usize, calibration: &Calibration, pool: &ThreadPool) -> f64 {
    quadratic_trace(MatrixView::new(matrix, rows, calibration.width()), calibration.second_moment(), pool)
}

/// `Δ = W − Ŵ`, row-major.
pub(crate) fn residual(weight: &DenseMatrix, quantized: &QuantizedMatrix) -> Vec<f64> {
    assert_eq!((weight.rows(), weight.columns()), (quantized.rows(), quantized.columns()), "one Linear, one shape");
    let mut delta = vec![0.0; weight.rows() * weight.columns()];
    delta
        .chunks_exact_mut(weight.columns().max(1))
        .enumerate()
        .for_each(|(i, row)| residual_row(weight, quantized, i, row));
    delta
}

/// Row `i` of `W − Ŵ`.
fn residual_row(weight: &DenseMatrix, quantized: &QuantizedMatrix, i: usize, row: &mut [f64]) {
    let (mut original, mut rounded) = (vec![0.0; row.len()], vec![0.0; row.len()]);
    weight.row_to_f32(i, &mut original);
    quantized.row_to_f32(i, &mut rounded);
    for (value, (original, rounded)) in row.iter_mut().zip(original.into_iter().zip(rounded)) {
        *value = f64::from(original) - f64::from(rounded);
    }
}

fn widen(values: &[f32], out: &mut [f64]) {
    out.iter_mut().zip(values).for_each(|(out, &value)| *out = f64::from(value));
}

/// `√(energy / original)`, or `√energy` where the original has none.
pub(crate) fn relative(energy: f64, original: f64) -> f64 {
    if original > 0.0 { energy.sqrt() / original.sqrt() } else { energy.sqrt() }
}
