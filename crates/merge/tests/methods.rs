//! Every rule against its definition, written out on dense updates.

mod dense;

use dense::{Adapter, dense as update_of, merged, norm, rank, relative, sum, update};
use kintsugi_linalg::ThinSvd;
use kintsugi_merge::{
    Coordinates, LinearSources, METHODS, MergeOptions, MergeSource, RankRule, SignElection, merge_linear, merge_method,
};
use kintsugi_runtime::{ErrorCode, ThreadPool};
use kintsugi_weights::{ElementType, LowRank};
use proptest::prelude::*;

const OUT: usize = 36;
const IN: usize = 50;
/// As many terms as there can be: nothing of what a rule gives is cut off.
const ALL: usize = 36;

fn adapters() -> Vec<Adapter> {
    vec![
        Adapter::new(OUT, IN, 4, 2.0, 1.0, 1),
        Adapter::new(OUT, IN, 4, 0.7, 0.5, 2),
        Adapter::new(OUT, IN, 4, 1.0, -0.25, 3),
        Adapter::new(OUT, IN, 4, 1.5, 1.0, 4),
    ]
}

/// The elements below the largest `density` share become 0.
fn trim(values: &[f64], density: f64) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.iter().map(|value| value.abs()).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let keep = (density * values.len() as f64) as usize;
    let least = if keep == 0 { f64::INFINITY } else { sorted[keep - 1] };
    values.iter().map(|&value| if value.abs() >= least { value } else { 0.0 }).collect()
}

/// The last steps of TIES: sign by sum or by majority, weights, mean of those that agree.
fn elect(tensors: &[Vec<f64>], weights: &[f64], election: SignElection, sums_break_ties: bool) -> Vec<f64> {
    (0..tensors[0].len())
        .map(|at| {
            let votes = tensors.iter().map(|tensor| tensor[at]);
            let total: f64 = votes.clone().sum();
            let majority: f64 = votes.filter(|&v| v != 0.0).map(f64::signum).sum();
            let majority = match election {
                SignElection::Frequency if majority != 0.0 || !sums_break_ties => majority,
                _ => total,
            };
            let sign = if majority >= 0.0 { 1.0 } else { -1.0 };
            let agreeing = tensors.iter().zip(weights).filter(|(tensor, _)| tensor[at] * sign > 0.0);
            let (total, count) = agreeing.fold((0.0, 0.0), |(t, c), (tensor, w)| (t + w * tensor[at], c + 1.0));
            total / f64::max(count, 1.0)
        })
        .collect()
}

fn weighted(tensors: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    (0..tensors[0].len()).map(|at| tensors.iter().zip(weights).map(|(t, w)| w * t[at]).sum()).collect()
}

fn multiply(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        for l in 0..k {
            (0..n).for_each(|j| out[i * n + j] += a[i * k + l] * b[l * n + j]);
        }
    }
    out
}

fn transpose(a: &[f64], m: usize, n: usize) -> Vec<f64> {
    (0..n).flat_map(|j| (0..m).map(move |i| a[i * n + j])).collect()
}

/// Orthonormal rows that span what the columns of `[out, parts]` do, as many as there are directions.
fn left_axes(columns: &[f64], out: usize, parts: usize) -> (Vec<f64>, usize) {
    let svd = ThinSvd::new(columns, out, parts).unwrap();
    let kept = svd.values.iter().take_while(|&&value| value > 1e-7 * svd.values[0]).count();
    (svd.left[..kept * out].to_vec(), kept)
}

/// A matrix in other coordinates.
type Turn = Box<dyn Fn(&[f64]) -> Vec<f64>>;

/// Updates in the coordinates, and the way back of a merged matrix.
fn in_coordinates(adapters: &[Adapter], coordinates: Coordinates) -> (Vec<Vec<f64>>, Turn) {
    let updates: Vec<Vec<f64>> = adapters.iter().map(Adapter::update).collect();
    let side_by_side = |blocks: &[Vec<f64>], rows: usize, width: usize| -> Vec<f64> {
        (0..rows).flat_map(|i| blocks.iter().flat_map(move |b| b[i * width..(i + 1) * width].to_vec())).collect()
    };
    match coordinates {
        Coordinates::Knots => {
            let (u, p) = left_axes(&side_by_side(&updates, OUT, IN), OUT, IN * adapters.len());
            let inside = updates.iter().map(|update| multiply(&u, update, p, OUT, IN)).collect();
            (inside, Box::new(move |m| multiply(&transpose(&u, p, OUT), m, OUT, p, IN)))
        }
        Coordinates::Core => {
            let r = adapters[0].factors.rank();
            let scaled = |values: &[f32], scaling: f64| -> Vec<f64> {
                values.iter().map(|&value| f64::from(value) * scaling.abs().sqrt()).collect()
            };
            let b: Vec<Vec<f64>> = adapters.iter().map(|a| scaled(a.factors.b(), a.scaling)).collect();
            let a: Vec<Vec<f64>> =
                adapters.iter().map(|a| transpose(&scaled(a.factors.a(), a.scaling), r, IN)).collect();
            let (u, p) = left_axes(&side_by_side(&b, OUT, r), OUT, r * adapters.len());
            let (v, q) = left_axes(&side_by_side(&a, IN, r), IN, r * adapters.len());
            let vt = transpose(&v, q, IN);
            let inside = updates.iter().map(|w| multiply(&multiply(&u, w, p, OUT, IN), &vt, p, IN, q)).collect();
            let back = move |m: &[f64]| multiply(&multiply(&transpose(&u, p, OUT), m, OUT, p, q), &v, OUT, q, IN);
            (inside, Box::new(back))
        }
        _ => (updates, Box::new(|m| m.to_vec())),
    }
}

#[test]
fn rules_for_elements_are_their_definitions_in_all_coordinates() {
    let adapters = adapters();
    let weights: Vec<f64> = adapters.iter().map(|adapter| adapter.weight).collect();
    for coordinates in [Coordinates::Update, Coordinates::Core, Coordinates::Knots] {
        let (updates, back) = in_coordinates(&adapters, coordinates);
        for density in [0.2, 0.5, 1.0] {
            let trimmed: Vec<Vec<f64>> = updates.iter().map(|values| trim(values, density)).collect();
            for election in [SignElection::Total, SignElection::Frequency] {
                let options =
                    MergeOptions { coordinates: Some(coordinates), density, sign_election: election, ..rank(ALL) };
                let expected = back(&elect(&trimmed, &weights, election, coordinates != Coordinates::Update));
                for name in ["ties", "knots"] {
                    let error = relative(&update(&adapters, merge_method(name).unwrap(), &options), &expected);
                    assert!(error <= 2e-6, "{name} {coordinates:?} {density} {election:?}: {error:e}");
                }
            }
            let options = MergeOptions { coordinates: Some(coordinates), density, ..rank(ALL) };
            let expected = back(&weighted(&trimmed, &weights));
            let found = update(&adapters, merge_method("magnitude-prune").unwrap(), &options);
            assert!(relative(&found, &expected) <= 2e-6, "{coordinates:?} {density}");
        }
    }
}

#[test]
fn rules_on_factors_merge_a_and_b_apart() {
    let adapters = adapters();
    let root = |adapter: &Adapter| (adapter.weight * adapter.scaling).abs().sqrt();
    let (b_weights, a_weights): (Vec<f64>, Vec<f64>) =
        adapters.iter().map(|adapter| (root(adapter), root(adapter).copysign(adapter.weight))).unzip();
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&value| f64::from(value)).collect() };
    let b: Vec<Vec<f64>> = adapters.iter().map(|adapter| trim(&wide(adapter.factors.b()), 0.3)).collect();
    let a: Vec<Vec<f64>> = adapters.iter().map(|adapter| trim(&wide(adapter.factors.a()), 0.3)).collect();
    let options = MergeOptions { coordinates: Some(Coordinates::Factors), density: 0.3, ..Default::default() };
    let factors = merged(&adapters, merge_method("ties").unwrap(), &options).factors.unwrap();
    assert!(relative(&wide(factors.b()), &elect(&b, &b_weights, SignElection::Total, false)) <= 1e-6);
    assert!(relative(&wide(factors.a()), &elect(&a, &a_weights, SignElection::Total, false)) <= 1e-6);
    let factors = merged(&adapters, merge_method("magnitude-prune").unwrap(), &options).factors.unwrap();
    assert!(relative(&wide(factors.b()), &weighted(&b, &b_weights)) <= 1e-6);
    assert!(relative(&wide(factors.a()), &weighted(&a, &a_weights)) <= 1e-6);
    let factors = merged(&adapters, merge_method("linear").unwrap(), &MergeOptions::default()).factors.unwrap();
    let plain =
        |of: fn(&LowRank) -> &[f32]| -> Vec<Vec<f64>> { adapters.iter().map(|a| wide(of(&a.factors))).collect() };
    assert!(relative(&wide(factors.b()), &weighted(&plain(|f| f.b()), &b_weights)) <= 1e-6);
    assert!(relative(&wide(factors.a()), &weighted(&plain(|f| f.a()), &a_weights)) <= 1e-6);
}

#[test]
fn dare_drops_the_share_and_makes_up_for_it() {
    // B is the identity, so that the update is A and its elements can be counted.
    let n = 64;
    let identity: Vec<f32> = (0..n * n).map(|at| f32::from(u8::from(at % (n + 1) == 0))).collect();
    let ones = LowRank::new(n, 400, n, identity, vec![1.0; n * 400], ElementType::F32);
    let two = [1.0, 1.0].map(|weight| Adapter { factors: ones.clone(), scaling: 1.0, weight });
    for density in [0.1, 0.5, 0.9] {
        let values = |seed: u64, name: &str| {
            let options = MergeOptions { density, seed, ..rank(n) };
            update(&two, merge_method(name).unwrap(), &options)
        };
        let linear = values(0, "dare-linear");
        for value in &linear {
            let times = value * density;
            assert!((0..3).any(|count| (times - f64::from(count)).abs() < 1e-4), "{value}");
        }
        let mean = linear.iter().sum::<f64>() / linear.len() as f64;
        assert!((mean - 2.0).abs() < 0.1, "{density} {mean}");
        // Both adapters keep different elements, and another seed others again.
        let both = linear.iter().filter(|&&value| value * density > 1.5).count() as f64 / linear.len() as f64;
        assert!((both - density * density).abs() < 0.03, "{both}");
        assert!(relative(&values(1, "dare-linear"), &linear) > 0.1);
        assert_eq!(values(0, "dare-linear"), linear);
        let ties = values(0, "dare-ties");
        assert!(ties.iter().zip(&linear).all(|(t, l)| (t * density - f64::from(u8::from(*l > 0.1))).abs() < 1e-4));
    }
}

#[test]
fn tsv_and_iso_c_are_their_definitions() {
    let adapters = adapters();
    let polar = |x: &[f64], m: usize, n: usize| -> Vec<f64> {
        let svd = ThinSvd::new(x, m, n).unwrap();
        let size = m.min(n);
        multiply(&transpose(&svd.left, size, m), &svd.right, m, size, n)
    };
    let (mut left, mut right, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for adapter in &adapters {
        let svd = ThinSvd::new(&adapter.update(), OUT, IN).unwrap();
        left.extend_from_slice(&svd.left[..4 * OUT]);
        right.extend_from_slice(&svd.right[..4 * IN]);
        values.extend(svd.values[..4].iter().map(|value| value * adapter.weight));
    }
    let scaled: Vec<f64> =
        polar(&left, 16, OUT).iter().enumerate().map(|(at, value)| value * values[at / OUT]).collect();
    let expected = multiply(&transpose(&scaled, 16, OUT), &polar(&right, 16, IN), OUT, 16, IN);
    let found = update(&adapters, merge_method("tsv").unwrap(), &rank(16));
    assert!(relative(&found, &expected) <= 1e-6, "{:e}", relative(&found, &expected));

    let svd = ThinSvd::new(&sum(&adapters), OUT, IN).unwrap();
    let mean = svd.values[..16].iter().sum::<f64>() / 16.0;
    for k in [16, 5] {
        let expected: Vec<f64> = multiply(&transpose(&svd.left[..k * OUT], k, OUT), &svd.right[..k * IN], OUT, k, IN);
        let expected: Vec<f64> = expected.iter().map(|value| value * mean).collect();
        let found = update(&adapters, merge_method("iso-c").unwrap(), &rank(k));
        assert!(relative(&found, &expected) <= 1e-6, "{:e}", relative(&found, &expected));
    }
}

#[test]
fn the_report_says_what_dense_matrices_say() {
    let mut adapters = adapters();
    adapters[1] = Adapter::new(OUT, IN, 7, 1.3, 0.8, 9);
    let target = sum(&adapters);
    for (name, k) in [("svd", 3), ("lego", 6), ("ties", 5), ("cat", 19)] {
        let result = merged(&adapters, merge_method(name).unwrap(), &rank(k));
        let (report, factors) = (result.report.unwrap(), result.factors.unwrap());
        let found = update_of(&factors);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        assert!((report.error - relative(&found, &target)).abs() <= 1e-6, "{name}");
        let cosine = dot(&found, &target) / norm(&found) / norm(&target);
        assert!((report.cosine.unwrap() - cosine).abs() <= 1e-6);
        assert!((report.norm_ratio.unwrap() - norm(&found) / norm(&target)).abs() <= 1e-6);
        let svd = ThinSvd::new(&found, OUT, IN).unwrap();
        let r = factors.rank();
        let (u, v) = (&svd.left[..r * OUT], &svd.right[..r * IN]);
        for (adapter, share) in adapters.iter().zip(&report.sources) {
            let own = adapter.update();
            let inside = multiply(&multiply(u, &own, r, OUT, IN), &transpose(v, r, IN), r, IN, r);
            let retained = (norm(&inside) / norm(&own)).powi(2);
            assert!((share.retained - retained).abs() <= 1e-6, "{name} {} {retained}", share.retained);
            assert!((share.multiple - dot(&found, &own) / norm(&own).powi(2)).abs() <= 1e-6);
            assert!((share.norm - norm(&own)).abs() <= 1e-9 * norm(&own));
        }
        assert_eq!(report.overlaps.len(), 6);
        for overlap in &report.overlaps {
            let spaces = [overlap.first, overlap.second].map(|i| {
                let svd = ThinSvd::new(&adapters[i].update(), OUT, IN).unwrap();
                let r = adapters[i].factors.rank();
                (svd.left[..r * OUT].to_vec(), svd.right[..r * IN].to_vec(), r)
            });
            let [(u1, v1, r1), (u2, v2, r2)] = &spaces;
            let least = *r1.min(r2) as f64;
            let outputs = norm(&multiply(u1, &transpose(u2, *r2, OUT), *r1, OUT, *r2)).powi(2) / least;
            let inputs = norm(&multiply(v1, &transpose(v2, *r2, IN), *r1, IN, *r2)).powi(2) / least;
            assert!((overlap.outputs - outputs).abs() <= 1e-6 && (overlap.inputs - inputs).abs() <= 1e-6);
        }
    }
}

#[test]
fn a_single_adapter_is_cut_to_the_rank() {
    let single = [Adapter::new(OUT, IN, 6, 2.0, 0.5, 1)];
    let energy = MergeOptions { rank: Some(RankRule::Energy { share: 0.5, most: 6 }), ..Default::default() };
    let svd = merge_method("svd").unwrap();
    for method in METHODS.iter().filter(|method| !method.name().starts_with("lego")) {
        for options in [rank(2), rank(6), energy.clone(), MergeOptions::default()] {
            let found = merged(&single, *method, &options).factors.unwrap();
            let expected = merged(&single, svd, &options).factors.unwrap();
            let name = method.name();
            assert_eq!(found.rank(), expected.rank(), "{name} {:?}", options.rank);
            assert!(relative(&update_of(&found), &update_of(&expected)) <= 1e-6, "{name} {:?}", options.rank);
        }
    }
    assert!(merged(&single, svd, &energy).factors.unwrap().rank() < 6);
}

fn failure(adapters: &[Adapter], name: &str, options: &MergeOptions) -> (ErrorCode, String) {
    let pool = ThreadPool::with_threads(1);
    let sources: Vec<MergeSource<'_>> = adapters.iter().map(Adapter::source).collect();
    let error = match LinearSources::new("q_proj", &sources, adapters.len()) {
        Err(error) => error,
        Ok(linear) => merge_linear(merge_method(name).unwrap(), &linear, options, &pool).unwrap_err(),
    };
    assert!(!error.hint.is_empty() && !error.subject.is_empty(), "{error}");
    (error.code, error.subject)
}

#[test]
fn bad_input_is_refused_by_name() {
    let good = adapters();
    let name = |code, subject: &str| (code, subject.to_string());
    assert_eq!(failure(&[], "cat", &rank(1)), name(ErrorCode::OptionInvalid, "q_proj"));
    let mut broken = good.clone();
    broken[1] = broken[1].with(vec![f32::NAN; OUT * 4], broken[1].factors.a().to_vec());
    assert_eq!(failure(&broken, "cat", &rank(1)), name(ErrorCode::ValueNotFinite, "q_proj"));
    let mut broken = good.clone();
    broken[2].weight = f64::INFINITY;
    assert_eq!(failure(&broken, "svd", &rank(1)), name(ErrorCode::ValueNotFinite, "q_proj"));
    let mut other = good.clone();
    other.push(Adapter::new(IN, OUT, 4, 1.0, 1.0, 5));
    assert_eq!(failure(&other, "svd", &rank(1)), name(ErrorCode::ShapeMismatch, "q_proj"));
    let mut ranks = good.clone();
    ranks.push(Adapter::new(OUT, IN, 2, 1.0, 1.0, 5));
    assert_eq!(failure(&ranks, "linear", &MergeOptions::default()), name(ErrorCode::OptionInvalid, "q_proj"));
    let factors = MergeOptions { coordinates: Some(Coordinates::Factors), ..Default::default() };
    assert_eq!(failure(&ranks, "ties", &factors), name(ErrorCode::OptionInvalid, "q_proj"));
    let cut = MergeOptions { rank: Some(RankRule::Fixed(2)), ..factors };
    assert_eq!(failure(&good, "ties", &cut), name(ErrorCode::OptionInvalid, "rank"));
    for (options, subject) in [
        (rank(0), "rank"),
        (MergeOptions { rank: Some(RankRule::Energy { share: 1.5, most: 4 }), ..Default::default() }, "energy"),
        (MergeOptions { density: 0.0, ..Default::default() }, "density"),
        (MergeOptions { density: f64::NAN, ..Default::default() }, "density"),
        (rank((1 << 16) + 1), "rank"),
        (
            MergeOptions { rank: Some(RankRule::Energy { share: 0.5, most: (1 << 16) + 1 }), ..Default::default() },
            "rank",
        ),
        (MergeOptions { restarts: 0, ..Default::default() }, "restarts"),
        (MergeOptions { restarts: 10_001, ..Default::default() }, "restarts"),
        (MergeOptions { iterations: 100_001, ..Default::default() }, "iterations"),
        (MergeOptions { reference_rank: Some(0.0), ..Default::default() }, "referenceRank"),
    ] {
        assert_eq!(failure(&good, "lego", &options), name(ErrorCode::OptionInvalid, subject));
    }
    let large = [Adapter { weight: 1e12, ..good[0].clone() }, good[1].clone()];
    let f16 = MergeOptions { factor_type: ElementType::F16, ..rank(4) };
    assert_eq!(failure(&large, "cat", &f16), name(ErrorCode::ValueNotFinite, "q_proj"));
    let Err(error) = merge_method("legos") else { panic!("legos is no method") };
    assert!(error.hint.contains("Did you mean \"lego\""), "{}", error.hint);
}

#[test]
fn untrained_adapters_and_weights_of_zero_leave_nothing_or_the_others() {
    let good = adapters();
    let untrained = good[0].with(vec![0.0; OUT * 4], good[0].factors.a().to_vec());
    for method in METHODS {
        let nothing = [untrained.clone(), Adapter { weight: 0.0, ..good[1].clone() }];
        let options = if method.keeps_rank() { MergeOptions::default() } else { rank(4) };
        let result = merged(&nothing, *method, &options);
        let left = result.factors.map_or(0.0, |factors| norm(&update_of(&factors)));
        // Means over factors do not see that B A is zero.
        assert!(left == 0.0 || method.name() == "linear", "{} {left}", method.name());
        let report = result.report.unwrap();
        assert!(report.error.is_finite() && report.cosine.is_none(), "{}", method.name());
    }
    let some = [untrained, good[1].clone()];
    let found = update(&some, merge_method("svd").unwrap(), &rank(4));
    assert!(relative(&found, &sum(&some)) <= 1e-6);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sums_are_exact_and_truncations_optimal_for_any_shape(
        out in 1usize..40,
        input in 1usize..40,
        ranks in prop::collection::vec(1usize..12, 1..5),
        k in 1usize..30,
        weight in prop::sample::select(vec![-1.0, 1e-3, 0.5, 1.0, 1e4]),
        seed in 0u64..1000,
    ) {
        let adapters: Vec<Adapter> = ranks
            .iter()
            .enumerate()
            .map(|(i, &r)| Adapter::new(out, input, r, 2.0, if i == 0 { weight } else { 1.0 }, seed + i as u64))
            .collect();
        let target = sum(&adapters);
        let cat = update(&adapters, merge_method("cat").unwrap(), &MergeOptions::default());
        prop_assert!(relative(&cat, &target) <= 1e-6);
        let svd = ThinSvd::new(&target, out, input).unwrap();
        let bound = norm(&svd.values[k.min(svd.values.len())..]);
        let found = update(&adapters, merge_method("svd").unwrap(), &rank(k));
        let wrong = relative(&found, &target) * norm(&target);
        prop_assert!(wrong <= bound * (1.0 + 1e-5) + 1e-6 * norm(&target), "{wrong:e} {bound:e}");
        let units: usize = ranks.iter().sum();
        let lego = MergeOptions { output_reweighting: false, ..rank(units) };
        prop_assert!(relative(&update(&adapters, merge_method("lego").unwrap(), &lego), &target) <= 1e-6);
        for method in METHODS.iter().filter(|method| !method.keeps_rank()) {
            let factors = merged(&adapters, *method, &rank(k)).factors.unwrap();
            prop_assert!(factors.rank() <= k, "{}", method.name());
        }
    }
}
