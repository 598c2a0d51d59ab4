//! What comes in: nothing to repair, what does not belong together, other orders and batches, inputs that were held out.

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_compensate::{CompensationOptions, Fast, HoldOut, compensate, output_energy};
use kintsugi_runtime::{ErrorCode, ThreadPool};
use kintsugi_testkit::eora_cases::{Damage, EORA_CASES, ITERATED_EORA_CASES, outputs};
use kintsugi_weights::{DenseMatrix, ElementType};

use crate::common::{calibrate, eora, norm, options, repaired, residual};

#[test]
fn nothing_to_repair_gives_no_factors() {
    let case = EORA_CASES[0];
    let instance = case.instance();
    let pool = ThreadPool::global();
    let calibration = calibrate(&instance.inputs, case.columns);
    let same = DenseMatrix::from_f32(case.rows, case.columns, instance.quantized.to_f32());
    let solved = eora(&same, &instance.quantized, &calibration, &CompensationOptions::default(), pool).unwrap();
    assert!(solved.factors.is_none());
    assert_eq!((solved.error.quantized, solved.error.compensated, solved.error.bound), (0.0, 0.0, 0.0));

    // Inputs that are all zero: no output, no error, and no division by it.
    let silent = calibrate(&vec![0.0; 10 * case.columns], case.columns);
    let solved = eora(&instance.weight, &instance.quantized, &silent, &CompensationOptions::default(), pool).unwrap();
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
    let solved = eora(&zero, &instance.quantized, &calibration, &CompensationOptions::default(), pool).unwrap();
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

#[test]
fn inputs_that_took_no_part_are_measured() {
    let case = EORA_CASES.iter().find(|case| case.damage == Damage::Feedback(3)).unwrap();
    let instance = case.instance();
    let (seen, unseen) = instance.inputs.split_at(400 * case.columns);
    let calibration = calibrate(seen, case.columns);
    let pool = ThreadPool::global();
    let hold_out = HoldOut::new(case.columns, unseen.to_vec());
    let options = options(case.rank, ElementType::Bf16);
    let solved =
        compensate(&instance.weight, &instance.quantized, &calibration, Some(&hold_out), None, &options, pool).unwrap();
    let profile = solved.profile.hold_out.unwrap();
    let factors = solved.factors.unwrap();
    assert_eq!((profile.tokens, profile.energies[0].len()), (100, factors.rank() + 1));
    let delta = residual(&instance);
    let weight: Vec<f64> = instance.weight.to_f32().into_iter().map(f64::from).collect();
    for (half, inputs) in unseen.chunks(100 * case.columns).enumerate() {
        let near = |found: f64, values: &[f64]| {
            let expected = norm(&outputs(values, case.columns, inputs));
            assert!((found.sqrt() - expected).abs() <= 1e-5 * expected, "{half}: {} {expected}", found.sqrt());
        };
        near(profile.original[half], &weight);
        for rank in [0, 1, factors.rank()] {
            near(profile.energies[half][rank], &repaired(&delta, &factors.prefix(rank)));
        }
    }
    let alone = eora(&instance.weight, &instance.quantized, &calibration, &options, pool).unwrap();
    assert_eq!(alone.factors.unwrap(), factors, "what is held out changes nothing");
}

#[test]
fn batches_orders_and_workers_do_not_matter() {
    for case in [EORA_CASES[7], EORA_CASES[20], ITERATED_EORA_CASES[9]] {
        let instance = case.instance();
        let pool = ThreadPool::global();
        let tokens: Vec<&[f32]> = instance.inputs.chunks_exact(case.columns).collect();
        let solve = |calibration: &Calibration| {
            let options = CompensationOptions { method: &Fast, ..options(case.rank, ElementType::F32) };
            let solved = eora(&instance.weight, &instance.quantized, calibration, &options, pool).unwrap();
            let delta = vec![0.0; case.rows * case.columns];
            repaired(&delta, &solved.factors.unwrap())
        };
        let expected = solve(&calibrate(&instance.inputs, case.columns));
        let mut variants: Vec<Calibration> = Vec::new();
        for batch in [1, 3, 8] {
            let mut builder = CalibrationBuilder::new(case.columns);
            tokens.chunks(batch).for_each(|batch| builder.push(&batch.concat(), pool).unwrap());
            variants.push(builder.finish(pool));
        }
        let reversed: Vec<f32> = tokens.iter().rev().flat_map(|row| row.iter().copied()).collect();
        variants.push(calibrate(&reversed, case.columns));
        for workers in 2..=4 {
            let parts = tokens.chunks(tokens.len().div_ceil(workers));
            let mut parts = parts.map(|part| calibrate(&part.concat(), case.columns));
            let mut sum = parts.next().unwrap();
            parts.for_each(|part| sum.merge(&part, 1.0).unwrap());
            variants.push(sum);
        }
        for calibration in &variants {
            let found = solve(calibration);
            let error: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
            assert!(norm(&error) <= 1e-6 * norm(&expected), "{case:?}: {:e}", norm(&error) / norm(&expected));
        }
    }
}
