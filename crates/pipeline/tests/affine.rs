//! Affine compensations: errors as an f64 evaluation on the calibration tokens gives them, the same from a compression
//! and from outside, resumed to the same bytes, cut at load, refused where only updates of weights can be used.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::common::{assets, backend, interrupted, load_with, recipe};
use crate::merges;
use kintsugi_checkpoint::{Checkpoint, TensorFile, read_adapter};
use kintsugi_compensate::RankBudget;
use kintsugi_linalg::{UpperTriangle, quadratic_trace_of};
use kintsugi_model::{CompensationChoice, LoadOptions, LoadedModel, Precision};
use kintsugi_pipeline::{
    AllocationRecipe, CalibrationKind, CompensateRecipe, CompensationReport, ConvertRecipe, EoraRecipe, FoldRecipe,
    RankWeights, Recipe, compensate, compress, convert, fold_adapter, plan_compensation,
};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, Result, ThreadPool};
use kintsugi_weights::{LowRank, RowSource};

const LENGTH: usize = 128;

/// `llama-7m` in 2 bits, and the statistics of four sequences of its inputs. Made once.
struct Compressed {
    root: tempfile::TempDir,
    model: PathBuf,
    statistics: PathBuf,
}

fn compression(out: &Path, rank: usize) -> Recipe {
    let mut recipe = recipe(&assets("llama-7m"), out, "rtn", 2, rank);
    let calibration = recipe.calibration.as_mut().unwrap();
    calibration.length = LENGTH;
    (calibration.sources[0].sequences, calibration.sources[0].hold_out) = (4, 2);
    recipe
}

fn compressed() -> &'static Compressed {
    static MADE: OnceLock<Compressed> = OnceLock::new();
    MADE.get_or_init(|| {
        let root = tempfile::tempdir().unwrap();
        let (model, statistics) = (root.path().join("w2"), root.path().join("statistics.safetensors"));
        let recipe = Recipe { save_statistics: Some(statistics.clone()), ..compression(&model, 0) };
        compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        Compressed { root, model, statistics }
    })
}

fn job(out: &Path, eora: EoraRecipe) -> CompensateRecipe {
    CompensateRecipe {
        original: assets("llama-7m"),
        compressed: compressed().model.clone(),
        out: out.to_path_buf(),
        calibration: compression(out, 0).calibration.unwrap(),
        eora,
        fresh: false,
        memory: None,
    }
}

fn affine(rank: usize) -> EoraRecipe {
    EoraRecipe { affine: true, ..EoraRecipe::uniform(rank) }
}

fn run(recipe: &CompensateRecipe) -> Result<CompensationReport> {
    compensate(recipe, &backend(), &CancelToken::new(), &Progress::new())
}

/// Affine factors of rank 8. Made once.
fn compensated() -> &'static (PathBuf, CompensationReport) {
    static MADE: OnceLock<(PathBuf, CompensationReport)> = OnceLock::new();
    MADE.get_or_init(|| {
        let out = compressed().root.path().join("affine");
        let report = run(&job(&out, affine(8))).unwrap();
        (out, report)
    })
}

/// Every file but the report, which has times in it.
fn bytes_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| !path.ends_with("report.json"));
    files.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

fn perplexity(choice: CompensationChoice) -> f64 {
    let text = fs::read_to_string(assets("text").join("eval-wikitext.txt")).unwrap();
    let model = load_with(&compressed().model, choice);
    model.perplexity(&text[..20_000], LENGTH, None, &CancelToken::new(), &Progress::new()).unwrap().perplexity
}

fn part(folder: &Path, rank: Option<usize>) -> CompensationChoice {
    CompensationChoice { folder: Some(folder.to_path_buf()), rank, ..Default::default() }
}

/// `‖M X − b 1ᵀ‖²` on inputs with those sums.
fn energy(matrix: &[f64], bias: &[f64], second_moment: &UpperTriangle<f64>, sums: &[f64], tokens: f64) -> f64 {
    let width = sums.len();
    let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&matrix[i * width..(i + 1) * width]);
    let of_matrix = quadratic_trace_of(bias.len(), fill, second_moment, ThreadPool::global());
    let answers = matrix.chunks(width).map(|row| row.iter().zip(sums).map(|(a, b)| a * b).sum::<f64>());
    let cross: f64 = answers.zip(bias).map(|(answer, bias)| answer * bias).sum();
    of_matrix - 2.0 * cross + tokens * bias.iter().map(|bias| bias * bias).sum::<f64>()
}

#[test]
fn errors_are_those_of_an_evaluation_in_f64_and_never_above_those_without_a_bias() {
    let root = tempfile::tempdir().unwrap();
    let from_statistics = |name: &str, eora: EoraRecipe| {
        let mut recipe = job(&root.path().join(name), eora);
        let source = &mut recipe.calibration.sources[0];
        (source.file, source.kind) = (compressed().statistics.clone(), CalibrationKind::Statistics);
        source.hold_out = 0;
        (recipe.out.clone(), run(&recipe).unwrap())
    };
    let (folder, report) = from_statistics("affine", affine(8));
    let (_, plain) = from_statistics("plain", EoraRecipe::uniform(8));
    let summary = report.summary.compensation.as_ref().unwrap();
    assert_eq!((summary.certified, summary.uncertified), (report.linears.len(), 0));
    let adapter = read_adapter(&folder).unwrap();
    let statistics = TensorFile::open(&compressed().statistics).unwrap();
    let (original, model) =
        (Checkpoint::open(&assets("llama-7m")).unwrap(), Checkpoint::open(&compressed().model).unwrap());
    let (mut better, mut prefixes) = (0, 0);
    for (linear, plain) in report.linears.iter().zip(&plain.linears) {
        let (block, module) = linear.name.rsplit_once('.').unwrap();
        let place = match module {
            "q_proj" | "k_proj" | "v_proj" => "attention_input",
            "o_proj" => "attention_output",
            "gate_proj" | "up_proj" => "mlp_input",
            _ => "mlp_activation",
        };
        let block = block.rsplit_once('.').unwrap().0;
        let (rows, width) = (linear.rows, linear.columns);
        let mut second_moment = UpperTriangle::zeros(width);
        let mut first = 0;
        for i in 0..width {
            statistics.read_f64s(&format!("{block}.{place}.second_moment"), first, second_moment.row_mut(i)).unwrap();
            first += width - i;
        }
        let mut sums = vec![0.0; width];
        statistics.read_f64s(&format!("{block}.{place}.sums"), 0, &mut sums).unwrap();
        let tokens = (4 * LENGTH) as f64;

        let weight = original.dense(&format!("{}.weight", linear.name)).unwrap();
        let rounded = model.linear(&linear.name).unwrap();
        let (mut wide, mut delta) = (Vec::new(), Vec::new());
        for i in 0..rows {
            let (mut before, mut after) = (vec![0.0; width], vec![0.0; width]);
            RowSource::row_to_f32(&weight, i, &mut before);
            RowSource::row_to_f32(&rounded, i, &mut after);
            wide.extend(before.iter().map(|&value| f64::from(value)));
            delta.extend(before.iter().zip(&after).map(|(&a, &b)| f64::from(a) - f64::from(b)));
        }
        let of = |update: &LowRank| {
            let mut left = delta.clone();
            for (i, row) in left.chunks_mut(width).enumerate() {
                for l in 0..update.rank() {
                    let b = f64::from(update.b()[i * update.rank() + l]);
                    let a = &update.a()[l * width..(l + 1) * width];
                    row.iter_mut().zip(a).for_each(|(value, &a)| *value -= b * f64::from(a));
                }
            }
            let bias: Vec<f64> = update.bias().unwrap().values.iter().map(|&value| f64::from(value)).collect();
            energy(&left, &bias, &second_moment, &sums, tokens)
        };
        let outputs = energy(&wide, &vec![0.0; rows], &second_moment, &sums, tokens);
        let before = energy(&delta, &vec![0.0; rows], &second_moment, &sums, tokens);
        let factors = &adapter.linears[&linear.name].factors;
        let error = linear.error.unwrap();
        let near = |said: f64, energy: f64| (said / (energy / outputs).sqrt() - 1.0).abs() < 1e-5;
        assert!(near(error.quantized, before) && near(error.compensated, of(factors)), "{}: {error:?}", linear.name);
        // Of less rank it is better than nothing, too.
        let energies: Vec<f64> = [1, 4, 8].iter().map(|&rank| of(&factors.prefix(rank))).collect();
        prefixes += usize::from(energies.is_sorted_by(|a, b| a >= b) && energies[0] < before);

        let without = plain.error.unwrap();
        assert!((error.quantized / without.quantized - 1.0).abs() < 1e-6);
        assert!(error.bound <= error.compensated && error.compensated < error.quantized, "{error:?}");
        assert!(error.compensated <= without.compensated * (1.0 + 1e-5), "{}: {error:?} {without:?}", linear.name);
        better += usize::from(error.compensated < without.compensated);
        assert_eq!(linear.stored_bits, plain.stored_bits + 32 * rows as u64);
    }
    assert_eq!(prefixes, report.linears.len());
    assert!(better * 2 > report.linears.len(), "{better} of {}", report.linears.len());
}

#[test]
fn a_compression_solves_the_same_and_the_model_runs_with_it() {
    let root = tempfile::tempdir().unwrap();
    let (folder, report) = compensated();
    let mut together = compression(&root.path().join("together"), 8);
    together.eora = Some(affine(8));
    compress(&together, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    for file in ["adapter_model.safetensors", "factor_centres.safetensors"] {
        assert!(
            fs::read(together.out.join("eora").join(file)).unwrap() == fs::read(folder.join(file)).unwrap(),
            "{file}"
        );
    }
    let planned = plan_compensation(&job(&root.path().join("planned"), affine(8))).unwrap();
    assert_eq!(planned.bytes, report.summary.bytes);
    let adapter = read_adapter(folder).unwrap();
    let stored: u64 = adapter.linears.values().map(|entry| entry.factors.stored_bits()).sum();
    assert_eq!(report.summary.bytes, stored.div_ceil(8));
    let held = report.summary.compensation.as_ref().unwrap().hold_out.unwrap();
    assert!(held.compensated < held.quantized, "{held:?}");

    let none = perplexity(CompensationChoice::default());
    let (some, all) = (perplexity(part(folder, Some(2))), perplexity(part(folder, None)));
    assert!(all.is_finite() && all < some && some < none, "{all} {some} {none}");
    assert_eq!(perplexity(part(folder, Some(8))), all);
    assert_eq!(perplexity(part(folder, Some(0))), none, "no rank, no bias");
    let text = fs::read_to_string(assets("text").join("eval-wikitext.txt")).unwrap();
    let inside = load_with(&together.out, CompensationChoice::default());
    let inside = inside.perplexity(&text[..20_000], LENGTH, None, &CancelToken::new(), &Progress::new()).unwrap();
    assert_eq!(inside.perplexity, all);
}

#[test]
fn an_interrupted_job_ends_in_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let recipe = job(&root.path().join("eora"), affine(8));
    let outcome = interrupted(2, |cancel, progress| compensate(&recipe, &backend(), cancel, progress));
    assert_eq!(outcome.unwrap_err().code, ErrorCode::Cancelled);
    let error = run(&CompensateRecipe { eora: EoraRecipe::uniform(8), ..recipe.clone() }).unwrap_err();
    assert_eq!(error.code, ErrorCode::ResumeMismatch);
    assert!(error.message.contains("eora.affine"), "{error}");
    let report = run(&recipe).unwrap();
    let (folder, whole) = compensated();
    assert!(bytes_of(&recipe.out) == bytes_of(folder));
    let facts = |report: &CompensationReport| serde_json::to_string(&report.linears).unwrap();
    assert!(facts(&report) == facts(whole));
}

#[test]
fn codes_budgets_solvers_and_other_bases_have_biases_too() {
    let root = tempfile::tempdir().unwrap();
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
    let budget = RankBudget::Bytes(compensated().1.summary.bytes);
    let allocation = AllocationRecipe { budget, min_rank: 0, multiple: 4, weights: RankWeights::Outputs };
    for (name, eora) in [
        ("coded-8", EoraRecipe { factor_bits: 8, ..affine(8) }),
        ("coded-4", EoraRecipe { factor_bits: 4, ..affine(8) }),
        ("diagonal", EoraRecipe { solver: "diagonal".to_owned(), ..affine(8) }),
        ("lorc", EoraRecipe { solver: "lorc".to_owned(), ..affine(8) }),
        ("divided", EoraRecipe { allocation: Some(allocation), ..affine(24) }),
        ("gguf", affine(4)),
    ] {
        let mut recipe = job(&root.path().join(name), eora);
        if name == "gguf" {
            recipe.compressed = gguf.clone();
        }
        let report = run(&recipe).unwrap();
        let adapter = read_adapter(&recipe.out).unwrap();
        let stored: u64 = adapter.linears.values().map(|entry| entry.factors.stored_bits()).sum();
        assert_eq!(report.summary.bytes, stored.div_ceil(8), "{name}");
        assert!(report.summary.bytes <= compensated().1.summary.bytes, "{name}");
        for linear in &report.linears {
            let error = linear.error.unwrap();
            assert!(error.compensated <= error.quantized && error.bound <= error.compensated, "{name} {linear:?}");
            let factors = adapter.linears.get(&linear.name).map(|entry| &entry.factors);
            assert_eq!(factors.map_or(0, LowRank::rank), linear.rank, "{name}");
            assert!(factors.is_none_or(|factors| factors.bias().is_some() && factors.is_divisible()), "{name}");
        }
        if name == "gguf" {
            continue;
        }
        let found = perplexity(part(&recipe.out, None));
        assert!(found.is_finite() && found < perplexity(CompensationChoice::default()), "{name}: {found}");
    }
}

#[test]
fn what_can_use_updates_of_weights_alone_refuses_biases() {
    let root = tempfile::tempdir().unwrap();
    let (folder, _) = compensated();
    // Cut without its centres.
    let copy = root.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(folder.join(file), copy.join(file)).unwrap();
    }
    let load = |compensation: CompensationChoice, adapters: Vec<(String, PathBuf)>| {
        let (backend, precision) = ("cpu".to_owned(), Precision::F32);
        let options = LoadOptions { backend, precision, compensation, adapters };
        LoadedModel::load(&compressed().model, &options, &CancelToken::new(), &Progress::new()).map(|_| ())
    };
    assert!(load(part(&copy, None), Vec::new()).is_ok() && load(part(&copy, Some(8)), Vec::new()).is_ok());
    let uncuttable = load(part(&copy, Some(4)), Vec::new()).unwrap_err();
    assert!(uncuttable.message.contains("factor_centres") && uncuttable.hint.contains("eoraRank"), "{uncuttable}");
    // Beside the model, for single requests.
    let beside = load(CompensationChoice::default(), vec![("a".to_owned(), folder.clone())]).unwrap_err();
    assert!(beside.hint.contains("compensation"), "{beside}");
    // Merged and folded.
    let merge = merges::recipe(&[folder.clone(), folder.clone()], &[1.0, 1.0], "cat", &root.path().join("merged"));
    let merged = merges::refused(&merge, ErrorCode::AdapterInvalid);
    let fold = FoldRecipe {
        checkpoint: assets("llama-7m"),
        adapter: folder.clone(),
        weight: 1.0,
        element_type: None,
        out: root.path().join("folded"),
    };
    let folded = fold_adapter(&fold, ThreadPool::global(), &CancelToken::new(), &Progress::new()).unwrap_err();
    // Compensated once more.
    let base = root.path().join("base");
    fs::create_dir_all(base.join("eora")).unwrap();
    for (from, to) in [(compressed().model.as_path(), base.clone()), (folder.as_path(), base.join("eora"))] {
        for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap()).filter(|entry| entry.path().is_file()) {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    let again = CompensateRecipe { compressed: base, ..job(&root.path().join("again"), EoraRecipe::uniform(4)) };
    let again = run(&again).unwrap_err();
    for error in [uncuttable, beside, merged, folded, again] {
        assert_eq!(error.code, ErrorCode::AdapterInvalid, "{error}");
        assert!(!error.hint.is_empty() && !error.subject.is_empty(), "{error}");
    }
}
