//! EoRA against f64 oracles that never see a second moment: singular values of `Δ X` by Jacobi rotations, and errors
//! measured on the inputs themselves.

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_compensate::{EoraOptions, eora, output_energy, residual_error};
use kintsugi_runtime::{ErrorCode, ThreadPool};
use kintsugi_testkit::eora_cases::{
    Damage, EORA_CASES, EoraCase, EoraInstance, Inputs, Random, outputs, singular_values,
};
use kintsugi_weights::{DenseMatrix, ElementType, LowRank};

fn calibrate(inputs: &[f32], width: usize) -> Calibration {
    let pool = ThreadPool::global();
    let mut builder = CalibrationBuilder::new(width);
    builder.push(inputs, pool).unwrap();
    builder.finish(pool)
}

fn residual(instance: &EoraInstance) -> Vec<f64> {
    let pairs = instance.weight.to_f32().into_iter().zip(instance.quantized.to_f32());
    pairs.map(|(a, b)| f64::from(a) - f64::from(b)).collect()
}

/// `Δ − B A` in f64.
fn repaired(delta: &[f64], factors: &LowRank) -> Vec<f64> {
    let (rank, columns) = (factors.rank(), factors.in_features());
    let mut out = delta.to_vec();
    for (row, out) in out.chunks_exact_mut(columns).enumerate() {
        for l in 0..rank {
            let b = f64::from(factors.b()[row * rank + l]);
            for (value, &a) in out.iter_mut().zip(&factors.a()[l * columns..(l + 1) * columns]) {
                *value -= b * f64::from(a);
            }
        }
    }
    out
}

/// `|B| |A| |x|` for every input: what the rounding errors of the factors are multiplied with.
fn magnitudes(factors: &LowRank, inputs: &[f32]) -> Vec<f64> {
    let absolute = |values: &[f32]| values.iter().map(|value| f64::from(value.abs())).collect::<Vec<_>>();
    let (b, a, rank) = (absolute(factors.b()), absolute(factors.a()), factors.rank());
    let inputs: Vec<f32> = inputs.iter().map(|value| value.abs()).collect();
    let projected = outputs(&a, factors.in_features(), &inputs);
    let tokens = inputs.len() / factors.in_features();
    let row = |row: usize, token: usize| (0..rank).map(|l| b[row * rank + l] * projected[l * tokens + token]).sum();
    (0..factors.out_features()).flat_map(|i| (0..tokens).map(move |token| (i, token))).map(|(i, t)| row(i, t)).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn options(rank: usize, factor_type: ElementType) -> EoraOptions {
    EoraOptions { rank, factor_type }
}

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

/// Inputs of four kinds, and none of them may come out worse with rounded factors than without.
#[test]
fn no_input_is_made_worse_after_rounding_to_bf16() {
    let mut tried = 0;
    for case in EORA_CASES {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let delta = residual(&instance);
        let bf16 = options(case.rank, ElementType::Bf16);
        let solved = eora(&instance.weight, &instance.quantized, &calibration, &bf16, ThreadPool::global()).unwrap();
        let Some(factors) = &solved.factors else { continue };
        let after = repaired(&delta, factors);
        for (kind, x) in probes(case, &instance, factors) {
            let (before, after) = (norm(&outputs(&delta, case.columns, &x)), norm(&outputs(&after, case.columns, &x)));
            assert!(after <= (1.0 + 1e-3) * before, "{case:?} {kind}: {after:e} instead of {before:e}");
            tried += 1;
        }
    }
    assert!(tried >= 10_000, "only {tried} inputs were tried");
}

fn probes(case: &EoraCase, instance: &EoraInstance, factors: &LowRank) -> Vec<(&'static str, Vec<f32>)> {
    let k = case.columns;
    let mut random = Random::new(case.rows + 1000 * k);
    let mut probes = Vec::new();
    probes.extend(instance.inputs.chunks_exact(k).take(100).map(|x| ("calibration", x.to_vec())));
    for scale in [1.0, 1e-20, 1e20] {
        probes.extend((0..30).map(|_| ("gaussian", random.normals(k).iter().map(|z| (z * scale) as f32).collect())));
    }
    probes.extend((0..k).map(|j| ("one-hot", (0..k).map(|i| f32::from(u8::from(i == j))).collect())));
    for a in factors.a().chunks_exact(k) {
        // Where the correction answers loudest, and the signs that make it add up.
        probes.push(("row of A", a.to_vec()));
        probes.push(("signs of A", a.iter().map(|a| a.signum()).collect()));
    }
    probes
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

#[test]
fn nothing_to_repair_gives_no_factors() {
    let case = EORA_CASES[0];
    let instance = case.instance();
    let pool = ThreadPool::global();
    let calibration = calibrate(&instance.inputs, case.columns);
    let same = DenseMatrix::from_f32(case.rows, case.columns, instance.quantized.to_f32());
    let solved = eora(&same, &instance.quantized, &calibration, &EoraOptions::default(), pool).unwrap();
    assert!(solved.factors.is_none());
    assert_eq!((solved.error.quantized, solved.error.compensated, solved.error.bound), (0.0, 0.0, 0.0));

    // Inputs that are all zero: no output, no error, and no division by it.
    let silent = calibrate(&vec![0.0; 10 * case.columns], case.columns);
    let solved = eora(&instance.weight, &instance.quantized, &silent, &EoraOptions::default(), pool).unwrap();
    assert!(solved.factors.is_none());
    assert_eq!((solved.error.quantized, solved.error.compensated, solved.error.bound), (0.0, 0.0, 0.0));

    // Rank zero reports the error and nothing else.
    let solved =
        eora(&instance.weight, &instance.quantized, &calibration, &options(0, ElementType::Bf16), pool).unwrap();
    assert!(solved.factors.is_none());
    assert!(solved.error.quantized > 0.0 && solved.error.compensated == solved.error.quantized);
    assert!((solved.error.bound / solved.error.quantized - 1.0).abs() < 1e-9);

    // A weight without output whose compressed form has some: the absolute error stands.
    let zero = DenseMatrix::from_f32(case.rows, case.columns, vec![0.0; case.rows * case.columns]);
    let solved = eora(&zero, &instance.quantized, &calibration, &EoraOptions::default(), pool).unwrap();
    let energy = output_energy(&instance.quantized.to_f32(), case.rows, &calibration, pool);
    assert!((solved.error.quantized / energy.sqrt() - 1.0).abs() < 1e-9);
}

#[test]
fn input_that_does_not_belong_together_or_is_broken_is_refused() {
    let case = EORA_CASES[0];
    let instance = case.instance();
    let pool = ThreadPool::global();
    let calibration = calibrate(&instance.inputs, case.columns);
    let code = |weight: &DenseMatrix, calibration: &Calibration, factor_type| {
        let options = options(4, factor_type);
        eora(weight, &instance.quantized, calibration, &options, pool).err().map(|error| error.code)
    };
    let bf16 = ElementType::Bf16;
    assert_eq!(code(&instance.weight, &calibration, bf16), None);
    let mut values = instance.weight.to_f32();
    let narrow = DenseMatrix::from_f32(case.rows, case.columns - 1, values[case.rows..].to_vec());
    assert_eq!(code(&narrow, &calibration, bf16), Some(ErrorCode::ShapeMismatch));
    let narrow = calibrate(&[1.0; 40], 40);
    assert_eq!(code(&instance.weight, &narrow, bf16), Some(ErrorCode::ShapeMismatch));
    let large = values.iter().map(|value| value * 1e8).collect();
    let large = DenseMatrix::from_f32(case.rows, case.columns, large);
    assert_eq!(code(&large, &calibration, ElementType::F16), Some(ErrorCode::ValueNotFinite));
    assert_eq!(code(&large, &calibration, bf16), None);
    values[7] = f32::NAN;
    let broken = DenseMatrix::from_f32(case.rows, case.columns, values);
    assert_eq!(code(&broken, &calibration, bf16), Some(ErrorCode::ValueNotFinite));
}

#[test]
fn threads_do_not_change_a_bit() {
    for case in EORA_CASES.iter().filter(|case| case.rows.max(case.columns) >= 130) {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let solve = |threads| {
            let pool = ThreadPool::with_threads(threads);
            let options = options(case.rank, ElementType::F32);
            let solved = eora(&instance.weight, &instance.quantized, &calibration, &options, &pool).unwrap();
            (solved.factors, solved.error)
        };
        let one = solve(1);
        assert_eq!(one, solve(2));
        assert_eq!(one, solve(5));
    }
}
