//! What a merge promises: exact where it says so, the optimum where it says so, and the same bytes for the same content.

mod dense;

use dense::{Adapter, dense as update_of, merged, merged_on, norm, orthogonal, rank, relative, sum, update};
use kintsugi_linalg::ThinSvd;
use kintsugi_merge::{Coordinates, Gauge, METHODS, MergeMethod, MergeOptions, RankRule, ScaleRule, merge_method};
use kintsugi_weights::{ElementType, LowRank};

/// Pairs of shapes and ranks: more units than a side is wide, fewer than either, different ranks.
const CASES: &[(usize, usize, &[usize])] =
    &[(40, 56, &[4, 4, 4]), (20, 64, &[8, 8, 8]), (64, 20, &[8, 8, 8]), (24, 24, &[16, 3, 9]), (96, 80, &[2, 4, 8, 1])];

fn adapters(out: usize, input: usize, ranks: &[usize]) -> Vec<Adapter> {
    let scalings = [2.0, 4.0 / 3.0, 0.5, 16.0 / 8f64.sqrt()];
    let weights = [1.0, 0.5, -0.75, 0.3];
    ranks
        .iter()
        .enumerate()
        .map(|(i, &r)| Adapter::new(out, input, r, scalings[i % 4], weights[i % 4], 10 + i as u64))
        .collect()
}

fn method(name: &str) -> &'static dyn MergeMethod {
    merge_method(name).unwrap()
}

#[test]
fn one_adapter_stays_itself_with_every_method() {
    for method in METHODS {
        for gauge in [Gauge::Raw, Gauge::Svd] {
            for scaling in [2.0, 16.0 / 8f64.sqrt(), -0.3] {
                for (out, input) in [(40, 56), (6, 30), (30, 6)] {
                    let adapter = Adapter::new(out, input, 8, scaling, 1.0, 3);
                    let options = MergeOptions { gauge, ..rank(if method.keeps_rank() { 8 } else { 12 }) };
                    let found = update(std::slice::from_ref(&adapter), *method, &options);
                    let error = relative(&found, &adapter.update());
                    assert!(error <= 1e-6, "{} {gauge:?} {scaling} {out}×{input}: {error:e}", method.name());
                }
            }
        }
    }
}

#[test]
fn cat_is_the_sum_and_keeps_every_digit_of_powers_of_two() {
    for &(out, input, ranks) in CASES {
        let adapters = adapters(out, input, ranks);
        let result = merged(&adapters, method("cat"), &MergeOptions::default());
        let factors = result.factors.unwrap();
        assert_eq!(factors.rank(), ranks.iter().sum::<usize>());
        assert!(relative(&update_of(&factors), &sum(&adapters)) <= 1e-6);
        assert!(result.report.unwrap().error <= 1e-6);
    }
    let mut adapters = adapters(12, 10, &[2, 3]);
    (adapters[0].scaling, adapters[0].weight) = (4.0, 0.125);
    (adapters[1].scaling, adapters[1].weight) = (-2.0, 8.0);
    let factors = merged(&adapters, method("cat"), &MergeOptions::default()).factors.unwrap();
    let pairs = |factors: &LowRank, coefficient: f32| -> Vec<(Vec<u32>, Vec<u32>)> {
        (0..factors.rank())
            .map(|unit| {
                let b = factors.b().iter().skip(unit).step_by(factors.rank()).map(|value| value.to_bits());
                let a = &factors.a()[unit * factors.in_features()..(unit + 1) * factors.in_features()];
                (b.collect(), a.iter().map(|value| (value * coefficient).to_bits()).collect())
            })
            .collect()
    };
    let mut expected = pairs(&adapters[0].factors, 0.5);
    expected.extend(pairs(&adapters[1].factors, -16.0));
    let mut found = pairs(&factors, 1.0);
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// `‖T‖` outside of its first `rank` singular values, and the best update.
fn eckart_young(values: &[f64], out: usize, input: usize, rank: usize) -> (f64, Vec<f64>, Vec<f64>) {
    let svd = ThinSvd::new(values, out, input).unwrap();
    let mut best = vec![0.0; out * input];
    for l in 0..rank.min(svd.values.len()) {
        for i in 0..out {
            for j in 0..input {
                best[i * input + j] += svd.values[l] * svd.left[l * out + i] * svd.right[l * input + j];
            }
        }
    }
    (norm(&svd.values[rank.min(svd.values.len())..]), best, svd.values)
}

#[track_caller]
fn assert_optimal(adapters: &[Adapter], out: usize, input: usize, k: usize) {
    let target = sum(adapters);
    let (bound, best, values) = eckart_young(&target, out, input, k);
    let result = merged(adapters, method("svd"), &rank(k));
    let factors = result.factors.unwrap();
    let found = update_of(&factors);
    let wrong = relative(&found, &target) * norm(&target);
    assert!(wrong <= bound * (1.0 + 1e-5) + 1e-6 * norm(&target), "{wrong:e} {bound:e}");
    assert!(relative(&found, &best) <= 1e-5, "{:e}", relative(&found, &best));
    let found = ThinSvd::new(&found, out, input).unwrap().values;
    for (found, expected) in found.iter().zip(&values).take(k) {
        assert!((found - expected).abs() <= 1e-6 * values[0], "{found} {expected}");
    }
    let report = result.report.unwrap();
    assert!((report.error - bound / norm(&target)).abs() <= 1e-6, "{} {}", report.error, bound / norm(&target));
}

#[test]
fn svd_is_the_best_of_its_rank() {
    for &(out, input, ranks) in CASES {
        for k in [1, 3, ranks[0], ranks.iter().sum()] {
            assert_optimal(&adapters(out, input, ranks), out, input, k);
        }
    }
}

#[test]
fn svd_is_the_best_where_adapters_are_nearly_the_same_or_differ_in_size() {
    let base = Adapter::new(60, 50, 6, 2.0, 1.0, 1);
    let noise = Adapter::new(60, 50, 6, 1.0, 1.0, 2);
    for amount in [0.0, 1e-6, 1e-3] {
        // Their difference is all that is left of them.
        let near = |of: &[f32], by: &[f32]| of.iter().zip(by).map(|(x, n)| x + amount * n).collect::<Vec<f32>>();
        let b = near(base.factors.b(), noise.factors.b());
        let twin = Adapter { weight: 1.0, ..base.with(b, base.factors.a().to_vec()) };
        assert_optimal(&[base.clone(), twin], 60, 50, 6);
    }
    let large = Adapter { weight: 1e6, ..base.clone() };
    let small = Adapter { weight: 1e-3, ..noise };
    assert_optimal(&[large, small], 60, 50, 8);
}

#[test]
fn an_energy_target_takes_as_few_terms_as_hold_it() {
    let adapters = adapters(40, 56, &[6, 6, 6]);
    let values = eckart_young(&sum(&adapters), 40, 56, 0).2;
    let total = norm(&values).powi(2);
    for share in [0.3, 0.9, 1.0] {
        for name in ["svd", "lego", "lego-gauge-free", "iso-c", "tsv"] {
            let options = MergeOptions { rank: Some(RankRule::Energy { share, most: 64 }), ..Default::default() };
            let found = merged(&adapters, method(name), &options).factors.unwrap().rank();
            if name != "tsv" {
                let held = |k: usize| values[..k].iter().map(|v| v * v).sum::<f64>() / total;
                assert!(
                    held(found) >= share - 1e-9 && (found == 1 || held(found - 1) < share),
                    "{name} {share} {found}"
                );
            }
            let capped = MergeOptions { rank: Some(RankRule::Energy { share, most: 2 }), ..Default::default() };
            assert!(merged(&adapters, method(name), &capped).factors.unwrap().rank() <= 2);
        }
    }
}

#[test]
fn as_many_clusters_as_units_are_the_sum() {
    for &(out, input, ranks) in CASES {
        let adapters = adapters(out, input, ranks);
        let (target, units) = (sum(&adapters), ranks.iter().sum::<usize>());
        for gauge in [Gauge::Raw, Gauge::Svd] {
            let off = MergeOptions { gauge, output_reweighting: false, ..rank(units) };
            assert!(relative(&update(&adapters, method("lego"), &off), &target) <= 1e-6);
            assert!(relative(&update(&adapters, method("lego-gauge-free"), &off), &target) <= 1e-6);
            // The output reweighting is √(reference rank / clusters).
            for reference in [None, Some(7.0)] {
                let on = MergeOptions { gauge, reference_rank: reference, ..rank(units) };
                let kept = merged(&adapters, method("lego"), &on).cluster_sizes.len() as f64;
                let factor = (reference.unwrap_or(kept / ranks.len() as f64) / kept).sqrt();
                let expected: Vec<f64> = target.iter().map(|value| value * factor).collect();
                let error = relative(&update(&adapters, method("lego"), &on), &expected);
                assert!(error <= 1e-6, "{gauge:?} {reference:?} {error:e}");
            }
        }
    }
}

#[test]
fn equal_adapters_give_one_with_lego_and_their_sum_without_gauge() {
    let adapter = Adapter::new(40, 56, 8, 2.0, 1.0, 3);
    let three = vec![adapter.clone(); 3];
    for parameter_reweighting in [false, true] {
        let options = MergeOptions { output_reweighting: false, parameter_reweighting, ..rank(8) };
        let result = merged(&three, method("lego"), &options);
        assert_eq!(result.cluster_sizes, [3; 8]);
        assert!(relative(&update_of(&result.factors.unwrap()), &adapter.update()) <= 1e-6);
    }
    let three_times: Vec<f64> = adapter.update().iter().map(|value| 3.0 * value).collect();
    assert!(relative(&update(&three, method("lego-gauge-free"), &rank(8)), &three_times) <= 1e-6);
}

/// Every method with every choice that it has.
fn variants() -> Vec<(&'static dyn MergeMethod, MergeOptions)> {
    let mut variants = Vec::new();
    for method in METHODS.iter().copied() {
        let plain = if method.keeps_rank() { MergeOptions::default() } else { rank(5) };
        variants.push((method, plain.clone()));
        if method.options().contains(&"gauge") {
            variants.push((method, MergeOptions { gauge: Gauge::Svd, ..plain.clone() }));
        }
        if method.options().contains(&"normalize") {
            variants.push((method, MergeOptions { normalize: true, ..plain.clone() }));
        }
        if method.options().contains(&"coordinates") {
            for coordinates in [Coordinates::Core, Coordinates::Knots] {
                variants.push((method, MergeOptions { coordinates: Some(coordinates), ..plain.clone() }));
            }
            let coordinates = Some(Coordinates::Factors);
            variants.push((method, MergeOptions { coordinates, ..Default::default() }));
        }
    }
    variants
}

#[test]
fn the_order_of_adapters_and_units_changes_no_byte() {
    let adapters = adapters(40, 56, &[4, 4, 4]);
    let mut shuffled: Vec<Adapter> = adapters.iter().rev().cloned().collect();
    shuffled.rotate_left(1);
    let reordered: Vec<Adapter> = adapters.iter().map(|adapter| adapter.reordered(&[2, 0, 3, 1])).collect();
    for (method, options) in variants() {
        let expected = merged(&adapters, method, &options);
        let found = merged(&shuffled, method, &options);
        assert_eq!(found.factors, expected.factors, "{} {options:?}", method.name());
        assert_eq!((&found.cluster_sizes, &found.scales), (&expected.cluster_sizes, &expected.scales));
        // Factors are paired by position there, so the position is part of the content.
        if method.name() != "linear" && options.coordinates != Some(Coordinates::Factors) {
            assert_eq!(merged(&reordered, method, &options).factors, expected.factors, "{}", method.name());
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let adapters = adapters(150, 130, &[6, 6, 6]);
    for (method, options) in variants() {
        let expected = merged_on(&adapters, method, &options, 1);
        for threads in [2, 7] {
            let found = merged_on(&adapters, method, &options, threads);
            assert_eq!(found.factors, expected.factors, "{} on {threads} threads", method.name());
            assert_eq!(found.report, expected.report, "{} on {threads} threads", method.name());
        }
    }
}

#[test]
fn signs_scales_and_rotations_of_the_factors_do_not_matter_where_that_is_promised() {
    let adapters = adapters(48, 40, &[6, 6, 6]);
    let flipped: Vec<Adapter> =
        adapters.iter().map(|adapter| adapter.rescaled(&[-1.0, 1.0, -1.0, -1.0, 1.0, -1.0])).collect();
    let rescaled: Vec<Adapter> =
        adapters.iter().map(|adapter| adapter.rescaled(&[10.0, 0.1, -3.0, 1.0, 0.7, 100.0])).collect();
    let rotated: Vec<Adapter> =
        adapters.iter().enumerate().map(|(i, adapter)| adapter.rotated(&orthogonal(6, i as u64))).collect();
    let svd_gauge = MergeOptions { gauge: Gauge::Svd, ..rank(7) };
    let cases: [(&str, MergeOptions, &[&Vec<Adapter>]); 7] = [
        ("lego-gauge-free", rank(7), &[&flipped, &rescaled]),
        ("lego-gauge-free", svd_gauge.clone(), &[&flipped, &rescaled, &rotated]),
        ("lego", svd_gauge, &[&flipped, &rescaled, &rotated]),
        ("svd", rank(7), &[&flipped, &rescaled, &rotated]),
        ("tsv", rank(7), &[&flipped, &rescaled, &rotated]),
        ("iso-c", rank(7), &[&flipped, &rescaled, &rotated]),
        ("ties", rank(7), &[&flipped, &rescaled]),
    ];
    for (name, options, others) in cases {
        let expected = update(&adapters, method(name), &options);
        for (i, other) in others.iter().enumerate() {
            let error = relative(&update(other, method(name), &options), &expected);
            // TIES drops elements by comparisons that rounding may turn: a handful of small ones.
            let bound = if name == "ties" { 1e-3 } else { 1e-5 };
            assert!(error <= bound, "{name} {i} {error:e}");
        }
    }
}

#[test]
fn the_best_scale_and_the_best_b_are_the_best() {
    let adapters = adapters(40, 56, &[4, 8, 2]);
    let target = sum(&adapters);
    for (name, k) in [("lego", 3), ("lego-gauge-free", 3), ("tsv", 4), ("iso-c", 4), ("ties", 4)] {
        let plain = update(&adapters, method(name), &rank(k));
        let scaled = merged(&adapters, method(name), &MergeOptions { scale: ScaleRule::ClosedForm, ..rank(k) });
        let dot: f64 = plain.iter().zip(&target).map(|(m, t)| m * t).sum();
        let best = dot / norm(&plain).powi(2);
        assert!((scaled.scale - best).abs() <= 1e-6 * best.abs(), "{name} {} {best}", scaled.scale);
        let scaled = update_of(&scaled.factors.unwrap());
        let refit = merged(&adapters, method(name), &MergeOptions { scale: ScaleRule::Refit, ..rank(k) });
        let factors = refit.factors.unwrap();
        let refit = update_of(&factors);
        let error = |found: &[f64]| relative(found, &target);
        assert!(error(&scaled) <= error(&plain) + 1e-9 && error(&refit) <= error(&scaled) + 1e-9, "{name}");
        // The residual of a least squares solution is orthogonal to the rows of A.
        let left: Vec<f64> = target.iter().zip(&refit).map(|(t, m)| t - m).collect();
        for row in left.chunks_exact(56) {
            for a in factors.a().chunks_exact(56) {
                let a: Vec<f64> = a.iter().map(|&value| f64::from(value)).collect();
                let product: f64 = row.iter().zip(&a).map(|(r, a)| r * a).sum();
                assert!(product.abs() <= 1e-6 * norm(&a) * norm(&target), "{name} {product:e}");
            }
        }
    }
}

#[test]
fn factors_are_rounded_to_the_type_that_is_asked_for() {
    let adapters = adapters(40, 56, &[4, 4]);
    for factor_type in [ElementType::Bf16, ElementType::F16] {
        let options = MergeOptions { factor_type, ..rank(8) };
        let result = merged(&adapters, method("svd"), &options);
        let factors = result.factors.unwrap();
        assert_eq!(factors.factor_type(), factor_type);
        assert!(factors.b().iter().chain(factors.a()).all(|&value| factor_type.round(value) == value));
        // The report is about what is stored.
        let error = relative(&update_of(&factors), &sum(&adapters));
        assert!((result.report.unwrap().error - error).abs() <= 1e-6 && error > 1e-5, "{error:e}");
    }
}
