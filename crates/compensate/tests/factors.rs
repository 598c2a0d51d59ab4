//! The stored factors: nested, no more than there is to repair, cheap in codes.

use kintsugi_compensate::{CompensationOptions, FactorPrecision};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::eora_cases::{Damage, EORA_CASES, EoraCase, ITERATED_EORA_CASES, outputs};
use kintsugi_weights::{ElementType, LowRank, QuantizedMatrix};

use crate::common::{Solvable, calibrate, eora, norm, options};

#[test]
fn a_prefix_is_the_solution_of_the_smaller_rank() {
    for case in EORA_CASES.iter().filter(|case| case.rank >= 8) {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        for factor_type in [ElementType::Bf16, ElementType::F32] {
            let solve = |rank| {
                let options = options(rank, factor_type);
                eora(&instance.weight, &instance.quantized, &calibration, &options, ThreadPool::global()).unwrap()
            };
            let (large, small) = (solve(case.rank), solve(3));
            let (large, small) = (large.factors.unwrap(), small.factors.unwrap());
            assert_eq!(large.prefix(small.rank()), small, "{case:?}");
            for column in 0..small.rank() {
                let column = small.b().iter().skip(column).step_by(small.rank());
                let (top, bottom) = column.fold((0.0f32, 0.0f32), |(top, bottom), &v| (v.max(top), v.min(bottom)));
                assert!(top >= -bottom, "signs are fixed");
            }
        }
    }
}

#[test]
fn ranks_are_clamped_to_what_the_residual_has() {
    let find = |damage: Damage| *EORA_CASES.iter().find(|case| case.damage == damage).unwrap();
    let rank = |case: EoraCase| {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let options = options(case.rank, ElementType::F32);
        let solved = eora(&instance.weight, &instance.quantized, &calibration, &options, ThreadPool::global()).unwrap();
        solved.factors.unwrap().rank()
    };
    let few_tokens = EORA_CASES.iter().find(|case| case.tokens < case.rank && case.tokens > 5).unwrap();
    assert_eq!(rank(EoraCase { rank: 1000, ..find(Damage::Rounded(2)) }), 96);
    assert_eq!(rank(EoraCase { rows: 6, rank: 1000, ..find(Damage::Rounded(2)) }), 6);
    assert_eq!(rank(EoraCase { columns: 1, rank: 1000, ..find(Damage::Rounded(2)) }), 1);
    // Noise directions above the clamp may stay, but not all that were asked for.
    assert!(rank(EoraCase { rank: 90, ..find(Damage::LowRank(5)) }) < 60);
    assert!(rank(*few_tokens) >= few_tokens.tokens);
}

/// `‖· X‖²` of independent errors of up to half a step in every value of both factors.
fn rounding_energy(factors: &LowRank, problem: &Solvable) -> f64 {
    let codes = factors.codes().unwrap();
    let (rank, columns) = (factors.rank(), factors.in_features());
    let energies = problem.calibration.energies();
    let a: Vec<f64> = factors.a().iter().map(|&value| f64::from(value)).collect();
    let tokens = problem.instance.inputs.len() / columns;
    let projected = outputs(&a, columns, &problem.instance.inputs);
    let of_direction: Vec<f64> = projected.chunks(tokens).map(|row| norm(row).powi(2)).collect();
    let step = |factor: &QuantizedMatrix, row, column| f64::from(factor.scales()[factor.scale_index(row, column)]);
    let of_a: f64 =
        (0..rank * columns).map(|at| step(&codes.a, at / columns, at % columns).powi(2) * energies[at % columns]).sum();
    let rows = factors.out_features();
    let of_b: f64 =
        (0..rows * rank).map(|at| step(&codes.b, at / rank, at % rank).powi(2) * of_direction[at % rank]).sum();
    (of_a + of_b) / 12.0
}

#[test]
fn coded_factors_cost_little_and_stay_nested() {
    for case in EORA_CASES.iter().chain(ITERATED_EORA_CASES) {
        let problem = Solvable::new(case);
        let float = problem.solve(&options(case.rank, ElementType::Bf16));
        for bits in [8, 4] {
            let precision = FactorPrecision::Codes(bits);
            let solved = problem.solve(&CompensationOptions { precision, ..options(case.rank, ElementType::Bf16) });
            let Some(factors) = &solved.factors else { continue };
            let codes = factors.codes().unwrap();
            assert_eq!((codes.b.bits(), codes.a.bits(), factors.factor_type()), (bits, bits, ElementType::Bf16));
            let (left, total) = (problem.left(Some(factors)), problem.total);
            let float_left = problem.left(float.factors.as_ref());
            let allowed = float_left.powi(2) + 4.0 * rounding_energy(factors, &problem);
            assert!(left.powi(2) <= allowed, "{case:?} {bits}: {left} instead of {float_left}");
            assert!(
                left < total && (solved.error.compensated * total / solved.error.quantized - left).abs() < 1e-6 * total
            );
            // Every prefix is a compensation too, and the profile says what it leaves.
            for rank in [1, factors.rank() / 2, factors.rank()] {
                let energy = solved.profile.calibration[rank];
                let measured = problem.left(Some(&factors.prefix(rank)));
                assert!((energy.sqrt() - measured).abs() <= 1e-6 * total, "{case:?} {rank}: {energy:e} {measured:e}");
            }
        }
    }
}
