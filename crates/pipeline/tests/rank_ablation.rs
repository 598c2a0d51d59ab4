//! Ranks that are divided by what the model is without some of its factors: costs are those of the finished checkpoint
//! with these factors taken away, in every family; budgets are kept, and interrupted jobs end in the same bytes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assets, backend, bytes_of, disturbed, recipe};
use kintsugi_checkpoint::{Checkpoint, read_adapter, write_adapter};
use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_model::{Batch, CompensationChoice, CpuBackend, DecoderSpec, Model, Session};
use kintsugi_pipeline::{
    AblatedGroup, AblationReport, AllocationRecipe, AllocationReport, CalibrationKind, CalibrationTokens,
    CompensateRecipe, LinearOverride, RankBudget, RankWeights, Recipe, Report, compensate, compress, plan,
};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, ProgressSnapshot, Result};
use serde_json::Value;

fn by_ablation(mean_rank: f64, multiple: usize) -> Option<AllocationRecipe> {
    let budget = RankBudget::MeanRank(mean_rank);
    Some(AllocationRecipe { budget, min_rank: 0, multiple, weights: RankWeights::Ablation })
}

/// A compression of `llama-7m` to two bits, on a short text of which four sequences are held out.
fn small(root: &Path, method: &str) -> Recipe {
    let mut recipe = recipe(&assets("llama-7m"), &root.join("out"), method, 2, 32);
    let calibration = recipe.calibration.as_mut().unwrap();
    calibration.length = 128;
    (calibration.sources[0].sequences, calibration.sources[0].hold_out) = (4, 4);
    recipe.eora.as_mut().unwrap().allocation = by_ablation(8.0, 4);
    recipe
}

fn run(recipe: &Recipe) -> Report {
    compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap()
}

fn allocation(report: &Report) -> AllocationReport {
    report.summary.compensation.clone().unwrap().allocation.unwrap()
}

fn ablation(report: &Report) -> AblationReport {
    allocation(report).ablation.unwrap()
}

/// The logits of a checkpoint for sequences of tokens, with the factors in a folder.
fn logits(checkpoint: &Checkpoint, factors: PathBuf, tokens: &[u32], length: usize) -> Vec<f32> {
    let choice = CompensationChoice { own: false, folder: Some(factors), rank: None };
    let model = Model::<CpuBackend>::load(checkpoint, backend(), &choice, &CancelToken::new(), &Progress::new());
    let model = model.unwrap();
    let mut session = Session::new(&model).unwrap();
    let mut all = Vec::new();
    for sequence in tokens.chunks(length) {
        let mut batch = Batch::new();
        batch.push(length, 0, (0..length.div_ceil(PAGE_POSITIONS) as u32).collect(), None);
        model.forward(&mut session, sequence, &batch, &CancelToken::new()).unwrap();
        all.extend_from_slice(&model.logits(&mut session, 0..length).unwrap());
    }
    all
}

/// The mean of `Σ p ln(p / q)` over rows of so many logits.
fn mean_divergence(p: &[f32], q: &[f32], vocabulary: usize) -> f64 {
    let distribution = |logits: &[f32]| {
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        logits.iter().map(|&logit| f64::from(logit).exp() / total).collect::<Vec<f64>>()
    };
    let rows = p.chunks(vocabulary).zip(q.chunks(vocabulary));
    let of_row = |(p, q): (&[f32], &[f32])| {
        let (p, q) = (distribution(p), distribution(q));
        p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>()
    };
    rows.map(of_row).sum::<f64>() / (p.len() / vocabulary) as f64
}

/// Compares all costs with those of the checkpoint that was written, whose factors have their largest rank.
fn check_costs(recipe: &Recipe, found: &AblationReport, sample: &[u32], length: usize) {
    let name = recipe.source.display();
    let checkpoint = Checkpoint::open(&recipe.out).unwrap();
    let spec = DecoderSpec::of(&checkpoint).unwrap();
    assert_eq!(found.tokens, sample.len(), "{name}");
    let all = read_adapter(&recipe.out.join("eora")).unwrap();
    let whole = logits(&checkpoint, recipe.out.join("eora"), sample, length);
    let cost_without = |left_out: &dyn Fn(&str) -> bool| {
        let folder = tempfile::tempdir().unwrap();
        let mut rest = all.clone();
        rest.linears.retain(|linear, _| !left_out(linear));
        assert!(rest.linears.len() < all.linears.len());
        write_adapter(&folder.path().join("rest"), &rest, "base").unwrap();
        let without = logits(&checkpoint, folder.path().join("rest"), sample, length);
        mean_divergence(&whole, &without, spec.vocabulary_size)
    };
    let check = |group: &AblatedGroup, expected: f64| {
        assert!(
            (group.cost - expected).abs() <= 1e-3 * expected + 1e-9,
            "{name}: {} costs {}, expected {expected}",
            group.name,
            group.cost
        );
        assert!(group.factor.is_finite() && group.factor > 0.0, "{name}: {group:?}");
    };
    for group in &found.types {
        let pattern = |name| LinearOverride { linears: format!("*.{name}"), bits: None, group_size: None };
        let patterns: Vec<LinearOverride> = group.name.split(" + ").map(pattern).collect();
        check(group, cost_without(&|linear| patterns.iter().any(|pattern| pattern.matches(linear))));
    }
    assert_eq!(found.bands.len(), spec.layers.min(4));
    for (band, group) in found.bands.iter().enumerate() {
        let blocks = (0..spec.layers).filter(|block| block * found.bands.len() / spec.layers == band);
        let names: Vec<String> = blocks.map(|block| format!("{}.", spec.block_name(block))).collect();
        let belongs = |linear: &str| names.iter().any(|name| linear.starts_with(name));
        check(group, cost_without(&belongs));
    }
}

/// Linears that share an A have the same one, and a number of others as their family says.
fn check_groups(recipe: &Recipe, report: &Report) {
    let adapter = read_adapter(&recipe.out.join("eora")).unwrap();
    let grouped = recipe.eora.as_ref().unwrap().grouped;
    for linear in &report.linears {
        let error = linear.error.map(|error| error.compensated <= error.quantized);
        assert!(error != Some(false), "{linear:?}");
        let Some(entry) = adapter.linears.get(&linear.name) else { continue };
        for other in &linear.shared_with {
            assert!(grouped && adapter.linears[other].factors.a() == entry.factors.a(), "{} {other}", linear.name);
        }
        let has = |name: &str| linear.name.ends_with(name);
        let expected = match grouped {
            true if has(".q_proj") || has(".k_proj") || has(".v_proj") => 2,
            true if has(".gate_proj") || has(".up_proj") || has(".w1") || has(".w3") => 1,
            _ => 0,
        };
        assert_eq!(linear.shared_with.len(), expected, "{}", linear.name);
    }
}

#[test]
fn costs_are_those_of_the_finished_model_without_these_factors() {
    let root = tempfile::tempdir().unwrap();
    let mut recipe = small(root.path(), "rtn");
    let settings = recipe.calibration.as_mut().unwrap();
    // Of 16 sequences the first half decides.
    (settings.sources[0].hold_out, settings.length) = (16, 32);
    let eora = recipe.eora.as_mut().unwrap();
    eora.rank = 8;
    eora.allocation = by_ablation(8.0, 4);
    let report = run(&recipe);
    let found = ablation(&report);
    assert!(found.held_out && found.fitted, "{found:?}");
    let source = Checkpoint::open(&recipe.source).unwrap();
    let spec = DecoderSpec::of(&source).unwrap();
    let read = CalibrationTokens::read(recipe.calibration.as_ref().unwrap(), &source, &spec).unwrap();
    let first = read.seen();
    check_costs(&recipe, &found, &read.tokens()[first..first + 8 * 32], 32);
    assert!(found.types.iter().chain(&found.bands).all(|group| group.cost > 0.0), "{found:?}");
    // What the weights promise: they explain the costs of types, in their proportions.
    let promised = |group: &AblatedGroup| group.factor * group.removed / group.cost;
    let first = promised(&found.types[0]);
    for group in &found.types {
        // Bands that differ within a type make this an approximation.
        assert!((promised(group) / first - 1.0).abs() < 0.7, "{found:?}");
    }
}

#[test]
fn every_family_is_ablated_with_shared_as_and_without() {
    let scratch = tempfile::tempdir().unwrap();
    let folders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/families");
    let mut folders: Vec<PathBuf> = fs::read_dir(folders).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let ids: Vec<u32> = (0..320u32).map(|at| (at * 37 + at * at) % 60).collect();
    let file = scratch.path().join("ids.json");
    fs::write(&file, serde_json::to_vec(&ids).unwrap()).unwrap();
    for (source, grouped) in folders.iter().flat_map(|source| [(source, false), (source, true)]) {
        let mut recipe = recipe(source, &scratch.path().join("out"), "rtn", 3, 3);
        recipe.group_size = Some(16);
        let settings = recipe.calibration.as_mut().unwrap();
        let text = &mut settings.sources[0];
        (text.file, text.kind, text.sequences) = (file.clone(), CalibrationKind::Tokens, 20);
        settings.length = 16;
        let eora = recipe.eora.as_mut().unwrap();
        (eora.allocation, eora.grouped) = (by_ablation(3.0, 1), grouped);
        let report = run(&recipe);
        check_groups(&recipe, &report);
        let found = ablation(&report);
        assert!(!found.held_out, "nothing is held out");
        let costs = found.types.iter().chain(&found.bands).map(|group| group.cost);
        assert!(costs.clone().filter(|&cost| cost > 1e-8).count() * 2 > costs.count(), "{source:?}: {found:?}");
        check_costs(&recipe, &found, &ids, 16);
        fs::remove_dir_all(&recipe.out).unwrap();
    }
}

#[test]
fn a_compression_and_a_compensation_of_its_result_divide_alike_and_keep_the_budget() {
    let root = tempfile::tempdir().unwrap();
    let recipe = small(root.path(), "rtn");
    let together = run(&recipe);
    let uniform = run(&Recipe {
        out: root.path().join("uniform"),
        eora: Some(kintsugi_pipeline::EoraRecipe::uniform(8)),
        ..recipe.clone()
    });
    let linears = |report: &Report| report.linears.iter().map(|linear| linear.stored_bits).sum::<u64>();
    assert!(linears(&together) <= linears(&uniform));
    let found = allocation(&together);
    assert!(found.ablation.as_ref().unwrap().fitted && found.uniform_rank == 8, "{found:?}");
    let ranks: Vec<usize> = together.linears.iter().map(|linear| linear.rank).collect();
    assert_eq!(found.chosen == "allocated", ranks.iter().any(|&rank| rank != 8), "{ranks:?}");

    let job = CompensateRecipe {
        original: recipe.source.clone(),
        compressed: recipe.out.clone(),
        out: root.path().join("eora"),
        calibration: recipe.calibration.clone().unwrap(),
        eora: recipe.eora.clone().unwrap(),
        fresh: false,
        memory: None,
    };
    let there = root.path().join("factors");
    fs::rename(recipe.out.join("eora"), &there).unwrap();
    let outside = compensate(&job, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    let weights = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert!(weights(&there) == weights(&job.out));
    assert!(outside.summary.compensation.unwrap().allocation.unwrap() == found);
}

/// Runs until the progress is so far in the ablations, then cancels.
fn interrupt(recipe: &Recipe, blocks: u64) -> Result<Report> {
    let there = |reading: &ProgressSnapshot| reading.phase == "weigh" && reading.done >= blocks;
    disturbed(there, CancelToken::cancel, |cancel, progress| compress(recipe, &backend(), cancel, progress))
}

#[test]
fn a_job_that_is_interrupted_in_its_ablations_ends_in_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let recipe = small(root.path(), "gptq");
    let report = run(&recipe);
    let undisturbed = bytes_of(&recipe.out);
    let partial = recipe.out.with_file_name("out.partial");
    for blocks in [0, 5] {
        fs::remove_dir_all(&recipe.out).unwrap();
        assert_eq!(interrupt(&recipe, blocks).unwrap_err().code, ErrorCode::Cancelled);
        let ledger = fs::read_to_string(partial.join("ledger.jsonl")).unwrap();
        assert_eq!(ledger.lines().count(), 1 + 1 + 8, "identity, what is outside of the blocks, blocks");
        let resumed = run(&recipe);
        assert!(bytes_of(&recipe.out) == undisturbed, "after {blocks} blocks");
        let facts = |report: &Report| serde_json::to_string(&report.linears).unwrap();
        assert!(facts(&resumed) == facts(&report));
        assert!(allocation(&resumed) == allocation(&report));
    }
}

#[test]
fn costs_of_another_model_in_the_ledger_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let recipe = small(root.path(), "rtn");
    interrupt(&recipe, 2).unwrap_err();
    let ledger = recipe.out.with_file_name("out.partial").join("ledger.jsonl");
    let lines = fs::read_to_string(&ledger).unwrap();
    let unit = |types: &str| {
        format!(
            r#"{{"part":null,"linears":[],"profiles":[],"activations":null,"factors":null,"ablation":{{"tokens":9,"heldOut":true,"types":{types},"bands":[1,1,1,1]}},"seconds":1,"phases":{{"read":0,"calibrate":0,"compress":0,"compensate":0,"write":0}}}}"#
        )
    };
    let with = |types: &str| fs::write(&ledger, format!("{lines}{}\n", unit(types))).unwrap();
    with("[1,1]");
    let error = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ResumeMismatch, "ledger"));
    assert!(error.hint.contains("--fresh"), "{error}");
    // What no job can have measured is measured again; what one can is taken.
    with("[1,1,1,-1,1,1,1]");
    let report = run(&recipe);
    assert!(ablation(&report).tokens == 256, "{:?}", ablation(&report));
}

#[test]
fn units_that_stand_where_no_job_records_them_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let recipe = small(root.path(), "rtn");
    interrupt(&recipe, 2).unwrap_err();
    let ledger = recipe.out.with_file_name("out.partial").join("ledger.jsonl");
    let whole = fs::read_to_string(&ledger).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    assert_eq!(lines.len(), 10, "identity, what is outside of the blocks, blocks");
    let costs: Value = serde_json::from_str(
        r#"{ "tokens": 9, "heldOut": true, "types": [9, 9, 9, 9, 9, 9, 9], "bands": [1, 1, 1, 1] }"#,
    )
    .unwrap();
    let with_costs = |line: &str| {
        let mut unit: Value = serde_json::from_str(line).unwrap();
        unit["ablation"] = costs.clone();
        unit.to_string()
    };
    let alone = {
        let mut unit: Value = serde_json::from_str(lines[1]).unwrap();
        unit["part"] = Value::Null;
        with_costs(&unit.to_string())
    };
    let changed = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines: Vec<String> = lines.iter().map(|&line| line.to_owned()).collect();
        change(&mut lines);
        lines.into_iter().map(|line| line + "\n").collect::<String>()
    };
    for (what, text, place) in [
        ("costs in the middle", changed(&|lines| lines.insert(4, alone.clone())), 4),
        ("costs with a block", changed(&|lines| lines[3] = with_costs(lines[3].as_str())), 3),
        ("costs with the last block", changed(&|lines| lines[9] = with_costs(lines[9].as_str())), 9),
        ("costs before the blocks", changed(&|lines| lines[1] = with_costs(lines[1].as_str())), 1),
        ("costs twice", changed(&|lines| lines.extend([alone.clone(), alone.clone()])), 11),
        ("blocks in another order", changed(&|lines| lines.swap(5, 6)), 5),
        ("a block twice", changed(&|lines| lines[6] = lines[5].clone()), 6),
        ("a block too many", changed(&|lines| lines.push(lines[9].clone())), 10),
        ("no block is the first", changed(&|lines| drop(lines.remove(1))), 1),
    ] {
        fs::write(&ledger, &text).unwrap();
        let error = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ResumeMismatch, "ledger"), "{what}: {error}");
        assert!(error.message.contains(&format!("unit {place} ")) && error.hint.contains("--fresh"), "{what}: {error}");
        assert!(fs::read_to_string(&ledger).unwrap() == text, "{what}: it is for the user to discard");
    }
    fs::write(&ledger, &whole).unwrap();
    run(&recipe);
}

#[test]
fn statistics_alone_cannot_be_ablated_and_the_plan_knows_the_memory() {
    let root = tempfile::tempdir().unwrap();
    let recipe = small(root.path(), "rtn");
    let (asked, mut others) = (plan(&recipe).unwrap(), recipe.clone());
    others.eora.as_mut().unwrap().allocation.as_mut().unwrap().weights = RankWeights::Outputs;
    assert!(asked.memory.parts.ablation > 0 && plan(&others).unwrap().memory.parts.ablation == 0);
    let mut blind = recipe;
    blind.calibration.as_mut().unwrap().sources[0].kind = CalibrationKind::Statistics;
    let error = plan(&blind).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "eora.rankWeights"));
    assert!(!error.hint.is_empty());
}
