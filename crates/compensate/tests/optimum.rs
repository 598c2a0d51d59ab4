//! Errors against f64 oracles that never see a second moment: singular values of `Δ X` by Jacobi rotations, and errors
//! measured on the inputs themselves.

use kintsugi_calibration::Calibration;
use kintsugi_compensate::{
    CompensationMethod, CompensationOptions, Diagonal, Exact, Fast, Lorc, METHODS, residual_error,
};
use kintsugi_linalg::{MatrixView, SymmetricEigen, ThinSvd, product};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::eora_cases::{Damage, EORA_CASES, ITERATED_EORA_CASES, Inputs, outputs, singular_values};
use kintsugi_weights::ElementType;

use crate::common::{Solvable, calibrate, eora, magnitudes, norm, options, repaired, residual};

#[test]
fn the_error_reaches_the_optimum_on_every_case() {
    let mut limited_by_factors = Vec::new();
    for case in EORA_CASES {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let delta = residual(&instance);
        let spoiled = outputs(&delta, case.columns, &instance.inputs);
        let original: Vec<f64> = instance.weight.to_f32().into_iter().map(f64::from).collect();
        let original = norm(&outputs(&original, case.columns, &instance.inputs));
        let values = singular_values(&spoiled, case.rows, case.tokens);
        let optimum = norm(&values[case.rank.min(values.len())..]);
        let total = norm(&spoiled);

        let solved = eora(
            &instance.weight,
            &instance.quantized,
            &calibration,
            &options(case.rank, ElementType::F32),
            ThreadPool::global(),
        )
        .unwrap();
        let Some(factors) = &solved.factors else {
            assert_eq!(total, 0.0, "{case:?} has something to repair");
            continue;
        };
        let left = norm(&outputs(&repaired(&delta, factors), case.columns, &instance.inputs));
        // Where Δ X cancels (fewer tokens than channels), even f32 cannot hold factors of that precision.
        let rounding = f64::from(f32::EPSILON) / 2.0 * norm(&magnitudes(factors, &instance.inputs));
        assert!(
            left <= optimum * (1.0 + 1e-6) + f64::max(1e-7 * total, rounding.min(2e-7 * total)),
            "{case:?}: {left:e} instead of {optimum:e} of {total:e}, rounding of factors up to {rounding:e}"
        );
        if left > optimum * (1.0 + 1e-6) + 1e-7 * total {
            limited_by_factors.push(case);
        }

        // What the report says is what the inputs say: up to the rounding of energies, the squares of the errors.
        let near = |reported: f64, measured: f64| {
            (reported - measured / original).abs() <= 1e-6 * measured / original + 1e-7 * total / original
        };
        assert!(near(solved.error.quantized, total), "{case:?}: {:?} {}", solved.error, total / original);
        assert!(near(solved.error.compensated, left), "{case:?}: {:?} {}", solved.error, left / original);
        assert!(near(solved.error.bound, optimum), "{case:?}: {:?} {}", solved.error, optimum / original);
        let alone = residual_error(&instance.weight, &instance.quantized, &calibration, ThreadPool::global());
        assert!((alone / solved.error.quantized - 1.0).abs() < 1e-9);
    }
    assert!(limited_by_factors.len() <= 1, "{limited_by_factors:?}");
}

#[test]
fn the_metric_of_the_inputs_beats_the_plain_svd() {
    for case in EORA_CASES.iter().filter(|case| matches!(case.inputs, Inputs::Outliers(factor) if factor < 1e4)) {
        let instance = case.instance();
        let delta = residual(&instance);
        let real = calibrate(&instance.inputs, case.columns);
        // White inputs make the second moment the identity: then EoRA is the truncated SVD of the residual.
        let identity: Vec<f32> =
            (0..case.columns * case.columns).map(|i| f32::from(u8::from(i % (case.columns + 1) == 0))).collect();
        let white = calibrate(&identity, case.columns);
        let solve = |calibration: &Calibration| {
            let options = options(case.rank, ElementType::F32);
            eora(&instance.weight, &instance.quantized, calibration, &options, ThreadPool::global()).unwrap()
        };
        let plain = solve(&white);
        let values = singular_values(&delta, case.rows, case.columns);
        let plain_residual = repaired(&delta, plain.factors.as_ref().unwrap());
        let optimum = norm(&values[case.rank.min(values.len())..]);
        assert!((norm(&plain_residual) - optimum).abs() <= 1e-6 * norm(&delta), "{case:?}");

        let left = |delta: &[f64]| norm(&outputs(delta, case.columns, &instance.inputs));
        let weighted = repaired(&delta, solve(&real).factors.as_ref().unwrap());
        assert!(left(&weighted) <= left(&plain_residual), "{case:?}");
        if !matches!(case.damage, Damage::LowRank(_)) && case.rank < case.rows.min(case.columns) {
            assert!(left(&weighted) < 0.999 * left(&plain_residual), "{case:?}");
            assert!(norm(&weighted) > norm(&plain_residual), "{case:?}: both metrics cannot be optimal at once");
        }
    }
}

#[test]
fn the_iterated_solver_is_within_its_certificate_of_the_optimum() {
    let mut typical = 0;
    for case in ITERATED_EORA_CASES {
        let problem = Solvable::new(case);
        let options = CompensationOptions { method: &Fast, ..options(case.rank, ElementType::F32) };
        let solved = problem.solve(&options);
        let (left, optimum, total) = (problem.left(solved.factors.as_ref()), problem.optimum(case.rank), problem.total);
        let factors = solved.factors.as_ref().unwrap();
        // What f32 cannot hold of factors whose product cancels on the inputs.
        let rounding = f64::from(f32::EPSILON) / 2.0 * norm(&magnitudes(factors, &problem.instance.inputs));
        let slack = 1e-7 * total + rounding;
        assert!(left <= optimum * (1.0 + 1e-3) + slack, "{case:?}: {left:e}, {optimum:e} of {total:e}");
        typical += usize::from(left <= optimum * (1.0 + 1e-4) + slack);
        let certificate = solved.certificate.unwrap();
        assert!(certificate.holds, "{case:?}: {certificate:?}");
        // The bound that it proves is one: below the optimum, and no lower than it says.
        let original: Vec<f64> = problem.instance.weight.to_f32().into_iter().map(f64::from).collect();
        let original = norm(&outputs(&original, case.columns, &problem.instance.inputs));
        let (bound, reached) = (certificate.bound * original, certificate.solved * original);
        // Energies in f32 are relative to what there was.
        let rounding = if case.columns >= 512 && optimum > 0.2 * total { 1e-5 * total } else { 1e-7 * total };
        assert!(bound <= optimum + rounding, "{case:?}: {bound:e} above {optimum:e}");
        assert!(reached <= optimum * (1.0 + 1e-3) + rounding && reached >= optimum - rounding, "{case:?}");
    }
    assert!(typical * 10 >= ITERATED_EORA_CASES.len() * 9, "{typical}");
}

#[test]
fn every_method_reaches_its_own_optimum_and_eora_is_the_best_of_them() {
    for case in ITERATED_EORA_CASES.iter().chain(EORA_CASES.iter().step_by(3)) {
        let problem = Solvable::new(case);
        let solve = |method: &'static dyn CompensationMethod| {
            problem.solve(&CompensationOptions { method, ..options(case.rank, ElementType::F32) })
        };
        let best = problem.left(solve(&Exact).factors.as_ref());
        for method in METHODS {
            let solved = solve(method);
            let left = problem.left(solved.factors.as_ref());
            let slack = 3e-7 * problem.total;
            assert!(best <= left * (1.0 + 1e-9) + slack, "{case:?} {}: {left:e} {best:e}", method.name());
            assert!(left <= problem.total * (1.0 + 1e-9), "{case:?} {}", method.name());
            assert!(solved.error.bound <= solved.error.compensated, "{case:?} {}", method.name());
            assert_eq!(solved.certificate.is_some(), method.is_optimal());
        }
        // The plain SVD is the optimum where all inputs are alike.
        let Some(factors) = solve(&Lorc).factors else { continue };
        let left = norm(&repaired(&problem.delta, &factors));
        let values = singular_values(&problem.delta, case.rows, case.columns);
        let (optimum, total) = (norm(&values[case.rank.min(values.len())..]), norm(&problem.delta));
        assert!(left <= optimum * (1.0 + 1e-3) + 1e-6 * total, "{case:?}: {left:e} {optimum:e}");
    }
}

/// What of `Δ X` is left by the leading left singular vectors of `Δ diag(S)^α`.
fn left_by_exponent(problem: &Solvable, rank: usize, exponent: f64) -> f64 {
    let ((rows, columns), energies) = (problem.shape, problem.calibration.energies());
    let weighted = |(at, value): (usize, &f64)| value * energies[at % columns].powf(exponent);
    let weighted: Vec<f64> = problem.delta.iter().enumerate().map(weighted).collect();
    let svd = ThinSvd::new(&weighted, rows, columns).unwrap();
    let mut left = outputs(&problem.delta, columns, &problem.instance.inputs);
    let tokens = left.len() / rows;
    for direction in svd.left.chunks_exact(rows).take(rank.min(rows).min(columns)) {
        let mut found = vec![0.0; tokens];
        for (row, value) in left.chunks_exact(tokens).zip(direction) {
            found.iter_mut().zip(row).for_each(|(found, output)| *found += value * output);
        }
        for (row, value) in left.chunks_exact_mut(tokens).zip(direction) {
            row.iter_mut().zip(&found).for_each(|(output, found)| *output -= value * found);
        }
    }
    norm(&left)
}

#[test]
fn diagonal_takes_the_best_of_its_exponents_and_is_never_behind_the_plain_svd() {
    let mut chosen = [0; 3];
    for case in EORA_CASES.iter().chain(ITERATED_EORA_CASES).filter(|case| case.columns <= 200) {
        let problem = Solvable::new(case);
        for element in [ElementType::F32, ElementType::Bf16] {
            let solve = |method: &'static dyn CompensationMethod| {
                let solved = problem.solve(&CompensationOptions { method, ..options(case.rank, element) });
                problem.left(solved.factors.as_ref())
            };
            let (left, plain) = (solve(&Diagonal), solve(&Lorc));
            let slack = 3e-7 * problem.total;
            // Where next to nothing is left it is what bf16 rounds away, by chance more or less.
            if element == ElementType::F32 || plain > 0.1 * problem.total {
                assert!(left <= plain * (1.0 + 1e-3) + slack, "{case:?} {element:?}: {left:e} {plain:e}");
            }
            if element == ElementType::F32 {
                let by_exponent = [0.5, 0.25, 0.0].map(|exponent| left_by_exponent(&problem, case.rank, exponent));
                let least = by_exponent.iter().fold(f64::INFINITY, |least, &value| least.min(value));
                assert!(left <= least * (1.0 + 1e-3) + slack, "{case:?}: {left:e} {by_exponent:?}");
                let alone = |at: usize| (0..3).all(|other| other == at || by_exponent[other] > 1.001 * by_exponent[at]);
                (0..3).filter(|&at| alone(at)).for_each(|at| chosen[at] += 1);
            }
        }
    }
    // Each of the exponents is needed somewhere.
    assert!(chosen.iter().all(|&count| count >= 3), "{chosen:?}");
}

#[test]
fn the_published_formula_gives_the_same_product() {
    let mut compared = 0;
    for case in EORA_CASES.iter().chain(ITERATED_EORA_CASES) {
        let calm = matches!(case.inputs, Inputs::White | Inputs::PowerLaw(_)) && case.dead == 0;
        if !calm || case.tokens < 3 * case.columns || matches!(case.damage, Damage::LowRank(_)) {
            continue;
        }
        let problem = Solvable::new(case);
        let (m, k, rank) = (case.rows, case.columns, case.rank.min(case.rows).min(case.columns));
        // Of equal singular values any directions would do.
        let values = problem.values();
        let (edge, next) = (values[rank - 1], values.get(rank).copied().unwrap_or(0.0));
        if next > 0.98 * edge {
            continue;
        }
        // B' A' = [Δ Q Λ^½]_r, A = A' Λ^−½ Qᵀ (arXiv 2410.21271, algorithm 1).
        let eigen = SymmetricEigen::new(&problem.calibration.second_moment().to_symmetric(), k).unwrap();
        let root = |power: f64| -> Vec<f64> {
            (0..k * k).map(|at| eigen.vectors[at % k * k + at / k] * eigen.values[at % k].powf(power)).collect()
        };
        let pool = ThreadPool::global();
        let (up, down) = (root(0.5), root(-0.5));
        let mut whitened = vec![0.0; m * k];
        product(MatrixView::new(&problem.delta, m, k), MatrixView::new(&up, k, k), &mut whitened, pool);
        let svd = ThinSvd::new(&whitened, m, k).unwrap();
        let mut truncated = vec![0.0; m * k];
        for l in 0..rank {
            for (at, value) in truncated.iter_mut().enumerate() {
                *value += svd.left[l * m + at / k] * svd.values[l] * svd.right[l * k + at % k];
            }
        }
        let mut expected = vec![0.0; m * k];
        product(MatrixView::new(&truncated, m, k), MatrixView::new(&down, k, k).transposed(), &mut expected, pool);
        let Some(factors) = problem.solve(&options(case.rank, ElementType::F32)).factors else { continue };
        let kept = repaired(&problem.delta, &factors);
        let error: Vec<f64> = (0..m * k).map(|at| problem.delta[at] - kept[at] - expected[at]).collect();
        assert!(norm(&error) <= 1e-5 * norm(&expected), "{case:?}: {:e}", norm(&error) / norm(&expected));
        compared += 1;
    }
    assert!(compared >= 10, "{compared}");
}
