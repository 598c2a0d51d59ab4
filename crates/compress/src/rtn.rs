use kintsugi_calibration::Calibration;
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, QuantizedMatrix};

use crate::linear_method::{assemble, check_input};
use crate::{GridRule, GroupInputs, LinearMethod, QuantizeOptions};

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
    let (rows, columns) = (weight.rows(), weight.columns());
    let (size, groups) = (options.group_size.columns(columns), options.group_size.groups(columns));
    let rule = GridRule::new(options);
    let statistics = calibration.map(|calibration| (calibration.energies(), calibration.second_moment()));
    let grids = pool.map(rows, |row| {
        let mut values = vec![0.0; columns];
        weight.row_to_f32(row, &mut values);
        let fit = |(group, values)| {
            let range = group * size..columns.min((group + 1) * size);
            let inputs = statistics.as_ref().map(|(energies, moment)| GroupInputs {
                energies: &energies[range.clone()],
                moment: Some((moment, range.start)),
            });
            rule.fit(values, inputs)
        };
        values.chunks(size).enumerate().map(fit).collect::<Vec<_>>()
    });
    let grids = grids.concat();
    let mut codes = vec![0u8; rows * columns];
    pool.for_each_chunk(&mut codes, columns, |row, codes| {
        let mut values = vec![0.0; columns];
        weight.row_to_f32(row, &mut values);
        let grids = &grids[row * groups..(row + 1) * groups];
        for ((codes, values), grid) in codes.chunks_mut(size).zip(values.chunks(size)).zip(grids) {
            for (code, &value) in codes.iter_mut().zip(values) {
                *code = grid.code(value);
            }
        }
    });
    assemble(weight, options, codes, &grids, None)
}

#[cfg(test)]
mod tests {
    use kintsugi_runtime::ErrorCode;
    use kintsugi_weights::{CODE_BITS, ElementType, GroupSize};

    use super::*;

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
