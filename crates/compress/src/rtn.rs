use kintsugi_calibration::Calibration;
use kintsugi_linalg::{UpperTriangle, transposed};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, GroupAxis, QuantizedMatrix};

use crate::adaptive_axis::group_axis;
use crate::linear_method::{assemble, check_input};
use crate::{Grid, GridRule, GroupInputs, LinearMethod, QuantizeOptions};

/// Rounding to nearest: every weight alone, no calibration.
#[derive(Clone, Copy, Debug)]
pub struct Rtn;

impl LinearMethod for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn needs_calibration(&self) -> bool {
        false
    }

    fn compress(
        &self,
        weight: &DenseMatrix,
        calibration: Option<&Calibration>,
        options: &QuantizeOptions,
        pool: &ThreadPool,
    ) -> Result<QuantizedMatrix> {
        rtn(weight, calibration, options, pool)
    }
}

/// Rounds each weight to the nearest point of the grid of its group (see [`GridRule`]). The calibration serves only the
/// search for clipped ranges.
///
/// # Errors
/// Those of [`LinearMethod::compress`].
pub fn rtn(
    weight: &DenseMatrix,
    calibration: Option<&Calibration>,
    options: &QuantizeOptions,
    pool: &ThreadPool,
) -> Result<QuantizedMatrix> {
    check_input(weight, calibration, options)?;
    round(weight, calibration, options, group_axis(weight, calibration, options, pool)?, pool)
}

/// [`rtn`] of checked arguments with groups along `axis`, whatever `options` say.
pub(crate) fn round(
    weight: &DenseMatrix,
    calibration: Option<&Calibration>,
    options: &QuantizeOptions,
    axis: GroupAxis,
    pool: &ThreadPool,
) -> Result<QuantizedMatrix> {
    let statistics = calibration.map(Statistics::of);
    let mut codes = vec![0u8; weight.rows() * weight.columns()];
    let grids = match axis {
        GroupAxis::Input => round_rows(weight, statistics.as_ref(), options, &mut codes, pool),
        GroupAxis::Output => round_columns(weight, statistics.as_ref(), options, &mut codes, pool),
    };
    assemble(weight, options, axis, codes, &grids, None)
}

/// [`rtn`] with groups along the inputs of a weight whose columns have been multiplied by `factors`. The calibration is
/// that of the inputs before they are divided by them.
///
/// # Errors
/// Those of [`rtn`].
pub(crate) fn rtn_scaled(
    weight: &DenseMatrix,
    calibration: &Calibration,
    factors: &[f32],
    options: &QuantizeOptions,
    pool: &ThreadPool,
) -> Result<QuantizedMatrix> {
    check_input(weight, Some(calibration), options)?;
    let statistics = Statistics { factors: Some(factors), ..Statistics::of(calibration) };
    let mut codes = vec![0u8; weight.rows() * weight.columns()];
    let grids = round_rows(weight, Some(&statistics), options, &mut codes, pool);
    assemble(weight, options, GroupAxis::Input, codes, &grids, None)
}

/// What is known of the inputs of a Linear; see [`GroupInputs`].
struct Statistics<'a> {
    energies: Vec<f64>,
    moment: &'a UpperTriangle<f64>,
    factors: Option<&'a [f32]>,
}

impl<'a> Statistics<'a> {
    fn of(calibration: &'a Calibration) -> Self {
        Statistics { energies: calibration.energies(), moment: calibration.second_moment(), factors: None }
    }
}

/// Groups along the inputs: gives the grids `[rows, groups]`.
fn round_rows(
    weight: &DenseMatrix,
    statistics: Option<&Statistics<'_>>,
    options: &QuantizeOptions,
    codes: &mut [u8],
    pool: &ThreadPool,
) -> Vec<Grid> {
    let (columns, rule) = (weight.columns(), GridRule::new(options));
    let size = options.group_size.columns(columns);
    let mut rows: Vec<(&mut [u8], Vec<Grid>)> =
        codes.chunks_mut(columns.max(1)).map(|codes| (codes, Vec::new())).collect();
    pool.for_each_chunk(&mut rows, 1, |row, part| {
        let (codes, grids) = &mut part[0];
        let mut values = vec![0.0; columns];
        weight.row_to_f32(row, &mut values);
        for (group, (codes, values)) in codes.chunks_mut(size).zip(values.chunks(size)).enumerate() {
            let range = group * size..group * size + values.len();
            let inputs = statistics.map(|inputs| GroupInputs {
                energies: &inputs.energies[range.clone()],
                moment: Some((inputs.moment, range.start)),
                factors: inputs.factors.map(|factors| &factors[range.clone()]),
            });
            let grid = rule.fit(values, inputs);
            for (code, &value) in codes.iter_mut().zip(values) {
                *code = grid.code(value);
            }
            grids.push(grid);
        }
    });
    rows.into_iter().flat_map(|(_, grids)| grids).collect()
}

/// Groups along the outputs: gives the grids `[groups, columns]`.
fn round_columns(
    weight: &DenseMatrix,
    statistics: Option<&Statistics<'_>>,
    options: &QuantizeOptions,
    codes: &mut [u8],
    pool: &ThreadPool,
) -> Vec<Grid> {
    let (columns, rule) = (weight.columns(), GridRule::new(options));
    let size = options.group_size.columns(weight.rows());
    let mut bands: Vec<(&mut [u8], Vec<Grid>)> =
        codes.chunks_mut((size * columns).max(1)).map(|codes| (codes, Vec::new())).collect();
    pool.for_each_chunk(&mut bands, 1, |band, part| {
        let (codes, grids) = &mut part[0];
        let height = codes.len() / columns;
        let mut values = vec![0.0; height * columns];
        for (row, values) in values.chunks_exact_mut(columns).enumerate() {
            weight.row_to_f32(band * size + row, values);
        }
        let by_column = transposed(&values, height, columns);
        let mut energies = vec![0.0; height];
        for (column, values) in by_column.chunks_exact(height).enumerate() {
            let inputs = statistics.map(|inputs| {
                energies.fill(inputs.energies[column]);
                GroupInputs { energies: &energies, moment: None, factors: None }
            });
            let grid = rule.fit(values, inputs);
            for (codes, &value) in codes.chunks_exact_mut(columns).zip(values) {
                codes[column] = grid.code(value);
            }
            grids.push(grid);
        }
    });
    bands.into_iter().flat_map(|(_, grids)| grids).collect()
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;
    use kintsugi_runtime::ErrorCode;
    use kintsugi_testkit::matrices;
    use kintsugi_weights::{CODE_BITS, ElementType, GroupSize};

    use super::*;
    use crate::{AxisRule, Clip};

    fn along_outputs(group_size: usize, bits: u8, clip: Clip) -> QuantizeOptions {
        let group_size = GroupSize::Columns(group_size);
        QuantizeOptions { bits, group_size, group_axis: AxisRule::Output, clip, ..Default::default() }
    }

    #[test]
    fn groups_along_the_outputs_are_those_of_the_transposed_matrix() {
        let pool = ThreadPool::with_threads(2);
        for (rows, columns, size) in [(1, 1, 32), (64, 3, 32), (70, 129, 32), (5, 40, 64), (130, 7, 128)] {
            for clip in [Clip::Never, Clip::Weights] {
                let weight = weights(rows, columns);
                let turned = DenseMatrix::from_f32(columns, rows, transposed(&weight.to_f32(), rows, columns));
                let options = along_outputs(size, 3, clip);
                let found = rtn(&weight, None, &options, &pool).unwrap();
                let expected =
                    rtn(&turned, None, &QuantizeOptions { group_axis: AxisRule::Input, ..options }, &pool).unwrap();
                assert_eq!(found.group_axis(), GroupAxis::Output);
                assert_eq!(found.to_f32(), transposed(&expected.to_f32(), columns, rows), "{rows}×{columns} {clip:?}");
                assert_eq!(found.scales(), transposed(expected.scales(), columns, expected.groups()));
            }
        }
    }

    #[test]
    fn along_the_outputs_an_input_is_alone_and_its_scale_does_not_matter() {
        let pool = ThreadPool::with_threads(1);
        let (rows, columns) = (96, 40);
        let weight = weights(rows, columns);
        let options = along_outputs(32, 3, Clip::Never);
        let before = rtn(&weight, None, &options, &pool).unwrap();
        let mut values = weight.to_f32();
        values.iter_mut().skip(7).step_by(columns).for_each(|value| *value *= 64.0);
        let after = rtn(&DenseMatrix::from_f32(rows, columns, values), None, &options, &pool).unwrap();
        assert_eq!(after.codes(), before.codes());
        for (at, (after, before)) in after.to_f32().iter().zip(before.to_f32()).enumerate() {
            assert_eq!(*after, if at % columns == 7 { before * 64.0 } else { before });
        }
    }

    fn weights(rows: usize, columns: usize) -> DenseMatrix {
        let values = (0..rows * columns).map(|i| ((i * i % 997) as f32 * 0.61).sin() * (1.0 + (i % 5) as f32));
        DenseMatrix::from_f32(rows, columns, values.collect())
    }

    #[test]
    fn every_weight_is_within_half_a_step_at_every_width_group_and_raggedness() {
        let pool = ThreadPool::with_threads(2);
        let sizes = [32, 64, 128, 7].map(GroupSize::Columns);
        for bits in CODE_BITS {
            for group_size in sizes.into_iter().chain([GroupSize::WholeRow]) {
                for (rows, columns) in [(1, 1), (3, 64), (5, 200), (1, 129), (70, 1)] {
                    for symmetric in [false, true] {
                        let options = QuantizeOptions { bits, group_size, symmetric, ..Default::default() };
                        let weight = weights(rows, columns);
                        let matrix = rtn(&weight, None, &options, &pool).unwrap();
                        assert_eq!(matrix.zero_points().is_none(), symmetric);
                        let (before, after) = (weight.to_f32(), matrix.to_f32());
                        for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                            let (row, column) = (i / columns, i % columns);
                            let scale = matrix.scales()[row * matrix.groups() + matrix.group_of(column)];
                            // Rounding the scale to bf16 moves the ends of the range by 2^-8 of up to 2^bits steps, and
                            // a zero point half-way between codes by another half step.
                            let steps = 0.5 + f32::from(bits).exp2() / 256.0 + 0.5;
                            assert!((before - after).abs() <= scale * steps, "{bits} {group_size:?} {before} {after}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn grid_points_survive_unchanged() {
        let values: Vec<f32> = (0..64).map(|i| (i % 16) as f32 * 0.25 - 1.0).collect();
        let weight = DenseMatrix::from_f32(2, 32, values.clone());
        let options = QuantizeOptions { group_size: GroupSize::Columns(16), ..Default::default() };
        assert_eq!(rtn(&weight, None, &options, &ThreadPool::with_threads(1)).unwrap().to_f32(), values);
    }

    #[test]
    fn factors_stand_for_inputs_that_are_divided_by_them() {
        let pool = ThreadPool::with_threads(2);
        let (rows, columns) = (9, 150);
        // Powers of two, so that neither way rounds what the other does not.
        let factors: Vec<f32> = (0..columns).map(|column| [0.25, 1.0, 8.0][column % 3]).collect();
        let inputs = matrices::activations(7, 300, columns);
        let divided: Vec<f32> = inputs.iter().zip(factors.iter().cycle()).map(|(x, factor)| x / factor).collect();
        let [before, after] = [inputs, divided].map(|inputs| {
            let mut builder = CalibrationBuilder::new(columns);
            builder.push(&inputs, &pool).unwrap();
            builder.finish(&pool)
        });
        let weight = weights(rows, columns);
        for clip in [Clip::Weights, Clip::Outputs] {
            let options = QuantizeOptions { bits: 3, group_size: GroupSize::Columns(64), clip, ..Default::default() };
            let found = rtn_scaled(&weight, &before, &factors, &options, &pool).unwrap();
            assert_eq!(found, rtn(&weight, Some(&after), &options, &pool).unwrap(), "{clip:?}");
            assert_ne!(found, rtn(&weight, Some(&before), &options, &pool).unwrap(), "{clip:?}");
        }
    }

    #[test]
    fn extremes_and_zeros_decode_to_finite_numbers() {
        let pool = ThreadPool::with_threads(1);
        for scale_type in ElementType::ALL {
            for value in [0.0, 1e-45, 1e-30, 1e30, f32::MAX] {
                let weight = DenseMatrix::from_f32(1, 4, vec![value, -value, 0.0, value / 3.0]);
                let options = QuantizeOptions { scale_type, ..Default::default() };
                let matrix = rtn(&weight, None, &options, &pool).unwrap();
                assert!(matrix.to_f32().iter().all(|value| value.is_finite()), "{scale_type:?} {value:e}");
                assert_eq!(matrix.to_f32()[2], 0.0);
            }
        }
    }

    #[test]
    fn broken_weights_are_refused() {
        let pool = ThreadPool::with_threads(1);
        let weight = DenseMatrix::from_f32(2, 2, vec![0.0, 1.0, 2.0, f32::NAN]);
        let error = rtn(&weight, None, &QuantizeOptions::default(), &pool).unwrap_err();
        assert_eq!(error.code, ErrorCode::ValueNotFinite);
        assert!(error.message.contains("row 1") && error.message.contains("column 1"));
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let weight = weights(37, 150);
        let run =
            |threads| rtn(&weight, None, &QuantizeOptions::default(), &ThreadPool::with_threads(threads)).unwrap();
        assert_eq!(run(1), run(4));
    }
}
