use kintsugi_calibration::Calibration;
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::RowSource;

use crate::output_energies::OutputEnergies;
use crate::residual_error::wide_row;

/// Largest exponent: outputs that are smaller still are hardly there, and may be nothing but rounding.
const MOST: f64 = 10.0;

/// What the outputs of Linears that share an A are multiplied with before their residuals are one: powers of two near
/// `1 / ‖W X‖`, relative to the largest outputs, so that errors count relative to the outputs of each Linear and not to
/// those of the loudest one. Powers of two change no digit of a residual or of factors.
pub fn group_scales(weights: &[&dyn RowSource], calibration: &Calibration, pool: &ThreadPool) -> Vec<f32> {
    if weights.len() < 2 {
        return vec![1.0; weights.len()];
    }
    let energies = OutputEnergies::new(calibration);
    let energies: Vec<f64> = weights
        .iter()
        .map(|&weight| energies.of(weight.rows(), |i, row| wide_row(weight, i, row), pool).value)
        .collect();
    let largest = energies.iter().fold(0.0f64, |largest, &energy| largest.max(energy));
    let scale = |&energy: &f64| {
        // A weight that is not finite is refused when it is solved for.
        let exponent = ((largest / energy).log2() / 2.0).round();
        if exponent.is_finite() { exponent.clamp(0.0, MOST).exp2() as f32 } else { 1.0 }
    };
    energies.iter().map(scale).collect()
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;
    use kintsugi_weights::DenseMatrix;

    use super::*;

    #[test]
    fn outputs_of_any_size_become_alike() {
        let pool = ThreadPool::with_threads(2);
        let mut builder = CalibrationBuilder::new(4);
        builder.push(&(0..80).map(|at| (at as f32 * 0.7).sin()).collect::<Vec<_>>(), &pool).unwrap();
        let calibration = builder.finish(&pool);
        let values = |factor: f32| (0..12).map(|at| factor * (at as f32 * 1.3).cos()).collect();
        let matrices = [1.0, 100.0, 0.0, 1e-20, f32::NAN].map(|factor| DenseMatrix::from_f32(3, 4, values(factor)));
        let all: Vec<&dyn RowSource> = matrices.iter().map(|matrix| matrix as _).collect();
        assert_eq!(group_scales(&all[..4], &calibration, &pool), [128.0, 1.0, 1.0, 1024.0]);
        assert_eq!(group_scales(&all[..1], &calibration, &pool), [1.0]);
        let with_nan = group_scales(&all[3..], &calibration, &pool);
        assert!(with_nan.iter().all(|scale| scale.is_finite()), "{with_nan:?}");
    }
}
