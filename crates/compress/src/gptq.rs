use kintsugi_calibration::Calibration;
use kintsugi_linalg::UpperCholesky;
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, GroupAxis, GroupSize, QuantizedMatrix};

use crate::adaptive_axis::group_axis;
use crate::gptq_sweep::{Sweep, SweepGroups};
use crate::linear_method::{assemble, check_input};
use crate::{AxisRule, GridRule, LinearMethod, QuantizeOptions};

/// Columns that are rounded before their errors reach the columns behind them in one product.
const BLOCK: usize = 64;

/// GPTQ: rounds column by column and lets the columns that follow make up for the error.
#[derive(Clone, Copy, Debug)]
pub struct Gptq;

impl LinearMethod for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn compress(
        &self,
        weight: &DenseMatrix,
        calibration: Option<&Calibration>,
        options: &QuantizeOptions,
        pool: &ThreadPool,
    ) -> Result<QuantizedMatrix> {
        let calibration = calibration.ok_or_else(|| {
            Error::new(ErrorCode::OptionInvalid, "gptq needs calibration activations")
                .subject("calibration")
                .hint("Give a calibration text, or use the method rtn")
        })?;
        Ok(gptq(weight, calibration, options, pool)?.matrix)
    }
}

/// Rows that one task of [`gptq`] holds at a time; groups along the outputs stay whole.
pub fn tile_rows(options: &QuantizeOptions) -> usize {
    let groups = match (options.group_axis, options.group_size) {
        (AxisRule::Input, _) | (_, GroupSize::WholeRow) => SweepGroups::Input { fixed: true, size: 1, count: 1 },
        (_, GroupSize::Columns(size)) => SweepGroups::Output { size: size.max(1) },
    };
    groups.tile_rows()
}

/// What [`gptq`] found.
#[derive(Clone, Debug)]
pub struct GptqSolution {
    /// The quantized weight.
    pub matrix: QuantizedMatrix,
    /// The objective that the sweep ends at, `tr(D H Dᵀ)` with `D = W − Ŵ` and the damped second moment `H`. Columns
    /// of dead channels count as zero in W.
    pub energy: f64,
    /// What was added to the diagonal of the second moment, absolute. More than asked for when H did not factor.
    pub damping: f64,
}

/// GPTQ (arXiv 2210.17323), solved by the Cholesky factor of H itself instead of that of its inverse.
///
/// With `H = S + damping · mean(diag S) · I = R Rᵀ`, R upper triangular, the objective is `‖D R‖²`, and column j of
/// `D R` holds only `d_1 … d_j`. So column j is rounded at `w_j + Σ_{i<j} d_i R_ij / R_jj` with `d_i = w_i − ŵ_i`, which
/// is the weight that the published recursion over `H⁻¹ = Uᵀ U` arrives at (`U = R⁻¹`), for a third of the work of
/// factoring and without the rounding errors of an inverse. The factor is computed in f64; the sweep is a sum over the
/// original weights and does not pile errors up, so f32 is enough for it. The constant that papers put before S changes
/// nothing, because the damping is relative.
///
/// As in the published algorithm, the weights of dead channels (`S_jj = 0`) become zero. A grid that is chosen during
/// the sweep sees weights that carry every correction of the columns before its group; that is how groups along the
/// outputs are always chosen (arXiv 2309.15531).
///
/// # Errors
/// Those of [`LinearMethod::compress`].
pub fn gptq(
    weight: &DenseMatrix,
    calibration: &Calibration,
    options: &QuantizeOptions,
    pool: &ThreadPool,
) -> Result<GptqSolution> {
    solve(weight, calibration, options, BLOCK, pool)
}

fn solve(
    weight: &DenseMatrix,
    calibration: &Calibration,
    options: &QuantizeOptions,
    block: usize,
    pool: &ThreadPool,
) -> Result<GptqSolution> {
    check_input(weight, Some(calibration), options)?;
    let axis = group_axis(weight, Some(calibration), options, pool)?;
    let columns = weight.columns();
    let moment = calibration.second_moment();
    let energies = calibration.energies();
    let mut order: Vec<usize> = (0..columns).collect();
    if options.act_order {
        order.sort_by(|&i, &j| energies[j].total_cmp(&energies[i]));
    }
    let live = energies.iter().filter(|&&energy| energy > 0.0).count();
    let mean = if live > 0 { energies.iter().sum::<f64>() / live as f64 } else { 1.0 };
    let fill = |i: usize, row: &mut [f64]| {
        for (value, &column) in row.iter_mut().zip(&order[i..]) {
            *value = moment.at(order[i], column);
        }
        // Any positive diagonal serves a dead channel: nothing couples it to the others.
        if row[0] == 0.0 {
            row[0] = mean;
        }
    };
    let UpperCholesky { factor, damping } = UpperCholesky::new(columns, options.damping * mean, fill, pool)?;
    let diagonal = factor.diagonal();
    let unit = factor.convert(|i, row, unit: &mut [f32]| {
        for ((unit, value), diagonal) in unit.iter_mut().zip(row).zip(&diagonal[i..]) {
            *unit = (value / diagonal) as f32;
        }
    });

    let sweep = Sweep {
        weight,
        rule: GridRule::new(options),
        groups: match axis {
            GroupAxis::Output => SweepGroups::Output { size: options.group_size.columns(weight.rows()) },
            GroupAxis::Input => SweepGroups::Input {
                fixed: options.static_groups,
                size: options.group_size.columns(columns),
                count: options.group_size.groups(columns),
            },
        },
        moment,
        energies,
        block,
        order,
        unit,
        diagonal,
    };
    let swept = sweep.run(pool);
    let matrix = assemble(weight, options, axis, swept.codes, &swept.grids, sweep.group_index())?;
    Ok(GptqSolution { matrix, energy: swept.energy, damping })
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;
    use kintsugi_linalg::{MatrixView, UpperTriangle, quadratic_trace};
    use kintsugi_testkit::{Random, matrices};
    use kintsugi_weights::ElementType;

    use super::*;
    use crate::{Grid, rtn};

    /// Statistics of correlated activations with outliers.
    fn calibration(seed: u64, tokens: usize, columns: usize, pool: &ThreadPool) -> Calibration {
        let mut x = matrices::activations(seed, tokens, columns);
        for row in x.chunks_exact_mut(columns) {
            for j in 1..columns {
                row[j] += 0.7 * row[j - 1];
            }
        }
        let mut builder = CalibrationBuilder::new(columns);
        builder.push(&x, pool).unwrap();
        builder.finish(pool)
    }

    fn weight(seed: u64, rows: usize, columns: usize) -> DenseMatrix {
        DenseMatrix::from_f32(rows, columns, matrices::weights(seed, rows, columns))
    }

    fn options(group: usize, static_groups: bool, act_order: bool) -> QuantizeOptions {
        let group_size = GroupSize::Columns(group);
        QuantizeOptions { bits: 3, group_size, static_groups, act_order, ..Default::default() }
    }

    fn along_outputs(group: usize, act_order: bool) -> QuantizeOptions {
        QuantizeOptions { group_axis: AxisRule::Output, ..options(group, true, act_order) }
    }

    /// `tr(D S Dᵀ)` with `damping` on the diagonal.
    fn energy(weight: &DenseMatrix, matrix: &QuantizedMatrix, calibration: &Calibration, damping: f64) -> f64 {
        let (rows, columns) = (weight.rows(), weight.columns());
        let pairs = weight.to_f32().into_iter().zip(matrix.to_f32());
        let difference: Vec<f64> = pairs.map(|(a, b)| f64::from(a) - f64::from(b)).collect();
        let mut moment: UpperTriangle<f64> = calibration.second_moment().clone();
        (0..columns).for_each(|i| moment.row_mut(i)[0] += damping);
        quadratic_trace(MatrixView::new(&difference, rows, columns), &moment, &ThreadPool::with_threads(1))
    }

    /// The published recursion in f64 with the whole inverse, which loses a row and a column with every weight that is
    /// rounded; the weights themselves carry the corrections.
    fn oracle(weight: &DenseMatrix, calibration: &Calibration, options: &QuantizeOptions) -> Vec<f32> {
        let (rows, n) = (weight.rows(), weight.columns());
        let s = calibration.second_moment().to_symmetric();
        let mut order: Vec<usize> = (0..n).collect();
        if options.act_order {
            order.sort_by(|&i, &j| s[j * (n + 1)].total_cmp(&s[i * (n + 1)]));
        }
        let mean = (0..n).map(|i| s[i * (n + 1)]).sum::<f64>() / n as f64;
        let mut inverse: Vec<f64> = Vec::new();
        for &i in &order {
            inverse.extend(order.iter().map(|&j| s[i * n + j] + if i == j { options.damping * mean } else { 0.0 }));
        }
        invert(&mut inverse, n);
        let original = weight.to_f32();
        let mut w: Vec<f64> = (0..rows)
            .flat_map(|row| order.iter().map(move |&j| (row, j)))
            .map(|(r, j)| f64::from(original[r * n + j]))
            .collect();
        let axis_length = if options.group_axis == AxisRule::Output { rows } else { n };
        let (rule, size) = (GridRule::new(options), options.group_size.columns(axis_length));
        let mut out = vec![0.0; rows * n];
        let mut grids: Vec<Grid> = vec![rule.fit(&[], None); rows];
        for p in 0..n {
            let pivot = inverse[p * (n + 1)];
            for row in 0..rows {
                if options.group_axis == AxisRule::Output {
                    if row % size == 0 {
                        let group: Vec<f32> = (row..rows.min(row + size)).map(|row| w[row * n + p] as f32).collect();
                        grids[row..rows.min(row + size)].fill(rule.fit(&group, None));
                    }
                } else if options.static_groups {
                    let group = order[p] / size * size;
                    grids[row] = rule.fit(&original[row * n + group..row * n + n.min(group + size)], None);
                } else if p % size == 0 {
                    let group: Vec<f32> = w[row * n + p..row * n + n.min(p + size)].iter().map(|&w| w as f32).collect();
                    grids[row] = rule.fit(&group, None);
                }
                let value = grids[row].value(grids[row].code(w[row * n + p] as f32));
                out[row * n + order[p]] = value;
                let error = (w[row * n + p] - f64::from(value)) / pivot;
                for j in p + 1..n {
                    w[row * n + j] -= error * inverse[p * n + j];
                }
            }
            for i in p + 1..n {
                let factor = inverse[i * n + p] / pivot;
                for j in p + 1..n {
                    inverse[i * n + j] -= factor * inverse[p * n + j];
                }
            }
        }
        out
    }

    /// Gauss-Jordan in place; no pivoting, the matrix is positive definite.
    fn invert(a: &mut [f64], n: usize) {
        for p in 0..n {
            let pivot = a[p * (n + 1)];
            a[p * (n + 1)] = 1.0;
            (0..n).for_each(|j| a[p * n + j] /= pivot);
            for i in (0..n).filter(|&i| i != p) {
                let factor = a[i * n + p];
                a[i * n + p] = 0.0;
                (0..n).for_each(|j| a[i * n + j] -= factor * a[p * n + j]);
            }
        }
    }

    #[test]
    fn codes_are_those_of_the_published_recursion() {
        let pool = ThreadPool::with_threads(2);
        let weight = weight(3, 21, 150);
        let calibration = calibration(4, 400, 150, &pool);
        for group in [16, 64, 150, 200] {
            for (static_groups, act_order) in [(true, true), (true, false), (false, true), (false, false)] {
                let options = options(group, static_groups, act_order);
                let found = gptq(&weight, &calibration, &options, &pool).unwrap().matrix.to_f32();
                // f32 against f64: a weight within 10⁻⁶ of the middle between two codes may go the other way, which
                // none of these 3150 does.
                assert_eq!(found, oracle(&weight, &calibration, &options), "{group} {static_groups} {act_order}");
            }
        }
        for group in [1, 4, 7, 16, 21, 100] {
            for act_order in [true, false] {
                let options = along_outputs(group, act_order);
                let found = gptq(&weight, &calibration, &options, &pool).unwrap().matrix.to_f32();
                assert_eq!(found, oracle(&weight, &calibration, &options), "outputs {group} {act_order}");
            }
        }
    }

    #[test]
    fn the_errors_of_the_sweep_add_up_to_the_damped_objective() {
        let pool = ThreadPool::with_threads(2);
        for (rows, columns) in [(1, 1), (5, 40), (150, 130), (17, 300)] {
            let weight = weight(5, rows, columns);
            let calibration = calibration(6, 2 * columns + 9, columns, &pool);
            for options in [options(32, true, true), options(32, false, true), along_outputs(32, true)] {
                let solved = gptq(&weight, &calibration, &options, &pool).unwrap();
                let expected = energy(&weight, &solved.matrix, &calibration, solved.damping);
                // An error e is the difference of two f32 of up to 2³ steps: 10⁻⁶ of a step, and e² has twice that.
                assert!((solved.energy / expected - 1.0).abs() < 2e-5, "{columns}: {} {expected}", solved.energy);
            }
        }
    }

    #[test]
    fn without_correlation_it_is_rounding_to_nearest() {
        let pool = ThreadPool::with_threads(2);
        let (rows, columns) = (40, 200);
        let weight = weight(7, rows, columns);
        let mut builder = CalibrationBuilder::new(columns);
        for j in 0..columns {
            let mut x = vec![0.0; columns];
            x[j] = 1.0 + (j * 7 % 13) as f32;
            builder.push(&x, &pool).unwrap();
        }
        let calibration = builder.finish(&pool);
        let along_inputs =
            [(true, true), (true, false), (false, false)].map(|(fixed, act_order)| options(64, fixed, act_order));
        for options in along_inputs.into_iter().chain([along_outputs(16, true), along_outputs(150, false)]) {
            let solved = gptq(&weight, &calibration, &options, &pool).unwrap().matrix;
            assert_eq!(solved, rtn(&weight, None, &options, &pool).unwrap());
        }
    }

    #[test]
    fn the_block_is_a_matter_of_speed() {
        let pool = ThreadPool::with_threads(2);
        let weight = weight(8, 33, 290);
        let calibration = calibration(9, 700, 290, &pool);
        let along_inputs = [(true, true), (true, false), (false, true), (false, false)]
            .map(|(fixed, act_order)| options(48, fixed, act_order));
        for options in along_inputs.into_iter().chain([along_outputs(32, true)]) {
            let run = |block| solve(&weight, &calibration, &options, block, &pool).unwrap().matrix;
            let expected = run(BLOCK);
            for block in [1, 7, 32, 128, 290, 1000] {
                assert_eq!(run(block), expected, "{block} {options:?}");
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let weight = weight(10, 300, 200);
        let calibration = calibration(11, 500, 200, &ThreadPool::with_threads(2));
        for options in [QuantizeOptions::default(), along_outputs(96, true)] {
            let run = |threads| {
                let solved = gptq(&weight, &calibration, &options, &ThreadPool::with_threads(threads)).unwrap();
                (solved.matrix, solved.energy.to_bits())
            };
            let one = run(1);
            assert_eq!(one, run(2));
            assert_eq!(one, run(5));
        }
    }

    #[test]
    fn correlated_inputs_gain_and_damping_repairs_itself() {
        let pool = ThreadPool::with_threads(2);
        let (rows, columns) = (64, 256);
        let weight = weight(12, rows, columns);
        for tokens in [20, 1000] {
            let calibration = calibration(13, tokens, columns, &pool);
            for damping in [0.0, 0.01] {
                let options = QuantizeOptions { damping, ..options(64, true, true) };
                let solved = gptq(&weight, &calibration, &options, &pool).unwrap();
                assert!(solved.damping > 0.0 || tokens > columns, "20 tokens leave the moment singular");
                let rounded = rtn(&weight, None, &options, &pool).unwrap();
                let (gptq, rtn) =
                    (energy(&weight, &solved.matrix, &calibration, 0.0), energy(&weight, &rounded, &calibration, 0.0));
                assert!(gptq < 0.5 * rtn, "{tokens} {damping}: {gptq} {rtn}");
            }
        }
    }

    #[test]
    fn weights_of_dead_channels_become_zero_and_huge_weights_stay_finite() {
        let pool = ThreadPool::with_threads(1);
        let mut x = matrices::activations(14, 200, 64);
        x.iter_mut().skip(5).step_by(64).for_each(|value| *value = 0.0);
        let mut builder = CalibrationBuilder::new(64);
        builder.push(&x, &pool).unwrap();
        let calibration = builder.finish(&pool);
        let mut random = Random::new(15);
        for size in [1e-40, 1e-30, 1.0, 1e30] {
            let values = (0..3 * 64).map(|_| (random.normal() * size) as f32).collect();
            let weight = DenseMatrix::from_f32(3, 64, values);
            let options = QuantizeOptions { scale_type: ElementType::F32, ..options(32, true, true) };
            let found = gptq(&weight, &calibration, &options, &pool).unwrap().matrix.to_f32();
            assert!(found.iter().all(|value| value.is_finite()));
            assert!((0..3).all(|row| found[row * 64 + 5] == 0.0));
        }
    }
}
