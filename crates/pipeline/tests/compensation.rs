//! Compensation of checkpoints that are compressed already: the same factors as a compression solves itself, from any
//! format, resumed to the same bytes, divided by a budget, in codes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{assets, backend, interrupted, load_with, recipe};
use kintsugi_checkpoint::read_adapter;
use kintsugi_compensate::RankBudget;
use kintsugi_model::CompensationChoice;
use kintsugi_pipeline::{
    AllocationRecipe, CalibrationKind, CompensateRecipe, CompensationReport, ConvertRecipe, EoraRecipe, RankWeights,
    Recipe, compensate, compress, convert, plan_compensation,
};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, Result};

/// A compression of `llama-7m` on a short text, of which one sequence is held out.
fn compression(root: &Path, method: &str, bits: u8, rank: usize) -> Recipe {
    let out = root.join(format!("{method}-{bits}-{rank}"));
    let mut recipe = recipe(&assets("llama-7m"), &out, method, bits, rank);
    let calibration = recipe.calibration.as_mut().unwrap();
    calibration.length = 128;
    (calibration.sources[0].sequences, calibration.sources[0].hold_out) = (4, 2);
    recipe
}

fn compressed(root: &Path, method: &str, bits: u8, rank: usize) -> PathBuf {
    let recipe = compression(root, method, bits, rank);
    compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    recipe.out
}

fn job(root: &Path, compressed: PathBuf, rank: usize) -> CompensateRecipe {
    CompensateRecipe {
        original: assets("llama-7m"),
        compressed,
        out: root.join("eora"),
        calibration: compression(root, "rtn", 4, 0).calibration.unwrap(),
        eora: EoraRecipe::uniform(rank),
        fresh: false,
        memory: None,
    }
}

fn run(recipe: &CompensateRecipe) -> Result<CompensationReport> {
    compensate(recipe, &backend(), &CancelToken::new(), &Progress::new())
}

/// Every file but the report, which has times in it.
fn bytes_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| !path.ends_with("report.json"));
    files.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

#[test]
fn the_factors_are_those_that_the_compression_itself_would_have_solved() {
    let root = tempfile::tempdir().unwrap();
    // GPTQ would round the later blocks otherwise: it sees the activations of a model without compensation.
    let together = compressed(root.path(), "rtn", 3, 8);
    let recipe = job(root.path(), compressed(root.path(), "rtn", 3, 0), 8);
    let plan = plan_compensation(&recipe).unwrap();
    let report = run(&recipe).unwrap();
    let weights = |folder: PathBuf| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert!(weights(together.join("eora")) == weights(recipe.out.clone()));
    assert_eq!(plan.bytes, report.summary.bytes);
    let summary = report.summary.compensation.unwrap();
    assert_eq!((summary.certified, summary.uncertified), (report.linears.len(), 0));
    assert!(summary.worst_ratio.unwrap() < 1.01, "{summary:?}");
    let held = summary.hold_out.unwrap();
    assert!(held.compensated < held.quantized);
    assert_eq!(report.summary.calibration_tokens, 4 * 128, "what is held out does not count");
    for linear in &report.linears {
        let error = linear.error.unwrap();
        assert!(error.bound <= error.compensated && error.compensated < error.quantized, "{linear:?}");
        assert_eq!((linear.rank, linear.hold_out.unwrap().tokens), (8, 128));
    }

    // Beside the checkpoint it does what eora/ does in it; less of it does less.
    let text = fs::read_to_string(assets("text").join("eval-wikitext.txt")).unwrap();
    let perplexity = |folder: &Path, choice: CompensationChoice| {
        let model = load_with(folder, choice);
        model.perplexity(&text[..20_000], 128, None, &CancelToken::new(), &Progress::new()).unwrap().perplexity
    };
    let part = |rank| CompensationChoice { folder: Some(recipe.out.clone()), rank: Some(rank), ..Default::default() };
    let fused = perplexity(&together, CompensationChoice::default());
    assert_eq!(perplexity(&recipe.compressed, part(8)), fused);
    let none = perplexity(&recipe.compressed, CompensationChoice::default());
    let some = perplexity(&recipe.compressed, part(2));
    assert!(fused < some && some < none, "{fused} {some} {none}");
    assert_eq!(perplexity(&together, CompensationChoice { own: false, ..part(0) }), none);
}

#[test]
fn an_interrupted_job_ends_in_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let recipe = job(root.path(), compressed(root.path(), "rtn", 3, 0), 4);
    let undisturbed = CompensateRecipe { out: root.path().join("undisturbed"), ..recipe.clone() };
    let whole = run(&undisturbed).unwrap();
    let partial = root.path().join("eora.partial");
    for blocks in [1, 3] {
        let outcome = interrupted(blocks, |cancel, progress| compensate(&recipe, &backend(), cancel, progress));
        assert_eq!(outcome.unwrap_err().code, ErrorCode::Cancelled);
        assert!(partial.is_dir());
    }
    let other = CompensateRecipe { eora: EoraRecipe::uniform(5), ..recipe.clone() };
    let error = run(&other).unwrap_err();
    assert_eq!(error.code, ErrorCode::ResumeMismatch);
    assert!(error.message.contains("eora.rank"), "{error}");
    let report = run(&recipe).unwrap();
    assert!(!partial.exists());
    assert!(bytes_of(&recipe.out) == bytes_of(&undisturbed.out));
    let facts = |report: &CompensationReport| serde_json::to_string(&report.linears).unwrap();
    assert_eq!(facts(&report), facts(&whole));
}

#[test]
fn units_that_stand_where_no_job_records_them_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let recipe = job(root.path(), compressed(root.path(), "rtn", 3, 0), 4);
    interrupted(3, |cancel, progress| compensate(&recipe, &backend(), cancel, progress)).unwrap_err();
    let ledger = root.path().join("eora.partial/ledger.jsonl");
    let whole = fs::read_to_string(&ledger).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    assert!(lines.len() >= 4, "identity and blocks");
    let outside = {
        let mut unit: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        unit["linears"] = serde_json::json!([]);
        unit.to_string()
    };
    let (first, second) = ("the Linears of model.layers.0", "the Linears of model.layers.1");
    for (what, lines, place, expected) in [
        ("what is outside of the blocks", vec![lines[0], &outside, lines[1]], 1, first),
        ("no block is the first", vec![lines[0], lines[2], lines[3]], 1, first),
        ("a block twice", vec![lines[0], lines[1], lines[1]], 2, second),
        ("blocks in another order", vec![lines[0], lines[1], lines[3], lines[2]], 2, second),
    ] {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(&ledger, &text).unwrap();
        let error = run(&recipe).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ResumeMismatch, "ledger"), "{what}: {error}");
        assert!(error.message.contains(&format!("unit {place} ")), "{what}: {error}");
        assert!(error.message.ends_with(expected) && error.hint.contains("--fresh"), "{what}: {error}");
        assert!(fs::read_to_string(&ledger).unwrap() == text, "{what}: it is for the user to discard");
    }
    fs::write(&ledger, &whole).unwrap();
    run(&recipe).unwrap();
}

#[test]
fn scales_that_awq_has_folded_into_a_checkpoint_are_no_error() {
    let root = tempfile::tempdir().unwrap();
    let awq = compression(root.path(), "awq", 3, 4);
    let report = compress(&awq, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    // Without what that job has solved, the same is to be found from outside.
    fs::remove_dir_all(awq.out.join("eora")).unwrap();
    let found = run(&job(root.path(), awq.out.clone(), 4)).unwrap();
    for (inside, outside) in report.linears.iter().zip(&found.linears) {
        let (inside_error, outside_error) = (inside.error.unwrap(), outside.error.unwrap());
        for (a, b) in
            [(inside_error.quantized, outside_error.quantized), (inside_error.compensated, outside_error.compensated)]
        {
            assert!((a / b - 1.0).abs() < 0.15, "{}: {inside_error:?} {outside_error:?}", inside.name);
        }
    }
    let mean = |errors: &kintsugi_pipeline::MeanError| (errors.quantized, errors.compensated);
    let (inside, outside) = (report.summary.mean_error.unwrap(), found.summary.mean_error.unwrap());
    assert!((mean(&inside).0 / mean(&outside).0 - 1.0).abs() < 0.05, "{inside:?} {outside:?}");
    assert!((mean(&inside).1 / mean(&outside).1 - 1.0).abs() < 0.05, "{inside:?} {outside:?}");
}

#[test]
fn other_formats_and_a_compensation_that_is_there_are_compensated_too() {
    let root = tempfile::tempdir().unwrap();
    let source = compressed(root.path(), "rtn", 4, 0);
    let gguf = root.path().join("model.gguf");
    let conversion = ConvertRecipe {
        source: assets("llama-7m"),
        out: gguf.clone(),
        format: "gguf:q4_0".to_owned(),
        allow_requantize: true,
        bits: None,
        group_size: None,
        dry_run: false,
    };
    convert(&conversion, &CancelToken::new(), &Progress::new()).unwrap();
    for (name, folder) in [("gguf", gguf), ("again", compressed(root.path(), "rtn", 3, 4)), ("plain", source)] {
        let recipe = CompensateRecipe { out: root.path().join(name), ..job(root.path(), folder, 4) };
        let report = run(&recipe).unwrap();
        let errors = report.linears.iter().filter_map(|linear| linear.error);
        assert!(errors.clone().count() == report.linears.len() && errors.clone().all(|e| e.compensated < e.quantized));
    }
    // What stands in eora/ is part of what is repaired: the new error begins where that has ended.
    let report = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(root.path().join(name).join("report.json")).unwrap()).unwrap()
    };
    let before = report("rtn-3-4")["summary"]["meanError"]["compensated"].as_f64().unwrap();
    let after = report("again")["summary"]["meanError"]["quantized"].as_f64().unwrap();
    assert!((after / before - 1.0).abs() < 0.02, "{after} {before}");
}

#[test]
fn a_budget_is_divided_and_kept() {
    let root = tempfile::tempdir().unwrap();
    let source = compressed(root.path(), "rtn", 2, 0);
    let uniform = run(&CompensateRecipe { out: root.path().join("uniform"), ..job(root.path(), source.clone(), 8) });
    let uniform = uniform.unwrap();
    for (name, budget) in [
        ("mean", RankBudget::MeanRank(8.0)),
        ("bytes", RankBudget::Bytes(uniform.summary.bytes)),
        ("none", RankBudget::Bytes(1)),
    ] {
        let mut recipe = CompensateRecipe { out: root.path().join(name), ..job(root.path(), source.clone(), 32) };
        let weights = RankWeights::Outputs;
        recipe.eora.allocation = Some(AllocationRecipe { budget, min_rank: 0, multiple: 4, weights });
        let found = run(&recipe);
        if name == "none" {
            let error = found.unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "eora.budgetBytes"));
            assert!(!recipe.out.exists() && !root.path().join("none.partial").exists());
            recipe.eora.allocation.as_mut().unwrap().budget = RankBudget::MeanRank(8.0);
            recipe.eora.allocation.as_mut().unwrap().min_rank = 9;
            assert_eq!(run(&recipe).unwrap_err().subject, "eora.minRank");
            continue;
        }
        let report = found.unwrap();
        let summary = report.summary.compensation.clone().unwrap();
        let allocation = summary.allocation.unwrap();
        assert!(report.summary.bytes <= uniform.summary.bytes, "{} {}", report.summary.bytes, uniform.summary.bytes);
        assert_eq!((allocation.bytes, allocation.uniform_rank, allocation.held_out), (report.summary.bytes, 8, true));
        assert_eq!(allocation.chosen, "allocated", "{allocation:?}");
        assert!(allocation.allocated < allocation.uniform, "{allocation:?}");
        let ranks: Vec<usize> = report.linears.iter().map(|linear| linear.rank).collect();
        assert!(ranks.iter().any(|&rank| rank > 8) && ranks.iter().any(|&rank| rank < 8), "{ranks:?}");
        let adapter = read_adapter(&recipe.out).unwrap();
        for linear in &report.linears {
            let factors = adapter.linears.get(&linear.name).map_or(0, |entry| entry.factors.rank());
            assert_eq!((factors, linear.rank % 4), (linear.rank, 0), "{}", linear.name);
            let error = linear.error.unwrap();
            assert!(error.bound <= error.compensated && error.compensated <= error.quantized);
        }
    }
}

#[test]
fn sizes_of_channels_are_never_behind_the_plain_svd_on_what_feedback_of_errors_leaves() {
    let mut ahead = 0;
    for (model, rank) in [("llama-7m", 32), ("tinystories-656k", 8)] {
        let root = tempfile::tempdir().unwrap();
        let statistics = root.path().join("statistics.safetensors");
        let mut base = compression(root.path(), "gptq", 3, 0);
        (base.source, base.save_statistics) = (assets(model), Some(statistics.clone()));
        compress(&base, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        let [diagonal, plain, best] = ["diagonal", "lorc", "fast"].map(|solver| -> Vec<f64> {
            let mut recipe = job(root.path(), base.out.clone(), rank);
            (recipe.original, recipe.out) = (base.source.clone(), root.path().join(solver));
            let source = &mut recipe.calibration.sources[0];
            (source.file, source.kind, source.hold_out) = (statistics.clone(), CalibrationKind::Statistics, 0);
            recipe.eora.solver = solver.to_owned();
            run(&recipe).unwrap().linears.iter().map(|linear| linear.error.unwrap().compensated).collect()
        });
        for (i, (found, plain)) in diagonal.iter().zip(&plain).enumerate() {
            assert!(*found <= plain * (1.0 + 1e-3), "{model} {i}: {found} {plain}");
            assert!(*found >= best[i] * (1.0 - 1e-6), "{model} {i}: {found} {}", best[i]);
        }
        let less = |(found, plain): &(&f64, &f64)| **found < **plain * (1.0 - 1e-3);
        ahead += diagonal.iter().zip(&plain).filter(less).count();
    }
    assert!(ahead > 0, "it is the plain SVD");
}

#[test]
fn factors_of_codes_take_their_bits_and_run() {
    let root = tempfile::tempdir().unwrap();
    let source = compressed(root.path(), "rtn", 3, 0);
    let mut errors = BTreeMap::new();
    for (bits, rank) in [(16, 8), (8, 8), (4, 8)] {
        let mut recipe =
            CompensateRecipe { out: root.path().join(format!("{bits}")), ..job(root.path(), source.clone(), rank) };
        recipe.eora.factor_bits = bits;
        let report = run(&recipe).unwrap();
        let adapter = read_adapter(&recipe.out).unwrap();
        let stored: u64 = adapter.linears.values().map(|entry| entry.factors.stored_bits()).sum();
        assert_eq!(report.summary.bytes, stored.div_ceil(8));
        assert!(adapter.linears.values().all(|entry| entry.factors.codes().is_some() == (bits < 16)));
        let choice = CompensationChoice { folder: Some(recipe.out.clone()), ..Default::default() };
        let text = fs::read_to_string(assets("text").join("eval-wikitext.txt")).unwrap();
        let model = load_with(&source, choice);
        let found = model.perplexity(&text[..8_000], 128, None, &CancelToken::new(), &Progress::new()).unwrap();
        errors.insert(bits, (report.summary.mean_error.unwrap().compensated, report.summary.bytes, found.perplexity));
    }
    let (full, eight, four) = (errors[&16], errors[&8], errors[&4]);
    assert!(eight.0 <= full.0 * 1.001, "int8 factors cost {} instead of {}", eight.0, full.0);
    assert!(four.0 <= full.0 * 1.03, "{} {}", four.0, full.0);
    assert!(eight.1 * 10 < full.1 * 6 && four.1 * 10 < full.1 * 4, "{errors:?}");
    assert!((eight.2 / full.2 - 1.0).abs() < 0.01 && (four.2 / full.2 - 1.0).abs() < 0.05, "{errors:?}");
}

#[test]
fn checkpoints_that_do_not_belong_together_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let source = compressed(root.path(), "rtn", 4, 0);
    let code = |recipe: &CompensateRecipe| {
        let error = run(recipe).unwrap_err();
        assert!(!error.hint.is_empty(), "{error}");
        assert!(!recipe.out.exists() && !root.path().join("eora.partial").exists());
        error.code
    };
    let right = job(root.path(), source.clone(), 4);
    assert_eq!(code(&CompensateRecipe { original: source, ..right.clone() }), ErrorCode::QuantizationUnsupported);
    assert_eq!(
        code(&CompensateRecipe { original: assets("tinystories-656k"), ..right.clone() }),
        ErrorCode::CheckpointShape
    );
    assert_eq!(code(&CompensateRecipe { compressed: assets("llama-7m"), ..right.clone() }), ErrorCode::AdapterInvalid);
    for spoil in [
        |eora: &mut EoraRecipe| eora.rank = 0,
        |eora: &mut EoraRecipe| eora.solver = "best".to_owned(),
        |eora: &mut EoraRecipe| eora.factor_bits = 5,
        |eora: &mut EoraRecipe| {
            let budget = RankBudget::MeanRank(5.0);
            eora.allocation = Some(AllocationRecipe { budget, min_rank: 0, multiple: 1, weights: RankWeights::Equal });
        },
    ] {
        let mut recipe = right.clone();
        spoil(&mut recipe.eora);
        assert_eq!(code(&recipe), ErrorCode::OptionInvalid);
    }
}
