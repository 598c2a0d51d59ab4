use kintsugi_calibration::Calibration;
use kintsugi_linalg::quadratic_trace_of;
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, GroupAxis, QuantizedMatrix};

use crate::rtn::round;
use crate::{AxisRule, QuantizeOptions};

/// The axis of the groups that `options` ask for.
///
/// AdaDim (arXiv 2309.15531) rounds the weight to nearest both ways and keeps the axis that does less damage; a solver
/// such as GPTQ then runs once. The damage is `tr(D S Dᵀ)`, that of the outputs of this Linear over the calibration
/// tokens, or `‖D‖²` where there are none. Groups along the outputs are better where some inputs are much larger than
/// the others, or their weights are; groups along the inputs where some outputs are. Equal damage keeps the inputs.
///
/// # Errors
/// Those of [`crate::rtn`].
pub(crate) fn group_axis(
    weight: &DenseMatrix,
    calibration: Option<&Calibration>,
    options: &QuantizeOptions,
    pool: &ThreadPool,
) -> Result<GroupAxis> {
    match options.group_axis {
        AxisRule::Input => Ok(GroupAxis::Input),
        AxisRule::Output => Ok(GroupAxis::Output),
        AxisRule::Adaptive => {
            let damage_along = |axis| -> Result<f64> {
                Ok(damage(weight, &round(weight, calibration, options, axis, pool)?, calibration, pool))
            };
            let (input, output) = (damage_along(GroupAxis::Input)?, damage_along(GroupAxis::Output)?);
            Ok(if output < input { GroupAxis::Output } else { GroupAxis::Input })
        }
    }
}

/// `tr(D S Dᵀ)` of `D = W − Ŵ`; S is the identity without calibration.
fn damage(
    weight: &DenseMatrix,
    quantized: &QuantizedMatrix,
    calibration: Option<&Calibration>,
    pool: &ThreadPool,
) -> f64 {
    let columns = weight.columns();
    let difference = |row: usize, out: &mut [f64]| {
        let (mut before, mut after) = (vec![0.0; columns], vec![0.0; columns]);
        weight.row_to_f32(row, &mut before);
        quantized.row_to_f32(row, &mut after);
        for (out, (before, after)) in out.iter_mut().zip(before.iter().zip(&after)) {
            *out = f64::from(*before) - f64::from(*after);
        }
    };
    match calibration {
        Some(calibration) => quadratic_trace_of(weight.rows(), difference, calibration.second_moment(), pool),
        None => {
            let squares = pool.map(weight.rows(), |row| {
                let mut values = vec![0.0; columns];
                difference(row, &mut values);
                values.iter().map(|value| value * value).sum::<f64>()
            });
            squares.iter().sum()
        }
    }
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;
    use kintsugi_testkit::Random;
    use kintsugi_weights::GroupSize;

    use super::*;
    use crate::{gptq, rtn};

    const ROWS: usize = 128;
    const COLUMNS: usize = 192;
    /// The input that is larger than the others; as in real models, its weights are small.
    const OUTLIER: usize = 17;

    /// Weights whose rows and columns have sizes of their own, from 1 to 10 to the power of `rows` and `columns`.
    fn weight(rows: f64, columns: f64) -> DenseMatrix {
        let mut random = Random::new(21);
        let mut sizes = |count: usize, power: f64| -> Vec<f64> {
            (0..count).map(|_| 10f64.powf(power * random.normal().abs().min(1.0))).collect()
        };
        let (of_rows, mut of_columns) = (sizes(ROWS, rows), sizes(COLUMNS, columns));
        of_columns[OUTLIER] = 1.0;
        let value =
            |i: usize, random: &mut Random| (random.normal() * of_rows[i / COLUMNS] * of_columns[i % COLUMNS]) as f32;
        DenseMatrix::from_f32(ROWS, COLUMNS, (0..ROWS * COLUMNS).map(|i| value(i, &mut random)).collect())
    }

    /// Statistics of inputs of which one is `outlier` times as large as the others.
    fn calibration(outlier: f64, pool: &ThreadPool) -> Calibration {
        let mut random = Random::new(22);
        let size = |j: usize| if j == OUTLIER { outlier } else { 1.0 };
        let x: Vec<f32> = (0..600 * COLUMNS).map(|i| (random.normal() * size(i % COLUMNS)) as f32).collect();
        let mut builder = CalibrationBuilder::new(COLUMNS);
        builder.push(&x, pool).unwrap();
        builder.finish(pool)
    }

    fn options(group_axis: AxisRule) -> QuantizeOptions {
        QuantizeOptions { bits: 3, group_size: GroupSize::Columns(32), group_axis, ..Default::default() }
    }

    #[test]
    fn the_better_axis_is_taken_and_both_occur() {
        let pool = ThreadPool::with_threads(2);
        let cases = [
            (weight(0.0, 1.0), Some(calibration(30.0, &pool)), GroupAxis::Output),
            (weight(0.0, 1.0), None, GroupAxis::Output),
            (weight(1.0, 0.0), Some(calibration(1.0, &pool)), GroupAxis::Input),
            (weight(1.0, 0.0), None, GroupAxis::Input),
        ];
        for (weight, calibration, expected) in cases {
            let damage_with = |rule| {
                let matrix = rtn(&weight, calibration.as_ref(), &options(rule), &pool).unwrap();
                (damage(&weight, &matrix, calibration.as_ref(), &pool), matrix.group_axis())
            };
            let (input, output) = (damage_with(AxisRule::Input), damage_with(AxisRule::Output));
            let adaptive = damage_with(AxisRule::Adaptive);
            assert_eq!(adaptive, if output.0 < input.0 { output } else { input });
            assert_eq!(adaptive.1, expected, "{input:?} {output:?}");
            assert!(adaptive.0 < 0.8 * input.0.max(output.0), "the case does not tell the axes apart");
            if let Some(calibration) = &calibration {
                let solved = gptq(&weight, calibration, &options(AxisRule::Adaptive), &pool).unwrap().matrix;
                assert_eq!(solved.group_axis(), expected);
                assert!(damage(&weight, &solved, Some(calibration), &pool) < adaptive.0);
            }
        }
    }
}
