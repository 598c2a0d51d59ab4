//! Mixtures of calibration sources: the statistics are weighted sums, whatever holds the parts.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assets, backend, recipe};
use kintsugi_checkpoint::{Checkpoint, TensorFile};
use kintsugi_model::DecoderSpec;
use kintsugi_pipeline::{
    CalibrationKind, CalibrationSource, CalibrationTokens, CompensateRecipe, EoraRecipe, Recipe, Report, compensate,
    compress,
};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, Result};

const LENGTH: usize = 32;

/// A folder for a model's jobs. Rounding to nearest: no activation depends on statistics.
struct Scene {
    root: tempfile::TempDir,
    recipe: Recipe,
}

impl Scene {
    fn new(model: &Path) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut recipe = recipe(model, &root.path().join("out"), "rtn", 4, 0);
        recipe.group_size = Some(16);
        recipe.calibration.as_mut().unwrap().length = LENGTH;
        Scene { root, recipe }
    }

    fn vocabulary(&self) -> usize {
        DecoderSpec::of(&Checkpoint::open(&self.recipe.source).unwrap()).unwrap().vocabulary_size
    }

    /// Token ids of some sequences, others for every seed.
    fn ids(&self, seed: usize, sequences: usize) -> Vec<u32> {
        let count = self.vocabulary();
        (0..sequences * LENGTH).map(|i| (i * i * (seed + 3) + 7 * i + 11 * seed) % count).map(|id| id as u32).collect()
    }

    fn write(&self, name: &str, ids: &[u32]) -> PathBuf {
        let path = self.root.path().join(name);
        fs::write(&path, serde_json::to_vec(ids).unwrap()).unwrap();
        path
    }

    fn mixture(&self, sources: &[(&Path, f64)]) -> Recipe {
        let mut recipe = self.recipe.clone();
        let of = |&(file, weight): &(&Path, f64)| CalibrationSource {
            file: file.to_path_buf(),
            kind: CalibrationKind::of(file).unwrap(),
            field: "text".into(),
            sequences: 1000,
            seed: None,
            hold_out: 0,
            weight,
        };
        recipe.calibration.as_mut().unwrap().sources = sources.iter().map(of).collect();
        recipe
    }

    fn run(recipe: &Recipe) -> Result<Report> {
        let report = compress(recipe, &backend(), &CancelToken::new(), &Progress::new());
        let _ = fs::remove_dir_all(&recipe.out);
        report
    }

    /// Saves the statistics of a mixture.
    fn save(&self, name: &str, sources: &[(&Path, f64)]) -> (PathBuf, Report) {
        let path = self.root.path().join(name);
        let recipe = Recipe { save_statistics: Some(path.clone()), ..self.mixture(sources) };
        (path, Self::run(&recipe).unwrap())
    }
}

/// Every sum of a file of statistics, with the size that rounding is relative to.
fn sums(path: &Path, spec: &DecoderSpec) -> Vec<(String, Vec<f64>, Vec<f64>)> {
    let file = TensorFile::open(path).unwrap();
    let read = |name: &str| {
        let mut values = vec![0.0; file.shape(name).unwrap()[0]];
        file.read_f64s(name, 0, &mut values).unwrap();
        values
    };
    let mut places: Vec<&str> = vec!["attention_input", "attention_output"];
    let experts = ["experts.0.input", "experts.1.activation", "experts.3.input"];
    places.extend(if spec.experts.is_some() { &experts[..] } else { &["mlp_input", "mlp_activation"] });
    let mut found = Vec::new();
    for block in 0..spec.layers {
        for place in &places {
            let name = format!("{}.{place}", spec.block_name(block));
            let moments = read(&format!("{name}.second_moment"));
            let width = read(&format!("{name}.sums")).len();
            let mut diagonal = Vec::new();
            let mut at = 0;
            for i in 0..width {
                diagonal.push(moments[at]);
                at += width - i;
            }
            let rows = (0..width).flat_map(|i| (i..width).map(move |j| (i, j)));
            let sizes = rows.map(|(i, j)| (diagonal[i] * diagonal[j]).sqrt()).collect();
            found.push((name.clone(), moments, sizes));
            let absolute = read(&format!("{name}.absolute_sums"));
            found.push((name.clone(), read(&format!("{name}.sums")), absolute.clone()));
            found.push((name, absolute.clone(), absolute));
        }
    }
    found
}

/// Asserts that `found` is the weighted sum of `parts`, to `tolerance`; gives how many sums that were.
fn assert_sum(found: &Path, parts: &[(&Path, f64)], tolerance: f64, spec: &DecoderSpec) -> usize {
    let parts: Vec<_> = parts.iter().map(|&(path, weight)| (sums(path, spec), weight)).collect();
    let mut compared = 0;
    for (place, (name, values, sizes)) in sums(found, spec).iter().enumerate() {
        for (at, (value, size)) in values.iter().zip(sizes).enumerate() {
            let expected: f64 = parts.iter().map(|(part, weight)| weight * part[place].1[at]).sum();
            assert!((value - expected).abs() <= tolerance * size, "{name} {at}: {value:e} {expected:e}");
            compared += usize::from(*size > 0.0);
        }
    }
    compared
}

#[test]
fn the_statistics_of_a_mixture_are_the_weighted_sum_of_those_of_its_sources() {
    let experts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/families/qwen2-moe");
    for model in [assets("tinystories-656k"), experts] {
        let scene = Scene::new(&model);
        let spec = DecoderSpec::of(&Checkpoint::open(&model).unwrap()).unwrap();
        let (first, second) = (scene.ids(1, 20), scene.ids(2, 33));
        let (a, b) = (scene.write("a.json", &first), scene.write("b.json", &second));
        let joined = scene.write("joined.json", &[first, second].concat());
        let (of_a, _) = scene.save("a.safetensors", &[(&a, 1.0)]);
        let (of_b, _) = scene.save("b.safetensors", &[(&b, 1.0)]);
        let (of_joined, report) = scene.save("joined.safetensors", &[(&joined, 1.0)]);
        assert_eq!(report.summary.calibration_tokens, 53 * LENGTH as u64);
        assert!(assert_sum(&of_joined, &[(&of_a, 1.0), (&of_b, 1.0)], 1e-12, &spec) > 1000);

        let weights = (3.0, 0.25);
        let mixtures: [(&str, [&Path; 2]); 4] = [
            ("texts", [&a, &b]),
            ("statistics", [&of_a, &of_b]),
            ("text-and-statistics", [&a, &of_b]),
            ("statistics-and-text", [&of_a, &b]),
        ];
        for (name, [left, right]) in mixtures {
            let (mixed, report) =
                scene.save(&format!("{name}.mix.safetensors"), &[(left, weights.0), (right, weights.1)]);
            let compared = assert_sum(&mixed, &[(&of_a, weights.0), (&of_b, weights.1)], 1e-12, &spec);
            assert!(compared > 1000, "{name}: {compared}");
            let shares = &report.summary.calibration;
            let tokens: Vec<u64> = shares.iter().map(|share| share.tokens).collect();
            assert_eq!(tokens, [20 * LENGTH as u64, 33 * LENGTH as u64], "{name}");
            assert_eq!((shares[0].file.as_path(), shares[1].weight), (left, weights.1), "{name}");
            assert!((shares[0].share - 60.0 / (60.0 + 33.0 / 4.0)).abs() < 1e-12, "{name}: {shares:?}");
            assert_eq!(report.summary.calibration_tokens, 53 * LENGTH as u64, "{name}");

            // A mixture that was saved goes on counting as it did.
            let (_, report) = scene.save("again.safetensors", &[(&mixed, 2.0), (&a, 1.0)]);
            let share = report.summary.calibration[0].share;
            let counted = 2.0 * (60.0 + 33.0 / 4.0);
            assert!((share - counted / (counted + 20.0)).abs() < 1e-12, "{name}: {share}");
        }
    }
}

#[test]
fn the_order_of_sources_hardly_matters() {
    let scene = Scene::new(&assets("tinystories-656k"));
    let spec = DecoderSpec::of(&Checkpoint::open(&scene.recipe.source).unwrap()).unwrap();
    let files: Vec<PathBuf> = (0..3).map(|i| scene.write(&format!("{i}.json"), &scene.ids(i, 7 + 5 * i))).collect();
    let weights = [1.0, 0.3, 7.7];
    let of = |order: [usize; 3]| order.map(|i| (files[i].as_path(), weights[i]));
    let (straight, _) = scene.save("straight.safetensors", &of([0, 1, 2]));
    for order in [[2, 0, 1], [2, 1, 0]] {
        let (other, _) = scene.save("other.safetensors", &of(order));
        assert_sum(&other, &[(&straight, 1.0)], 1e-12, &spec);
        assert!(fs::read(&other).unwrap() != fs::read(&straight).unwrap());
    }
}

#[test]
fn only_quotients_of_weights_matter() {
    let scene = Scene::new(&assets("tinystories-656k"));
    let (a, b) = (scene.write("a.json", &scene.ids(1, 20)), scene.write("b.json", &scene.ids(2, 20)));
    let outcome = |weights: [f64; 2]| {
        let mut recipe = scene.mixture(&[(&a, weights[0]), (&b, weights[1])]);
        recipe.method = "gptq".into();
        recipe.eora = Some(EoraRecipe::uniform(4));
        recipe.calibration.as_mut().unwrap().sources.iter_mut().for_each(|source| source.hold_out = 2);
        let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        let files = ["model.safetensors", "eora/adapter_model.safetensors"];
        let bytes = files.map(|name| fs::read(recipe.out.join(name)).unwrap());
        fs::remove_dir_all(&recipe.out).unwrap();
        (bytes, serde_json::to_string(&report.linears).unwrap())
    };
    let expected = outcome([1.0, 0.5]);
    assert!(outcome([4.0, 2.0]) == expected, "powers of two round nothing");
    assert!(outcome([0.5, 1.0]) != expected);
}

#[test]
fn held_out_tokens_are_a_mixture_of_the_same_weights() {
    let scene = Scene::new(&assets("tinystories-656k"));
    let (first, second) = (scene.ids(1, 11), scene.ids(2, 9));
    let (a, b) = (scene.write("a.json", &first), scene.write("b.json", &second));
    let report = |sources: &[(&Path, f64)]| {
        let mut recipe = scene.mixture(sources);
        recipe.eora = Some(EoraRecipe::uniform(4));
        let sources = &mut recipe.calibration.as_mut().unwrap().sources;
        sources.iter_mut().for_each(|source| (source.sequences, source.hold_out) = (4, 2));
        let (checkpoint, calibration) =
            (Checkpoint::open(&recipe.source).unwrap(), recipe.calibration.as_ref().unwrap());
        let tokens = CalibrationTokens::read(calibration, &checkpoint, &DecoderSpec::of(&checkpoint).unwrap()).unwrap();
        (tokens, Scene::run(&recipe).unwrap())
    };
    let (tokens, _) = report(&[(&a, 1.0), (&b, 1.0)]);
    let sequence = |ids: &[u32], index: usize| ids[index * LENGTH..(index + 1) * LENGTH].to_vec();
    let held_out = [(&first, 4), (&second, 4), (&first, 5), (&second, 5)].map(|(ids, index)| sequence(ids, index));
    assert_eq!((tokens.seen(), tokens.held_out()), (8 * LENGTH, 4 * LENGTH));
    assert!(tokens.tokens()[..4 * LENGTH] == first[..4 * LENGTH]);
    assert!(tokens.tokens()[4 * LENGTH..8 * LENGTH] == second[..4 * LENGTH]);
    assert!(tokens.tokens()[8 * LENGTH..] == held_out.concat());

    // Odd ones go to the halves in turns.
    let mut recipe = scene.mixture(&[(&a, 1.0), (&b, 1.0)]);
    let sources = &mut recipe.calibration.as_mut().unwrap().sources;
    sources.iter_mut().for_each(|source| (source.sequences, source.hold_out) = (4, 3));
    let checkpoint = Checkpoint::open(&recipe.source).unwrap();
    let spec = DecoderSpec::of(&checkpoint).unwrap();
    let tokens = CalibrationTokens::read(recipe.calibration.as_ref().unwrap(), &checkpoint, &spec).unwrap();
    let halves = [(&first, 4), (&first, 5), (&second, 4), (&first, 6), (&second, 5), (&second, 6)];
    assert!(tokens.tokens()[8 * LENGTH..] == halves.map(|(ids, index)| sequence(ids, index)).concat());
    assert_eq!(CalibrationSource::usual_hold_out(128, 2048, 1), 1);
    assert_eq!(CalibrationSource::usual_hold_out(128, 2048, 5), 2);
    assert_eq!(CalibrationSource::usual_hold_out(128, 128, 1), 16);
    assert_eq!(CalibrationSource::usual_hold_out(128, 128, 3), 4);

    // The first Linears read the same inputs whatever is done to the model.
    let before = |sources: &[(&Path, f64)]| report(sources).1.linears[0].hold_out.unwrap().quantized;
    let (of_a, of_b) = (before(&[(&a, 1.0)]), before(&[(&b, 1.0)]));
    assert!((of_a / of_b - 1.0).abs() > 1e-3, "the texts differ");
    let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
    near(before(&[(&a, 1.0), (&b, 1e-6)]), of_a);
    near(before(&[(&a, 1e-6), (&b, 1.0)]), of_b);
}

#[test]
fn a_compensation_takes_a_mixture() {
    let scene = Scene::new(&assets("tinystories-656k"));
    let (a, b) = (scene.write("a.json", &scene.ids(1, 20)), scene.write("b.json", &scene.ids(2, 20)));
    let (of_b, _) = scene.save("b.safetensors", &[(&b, 1.0)]);
    let solve = |sources: &[(&Path, f64)]| {
        let mut mixture = scene.mixture(sources);
        mixture.out = scene.root.path().join("eora");
        let compressed = scene.root.path().join("compressed");
        if !compressed.exists() {
            let plain = Recipe { calibration: None, out: compressed.clone(), ..scene.recipe.clone() };
            compress(&plain, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        }
        let recipe = CompensateRecipe {
            original: mixture.source,
            compressed,
            out: mixture.out.clone(),
            calibration: mixture.calibration.unwrap(),
            eora: EoraRecipe::uniform(4),
            fresh: false,
            memory: None,
        };
        let report = compensate(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        fs::remove_dir_all(&mixture.out).unwrap();
        report
    };
    let (texts, mixed) = (solve(&[(&a, 1.0), (&b, 2.0)]), solve(&[(&a, 1.0), (&of_b, 2.0)]));
    assert_eq!(texts.summary.calibration.len(), 2);
    assert_eq!(mixed.summary.calibration[1].kind, CalibrationKind::Statistics);
    // The first Linears: inputs behind them depend on the factors.
    let (left, right) = (texts.linears[0].error.unwrap(), mixed.linears[0].error.unwrap());
    assert!((left.quantized / right.quantized - 1.0).abs() < 1e-9, "{left:?} {right:?}");
    let alone = solve(&[(&a, 1.0)]).linears[0].error.unwrap();
    assert!((left.quantized / alone.quantized - 1.0).abs() > 1e-6, "the second source counts");
}

#[test]
fn sources_that_do_not_fit_are_refused_by_name() {
    let scene = Scene::new(&assets("tinystories-656k"));
    let a = scene.write("a.json", &scene.ids(1, 20));
    let other = Scene::new(&assets("llama-7m"));
    let (of_other, _) = other.save("other.safetensors", &[(&other.write("o.json", &other.ids(1, 3)), 1.0)]);
    let (of_a, _) = scene.save("a.safetensors", &[(&a, 1.0)]);

    let error = Scene::run(&scene.mixture(&[(&of_a, 1.0), (&of_other, 1.0)])).unwrap_err();
    assert_eq!((error.code, error.subject), (ErrorCode::StatisticsMismatch, of_other.display().to_string()));
    // A copy that lacks the second moment of a Linear.
    let mut bytes = fs::read(&of_a).unwrap();
    let name = b"layers.1.mlp_input.second_moment";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    bytes[at + name.len() - 1] = b'x';
    let lacking = scene.root.path().join("lacking.safetensors");
    fs::write(&lacking, bytes).unwrap();
    let error = Scene::run(&scene.mixture(&[(&a, 1.0), (&lacking, 1.0)])).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::StatisticsMismatch, lacking.to_str().unwrap()));
    assert!(error.message.contains("layers.1.mlp_input.second_moment"), "{error}");

    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e7] {
        let error = Scene::run(&scene.mixture(&[(&a, 1.0), (&of_a, weight)])).unwrap_err();
        let found = (error.code, error.subject.as_str());
        assert_eq!(found, (ErrorCode::OptionInvalid, "calibration.sources[1].weight"), "{weight}");
    }
    let error = Scene::run(&scene.mixture(&[])).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "calibration.sources"));
    let mixed = scene.mixture(&[(&a, 1.0), (&of_a, 1.0)]);
    let error = Scene::run(&Recipe { method: "awq".into(), ..mixed.clone() }).unwrap_err();
    assert_eq!(error.subject, "calibration.sources[1].file", "{error}");
    let twice = scene.mixture(&[(&a, 1.0), (&of_a, 1.0), (&scene.root.path().join("./a.json"), 2.0)]);
    let error = Scene::run(&twice).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "calibration.sources[2].file"));
    let before = fs::read(&of_a).unwrap();
    let onto_source = Recipe { save_statistics: Some(scene.root.path().join("./a.safetensors")), ..mixed.clone() };
    let error = Scene::run(&onto_source).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "saveStatistics"), "{error}");
    assert!(fs::read(&of_a).unwrap() == before);
    let mut subset = mixed;
    subset.calibration.as_mut().unwrap().subset = true;
    assert_eq!(Scene::run(&subset).unwrap_err().subject, "calibration.subset");
}
