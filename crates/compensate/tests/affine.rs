//! Affine compensations against affine reduced-rank regression in f64: singular values of the centred `Δ X` by Jacobi
//! rotations, and errors measured on the inputs themselves.

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_compensate::{
    Compensation, CompensationOptions, Exact, FactorPrecision, Fast, HoldOut, METHODS, compensate,
};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::eora_cases::{EORA_CASES, EoraCase, ITERATED_EORA_CASES, Inputs, outputs, singular_values};
use kintsugi_weights::{ElementType, LowRank};

use crate::common::{Solvable, calibrate, magnitudes, norm, options, repaired};

fn affine(rank: usize, factor_type: ElementType) -> CompensationOptions {
    CompensationOptions { affine: true, ..options(rank, factor_type) }
}

fn cases() -> impl Iterator<Item = &'static EoraCase> {
    EORA_CASES.iter().chain(ITERATED_EORA_CASES)
}

/// `[rows, tokens]` without the mean of each row.
fn centred(outputs: &[f64], tokens: usize) -> Vec<f64> {
    let centre = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().sum::<f64>() / tokens as f64;
        row.iter().map(|value| value - mean).collect()
    };
    outputs.chunks_exact(tokens).flat_map(centre).collect()
}

/// `(Δ − B A) X − b 1ᵀ`, `[rows, tokens]`.
fn left_over(delta: &[f64], update: &LowRank, inputs: &[f32]) -> Vec<f64> {
    let tokens = inputs.len() / update.in_features();
    let mut left = outputs(&repaired(delta, update), update.in_features(), inputs);
    if let Some(bias) = update.bias() {
        for (row, &bias) in left.chunks_exact_mut(tokens).zip(&bias.values) {
            row.iter_mut().for_each(|value| *value -= f64::from(bias));
        }
    }
    left
}

fn left(problem: &Solvable, update: Option<&LowRank>) -> f64 {
    update.map_or(problem.total, |update| norm(&left_over(&problem.delta, update, &problem.instance.inputs)))
}

/// What f32 cannot hold of factors and bias whose sum cancels on the inputs.
fn rounding(problem: &Solvable, update: &LowRank) -> f64 {
    let tokens = (problem.instance.inputs.len() / update.in_features()) as f64;
    let bias: Vec<f64> = update.bias().iter().flat_map(|b| &b.values).map(|&value| f64::from(value)).collect();
    let sizes = norm(&magnitudes(update, &problem.instance.inputs)) + tokens.sqrt() * norm(&bias);
    f64::from(f32::EPSILON) / 2.0 * sizes
}

#[test]
fn the_error_is_that_of_affine_reduced_rank_regression() {
    let (mut compared, mut strictly_better) = (0, 0);
    for case in cases() {
        let problem = Solvable::new(case);
        let spoiled = outputs(&problem.delta, case.columns, &problem.instance.inputs);
        let values = singular_values(&centred(&spoiled, case.tokens), case.rows, case.tokens);
        let optimum = norm(&values[case.rank.min(values.len())..]);
        let plain = problem.solve(&options(case.rank, ElementType::F32));
        let solved = problem.solve(&affine(case.rank, ElementType::F32));
        let Some(update) = &solved.factors else {
            assert!(problem.total == 0.0 && plain.factors.is_none(), "{case:?} has something to repair");
            continue;
        };
        let total = problem.total;
        let found = left(&problem, Some(update));
        let slack = 1e-7 * total + rounding(&problem, update);
        assert!(found <= optimum * (1.0 + 1e-6) + slack, "{case:?}: {found:e}, {optimum:e} of {total:e}");
        assert!(found >= optimum * (1.0 - 1e-6) - slack, "{case:?}: {found:e} below {optimum:e}");

        // Factors alone are among those that were chosen from.
        let without = left(&problem, plain.factors.as_ref());
        assert!(found <= without * (1.0 + 1e-6) + slack, "{case:?}: {found:e} above {without:e}");
        strictly_better += usize::from(found < 0.99 * without);

        // What the report says is what the inputs say, relative to the outputs of the inputs as they are.
        let original = total / plain.error.quantized;
        let near = |said: f64, measured: f64| (said * original - measured).abs() <= 1e-6 * measured + slack;
        assert!(near(solved.error.quantized, total), "{case:?}: {:?}", solved.error);
        assert!(near(solved.error.compensated, found), "{case:?}: {:?} {:e}", solved.error, found / original);
        assert!(near(solved.error.bound, optimum), "{case:?}: {:?} {:e}", solved.error, optimum / original);
        assert!(solved.certificate.unwrap().holds, "{case:?}: {:?}", solved.certificate);
        compared += 1;
    }
    assert!(compared >= 30 && strictly_better >= 2, "{compared} {strictly_better}");
}

#[test]
fn iterated_directions_are_as_good() {
    for case in ITERATED_EORA_CASES {
        let problem = Solvable::new(case);
        let solve = |method| problem.solve(&CompensationOptions { method, ..affine(case.rank, ElementType::F32) });
        let (fast, exact) = (solve(&Fast), solve(&Exact));
        let slack = 1e-7 * problem.total + rounding(&problem, fast.factors.as_ref().unwrap());
        let (fast_left, exact_left) = (left(&problem, fast.factors.as_ref()), left(&problem, exact.factors.as_ref()));
        assert!(fast_left <= exact_left * (1.0 + 1e-3) + slack, "{case:?}: {fast_left:e} {exact_left:e}");
        assert!(fast.certificate.unwrap().holds, "{case:?}");
    }
}

#[test]
fn a_prefix_is_the_affine_solution_of_the_smaller_rank() {
    let mut compared = 0;
    for case in EORA_CASES.iter().filter(|case| case.rank >= 8) {
        let problem = Solvable::new(case);
        for factor_type in [ElementType::Bf16, ElementType::F32] {
            let solve = |rank| problem.solve(&affine(rank, factor_type)).factors.unwrap();
            let (large, small) = (solve(case.rank), solve(3));
            let part = large.prefix(small.rank());
            assert_eq!((part.b(), part.a()), (small.b(), small.a()), "{case:?}");
            let (part, small, all) = (part.bias().unwrap(), small.bias().unwrap(), large.bias().unwrap());
            assert_eq!(part.centre, small.centre, "{case:?}");
            let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let apart: Vec<f64> = wide(&part.values).iter().zip(wide(&small.values)).map(|(a, b)| a - b).collect();
            let size =
                norm(&wide(&small.values)) + norm(&wide(&all.values)) + norm(&wide(all.centre.as_ref().unwrap()));
            assert!(norm(&apart) <= 1e-6 * size, "{case:?}: {:e} of {size:e}", norm(&apart));
            compared += 1;
        }
    }
    assert!(compared >= 20, "{compared}");
}

/// The same inputs in another order, and moved: they took no part.
fn held_out(problem: &Solvable, columns: usize) -> Vec<f32> {
    let inputs = &problem.instance.inputs;
    inputs.iter().enumerate().map(|(at, &x)| 0.9 * x + 0.2 * inputs[(at + 7 * columns) % inputs.len()]).collect()
}

#[test]
fn profiles_say_what_every_prefix_leaves_on_both_kinds_of_inputs() {
    let pool = ThreadPool::global();
    for case in cases().step_by(2) {
        let problem = Solvable::new(case);
        let held = held_out(&problem, case.columns);
        let second = &held[case.tokens / 2 * case.columns..];
        let hold_out = HoldOut::new(case.columns, held.clone());
        for bits in [16, 8, 4] {
            let precision = FactorPrecision::of_bits(bits).unwrap();
            let options = CompensationOptions { precision, ..affine(case.rank, ElementType::F32) };
            let (weight, quantized) = (&problem.instance.weight, &problem.instance.quantized);
            let solved =
                compensate(weight, quantized, &problem.calibration, Some(&hold_out), None, &options, pool).unwrap();
            let Some(update) = &solved.factors else { continue };
            assert_eq!(solved.profile.calibration.len(), update.rank() + 1);
            assert!(solved.profile.best.len() > update.rank() && solved.profile.is_sound());
            let held_profile = solved.profile.hold_out.as_ref().unwrap();
            let before = norm(&outputs(&problem.delta, case.columns, second));
            for rank in [0, 1, update.rank() / 2, update.rank()] {
                let prefix = update.prefix(rank);
                let (said, measured) = (solved.profile.calibration[rank].sqrt(), left(&problem, Some(&prefix)));
                assert!(
                    (said - measured).abs() <= 1e-6 * problem.total,
                    "{case:?} {bits} {rank}: {said:e} {measured:e}"
                );
                let (said, measured) =
                    (held_profile.energies[1][rank].sqrt(), norm(&left_over(&problem.delta, &prefix, second)));
                // Products of f32.
                assert!((said - measured).abs() <= 1e-5 * before, "{case:?} {bits} {rank}: {said:e} {measured:e}");
            }
            // A prefix of codes has a bias of its own, too: never worse than nothing on the calibration.
            let energies = &solved.profile.calibration;
            assert!(energies[update.rank()] < energies[0], "{case:?} {bits}: {energies:?}");
        }
    }
}

#[test]
fn inputs_that_count_more_are_held_out_as_often() {
    let pool = ThreadPool::global();
    for case in cases().step_by(5) {
        let problem = Solvable::new(case);
        let held = held_out(&problem, case.columns);
        let tokens = held.len() / case.columns;
        let weights: Vec<f64> = (0..tokens).map(|token| [4.0, 1.0, 0.25][token % 3]).collect();
        let weighted = HoldOut::weighted(case.columns, held.clone(), &weights);
        let options = affine(case.rank, ElementType::F32);
        let (weight, quantized) = (&problem.instance.weight, &problem.instance.quantized);
        let solved =
            compensate(weight, quantized, &problem.calibration, Some(&weighted), None, &options, pool).unwrap();
        let Some(update) = &solved.factors else { continue };
        let profile = solved.profile.hold_out.as_ref().unwrap();
        for (half, range) in [(0, 0..tokens / 2), (1, tokens / 2..tokens)] {
            let energy = |rank: usize| -> f64 {
                let of = |token: usize| {
                    let x = &held[token * case.columns..(token + 1) * case.columns];
                    let left = match rank {
                        0 => outputs(&problem.delta, case.columns, x),
                        _ => left_over(&problem.delta, &update.prefix(rank), x),
                    };
                    weights[token] * norm(&left).powi(2)
                };
                range.clone().map(of).sum()
            };
            let before = energy(0).sqrt();
            for rank in [0, 1, update.rank()] {
                let (said, measured) = (profile.energies[half][rank].sqrt(), energy(rank).sqrt());
                // Products of f32.
                assert!((said - measured).abs() <= 1e-5 * before, "{case:?} {half} {rank}: {said:e} {measured:e}");
            }
        }
    }
}

#[test]
fn every_method_gains_from_a_bias_where_its_directions_are_the_same() {
    // Of `lorc` the directions know nothing of inputs, so that a bias can only add.
    for case in cases().step_by(3) {
        let problem = Solvable::new(case);
        for method in METHODS {
            let options = CompensationOptions { method, ..affine(case.rank, ElementType::F32) };
            let with: Compensation = problem.solve(&options);
            let without = problem.solve(&CompensationOptions { affine: false, ..options });
            let (with_left, without_left) =
                (left(&problem, with.factors.as_ref()), left(&problem, without.factors.as_ref()));
            let slack = 3e-7 * problem.total;
            assert!(with_left <= problem.total * (1.0 + 1e-9), "{case:?} {}", method.name());
            if method.name() != "diagonal" {
                let allowed = without_left * (1.0 + 1e-3) + slack;
                assert!(with_left <= allowed, "{case:?} {}: {with_left:e} {without_left:e}", method.name());
            }
            assert!(with.error.bound <= with.error.compensated, "{case:?} {}", method.name());
            assert_eq!(with.certificate.is_some(), method.is_optimal());
        }
    }
}

#[test]
fn inputs_that_do_not_vary_are_repaired_by_one_direction() {
    let case = EORA_CASES.iter().find(|case| matches!(case.inputs, Inputs::PowerLaw(_))).unwrap();
    let mut problem = Solvable::new(case);
    let one = problem.instance.inputs[..case.columns].to_vec();
    problem.instance.inputs = one.repeat(5);
    problem.calibration = calibrate(&problem.instance.inputs, case.columns);
    problem.total = norm(&outputs(&problem.delta, case.columns, &problem.instance.inputs));
    for bits in [16, 4] {
        let precision = FactorPrecision::of_bits(bits).unwrap();
        let solved = problem.solve(&CompensationOptions { precision, ..affine(8, ElementType::F32) });
        let update = solved.factors.as_ref().unwrap();
        assert_eq!(update.rank(), 1);
        assert!(left(&problem, Some(update)) <= 1e-6 * problem.total, "{bits}");
        assert!(solved.error.compensated <= 1e-6 * solved.error.quantized, "{:?}", solved.error);
    }
}

#[test]
fn tokens_of_a_mixture_count_in_the_mean_as_in_everything() {
    let pool = ThreadPool::global();
    for case in cases().filter(|case| matches!(case.inputs, Inputs::Mean) || case.rank == 12) {
        let mut problem = Solvable::new(case);
        // Sources with means of their own, that count 3 and ½: as often as six and one.
        let half = case.tokens / 2 * case.columns;
        problem.instance.inputs[half..].iter_mut().for_each(|value| *value += 0.5);
        let (first, second) = problem.instance.inputs.split_at(half);
        let mut builder = CalibrationBuilder::new(case.columns);
        for (part, weight) in [(first, 3.0), (second, 0.5)] {
            builder.weigh(weight, pool);
            builder.push(part, pool).unwrap();
        }
        let weighted: Calibration = builder.finish(pool);
        let repeated = [first.repeat(6), second.to_vec()].concat();
        let solve = |calibration: &Calibration| {
            let options = affine(case.rank, ElementType::F32);
            compensate(&problem.instance.weight, &problem.instance.quantized, calibration, None, None, &options, pool)
                .unwrap()
        };
        let (found, expected) = (solve(&weighted), solve(&calibrate(&repeated, case.columns)));
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * expected.error.quantized;
        assert!(near(found.error.quantized, expected.error.quantized), "{case:?}");
        assert!(near(found.error.compensated, expected.error.compensated), "{case:?}: {:?}", found.error);
        let measured =
            |solved: &Compensation| norm(&left_over(&problem.delta, solved.factors.as_ref().unwrap(), &repeated));
        assert!((measured(&found) / measured(&expected) - 1.0).abs() <= 1e-5, "{case:?}");
    }
}
