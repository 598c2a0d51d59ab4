//! Merging in the metric of the inputs, against dense matrices: what is optimal, what is the same without statistics,
//! what is refused.

mod dense;

use dense::{Adapter, dense as update_of, norm, rank, relative, sum};
use kintsugi_linalg::{SymmetricEigen, ThinSvd, UpperTriangle};
use kintsugi_merge::{
    LinearSources, METHODS, MergeOptions, MergeSource, MergedLinear, RankRule, ScaleRule, merge_linear, merge_method,
};
use kintsugi_runtime::{ErrorCode, Result, ThreadPool};
use kintsugi_testkit::Random;
use kintsugi_weights::ElementType;

const CASES: &[(usize, usize, &[usize])] =
    &[(40, 56, &[4, 4, 4]), (20, 64, &[8, 8, 8]), (64, 20, &[8, 8, 8]), (24, 24, &[16, 3, 9]), (48, 30, &[2])];

fn adapters(out: usize, input: usize, ranks: &[usize]) -> Vec<Adapter> {
    let (scalings, weights) = ([2.0, 4.0 / 3.0, 0.5], [1.0, 0.5, -0.75]);
    let each = ranks.iter().enumerate();
    each.map(|(i, &r)| Adapter::new(out, input, r, scalings[i], weights[i], 70 + i as u64)).collect()
}

/// Second moments of few and of many tokens with outliers in some channels and nothing in others, `[side, side]`.
fn second_moments(side: usize) -> Vec<(&'static str, Vec<f64>)> {
    let of_tokens = |tokens: usize, outlier: f64, seed: u64| {
        let mut random = Random::new(seed);
        let mut sum = vec![0.0; side * side];
        for _ in 0..tokens {
            let mut x: Vec<f64> = (0..side).map(|_| random.normal() + 0.3).collect();
            x[side / 3] *= outlier;
            x[side / 2] = 0.0;
            for i in 0..side {
                (0..side).for_each(|j| sum[i * side + j] += x[i] * x[j]);
            }
        }
        sum
    };
    vec![
        ("many tokens", of_tokens(4 * side, 1.0, 1)),
        ("outliers", of_tokens(4 * side, 100.0, 2)),
        ("fewer tokens than inputs", of_tokens(side / 3, 3.0, 3)),
    ]
}

fn identity(side: usize) -> Vec<f64> {
    (0..side * side).map(|at| if at / side == at % side { 1.0 } else { 0.0 }).collect()
}

fn merged(adapters: &[Adapter], name: &str, options: &MergeOptions, s: &[f64], threads: usize) -> Result<MergedLinear> {
    let sources: Vec<MergeSource<'_>> = adapters.iter().map(Adapter::source).collect();
    let s = UpperTriangle::of(s, adapters[0].factors.in_features());
    let linear = LinearSources::new("layers.0.q_proj", &sources, adapters.len())?.weighted_by(&s)?;
    merge_linear(merge_method(name)?, &linear, options, &ThreadPool::with_threads(threads))
}

fn update(adapters: &[Adapter], name: &str, options: &MergeOptions, s: &[f64]) -> Vec<f64> {
    update_of(&merged(adapters, name, options, s, 2).unwrap().factors.unwrap())
}

/// `S^½`.
fn root(s: &[f64], side: usize) -> Vec<f64> {
    let eigen = SymmetricEigen::new(s, side).unwrap();
    let mut out = vec![0.0; side * side];
    for (value, vector) in eigen.values.iter().zip(eigen.vectors.chunks_exact(side)) {
        for i in 0..side {
            (0..side).for_each(|j| out[i * side + j] += value.max(0.0).sqrt() * vector[i] * vector[j]);
        }
    }
    out
}

/// `M S^½`: what the outputs see.
fn outputs(m: &[f64], root: &[f64], side: usize) -> Vec<f64> {
    let mut out = vec![0.0; m.len()];
    for (row, out) in m.chunks_exact(side).zip(out.chunks_exact_mut(side)) {
        for (l, value) in row.iter().enumerate() {
            out.iter_mut().zip(&root[l * side..]).for_each(|(sum, r)| *sum += value * r);
        }
    }
    out
}

fn output_error(found: &[f64], target: &[f64], root: &[f64], side: usize) -> f64 {
    relative(&outputs(found, root, side), &outputs(target, root, side))
}

#[test]
fn svd_is_the_best_in_the_metric_of_the_inputs() {
    for &(out, input, ranks) in CASES {
        let adapters = adapters(out, input, ranks);
        let target = sum(&adapters);
        for (what, s) in second_moments(input) {
            let root = root(&s, input);
            let seen = outputs(&target, &root, input);
            let values = ThinSvd::new(&seen, out, input).unwrap().values;
            for k in [1, 3, ranks.iter().sum()] {
                let result = merged(&adapters, "svd", &rank(k), &s, 2).unwrap();
                let found = update_of(result.factors.as_ref().unwrap());
                let bound = norm(&values[k.min(values.len())..]) / norm(&values);
                let error = output_error(&found, &target, &root, input);
                assert!(error <= bound * (1.0 + 1e-5) + 1e-6, "{what} {out}×{input} {k}: {error:e} {bound:e}");
                let plain = dense::update(&adapters, merge_method("svd").unwrap(), &rank(k));
                let of_plain = output_error(&plain, &target, &root, input);
                assert!(error <= of_plain * (1.0 + 1e-6) + 1e-6, "{what}: {error:e}, plain {of_plain:e}");
                let report = result.report.unwrap();
                assert!((report.weighted_error.unwrap() - error).abs() <= 1e-6, "{what} {k}");
                assert!((report.error - relative(&found, &target)).abs() <= 1e-6, "{what} {k}");
                let seen_norm = report.weighted_sum_norm.unwrap();
                assert!((seen_norm / norm(&seen) - 1.0).abs() <= 1e-6, "{seen_norm} {}", norm(&seen));
            }
        }
    }
}

#[test]
fn the_metric_pays_where_inputs_differ() {
    let (out, input) = (40, 56);
    let adapters = adapters(out, input, &[4, 4, 4]);
    let (target, s) = (sum(&adapters), &second_moments(input)[1].1);
    let root = root(s, input);
    let plain = dense::update(&adapters, merge_method("svd").unwrap(), &rank(4));
    let weighted = update(&adapters, "svd", &rank(4), s);
    let [of_weighted, of_plain] = [&weighted, &plain].map(|found| output_error(found, &target, &root, input));
    assert!(of_weighted < 0.5 * of_plain, "{of_weighted} {of_plain}");
    assert!(relative(&weighted, &target) > relative(&plain, &target));
}

#[test]
fn inputs_without_preference_change_nothing() {
    for &(out, input, ranks) in CASES {
        let adapters = adapters(out, input, ranks);
        for k in [1, 3, ranks[0]] {
            for scale in [ScaleRule::Method, ScaleRule::ClosedForm, ScaleRule::Refit] {
                for name in ["svd", "lego", "tsv"] {
                    if name != "svd" && scale == ScaleRule::Method {
                        continue;
                    }
                    let options = MergeOptions { scale, ..rank(k) };
                    let plain = dense::update(&adapters, merge_method(name).unwrap(), &options);
                    let found = update(&adapters, name, &options, &identity(input));
                    assert!(relative(&found, &plain) <= 1e-5, "{name} {scale:?} {out}×{input} {k}");
                }
            }
        }
    }
}

#[test]
fn the_best_scale_and_the_best_b_are_the_best_for_the_outputs() {
    let (out, input) = (40, 56);
    let adapters = adapters(out, input, &[4, 8, 2]);
    let target = sum(&adapters);
    for (what, s) in second_moments(input) {
        let root = root(&s, input);
        let seen = outputs(&target, &root, input);
        for name in ["lego", "lego-gauge-free", "tsv", "iso-c", "ties"] {
            let plain = outputs(&dense::update(&adapters, merge_method(name).unwrap(), &rank(3)), &root, input);
            let options = |scale| MergeOptions { scale, ..rank(3) };
            let scaled = merged(&adapters, name, &options(ScaleRule::ClosedForm), &s, 2).unwrap();
            let best = plain.iter().zip(&seen).map(|(m, t)| m * t).sum::<f64>() / norm(&plain).powi(2);
            assert!((scaled.scale - best).abs() <= 1e-5 * best.abs(), "{what} {name}: {} {best}", scaled.scale);
            let refit = update(&adapters, name, &options(ScaleRule::Refit), &s);
            let errors =
                [outputs(&refit, &root, input), outputs(&update_of(&scaled.factors.unwrap()), &root, input), plain];
            let errors = errors.map(|found| relative(&found, &seen));
            assert!(errors.windows(2).all(|pair| pair[0] <= pair[1] * (1.0 + 1e-6) + 1e-9), "{what} {name} {errors:?}");
        }
    }
}

#[test]
fn an_update_that_gives_no_output_keeps_its_scale() {
    let (out, input) = (16, 24);
    let adapters = adapters(out, input, &[3, 4, 3]);
    // One direction that no adapter reads.
    let mut random = Random::new(9);
    let mut x: Vec<f64> = (0..input).map(|_| random.normal()).collect();
    let mut basis: Vec<Vec<f64>> = Vec::new();
    let dot = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(l, r)| l * r).sum::<f64>();
    let project = |vector: &mut [f64], basis: &[Vec<f64>]| {
        for unit in basis.iter().chain(basis) {
            let part = dot(vector, unit);
            vector.iter_mut().zip(unit).for_each(|(value, u)| *value -= part * u);
        }
    };
    for row in adapters.iter().flat_map(|adapter| adapter.factors.a().chunks_exact(input)) {
        let mut unit: Vec<f64> = row.iter().map(|&value| f64::from(value)).collect();
        project(&mut unit, &basis);
        let length = dot(&unit, &unit).sqrt();
        unit.iter_mut().for_each(|value| *value /= length);
        basis.push(unit);
    }
    project(&mut x, &basis);
    let s: Vec<f64> = (0..input * input).map(|at| x[at / input] * x[at % input]).collect();
    for method in ["lego", "tsv"] {
        let of = |scale| MergeOptions { rank: Some(RankRule::Fixed(4)), scale, report: false, ..Default::default() };
        let scale = merged(&adapters, method, &of(ScaleRule::ClosedForm), &s, 2).unwrap().scale;
        assert_eq!(scale, 1.0, "{method}");
        // What reads the direction is scaled.
        let all = merged(&adapters, method, &of(ScaleRule::ClosedForm), &identity(input), 2).unwrap().scale;
        assert!(all != 1.0 && all.is_finite(), "{method} {all}");
    }
}

#[test]
fn an_energy_target_counts_the_energy_of_the_outputs() {
    let (out, input) = (40, 56);
    let adapters = adapters(out, input, &[6, 6, 6]);
    let s = &second_moments(input)[1].1;
    let seen = outputs(&sum(&adapters), &root(s, input), input);
    let values = ThinSvd::new(&seen, out, input).unwrap().values;
    let held = |k: usize| values[..k].iter().map(|v| v * v).sum::<f64>() / norm(&values).powi(2);
    for share in [0.5, 0.9, 0.99] {
        let options = MergeOptions { rank: Some(RankRule::Energy { share, most: 64 }), ..Default::default() };
        let found = merged(&adapters, "svd", &options, s, 2).unwrap().factors.unwrap().rank();
        assert!(held(found) >= share - 1e-9 && (found == 1 || held(found - 1) < share), "{share} {found}");
    }
}

#[test]
fn neither_order_nor_threads_change_a_byte() {
    let adapters = adapters(150, 130, &[6, 6, 6]);
    let shuffled: Vec<Adapter> = adapters.iter().rev().cloned().collect();
    let s = &second_moments(130)[0].1;
    for (name, scale) in [("svd", ScaleRule::Method), ("lego", ScaleRule::Refit), ("ties", ScaleRule::ClosedForm)] {
        let options = MergeOptions { scale, ..rank(5) };
        let expected = merged(&adapters, name, &options, s, 1).unwrap();
        for threads in [2, 7] {
            let found = merged(&adapters, name, &options, s, threads).unwrap();
            assert_eq!((found.factors, found.report), (expected.factors.clone(), expected.report.clone()), "{name}");
        }
        assert_eq!(merged(&shuffled, name, &options, s, 2).unwrap().factors, expected.factors, "{name}");
    }
}

#[test]
fn rounded_factors_are_reported_as_they_are_stored() {
    let adapters = adapters(40, 56, &[4, 4]);
    let s = &second_moments(56)[0].1;
    let options = MergeOptions { factor_type: ElementType::Bf16, ..rank(8) };
    let result = merged(&adapters, "svd", &options, s, 2).unwrap();
    let error = output_error(&update_of(&result.factors.unwrap()), &sum(&adapters), &root(s, 56), 56);
    assert!((result.report.unwrap().weighted_error.unwrap() - error).abs() <= 1e-6 && error > 1e-5, "{error:e}");
}

#[test]
fn statistics_that_nothing_would_read_are_refused_by_name() {
    let adapters = adapters(10, 12, &[2, 2]);
    let s = identity(12);
    for method in METHODS {
        for scale in [ScaleRule::Method, ScaleRule::ClosedForm, ScaleRule::Refit] {
            let options = MergeOptions { scale, ..rank(2) };
            let read = method.weighs_inputs() || (scale != ScaleRule::Method && method.name() != "cat");
            match merged(&adapters, method.name(), &options, &s, 1) {
                Ok(result) => assert!(read && result.report.unwrap().weighted_error.is_some(), "{}", method.name()),
                Err(error) => {
                    assert!(!read && error.message.contains(method.name()), "{error}");
                    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "calibration"));
                    assert!(error.hint.contains("svd"), "{error}");
                }
            }
        }
    }
    let sources: Vec<MergeSource<'_>> = adapters.iter().map(Adapter::source).collect();
    let other = UpperTriangle::zeros(11);
    let error = LinearSources::new("q_proj", &sources, 2).unwrap().weighted_by(&other).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::StatisticsMismatch, "q_proj"));
}
