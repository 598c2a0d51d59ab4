use kintsugi_calibration::Calibration;
use kintsugi_linalg::quadratic_trace_of;
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::RowSource;
use serde::{Deserialize, Serialize};

use crate::residual::{difference, relative};

/// Output errors of a compressed Linear on its calibration inputs X, relative: `‖· X‖ / ‖W X‖` (Frobenius).
///
/// Where the original weight has no output at all (`‖W X‖ = 0`), the numerators stand alone, so that every figure is
/// finite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualError {
    /// Of the compressed weight: `(W − Ŵ) X`.
    pub quantized: f64,
    /// Of the compressed and compensated weight, with the factors as stored: `(W − Ŵ − B A) X`.
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
    let fill = |i: usize, row: &mut [f64]| widen(&matrix[i * columns..(i + 1) * columns], row);
    quadratic_trace_of(rows, fill, calibration.second_moment(), pool)
}

/// `‖(W − Ŵ) X‖ / ‖W X‖` without compensation; the numerator alone where `‖W X‖ = 0`.
///
/// # Panics
/// When the shapes differ.
pub fn residual_error(
    weight: &dyn RowSource,
    compressed: &dyn RowSource,
    calibration: &Calibration,
    pool: &ThreadPool,
) -> f64 {
    let fill = |i: usize, row: &mut [f64]| difference(weight, compressed, i, row);
    let energy = quadratic_trace_of(weight.rows(), fill, calibration.second_moment(), pool);
    relative(energy, weight_energy(weight, calibration, pool))
}

/// `‖W X‖²`.
fn weight_energy(weight: &dyn RowSource, calibration: &Calibration, pool: &ThreadPool) -> f64 {
    quadratic_trace_of(weight.rows(), |i, row| wide_row(weight, i, row), calibration.second_moment(), pool)
}

/// Writes row `i` of a weight.
pub(crate) fn wide_row(weight: &dyn RowSource, i: usize, row: &mut [f64]) {
    let mut values = vec![0.0; row.len()];
    weight.row_to_f32(i, &mut values);
    widen(&values, row);
}

fn widen(values: &[f32], out: &mut [f64]) {
    out.iter_mut().zip(values).for_each(|(out, &value)| *out = f64::from(value));
}
