//! Shared As in every kind of job: over a compensation that is there, on a GGUF file, for inputs that are taken stage by
//! stage or from the original model, within a budget of bytes, interrupted, and with bases that are damaged.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::common::{assets, backend, bytes_of, disturbed, load_with, recipe};
use kintsugi_checkpoint::{Checkpoint, read_adapter};
use kintsugi_compensate::RankBudget;
use kintsugi_model::CompensationChoice;
use kintsugi_pipeline::{
    AllocationRecipe, CalibrationKind, CompensateRecipe, CompensationReport, EoraInputs, EoraRecipe, LinearReport,
    RankWeights, Recipe, compensate, compress, plan,
};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, ProgressSnapshot, Result};
use kintsugi_weights::{Adapter, ElementType};

const MODEL: &str = "tinystories-656k";

/// In 3 bits, with scales in f32.
fn compression(out: &Path, eora: Option<EoraRecipe>) -> Recipe {
    let mut recipe = recipe(&assets(MODEL), out, "rtn", 3, 0);
    let calibration = recipe.calibration.as_mut().unwrap();
    calibration.length = 64;
    (calibration.sources[0].sequences, calibration.sources[0].hold_out) = (8, 4);
    Recipe { eora, format: "kintsugi".to_owned(), scale_type: Some(ElementType::F32), ..recipe }
}

fn finish(recipe: &Recipe) -> kintsugi_pipeline::Report {
    compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap()
}

/// The model in 3 bits. Made once.
fn base() -> &'static Path {
    static MADE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, folder) = MADE.get_or_init(|| {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("base");
        finish(&compression(&folder, None));
        (root, folder)
    });
    folder
}

fn grouped(rank: usize) -> EoraRecipe {
    EoraRecipe { grouped: true, ..EoraRecipe::uniform(rank) }
}

fn job(compressed: &Path, out: &Path, eora: EoraRecipe) -> CompensateRecipe {
    CompensateRecipe {
        original: assets(MODEL),
        compressed: compressed.to_path_buf(),
        out: out.to_path_buf(),
        calibration: compression(out, None).calibration.unwrap(),
        eora,
        fresh: false,
        memory: None,
    }
}

fn run(recipe: &CompensateRecipe) -> Result<CompensationReport> {
    compensate(recipe, &backend(), &CancelToken::new(), &Progress::new())
}

/// Linears share the A of the first of them, and others have their own; gives how many share one.
fn check_shared(adapter: &Adapter, linears: &[LinearReport]) -> usize {
    let mut sharing = 0;
    for linear in linears {
        let module = linear.name.rsplit('.').next().unwrap();
        let Some(entry) = adapter.linears.get(&linear.name) else {
            assert_eq!(linear.rank, 0, "{}", linear.name);
            continue;
        };
        assert_eq!(entry.factors.rank(), linear.rank, "{}", linear.name);
        let expected = match module {
            "q_proj" | "k_proj" | "v_proj" => 2,
            "gate_proj" | "up_proj" => 1,
            _ => 0,
        };
        assert_eq!(linear.shared_with.len(), expected, "{}", linear.name);
        for other in &linear.shared_with {
            assert!(adapter.linears[other].factors.a() == entry.factors.a(), "{} and {other}", linear.name);
        }
        sharing += usize::from(expected > 0);
    }
    sharing
}

fn perplexity(model: &Path, choice: CompensationChoice) -> f64 {
    let text = fs::read_to_string(assets("text").join("eval-stories.txt")).unwrap();
    let text: String = text.chars().take(6000).collect();
    let (cancel, progress) = (CancelToken::new(), Progress::new());
    load_with(model, choice).perplexity(&text, 64, None, &cancel, &progress).unwrap().perplexity
}

fn beside(folder: &Path, own: bool) -> CompensationChoice {
    CompensationChoice { own, folder: Some(folder.to_path_buf()), rank: None }
}

#[test]
fn the_plan_of_a_compression_has_the_disk_for_every_a() {
    let root = tempfile::tempdir().unwrap();
    let needed = |name: &str, eora| plan(&compression(&root.path().join(name), eora)).unwrap();
    let (none, apart, shared) =
        (needed("none", None), needed("apart", Some(EoraRecipe::uniform(16))), needed("shared", Some(grouped(16))));
    assert!(shared.bytes < apart.bytes, "in memory an A is there once");
    assert_eq!(shared.disk.needed_bytes, apart.disk.needed_bytes, "in files it is not");
    let report = finish(&compression(&root.path().join("shared"), Some(grouped(16))));
    let out = root.path().join("shared");
    let files: u64 = bytes_of(&out).values().map(|bytes| bytes.len() as u64).sum();
    let factors = fs::metadata(out.join("eora/adapter_model.safetensors")).unwrap().len();
    // The factors once more while blocks are solved.
    assert!(shared.disk.needed_bytes >= files + factors, "{} {files} {factors}", shared.disk.needed_bytes);
    let values = |rows: usize, columns: usize| 2 * 16 * (rows + columns) as u64;
    let every_a: u64 = report.linears.iter().map(|linear| values(linear.rows, linear.columns)).sum();
    assert!(factors >= every_a && factors < every_a + every_a / 10 + 8192, "{factors} {every_a}");
    assert!(shared.disk.needed_bytes - none.disk.needed_bytes >= every_a, "at least the file");
}

#[test]
fn a_shared_a_is_solved_over_a_compensation_that_is_there() {
    let root = tempfile::tempdir().unwrap();
    let with = compression(&root.path().join("with"), Some(EoraRecipe::uniform(4)));
    finish(&with);
    let recipe = job(&with.out, &root.path().join("more"), grouped(8));
    let report = run(&recipe).unwrap();
    let adapter = read_adapter(&recipe.out).unwrap();
    assert!(check_shared(&adapter, &report.linears) > 0);
    // What is there is part of what is repaired: less is left to repair than of the bare base.
    let bare = run(&job(base(), &root.path().join("bare"), grouped(8))).unwrap();
    for (over, bare) in report.linears.iter().zip(&bare.linears).take(7) {
        let (over, bare) = (over.error.unwrap(), bare.error.unwrap());
        assert!(over.quantized < bare.quantized && over.compensated < over.quantized, "{over:?} {bare:?}");
        assert!(over.compensated < bare.compensated, "{over:?} {bare:?}");
    }
    // Both are added.
    let [own, both] =
        [CompensationChoice::default(), beside(&recipe.out, true)].map(|choice| perplexity(&with.out, choice));
    assert!(both < own, "{both} {own}");
}

/// Gives a tensor of a file other values.
fn overwrite(path: &Path, name: &str, values: &[f32]) {
    let mut bytes = fs::read(path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    assert_eq!(header[name]["dtype"], "F32", "{name}");
    let [first, end] = [0, 1].map(|at| start + header[name]["data_offsets"][at].as_u64().unwrap() as usize);
    let values: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    bytes[first..end].copy_from_slice(&values);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_shared_a_repairs_a_gguf_file_too() {
    let root = tempfile::tempdir().unwrap();
    let mut file = compression(&root.path().join("file"), None);
    (file.format, file.bits, file.group_size, file.symmetric) = ("gguf:Q4_0".to_owned(), 4, Some(32), true);
    file.scale_type = Some(ElementType::F16);
    finish(&file);
    assert!(file.out.join("model.gguf").is_file());
    let recipe = job(&file.out, &root.path().join("eora"), grouped(16));
    let report = run(&recipe).unwrap();
    let adapter = read_adapter(&recipe.out).unwrap();
    assert!(check_shared(&adapter, &report.linears) > 0);
    let held = report.summary.compensation.unwrap().hold_out.unwrap();
    assert!(held.compensated < 0.9 * held.quantized, "{held:?}");
    // A folder with the same codes has the same factors when it has the embedding of the file, too, which is in codes.
    let folder = Recipe { out: root.path().join("folder"), format: "auto".to_owned(), ..file.clone() };
    finish(&folder);
    let embedding = Checkpoint::open(&file.out).unwrap().dense("model.embed_tokens.weight").unwrap();
    overwrite(&folder.out.join("model.safetensors"), "lm_head.weight", &embedding.to_f32());
    let other = job(&folder.out, &root.path().join("other"), grouped(16));
    run(&other).unwrap();
    let of_folder = read_adapter(&other.out).unwrap();
    assert_eq!(adapter.linears.len(), report.linears.len());
    for (name, entry) in &adapter.linears {
        assert!(*entry == of_folder.linears[name], "{name}");
    }
    let [with, without] =
        [beside(&recipe.out, false), CompensationChoice::default()].map(|choice| perplexity(&file.out, choice));
    assert!(with < without, "{with} {without}");
}

#[test]
fn inputs_that_are_taken_stage_by_stage_have_shared_as_too() {
    let root = tempfile::tempdir().unwrap();
    let mut by_stage = compression(&root.path().join("by-stage"), Some(grouped(8)));
    by_stage.calibration.as_mut().unwrap().subset = true;
    let at_once = compression(&root.path().join("at-once"), Some(grouped(8)));
    let [found, others] = [&by_stage, &at_once].map(finish);
    let adapters = [&by_stage, &at_once].map(|recipe| read_adapter(&recipe.out.join("eora")).unwrap());
    assert_eq!(check_shared(&adapters[0], &found.linears), 2 * 5);
    let factors = |at: usize, module: &str| {
        let name = format!("model.layers.0.{module}");
        adapters[at].linears[&name].factors.clone()
    };
    // The first stage of the first block reads the same; what is behind it reads what its compressed Linears say.
    for module in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
        assert!(factors(0, module) == factors(1, module), "{module}");
    }
    for module in ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
        assert!(factors(0, module).a() != factors(1, module).a(), "{module}");
    }
    for (linear, other) in found.linears.iter().zip(&others.linears) {
        let error = linear.error.unwrap();
        assert!(error.compensated < error.quantized && linear.rank == other.rank, "{linear:?}");
    }
}

#[test]
fn shared_as_for_inputs_of_the_original_are_those_of_its_statistics() {
    let root = tempfile::tempdir().unwrap();
    let dense = EoraRecipe { inputs: EoraInputs::Dense, ..grouped(8) };
    let statistics = root.path().join("dense.safetensors");
    let saving = Recipe {
        save_statistics: Some(statistics.clone()),
        ..compression(&root.path().join("saving"), Some(dense.clone()))
    };
    finish(&saving);
    let from_tokens = job(base(), &root.path().join("tokens"), dense.clone());
    let mut from_file = job(base(), &root.path().join("file"), dense);
    let source = &mut from_file.calibration.sources[0];
    (source.file, source.kind, source.hold_out) = (statistics, CalibrationKind::Statistics, 0);
    let [found, _] = [&from_tokens, &from_file].map(|recipe| run(recipe).unwrap());
    let factors = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert!(factors(&from_tokens.out) == factors(&from_file.out));
    assert!(factors(&from_tokens.out) == factors(&saving.out.join("eora")));
    assert!(check_shared(&read_adapter(&from_tokens.out).unwrap(), &found.linears) > 0);
    let deployed = job(base(), &root.path().join("deployed"), grouped(8));
    run(&deployed).unwrap();
    assert!(factors(&from_tokens.out) != factors(&deployed.out), "the second block reads something else");
}

#[test]
fn a_budget_of_bytes_is_divided_alike_whether_the_job_was_interrupted_or_not() {
    let root = tempfile::tempdir().unwrap();
    let whole = run(&job(base(), &root.path().join("whole"), grouped(8))).unwrap();
    let budget = RankBudget::Bytes(whole.summary.bytes);
    let allocation = AllocationRecipe { budget, min_rank: 0, multiple: 4, weights: RankWeights::Outputs };
    for (name, shared) in [("shared", true), ("apart", false)] {
        let eora = EoraRecipe { grouped: shared, allocation: Some(allocation), ..EoraRecipe::uniform(32) };
        let recipe = job(base(), &root.path().join(name), eora.clone());
        let undisturbed = CompensateRecipe { out: root.path().join(format!("{name}-undisturbed")), ..recipe.clone() };
        let expected = run(&undisturbed).unwrap();
        assert!(expected.summary.bytes <= whole.summary.bytes, "{name}");
        let ranks = |report: &CompensationReport| -> Vec<usize> { report.linears.iter().map(|l| l.rank).collect() };
        let first = expected.linears[0].rank;
        assert!(ranks(&expected).iter().any(|&rank| rank != first), "{name}: one rank for all");
        let there = |reading: &ProgressSnapshot| reading.phase == "compensate" && reading.done >= 1;
        let outcome =
            disturbed(there, CancelToken::cancel, |cancel, progress| compensate(&recipe, &backend(), cancel, progress));
        assert_eq!(outcome.unwrap_err().code, ErrorCode::Cancelled, "{name}");
        let ledger = recipe.out.with_file_name(format!("{name}.partial")).join("ledger.jsonl");
        assert_eq!(fs::read_to_string(ledger).unwrap().lines().count(), 2, "{name}: identity and a block");
        let resumed = run(&recipe).unwrap();
        assert!(bytes_of(&recipe.out) == bytes_of(&undisturbed.out), "{name}");
        assert_eq!(ranks(&resumed), ranks(&expected), "{name}");
        // Another budget is another job.
        let outcome = disturbed(there, CancelToken::cancel, |cancel, progress| {
            let again = CompensateRecipe { out: root.path().join(format!("{name}-again")), ..recipe.clone() };
            compensate(&again, &backend(), cancel, progress)
        });
        assert_eq!(outcome.unwrap_err().code, ErrorCode::Cancelled, "{name}");
        let less = AllocationRecipe { budget: RankBudget::Bytes(whole.summary.bytes - 1), ..allocation };
        let other = EoraRecipe { allocation: Some(less), ..eora };
        let error = run(&job(base(), &root.path().join(format!("{name}-again")), other)).unwrap_err();
        assert_eq!(error.code, ErrorCode::ResumeMismatch, "{name}: {error}");
        assert!(error.message.contains("budget"), "{name}: {error}");
    }
}

#[test]
fn a_job_that_is_cancelled_anywhere_in_a_block_ends_in_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    // GPTQ and the solution take their time between the Linears of a group.
    let slow = |name: &str| Recipe {
        method: "gptq".to_owned(),
        ..compression(&root.path().join(name).join("out"), Some(grouped(32)))
    };
    let undisturbed = slow("undisturbed");
    ["undisturbed", "disturbed"].iter().for_each(|name| fs::create_dir(root.path().join(name)).unwrap());
    let started = std::time::Instant::now();
    finish(&undisturbed);
    let seconds = started.elapsed().as_secs_f64();
    let expected = bytes_of(&undisturbed.out);
    let recipe = slow("disturbed");
    let mut cancelled = 0;
    for step in 0..6 {
        let wait = Duration::from_secs_f64(seconds / 2.0 * f64::from(step) / 6.0);
        let there = |reading: &ProgressSnapshot| reading.phase == "compress" && reading.total > 0;
        let disturb = |cancel: &CancelToken| {
            std::thread::sleep(wait);
            cancel.cancel();
        };
        match disturbed(there, disturb, |cancel, progress| compress(&recipe, &backend(), cancel, progress)) {
            Err(error) => {
                assert_eq!(error.code, ErrorCode::Cancelled, "{error}");
                assert!(!recipe.out.exists());
                cancelled += 1;
            }
            // The rest of it was done before the time was over.
            Ok(_) => fs::remove_dir_all(&recipe.out).unwrap(),
        }
    }
    assert!(cancelled > 0);
    finish(&recipe);
    assert!(bytes_of(&recipe.out) == expected);
}

/// Copies a checkpoint, with another scale for all values of a row of a Linear in the first block.
fn with_scale(source: &Path, folder: &Path, modules: &[&str], row: usize, scale: f32) {
    fs::create_dir(folder).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    for module in modules {
        let tensor = &header[format!("model.layers.0.{module}.weight_scale")];
        assert_eq!(tensor["dtype"], "F32", "{module}");
        let groups = tensor["shape"][1].as_u64().unwrap() as usize;
        let first = start + tensor["data_offsets"][0].as_u64().unwrap() as usize + 4 * row * groups;
        for at in (first..first + 4 * groups).step_by(4) {
            bytes[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_value_of_a_group_that_is_not_finite_is_named_with_its_linear() {
    let root = tempfile::tempdir().unwrap();
    for (module, row) in [("self_attn.k_proj", 1), ("self_attn.v_proj", 0), ("mlp.up_proj", 5)] {
        // A scale that is finite, of values that are not.
        let damaged = root.path().join(module);
        with_scale(base(), &damaged, &[module], row, f32::MAX);
        let recipe = job(&damaged, &root.path().join("out"), grouped(4));
        let error = run(&recipe).unwrap_err();
        assert_eq!((error.code, error.subject), (ErrorCode::ValueNotFinite, format!("model.layers.0.{module}")));
        assert!(error.message.contains(&format!("the compressed weight in row {row}, column ")), "{}", error.message);
        assert!(!error.hint.is_empty() && !recipe.out.exists());
        assert!(!root.path().join("out.partial").exists(), "a damaged base is nothing to go on with");
    }
}

#[test]
fn a_model_that_overflows_without_factors_is_divided_by_its_outputs() {
    let root = tempfile::tempdir().unwrap();
    let damaged = root.path().join("damaged");
    // Activations of the MLP are products of two numbers that f32 holds, and that it does not hold itself.
    with_scale(base(), &damaged, &["mlp.gate_proj", "mlp.up_proj"], 0, 1e25);
    let budget = RankBudget::MeanRank(4.0);
    let allocation = AllocationRecipe { budget, min_rank: 0, multiple: 2, weights: RankWeights::Ablation };
    for shared in [true, false] {
        let eora = EoraRecipe {
            inputs: EoraInputs::Dense,
            grouped: shared,
            allocation: Some(allocation),
            ..EoraRecipe::uniform(16)
        };
        let recipe = job(&damaged, &root.path().join(format!("eora-{shared}")), eora);
        let report = run(&recipe).unwrap();
        let ablation = report.summary.compensation.unwrap().allocation.unwrap().ablation.unwrap();
        assert!(!ablation.fitted, "{ablation:?}");
        let mut groups = ablation.types.iter().chain(&ablation.bands);
        assert!(groups.all(|group| group.cost == 0.0 && group.factor == 1.0), "{ablation:?}");
        let mut other = recipe.clone();
        other.out = root.path().join(format!("outputs-{shared}"));
        other.eora.allocation.as_mut().unwrap().weights = RankWeights::Outputs;
        let ranks = |linears: &[LinearReport]| -> Vec<usize> { linears.iter().map(|linear| linear.rank).collect() };
        assert_eq!(ranks(&report.linears), ranks(&run(&other).unwrap().linears));
    }
}
