//! Which inputs a compensation is solved for: those of the deployed model, of the dense one, or pairs of both.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assets, backend, interrupted, recipe};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_compensate::{
    CompensationOptions, FactorPrecision, MixedInputs, RankBudget, compensate as solve, compensate_mixed,
};
use kintsugi_model::{Block, BlockWeights, DecoderSpec, TapPoint};
use kintsugi_pipeline::{
    ActivationPlace, AllocationRecipe, CalibrationKind, CalibrationStream, CalibrationTokens, CompensateRecipe,
    CompensationReport, EoraInputs, EoraRecipe, RankWeights, Recipe, compensate, compress, plan, plan_compensation,
};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, ElementType, LinearWeight, WeightMatrix};

const MODEL: &str = "tinystories-656k";

/// A job on a short text, of which two sequences are held out.
fn job(out: PathBuf, method: &str, inputs: Option<EoraInputs>) -> Recipe {
    let mut recipe = recipe(&assets(MODEL), &out, method, 3, 0);
    let calibration = recipe.calibration.as_mut().unwrap();
    calibration.length = 64;
    (calibration.sources[0].sequences, calibration.sources[0].hold_out) = (16, 2);
    recipe.eora = inputs.map(|inputs| EoraRecipe { inputs, ..EoraRecipe::uniform(4) });
    recipe
}

fn compressed(root: &Path, method: &str) -> PathBuf {
    let recipe = job(root.join(method), method, None);
    compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    recipe.out
}

fn compensation(root: &Path, name: &str, compressed: &Path, inputs: EoraInputs) -> CompensateRecipe {
    let Recipe { source, calibration, eora, .. } = job(root.join(name), "rtn", Some(inputs));
    CompensateRecipe {
        original: source,
        compressed: compressed.to_path_buf(),
        out: root.join(name),
        calibration: calibration.unwrap(),
        eora: eora.unwrap(),
        fresh: false,
        memory: None,
    }
}

fn run(recipe: &CompensateRecipe) -> Result<CompensationReport> {
    compensate(recipe, &backend(), &CancelToken::new(), &Progress::new())
}

const ALL: EoraInputs = EoraInputs::Mixed { mismatch: 1.0 };

/// Every file but the report, which has times in it.
fn bytes_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| !path.ends_with("report.json"));
    files.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

fn weights(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn every_linear_comes_closer_to_the_dense_outputs_than_without_the_drift() {
    let root = tempfile::tempdir().unwrap();
    let folder = compressed(root.path(), "rtn");
    let (backend, cancel, pool) = (backend(), CancelToken::new(), ThreadPool::global());
    let [original, deployed] = [assets(MODEL), folder].map(|path| Checkpoint::open(&path).unwrap());
    let [spec, deployed_spec] = [&original, &deployed].map(|checkpoint| DecoderSpec::of(checkpoint).unwrap());
    let mut calibration = job(PathBuf::new(), "rtn", None).calibration.unwrap();
    (calibration.sources[0].sequences, calibration.sources[0].hold_out) = (24, 4);
    let text = CalibrationTokens::read(&calibration, &original, &spec).unwrap();
    let mut stream = CalibrationStream::new(&deployed, &spec, &text, None).unwrap();
    let mut dense = CalibrationStream::of_dense_model(&original, &spec, &text, None).unwrap();
    let options = CompensationOptions {
        rank: 8,
        precision: FactorPrecision::Float(ElementType::F32),
        ..CompensationOptions::default()
    };
    let points = spec.tap_stages().concat();
    let mut lower = 0;
    for index in 0..spec.layers {
        let weights = BlockWeights::read(&original, &spec, index).unwrap();
        let rounded = BlockWeights::read(&deployed, &deployed_spec, index).unwrap();
        let [block, deployed_block] = [&weights, &rounded].map(|w| Block::prepare(&backend, &spec, index, w).unwrap());
        let blocks = (&deployed_block, &block);
        let (inputs, drift) = stream.capture_drift(&mut dense, &backend, blocks, &spec, &points, &cancel).unwrap();
        let alone = stream.capture(&backend, &deployed_block, &points, &cancel).unwrap();
        for (linear, (weight, compressed)) in spec.linears.iter().zip(weights.linears.iter().zip(&rounded.linears)) {
            let point = linear.slot.tap();
            let calibration = &inputs.statistics[&point];
            // The dense model beside it changes nothing of what is captured.
            assert!(*calibration == alone.statistics[&point] && inputs.held_out[&point] == alone.held_out[&point]);
            let drift_here = &drift.statistics[&point];
            assert_eq!(drift_here.tokens(), calibration.tokens());
            assert_eq!(drift_here.is_zero(), index == 0 && point == TapPoint::AttentionInput);
            let WeightMatrix::Dense(weight) = &weight.matrix else { unreachable!() };
            let hold_out = Some((&inputs.held_out[&point], &drift.held_out[&point]));
            let mixed = |share| {
                let inputs = MixedInputs { deployed: calibration, drift: drift_here, share, hold_out };
                compensate_mixed(weight, compressed, &inputs, None, &options, pool).unwrap()
            };
            let [none, all] = [0.0, 1.0].map(mixed);
            let plain = solve(weight, compressed, calibration, hold_out.map(|(x, _)| x), None, &options, pool).unwrap();
            assert!(none.error == plain.error && none.profile.hold_out == plain.profile.hold_out);
            let [before, after] = [&none, &all].map(|solved| solved.profile.dense_error(8).unwrap());
            let name = format!("{index} {}: {before:?} {after:?}", linear.name);
            assert!(after.compensated <= before.compensated * 1.001, "{name}");
            assert_eq!((after.quantized, after.hold_out.unwrap().tokens), (before.quantized, 128), "{name}");
            lower += usize::from(after.compensated < 0.999 * before.compensated);
        }
        stream.advance(&backend, &deployed_block, &cancel).unwrap();
        dense.advance(&backend, &block, &cancel).unwrap();
    }
    assert!(lower * 2 > spec.layers * spec.linears.len(), "{lower}");
}

#[test]
fn a_job_tells_the_errors_against_the_dense_model_and_none_of_the_mismatch_is_deployed() {
    let root = tempfile::tempdir().unwrap();
    let folder = compressed(root.path(), "rtn");
    let solve = |name: &str, inputs| {
        let recipe = compensation(root.path(), name, &folder, inputs);
        (run(&recipe).unwrap(), recipe.out)
    };
    let (plain, plain_out) = solve("deployed", EoraInputs::Deployed);
    let (none, none_out) = solve("none", EoraInputs::Mixed { mismatch: 0.0 });
    let (all, all_out) = solve("all", ALL);
    assert!(weights(&plain_out) == weights(&none_out) && weights(&plain_out) != weights(&all_out));
    assert!(plain.summary.compensation.unwrap().dense_error.is_none());
    let [none_mean, all_mean] = [&none, &all].map(|report| report.summary.compensation.as_ref().unwrap().dense_error);
    assert!(all_mean.unwrap().compensated < none_mean.unwrap().quantized);
    for ((plain, none), all) in plain.linears.iter().zip(&none.linears).zip(&all.linears) {
        assert!(plain.error == none.error && plain.hold_out == none.hold_out && plain.dense_error.is_none());
        let (without, with) = (none.dense_error.unwrap(), all.dense_error.unwrap());
        assert_eq!(with.hold_out.unwrap().tokens, 64);
        assert!(all.certificate.unwrap().holds);
        if plain.name.contains(".0.") {
            // No block before has changed anything.
            assert!(all.error == plain.error && with == without, "{}", plain.name);
            assert!((with.quantized / all.error.unwrap().quantized - 1.0).abs() < 1e-6, "{}", plain.name);
        } else {
            assert!(with.compensated < with.quantized, "{}: {with:?}", plain.name);
        }
    }
    let written = fs::read_to_string(all_out.join("report.json")).unwrap();
    let written: serde_json::Value = serde_json::from_str(&written).unwrap();
    assert_eq!(written["recipe"]["eora"]["inputs"], "mixed");
    assert_eq!(written["recipe"]["eora"]["mismatch"], 1.0);
    assert!(written["linears"][3]["denseError"]["holdOut"]["compensated"].is_f64());
}

#[test]
fn where_activations_lie_and_where_a_job_was_interrupted_change_no_bit() {
    let root = tempfile::tempdir().unwrap();
    let folder = compressed(root.path(), "rtn");
    let undisturbed = compensation(root.path(), "undisturbed", &folder, ALL);
    let expected = run(&undisturbed).unwrap();
    for (name, place) in [("memory", ActivationPlace::Memory), ("disk", ActivationPlace::Disk)] {
        let mut recipe = compensation(root.path(), name, &folder, ALL);
        recipe.calibration.activations = place;
        for blocks in [1, 2] {
            // On a busy machine the job may be over before it is looked at.
            let interrupted = (0..20).any(|_| match interrupt_after(&recipe, blocks) {
                Err(error) => error.code == ErrorCode::Cancelled,
                Ok(_) => fs::remove_dir_all(&recipe.out).is_err(),
            });
            assert!(interrupted, "{name}, {blocks}");
        }
        let partial = root.path().join(format!("{name}.partial"));
        let dense: Vec<_> = names_in(&partial).into_iter().filter(|name| name.contains("dense")).collect();
        assert!(!dense.is_empty(), "the activations of the dense model are kept");
        let other = compensation(root.path(), name, &folder, EoraInputs::Mixed { mismatch: 0.5 });
        assert_eq!(run(&other).unwrap_err().code, ErrorCode::ResumeMismatch);
        let report = run(&recipe).unwrap();
        assert!(bytes_of(&recipe.out) == bytes_of(&undisturbed.out), "{name}");
        let facts = |report: &CompensationReport| serde_json::to_string(&report.linears).unwrap();
        assert_eq!(facts(&report), facts(&expected), "{name}");
    }
}

/// Runs until `blocks` blocks are done, then cancels.
fn interrupt_after(recipe: &CompensateRecipe, blocks: u64) -> Result<CompensationReport> {
    interrupted(blocks, |cancel, progress| compensate(recipe, &backend(), cancel, progress))
}

fn names_in(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn both_streams_read_the_inputs_that_folded_scales_leave() {
    let root = tempfile::tempdir().unwrap();
    let inside = job(root.path().join("inside"), "awq", Some(ALL));
    let inside = compress(&inside, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    assert!(inside.linears.iter().all(|linear| linear.alpha.is_some()));
    let outside = run(&compensation(root.path(), "outside", &compressed(root.path(), "awq"), ALL)).unwrap();
    let dense = run(&compensation(root.path(), "dense", &root.path().join("awq"), EoraInputs::Dense)).unwrap();
    for (linears, exact) in [(&inside.linears, true), (&outside.linears, false)] {
        for linear in linears {
            let (error, dense) = (linear.error.unwrap(), linear.dense_error.unwrap());
            // Scales in one stream alone would be errors as large as the outputs.
            assert!(dense.quantized < 0.9 && dense.compensated < dense.quantized, "{}: {dense:?}", linear.name);
            if linear.name.contains(".0.") && exact {
                assert!((dense.quantized / error.quantized - 1.0).abs() < 1e-6, "{}: {dense:?}", linear.name);
            }
        }
    }
    assert!(dense.linears.iter().all(|linear| linear.error.unwrap().quantized < 0.9 && linear.dense_error.is_none()));
}

#[test]
fn tokens_are_paired_in_the_experts_that_both_models_send_them_to() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/families/qwen2-moe");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let (backend, cancel, spec) = (backend(), CancelToken::new(), DecoderSpec::of(&checkpoint).unwrap());
    let scratch = tempfile::tempdir().unwrap();
    let ids: Vec<u32> = (0..192).map(|at| (at * 37 + at * at) % 60).collect();
    let file = scratch.path().join("ids.json");
    fs::write(&file, serde_json::to_vec(&ids).unwrap()).unwrap();
    let mut calibration = job(PathBuf::new(), "rtn", None).calibration.unwrap();
    let source = &mut calibration.sources[0];
    (source.file, source.kind, source.sequences, source.hold_out) = (file, CalibrationKind::Tokens, 10, 2);
    calibration.length = 16;
    let text = CalibrationTokens::read(&calibration, &checkpoint, &spec).unwrap();
    let streams = || {
        let deployed = CalibrationStream::new(&checkpoint, &spec, &text, None).unwrap();
        (deployed, CalibrationStream::of_dense_model(&checkpoint, &spec, &text, None).unwrap())
    };
    let original = BlockWeights::read(&checkpoint, &spec, 0).unwrap();
    let scaled = |weight: &LinearWeight, factor: f32| {
        let WeightMatrix::Dense(matrix) = &weight.matrix else { unreachable!() };
        let values = matrix.to_f32().iter().map(|value| factor * value).collect();
        let matrix = DenseMatrix::from_f32(matrix.rows(), matrix.columns(), values);
        LinearWeight { matrix: WeightMatrix::Dense(matrix), ..weight.clone() }
    };
    let points = spec.tap_stages().concat();
    let experts: Vec<TapPoint> =
        points.iter().copied().filter(|point| matches!(point, TapPoint::ExpertInput(_))).collect();
    assert!(experts.len() > 3);
    let capture = |deployed_weights: &BlockWeights| {
        let [block, deployed] =
            [&original, deployed_weights].map(|weights| Block::prepare(&backend, &spec, 0, weights).unwrap());
        let (mut stream, mut dense) = streams();
        let (captured, drift) =
            stream.capture_drift(&mut dense, &backend, (&deployed, &block), &spec, &points, &cancel).unwrap();
        (captured, drift, deployed, block)
    };

    // Another router: tokens go to other experts, and what both models send to one is the same input.
    let router = scaled(original.router.as_ref().unwrap(), -1.0);
    let rerouted = BlockWeights { router: Some(router), ..original.clone() };
    let (captured, drift, _, _) = capture(&rerouted);
    let (own, _, _, _) = capture(&original);
    let tokens = |point: &TapPoint, of: &kintsugi_pipeline::CapturedInputs| {
        of.statistics.get(point).map_or(0, |statistics| statistics.tokens())
    };
    assert!(experts.iter().any(|point| tokens(point, &captured) != tokens(point, &own)), "the routes differ");
    for (point, statistics) in &captured.statistics {
        let found = &drift.statistics[point];
        assert_eq!((found.tokens(), found.is_zero()), (statistics.tokens(), true), "{point:?}");
    }
    for (point, rows) in &captured.held_out {
        assert_eq!(drift.held_out[point].tokens(), rows.tokens());
    }

    // Another attention: inputs of experts drift, and a token that only one model sends there does not count.
    let place = spec.linears.iter().position(|linear| linear.slot.tap() == TapPoint::AttentionOutput).unwrap();
    let mut moved = original.clone();
    moved.linears[place] = scaled(&original.linears[place], 1.5);
    let (captured, drift, _, _) = capture(&moved);
    assert!(experts.iter().filter_map(|point| drift.statistics.get(point)).any(|drift| !drift.is_zero()));
    assert!(drift.statistics.keys().eq(captured.statistics.keys()));
    moved.router = rerouted.router;
    let (_, apart, _, _) = capture(&moved);
    // Some experts share tokens with their dense selves in neither case: less drift than all tokens would have.
    let total = |drift: &kintsugi_pipeline::CapturedDrift| -> f64 {
        experts
            .iter()
            .filter_map(|point| drift.statistics.get(point))
            .map(|d| d.square().diagonal().iter().sum::<f64>())
            .sum()
    };
    assert!(total(&apart) < total(&drift), "{} {}", total(&apart), total(&drift));
}

#[test]
fn dense_inputs_are_those_of_the_original_whatever_was_compressed() {
    let root = tempfile::tempdir().unwrap();
    let [rtn, gptq] = ["rtn", "gptq"].map(|method| compressed(root.path(), method));
    let first = run(&compensation(root.path(), "first", &rtn, EoraInputs::Dense)).unwrap();
    let deployed = run(&compensation(root.path(), "deployed", &rtn, EoraInputs::Deployed)).unwrap();
    let apart = first.linears.iter().zip(&deployed.linears).filter(|(a, b)| a.error != b.error).count();
    assert!(apart > 0 && first.linears.iter().all(|linear| linear.hold_out.is_some()));

    // Statistics of dense inputs are those of any job that takes dense inputs, and of no other.
    let statistics = |method: &str, inputs| {
        let path = root.path().join(format!("{method}-{inputs:?}.safetensors"));
        let recipe = job(root.path().join(format!("{method}-{inputs:?}")), method, Some(inputs));
        let recipe = Recipe { save_statistics: Some(path.clone()), ..recipe };
        compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        path
    };
    let from = |file: &Path, name: &str, inputs| {
        let mut recipe = compensation(root.path(), name, &gptq, inputs);
        recipe.calibration.sources[0].file = file.to_path_buf();
        recipe.calibration.sources[0].kind = CalibrationKind::of(file).unwrap();
        recipe
    };
    let [dense, again, of_deployed] = [
        statistics("rtn", EoraInputs::Dense),
        statistics("gptq", EoraInputs::Dense),
        statistics("rtn", EoraInputs::Deployed),
    ];
    let text = compensation(root.path(), "text", &gptq, EoraInputs::Dense);
    run(&text).unwrap();
    for (name, file) in [("one", &dense), ("two", &again)] {
        let recipe = from(file, name, EoraInputs::Dense);
        run(&recipe).unwrap();
        assert!(weights(&recipe.out) == weights(&text.out), "{name}");
    }
    for (file, inputs, hint) in [
        (&dense, EoraInputs::Deployed, "Use eora.inputs 'dense'"),
        (&of_deployed, EoraInputs::Dense, "Take the statistics"),
    ] {
        let error = run(&from(file, "refused", inputs)).unwrap_err();
        assert_eq!(error.code, ErrorCode::StatisticsMismatch);
        assert!(error.hint.starts_with(hint), "{error:?}");
    }
    let error = run(&from(&of_deployed, "refused", ALL)).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "eora.inputs"));
    assert!(!root.path().join("refused").exists() && !root.path().join("refused.partial").exists());
}

#[test]
fn a_budget_is_divided_with_errors_of_the_ranks_that_are_given() {
    let root = tempfile::tempdir().unwrap();
    let folder = compressed(root.path(), "rtn");
    let mut recipe = compensation(root.path(), "divided", &folder, ALL);
    let (budget, weights) = (RankBudget::MeanRank(4.0), RankWeights::Outputs);
    recipe.eora = EoraRecipe {
        rank: 12,
        allocation: Some(AllocationRecipe { budget, min_rank: 0, multiple: 4, weights }),
        ..recipe.eora
    };
    let report = run(&recipe).unwrap();
    let chosen = report.summary.compensation.unwrap().allocation.unwrap().chosen;
    for linear in &report.linears {
        let error = linear.dense_error.unwrap();
        assert!(linear.rank > 0 || error.quantized == error.compensated, "{chosen} {}: {error:?}", linear.name);
    }
}

#[test]
fn both_models_are_in_the_plan_and_a_share_that_is_none_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let of = |inputs| plan(&job(root.path().join("out"), "rtn", Some(inputs))).unwrap();
    let [deployed, dense, mixed] = [EoraInputs::Deployed, EoraInputs::Dense, ALL].map(of);
    assert_eq!(deployed.memory.peak_bytes, dense.memory.peak_bytes);
    let (one, two) = (deployed.memory.parts, mixed.memory.parts);
    assert_eq!((2 * one.activations, 2 * one.prepared), (two.activations, two.prepared));
    assert!(two.statistics > 2 * one.statistics && two.solver > one.solver && two.forward > one.forward);
    assert!(mixed.disk.needed_bytes > deployed.disk.needed_bytes);
    for mismatch in [-0.5, 1.5, f64::NAN] {
        let recipe = compensation(root.path(), "out", root.path(), EoraInputs::Mixed { mismatch });
        let error = plan_compensation(&recipe).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "eora.mismatch"));
    }
    let mut recipe = compensation(root.path(), "out", root.path(), EoraInputs::Dense);
    recipe.calibration.subset = true;
    let error = plan_compensation(&recipe).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "calibration.subset"));
    let mut recipe = compensation(root.path(), "out", root.path(), ALL);
    recipe.eora.affine = true;
    let error = plan_compensation(&recipe).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "eora.affine"));
}
