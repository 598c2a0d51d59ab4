//! Inputs of many kinds, and none of them may come out worse with stored factors than without any.

use std::collections::BTreeMap;

use kintsugi_compensate::{CompensationOptions, FactorPrecision, Fast};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::eora_cases::{EORA_CASES, EoraCase, ITERATED_EORA_CASES, Random, outputs};
use kintsugi_weights::{ElementType, LowRank};

use crate::common::{calibrate, eora, options, repaired, residual};

/// The largest norm of a compensated error beside the plain one.
const WORSE: f64 = 1.0 + 1e-3;

/// What became of all inputs of a kind.
#[derive(Debug, Default)]
struct Outcome {
    tried: usize,
    /// Those whose error has grown by more than [`WORSE`].
    worse: usize,
    /// The largest quotient of errors of one input.
    worst: f64,
    /// The same of all inputs of a case together, where they are a hundred or more.
    worst_case: f64,
    /// Most that the error of an input has grown, beside what its channels would give if none cancelled another.
    noise: f64,
}

/// Tries every input on every case; the outcome of each kind.
fn try_all(precision: FactorPrecision) -> BTreeMap<&'static str, Outcome> {
    let mut found: BTreeMap<&'static str, Outcome> = BTreeMap::new();
    for case in EORA_CASES.iter().chain(ITERATED_EORA_CASES) {
        let instance = case.instance();
        let (seen, held_out) = instance.inputs.split_at(case.tokens.div_ceil(2) * case.columns);
        let calibration = calibrate(seen, case.columns);
        let delta = residual(&instance);
        let options = CompensationOptions { method: &Fast, precision, ..options(case.rank, ElementType::Bf16) };
        let solved = eora(&instance.weight, &instance.quantized, &calibration, &options, ThreadPool::global()).unwrap();
        let Some(factors) = &solved.factors else { continue };
        let repaired = repaired(&delta, factors);
        let mut kinds = probes(case, factors);
        kinds.extend([("calibration", seen.to_vec()), ("hold-out", held_out.to_vec())]);
        for (kind, inputs) in kinds {
            let (before, after) = (norms(&delta, case.columns, &inputs), norms(&repaired, case.columns, &inputs));
            let sizes = sizes(&delta, case.columns, &inputs);
            let outcome = found.entry(kind).or_default();
            outcome.tried += before.len();
            for ((before, after), size) in before.iter().zip(&after).zip(sizes) {
                if size == 0.0 {
                    assert_eq!(*after, 0.0, "{case:?} {kind}");
                    continue;
                }
                outcome.worse += usize::from(*after > WORSE * before);
                outcome.worst = outcome.worst.max(after / before);
                outcome.noise = outcome.noise.max((after - before) / size);
            }
            if before.len() >= 100 {
                let sum = |norms: &[f64]| norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
                outcome.worst_case = outcome.worst_case.max(sum(&after) / sum(&before));
            }
        }
    }
    found
}

/// `(Σ ‖mⱼ‖² xⱼ²)^½` of every input.
fn sizes(matrix: &[f64], columns: usize, inputs: &[f32]) -> Vec<f64> {
    let mut squares = vec![0.0; columns];
    for row in matrix.chunks_exact(columns) {
        squares.iter_mut().zip(row).for_each(|(square, value)| *square += value * value);
    }
    let size = |x: &[f32]| x.iter().zip(&squares).map(|(x, square)| f64::from(*x).powi(2) * square).sum::<f64>().sqrt();
    inputs.chunks_exact(columns).map(size).collect()
}

/// `‖M x‖` of every input.
fn norms(matrix: &[f64], columns: usize, inputs: &[f32]) -> Vec<f64> {
    let tokens = inputs.len() / columns;
    let mut squares = vec![0.0; tokens];
    for row in outputs(matrix, columns, inputs).chunks_exact(tokens.max(1)) {
        squares.iter_mut().zip(row).for_each(|(square, value)| *square += value * value);
    }
    squares.into_iter().map(f64::sqrt).collect()
}

fn probes(case: &EoraCase, factors: &LowRank) -> Vec<(&'static str, Vec<f32>)> {
    let k = case.columns;
    let mut random = Random::new(case.rows + 1000 * k);
    let mut gaussian = |scale: f64| -> Vec<f32> { random.normals(65 * k).iter().map(|z| (z * scale) as f32).collect() };
    let a: Vec<f32> = factors.a()[..factors.rank() * k].to_vec();
    vec![
        ("gaussian", [gaussian(1.0), gaussian(1.0)].concat()),
        ("small gaussian", gaussian(1e-20)),
        ("large gaussian", gaussian(1e20)),
        ("one-hot", (0..k * k).map(|at| f32::from(u8::from(at % (k + 1) == 0))).collect()),
        // Where the correction answers loudest, and the signs that make it add up.
        ("signs of A", a.iter().map(|value| value.signum()).collect()),
        ("rows of A", a),
    ]
}

#[test]
fn no_input_is_made_worse_by_factors_in_bf16() {
    let found = try_all(FactorPrecision::Float(ElementType::Bf16));
    assert_enough(&found);
    for (kind, outcome) in &found {
        assert!(outcome.worse == 0 && outcome.worst <= WORSE, "{kind}: {outcome:?}");
    }
}

/// Codes add noise of their own, and an input whose channels cancel each other in Δ may end with more of that than it
/// had: of single inputs few become worse, none by more than the noise, and many inputs of a kind together never.
#[test]
fn codes_make_no_channel_worse_and_other_inputs_rarely_and_little() {
    // Half a step beside the largest value of a run, whose scale may be twice as large as need be with 8 bits, and a
    // sixteenth larger with 4; in both factors.
    for (bits, noise, share) in [(8, 2.0 / 127.0, 1e-3), (4, 1.0625 / 7.0, 1e-2)] {
        let found = try_all(FactorPrecision::Codes(bits));
        assert_enough(&found);
        for (kind, outcome) in &found {
            assert!(outcome.worst_case <= WORSE, "{bits} {kind}: {outcome:?}");
            assert!(outcome.noise <= noise, "{bits} {kind}: {outcome:?}");
            assert!(outcome.worse as f64 <= share * outcome.tried as f64, "{bits} {kind}: {outcome:?}");
        }
        assert_eq!(found["one-hot"].worse, 0, "{bits}: {found:?}");
    }
}

fn assert_enough(found: &BTreeMap<&'static str, Outcome>) {
    for kind in ["calibration", "hold-out", "gaussian", "one-hot"] {
        assert!(found[kind].tried >= 10_000, "{found:?}");
    }
}
