use kintsugi_calibration::Calibration;
use kintsugi_linalg::quadratic_forms;
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, GroupAxis, QuantizedMatrix};

use crate::rtn::round;
use crate::{AxisRule, QuantizeOptions};

/// The axis of the groups that `options` ask for.
///
/// AdaDim (arXiv 2309.15531) rounds the weight to nearest both ways and keeps the axis that does less damage; a solver
/// such as GPTQ then runs once. The published damage is that of all outputs together, in which the largest outputs drown
/// the others: a norm or a gate behind them may make all equal again, and a few rows of large weights would choose an axis
/// that ruins the rest. Here it is the mean over the outputs of `d S dᵀ / w S wᵀ`, d and w being the rows of `W − Ŵ`
/// and W; without calibration S is the identity.
///
/// Groups along the outputs are better where some inputs are much larger than the others, or their weights are; groups
/// along the inputs where some outputs are. Equal damage keeps the inputs. Weights of inputs that no token activates
/// count here, although GPTQ drops them.
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
            let energies = energies(weight, None, calibration, pool);
            let damage_along = |axis| -> Result<f64> {
                let quantized = round(weight, calibration, options, axis, pool)?;
                Ok(damage(weight, &quantized, calibration, &energies, pool))
            };
            let (input, output) = (damage_along(GroupAxis::Input)?, damage_along(GroupAxis::Output)?);
            Ok(if output < input { GroupAxis::Output } else { GroupAxis::Input })
        }
    }
}

/// The mean over the outputs of the relative damage; outputs that are always zero count with what is added to them.
fn damage(
    weight: &DenseMatrix,
    quantized: &QuantizedMatrix,
    calibration: Option<&Calibration>,
    energies_before: &[f64],
    pool: &ThreadPool,
) -> f64 {
    let errors = energies(weight, Some(quantized), calibration, pool);
    let relative = errors.iter().zip(energies_before).map(|(&error, &energy)| match energy > 0.0 {
        true => error / energy,
        false => error,
    });
    relative.sum::<f64>() / errors.len().max(1) as f64
}

/// `m S mᵀ` of every row m of `W − Ŵ`, or of W.
fn energies(
    weight: &DenseMatrix,
    quantized: Option<&QuantizedMatrix>,
    calibration: Option<&Calibration>,
    pool: &ThreadPool,
) -> Vec<f64> {
    let columns = weight.columns();
    let fill = |row: usize, out: &mut [f64]| {
        let (mut before, mut after) = (vec![0.0; columns], vec![0.0; columns]);
        weight.row_to_f32(row, &mut before);
        if let Some(quantized) = quantized {
            quantized.row_to_f32(row, &mut after);
        }
        for (out, (before, after)) in out.iter_mut().zip(before.iter().zip(&after)) {
            *out = f64::from(*before) - f64::from(*after);
        }
    };
    match calibration {
        Some(calibration) => quadratic_forms(weight.rows(), fill, calibration.second_moment(), pool),
        None => pool.map(weight.rows(), |row| {
            let mut values = vec![0.0; columns];
            fill(row, &mut values);
            values.iter().map(|value| value * value).sum::<f64>()
        }),
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
    fn the_size_of_an_output_does_not_matter() {
        let pool = ThreadPool::with_threads(2);
        let (plain, calibration) = (weight(0.0, 1.0), calibration(30.0, &pool));
        let chosen = |weight: &DenseMatrix| group_axis(weight, Some(&calibration), &options(AxisRule::Adaptive), &pool);
        assert_eq!(chosen(&plain).unwrap(), GroupAxis::Output);
        // One output in a thousand times the size: along the outputs its group has nothing left for its neighbours.
        let mut values = plain.to_f32();
        values.iter_mut().enumerate().filter(|(i, _)| i / COLUMNS % 32 == 5).for_each(|(_, value)| *value *= 1000.0);
        let large = DenseMatrix::from_f32(ROWS, COLUMNS, values);
        assert_eq!(chosen(&large).unwrap(), GroupAxis::Input);
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
                let energies = energies(&weight, None, calibration.as_ref(), &pool);
                (damage(&weight, &matrix, calibration.as_ref(), &energies, &pool), matrix.group_axis())
            };
            let (input, output) = (damage_with(AxisRule::Input), damage_with(AxisRule::Output));
            let adaptive = damage_with(AxisRule::Adaptive);
            assert_eq!(adaptive, if output.0 < input.0 { output } else { input });
            assert_eq!(adaptive.1, expected, "{input:?} {output:?}");
            assert!(adaptive.0 < 0.8 * input.0.max(output.0), "the case does not tell the axes apart");
            if let Some(calibration) = &calibration {
                let solved = gptq(&weight, calibration, &options(AxisRule::Adaptive), &pool).unwrap().matrix;
                assert_eq!(solved.group_axis(), expected);
                let energies = energies(&weight, None, Some(calibration), &pool);
                assert!(damage(&weight, &solved, Some(calibration), &energies, &pool) < adaptive.0);
            }
        }
    }
}
