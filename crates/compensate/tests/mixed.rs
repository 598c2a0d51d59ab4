//! Compensation towards the outputs of the dense model: against a closed form that is computed without the solvers, and
//! against errors measured on the pairs of inputs themselves.

use kintsugi_calibration::{Drift, DriftBuilder};
use kintsugi_compensate::{
    Compensation, CompensationOptions, Exact, FactorPrecision, HoldOut, METHODS, MixedInputs, compensate,
    compensate_mixed,
};
use kintsugi_linalg::SplitMix64;
use kintsugi_runtime::{ErrorCode, ThreadPool};
use kintsugi_testkit::eora_cases::{EORA_CASES, EoraCase, outputs, singular_values};
use kintsugi_weights::{ElementType, LowRank};

use crate::common::{Solvable, magnitudes, norm, options, repaired};

/// λ of the solver, relative to the energy of each channel.
const SHRINKAGE: f64 = 1e-2;

/// What tokens are more in the dense model: a mixture of what they are, and chance.
fn drifts(inputs: &[f32], columns: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix64::new(seed);
    let mut out = Vec::with_capacity(inputs.len());
    for row in inputs.chunks_exact(columns) {
        for j in 0..columns {
            let own = 0.2 * row[j] - 0.1 * row[(j * 7 + 3) % columns];
            // Of no dead channel.
            out.push(own + if row[j] == 0.0 { 0.0 } else { 0.1 * row[j].abs() * (random.uniform() - 0.5) as f32 });
        }
    }
    out
}

fn drift(drifts: &[f32], deployed: &[f32], columns: usize) -> Drift {
    let pool = ThreadPool::global();
    let mut builder = DriftBuilder::new(columns);
    builder.push(drifts, deployed, pool).unwrap();
    builder.finish(pool)
}

/// A case, its drift, and both inputs.
struct Pairs {
    solvable: Solvable,
    drifts: Vec<f32>,
    drift: Drift,
    weight: Vec<f64>,
}

impl Pairs {
    fn new(case: &EoraCase) -> Self {
        let solvable = Solvable::new(case);
        let drifts = drifts(&solvable.instance.inputs, case.columns, 3);
        let drift = drift(&drifts, &solvable.instance.inputs, case.columns);
        let weight = solvable.instance.weight.to_f32().into_iter().map(f64::from).collect();
        Pairs { solvable, drifts, drift, weight }
    }

    fn solve(&self, share: f64, options: &CompensationOptions) -> Compensation {
        self.solve_beside(share, options, None)
    }

    fn solve_beside(
        &self,
        share: f64,
        options: &CompensationOptions,
        hold_out: Option<(&HoldOut, &HoldOut)>,
    ) -> Compensation {
        let inputs = MixedInputs { deployed: &self.solvable.calibration, drift: &self.drift, share, hold_out };
        let instance = &self.solvable.instance;
        compensate_mixed(&instance.weight, &instance.quantized, &inputs, None, options, ThreadPool::global()).unwrap()
    }

    /// `Δ + α W D (S + λ diag S)⁻¹`, by elimination.
    fn target(&self, share: f64) -> Vec<f64> {
        let (rows, columns) = self.solvable.shape;
        let (mut second, mut cross) = (vec![0.0; columns * columns], vec![0.0; columns * columns]);
        let pairs = self.solvable.instance.inputs.chunks_exact(columns).zip(self.drifts.chunks_exact(columns));
        for (inputs, drifts) in pairs {
            for i in 0..columns {
                for j in 0..columns {
                    second[i * columns + j] += f64::from(inputs[i]) * f64::from(inputs[j]);
                    cross[i * columns + j] += f64::from(drifts[i]) * f64::from(inputs[j]);
                }
            }
        }
        for i in 0..columns {
            let energy = second[i * (columns + 1)];
            second[i * (columns + 1)] += SHRINKAGE * if energy > 0.0 { energy } else { 1.0 };
        }
        let mut image = vec![0.0; rows * columns];
        for row in 0..rows {
            for i in 0..columns {
                for j in 0..columns {
                    image[row * columns + j] += self.weight[row * columns + i] * cross[i * columns + j];
                }
            }
        }
        let solved = eliminate(second, image, rows, columns);
        self.solvable.delta.iter().zip(solved).map(|(delta, change)| delta + share * change).collect()
    }

    /// `‖W X − (Ŵ + B A) X̂‖ / ‖W X‖` on some pairs.
    fn against_dense(&self, factors: Option<&LowRank>, deployed: &[f32], drifts: &[f32]) -> f64 {
        let columns = self.solvable.shape.1;
        let left = match factors {
            Some(factors) => repaired(&self.solvable.delta, factors),
            None => self.solvable.delta.clone(),
        };
        let (of_drift, of_inputs) = (outputs(&self.weight, columns, drifts), outputs(&left, columns, deployed));
        let dense: Vec<f64> =
            outputs(&self.weight, columns, deployed).iter().zip(&of_drift).map(|(a, b)| a + b).collect();
        norm(&of_drift.iter().zip(of_inputs).map(|(a, b)| a + b).collect::<Vec<f64>>()) / norm(&dense)
    }
}

/// `X A⁻¹` for a symmetric A, by Gauss and Jordan with pivots.
fn eliminate(mut a: Vec<f64>, x: Vec<f64>, rows: usize, n: usize) -> Vec<f64> {
    // [n, rows]: A Y = Xᵀ.
    let mut y: Vec<f64> = (0..n * rows).map(|at| x[at % rows * n + at / rows]).collect();
    for step in 0..n {
        let size = |row: usize| a[row * n + step].abs();
        let pivot = (step..n).max_by(|&i, &j| size(i).total_cmp(&size(j))).unwrap();
        for j in 0..n {
            a.swap(step * n + j, pivot * n + j);
        }
        for j in 0..rows {
            y.swap(step * rows + j, pivot * rows + j);
        }
        for i in (0..n).filter(|&i| i != step) {
            let factor = a[i * n + step] / a[step * n + step];
            if factor != 0.0 {
                (step..n).for_each(|j| a[i * n + j] -= factor * a[step * n + j]);
                (0..rows).for_each(|j| y[i * rows + j] -= factor * y[step * rows + j]);
            }
        }
    }
    (0..rows * n).map(|at| y[at % n * rows + at / n] / a[at % n * (n + 1)]).collect()
}

fn f32_options(rank: usize) -> CompensationOptions {
    options(rank, ElementType::F32)
}

#[test]
fn the_solution_is_that_of_the_closed_form() {
    let mut checked = 0;
    for case in EORA_CASES.iter().step_by(2) {
        let pairs = Pairs::new(case);
        let inputs = &pairs.solvable.instance.inputs;
        for share in [0.4, 1.0] {
            let target = pairs.target(share);
            let solved = pairs.solve(share, &f32_options(case.rank));
            let spoiled = outputs(&target, case.columns, inputs);
            let values = singular_values(&spoiled, case.rows, case.tokens);
            let (optimum, total) = (norm(&values[case.rank.min(values.len())..]), norm(&spoiled));
            let factors = solved.factors.as_ref().unwrap_or_else(|| panic!("{case:?} has something to repair"));
            let left = norm(&outputs(&repaired(&target, factors), case.columns, inputs));
            let rounding = f64::from(f32::EPSILON) / 2.0 * norm(&magnitudes(factors, inputs));
            assert!(
                left <= optimum * (1.0 + 1e-6) + f64::max(1e-7 * total, rounding.min(1e-6 * total)),
                "{case:?} {share}: {left:e} instead of {optimum:e} of {total:e}"
            );
            let original = norm(&outputs(&pairs.weight, case.columns, inputs));
            let near = |reported: f64, measured: f64| {
                (reported - measured / original).abs() <= 1e-6 * measured / original + 1e-7 * total / original
            };
            assert!(near(solved.error.compensated, left) && near(solved.error.quantized, total), "{case:?}");
            assert!(near(solved.error.bound, optimum), "{case:?}: {:?} {}", solved.error, optimum / original);
            let dense = solved.profile.dense_error(case.rank).unwrap();
            for (reported, factors) in [(dense.quantized, None), (dense.compensated, Some(factors))] {
                let measured = pairs.against_dense(factors, inputs, &pairs.drifts);
                assert!((reported - measured).abs() <= 1e-6 * measured + 1e-7, "{case:?} {reported} {measured}");
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 40);
}

#[test]
fn the_outputs_come_closer_to_those_of_the_dense_model_the_more_of_the_drift_is_corrected() {
    let mut lower = 0;
    for case in EORA_CASES.iter().filter(|case| case.tokens >= 5 * case.columns && case.dead == 0) {
        let pairs = Pairs::new(case);
        let error = |share| pairs.solve(share, &f32_options(case.rank)).profile.dense_error(case.rank).unwrap();
        let errors = [0.0, 0.5, 1.0].map(error);
        for pair in errors.windows(2) {
            // The shrinkage may cost a hundredth of what is left.
            assert!(pair[1].compensated <= pair[0].compensated * 1.01, "{case:?}: {errors:?}");
        }
        lower += usize::from(errors[2].compensated < 0.99 * errors[0].compensated);
        assert!(errors.iter().all(|error| error.quantized == errors[0].quantized));
    }
    assert!(lower >= 15, "{lower}");
}

#[test]
fn without_a_share_or_a_drift_the_factors_are_those_of_deployed_inputs() {
    for case in EORA_CASES.iter().step_by(5) {
        let pairs = Pairs::new(case);
        let (instance, pool) = (&pairs.solvable.instance, ThreadPool::global());
        for method in METHODS {
            let precision = FactorPrecision::Codes(8);
            let options = CompensationOptions { method, rank: case.rank, precision, ..CompensationOptions::default() };
            let plain = compensate(
                &instance.weight,
                &instance.quantized,
                &pairs.solvable.calibration,
                None,
                None,
                &options,
                pool,
            );
            let plain = plain.unwrap();
            let none = Drift::zeros(case.columns);
            let still = MixedInputs { deployed: &pairs.solvable.calibration, drift: &none, share: 1.0, hold_out: None };
            let still = compensate_mixed(&instance.weight, &instance.quantized, &still, None, &options, pool).unwrap();
            for mixed in [pairs.solve(0.0, &options), still] {
                let values = |solved: &Compensation| {
                    solved.factors.as_ref().map(|factors| (factors.b().to_vec(), factors.a().to_vec()))
                };
                assert!(values(&mixed) == values(&plain), "{case:?} {}", method.name());
                assert_eq!((mixed.error, mixed.certificate), (plain.error, plain.certificate));
                let profile = mixed.profile;
                assert!(profile.calibration == plain.profile.calibration && profile.dense.is_some());
            }
        }
    }
}

#[test]
fn held_out_pairs_are_measured_as_they_are() {
    for case in EORA_CASES.iter().filter(|case| case.tokens >= 300).step_by(6) {
        let pairs = Pairs::new(case);
        let inputs = &pairs.solvable.instance.inputs[..96 * case.columns];
        let moved = drifts(inputs, case.columns, 77);
        let (x, d) = (HoldOut::new(case.columns, inputs.to_vec()), HoldOut::new(case.columns, moved.clone()));
        let solved = pairs.solve_beside(0.7, &f32_options(case.rank), Some((&x, &d)));
        let found = solved.profile.dense_error(case.rank).unwrap().hold_out.unwrap();
        let half = inputs.len() / 2;
        for (reported, factors) in [(found.quantized, None), (found.compensated, solved.factors.as_ref())] {
            let measured = pairs.against_dense(factors, &inputs[half..], &moved[half..]);
            assert!((reported - measured).abs() <= 1e-5 * measured + 1e-7, "{case:?} {reported} {measured}");
        }
        assert_eq!(found.tokens, 48);
        // A prefix leaves what its own factors leave.
        if let Some(factors) = solved.factors.as_ref().filter(|factors| factors.rank() > 1) {
            let error = solved.profile.dense_error(1).unwrap();
            let measured = pairs.against_dense(Some(&factors.prefix(1)), &inputs[half..], &moved[half..]);
            assert!((error.hold_out.unwrap().compensated - measured).abs() <= 1e-5 * measured + 1e-7, "{case:?}");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let pairs = Pairs::new(&EORA_CASES[13]);
    let inputs = MixedInputs { deployed: &pairs.solvable.calibration, drift: &pairs.drift, share: 0.5, hold_out: None };
    let instance = &pairs.solvable.instance;
    let solve = |threads| {
        let (options, pool) = (f32_options(12), ThreadPool::with_threads(threads));
        let solved = compensate_mixed(&instance.weight, &instance.quantized, &inputs, None, &options, &pool).unwrap();
        let factors = solved.factors.unwrap();
        (factors.b().to_vec(), factors.a().to_vec(), solved.profile)
    };
    let one = solve(1);
    assert!(one == solve(2) && one == solve(5));
}

#[test]
fn scales_that_are_folded_into_channels_change_nothing_but_rounding() {
    let pairs = Pairs::new(&EORA_CASES[11]);
    let (rows, columns) = pairs.solvable.shape;
    let scale = |column: usize| 2f32.powi(column as i32 % 9 - 4);
    let instance = &pairs.solvable.instance;
    let divided = |values: &[f32]| -> Vec<f32> {
        values.iter().enumerate().map(|(at, value)| value / scale(at % columns)).collect()
    };
    let multiplied = |values: Vec<f32>| {
        let values = values.into_iter().enumerate().map(|(at, value)| value * scale(at % columns)).collect();
        kintsugi_weights::DenseMatrix::from_f32(rows, columns, values)
    };
    let (inputs, moved) = (divided(&instance.inputs), divided(&pairs.drifts));
    let calibration = crate::common::calibrate(&inputs, columns);
    let folded = drift(&moved, &inputs, columns);
    let mixed = MixedInputs { deployed: &calibration, drift: &folded, share: 1.0, hold_out: None };
    let (weight, compressed) = (multiplied(instance.weight.to_f32()), multiplied(instance.quantized.to_f32()));
    let options = CompensationOptions { method: &Exact, ..f32_options(12) };
    let scaled = compensate_mixed(&weight, &compressed, &mixed, None, &options, ThreadPool::global()).unwrap();
    let plain = pairs.solve(1.0, &options);
    let (scaled, plain) = (scaled.profile.dense_error(12).unwrap(), plain.profile.dense_error(12).unwrap());
    assert!((scaled.compensated / plain.compensated - 1.0).abs() < 1e-6, "{scaled:?} {plain:?}");
}

#[test]
fn what_is_no_share_and_what_does_not_fit_is_refused() {
    let pairs = Pairs::new(&EORA_CASES[0]);
    let (instance, pool) = (&pairs.solvable.instance, ThreadPool::global());
    let solve = |share: f64, drift: &Drift, hold_out: Option<(&HoldOut, &HoldOut)>| {
        let inputs = MixedInputs { deployed: &pairs.solvable.calibration, drift, share, hold_out };
        compensate_mixed(&instance.weight, &instance.quantized, &inputs, None, &f32_options(4), pool).unwrap_err().code
    };
    for share in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        assert_eq!(solve(share, &pairs.drift, None), ErrorCode::OptionInvalid);
    }
    assert_eq!(solve(0.5, &Drift::zeros(95), None), ErrorCode::ShapeMismatch);
    let (two, three) = (HoldOut::new(96, vec![0.0; 192]), HoldOut::new(96, vec![0.0; 288]));
    assert_eq!(solve(0.5, &pairs.drift, Some((&two, &three))), ErrorCode::ShapeMismatch);
}
