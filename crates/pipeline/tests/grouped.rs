//! Compensations of Linears that share an A: what is reported is what an f64 evaluation of all of them together gives,
//! the A is the same in every file and once in memory, and jobs are budgeted, resumed and combined as others are.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::common::{assets, backend, interrupted, load_with, recipe};
use kintsugi_checkpoint::{Checkpoint, TensorFile, read_adapter};
use kintsugi_compensate::RankBudget;
use kintsugi_linalg::{UpperTriangle, quadratic_trace_of};
use kintsugi_model::{CompensationChoice, DecoderSpec};
use kintsugi_pipeline::{
    AllocationRecipe, CalibrationKind, CompensateRecipe, CompensationReport, EoraInputs, EoraRecipe, LinearReport,
    RankWeights, Recipe, compensate, compress, inspect, plan_compensation,
};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, Result, ThreadPool};
use kintsugi_weights::{Adapter, LowRank, RowSource};

const LENGTH: usize = 128;

/// `llama-7m` in 2 bits, and the statistics of its inputs. Made once.
struct Compressed {
    root: tempfile::TempDir,
    model: PathBuf,
    statistics: PathBuf,
}

fn compression(out: &Path) -> Recipe {
    let mut recipe = recipe(&assets("llama-7m"), out, "rtn", 2, 0);
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
        let recipe = Recipe { save_statistics: Some(statistics.clone()), ..compression(&model) };
        compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        Compressed { root, model, statistics }
    })
}

fn grouped(rank: usize) -> EoraRecipe {
    EoraRecipe { grouped: true, ..EoraRecipe::uniform(rank) }
}

fn job(out: &Path, eora: EoraRecipe) -> CompensateRecipe {
    CompensateRecipe {
        original: assets("llama-7m"),
        compressed: compressed().model.clone(),
        out: out.to_path_buf(),
        calibration: compression(out).calibration.unwrap(),
        eora,
        fresh: false,
        memory: None,
    }
}

fn run(recipe: &CompensateRecipe) -> Result<CompensationReport> {
    compensate(recipe, &backend(), &CancelToken::new(), &Progress::new())
}

/// One A of rank 8 for each input. Made once.
fn compensated() -> &'static (PathBuf, CompensationReport) {
    static MADE: OnceLock<(PathBuf, CompensationReport)> = OnceLock::new();
    MADE.get_or_init(|| {
        let out = compressed().root.path().join("grouped");
        let report = run(&job(&out, grouped(8))).unwrap();
        (out, report)
    })
}

/// The Linears of a block that read one input, by the names of their modules.
const GROUPS: [&[&str]; 4] = [&["q_proj", "k_proj", "v_proj"], &["o_proj"], &["gate_proj", "up_proj"], &["down_proj"]];

/// Those reports of a block.
fn group<'a>(linears: &'a [LinearReport], block: usize, modules: &[&str]) -> Vec<&'a LinearReport> {
    let of_block = format!("layers.{block}.");
    let found = |module: &&str| {
        linears.iter().find(|l| l.name.contains(&of_block) && l.name.ends_with(*module)).expect("a Linear of the block")
    };
    modules.iter().map(found).collect()
}

/// The bits of an adapter where an A that several share is kept once.
fn bits_of(adapter: &Adapter, linears: &[LinearReport]) -> u64 {
    let mut bits = 0;
    for (at, linear) in linears.iter().enumerate() {
        let Some(entry) = adapter.linears.get(&linear.name) else { continue };
        let is_first = linears[..at].iter().all(|other| !linear.shared_with.contains(&other.name));
        bits += entry.factors.stored_bits() - if is_first { 0 } else { entry.factors.projection_bits() };
    }
    bits
}

fn perplexity(choice: CompensationChoice) -> f64 {
    let text = fs::read_to_string(assets("text").join("eval-wikitext.txt")).unwrap();
    let model = load_with(&compressed().model, choice);
    model.perplexity(&text[..20_000], LENGTH, None, &CancelToken::new(), &Progress::new()).unwrap().perplexity
}

fn part(folder: &Path, rank: Option<usize>) -> CompensationChoice {
    CompensationChoice { folder: Some(folder.to_path_buf()), rank, ..Default::default() }
}

/// The statistics of the inputs of a Linear.
fn statistics(prefix: &str, width: usize) -> UpperTriangle<f64> {
    let file = TensorFile::open(&compressed().statistics).unwrap();
    let (mut moments, mut first) = (UpperTriangle::zeros(width), 0);
    for i in 0..width {
        file.read_f64s(&format!("{prefix}.second_moment"), first, moments.row_mut(i)).unwrap();
        first += width - i;
    }
    moments
}

fn wide_rows(matrix: &dyn RowSource) -> Vec<f64> {
    let mut row = vec![0.0; matrix.columns()];
    let mut all = Vec::new();
    for i in 0..matrix.rows() {
        matrix.row_to_f32(i, &mut row);
        all.extend(row.iter().map(|&value| f64::from(value)));
    }
    all
}

#[test]
fn errors_are_those_of_all_that_share_an_a_and_none_of_them_gets_worse() {
    let root = tempfile::tempdir().unwrap();
    let mut recipe = job(&root.path().join("grouped"), grouped(8));
    let source = &mut recipe.calibration.sources[0];
    (source.file, source.kind) = (compressed().statistics.clone(), CalibrationKind::Statistics);
    source.hold_out = 0;
    let report = run(&recipe).unwrap();
    let adapter = read_adapter(&recipe.out).unwrap();
    let summary = report.summary.compensation.as_ref().unwrap();
    assert_eq!((summary.certified, summary.uncertified), (report.linears.len(), 0));
    let original = Checkpoint::open(&assets("llama-7m")).unwrap();
    let model = Checkpoint::open(&compressed().model).unwrap();
    let spec = DecoderSpec::of(&original).unwrap();
    for block in [0, spec.layers - 1] {
        for modules in GROUPS {
            let members = group(&report.linears, block, modules);
            let place = match modules[0] {
                "q_proj" => "attention_input",
                "o_proj" => "attention_output",
                "gate_proj" => "mlp_input",
                _ => "mlp_activation",
            };
            let moments = statistics(&format!("{}.{place}", spec.block_name(block)), members[0].columns);
            let energy = |matrix: &[f64]| {
                let width = members[0].columns;
                let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&matrix[i * width..(i + 1) * width]);
                quadratic_trace_of(matrix.len() / width, fill, &moments, ThreadPool::global())
            };
            let mut energies = Vec::new();
            for linear in &members {
                let weight = wide_rows(&original.dense(&format!("{}.weight", linear.name)).unwrap());
                let rounded = wide_rows(&model.linear(&linear.name).unwrap());
                let mut left: Vec<f64> = weight.iter().zip(&rounded).map(|(a, b)| a - b).collect();
                let own = (energy(&weight), energy(&left));
                let factors = &adapter.linears[&linear.name].factors;
                for (i, row) in left.chunks_mut(linear.columns).enumerate() {
                    for l in 0..factors.rank() {
                        let b = f64::from(factors.b()[i * factors.rank() + l]);
                        let a = &factors.a()[l * linear.columns..(l + 1) * linear.columns];
                        row.iter_mut().zip(a).for_each(|(value, &a)| *value -= b * f64::from(a));
                    }
                }
                let rest = energy(&left);
                assert!(rest < own.1, "{} gets worse: {rest} {}", linear.name, own.1);
                energies.push([own.0, own.1, rest]);
            }
            // Each counts relative to its outputs, by powers of two.
            let largest = energies.iter().fold(0.0f64, |largest, energies| largest.max(energies[0]));
            let square = |outputs: f64| ((largest / outputs).log2() / 2.0).round().exp2().powi(2);
            let sum = |at: usize| energies.iter().map(|of| square(of[0]) * of[at]).sum::<f64>();
            let [outputs, before, after] = [0, 1, 2].map(sum);
            for linear in members {
                let error = linear.error.unwrap();
                let near = |said: f64, energy: f64| (said / (energy / outputs).sqrt() - 1.0).abs() < 1e-5;
                assert!(near(error.quantized, before) && near(error.compensated, after), "{} {error:?}", linear.name);
                assert!(error.bound <= error.compensated && error.compensated < error.quantized);
            }
        }
    }
}

#[test]
fn an_a_is_the_same_in_every_file_and_once_in_memory() {
    let (folder, report) = compensated();
    let adapter = read_adapter(folder).unwrap();
    for linear in &report.linears {
        let module = linear.name.rsplit('.').next().unwrap();
        let expected = GROUPS.iter().find(|group| group.contains(&module)).unwrap();
        let mut shared: Vec<&str> =
            linear.shared_with.iter().map(|name| name.rsplit('.').next().unwrap()).chain([module]).collect();
        shared.sort_unstable();
        let mut modules = expected.to_vec();
        modules.sort_unstable();
        assert_eq!(shared, modules, "{}", linear.name);
        let factors = &adapter.linears[&linear.name].factors;
        assert_eq!((factors.rank(), linear.rank), (8, 8));
        for other in &linear.shared_with {
            assert!(factors.a() == adapter.linears[other].factors.a(), "{} and {other}", linear.name);
        }
    }
    let bits = bits_of(&adapter, &report.linears);
    assert_eq!(report.summary.bytes, bits.div_ceil(8));
    let planned = plan_compensation(&job(&compressed().root.path().join("planned"), grouped(8))).unwrap();
    assert_eq!(planned.bytes, report.summary.bytes);
    let apart = plan_compensation(&job(&compressed().root.path().join("planned"), EoraRecipe::uniform(8))).unwrap();
    assert!(planned.bytes < apart.bytes && planned.disk.needed_bytes == apart.disk.needed_bytes);

    let apart = compressed().root.path().join("apart");
    run(&job(&apart, EoraRecipe::uniform(8))).unwrap();
    let bytes = |choice: CompensationChoice| load_with(&compressed().model, choice).memory_bytes();
    // Rows of A come in panels of 32: two of three for query, key and value, and one of two for gate and up, are not there.
    let (once, each) = (bytes(part(folder, None)), bytes(part(&apart, None)));
    let blocks = report.linears.len() / 7;
    assert!(each - once >= blocks * 3 * 32 * 256 * 2, "{each} {once}");

    let none = perplexity(CompensationChoice::default());
    let (some, all) = (perplexity(part(folder, Some(2))), perplexity(part(folder, None)));
    assert!(all < some && some < none, "{all} {some} {none}");
}

#[test]
fn a_compression_solves_the_same_and_an_interrupted_job_ends_in_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let (folder, whole) = compensated();
    let factors = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let together = Recipe { eora: Some(grouped(8)), ..compression(&root.path().join("together")) };
    let report = compress(&together, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    assert!(factors(&together.out.join("eora")) == factors(folder));
    let bits: u64 = report.linears.iter().map(|linear| linear.stored_bits).sum();
    let weights: usize = report.linears.iter().map(|linear| linear.rows * linear.columns).sum();
    assert!((report.summary.bits_per_weight - bits as f64 / weights as f64).abs() < 1e-9);
    let inspected =
        [&together.out, &compressed().model].map(|folder| inspect(folder).unwrap().bits_per_weight.unwrap());
    let of_factors = whole.summary.bits_per_weight;
    assert!((inspected[0] - inspected[1] - of_factors).abs() < 1e-9, "{inspected:?} {of_factors}");

    let recipe = job(&root.path().join("eora"), grouped(8));
    let outcome = interrupted(2, |cancel, progress| compensate(&recipe, &backend(), cancel, progress));
    assert_eq!(outcome.unwrap_err().code, ErrorCode::Cancelled);
    let other = run(&CompensateRecipe { eora: EoraRecipe::uniform(8), ..recipe.clone() }).unwrap_err();
    assert_eq!(other.code, ErrorCode::ResumeMismatch);
    assert!(other.message.contains("eora.grouped"), "{other}");
    let resumed = run(&recipe).unwrap();
    assert!(factors(&recipe.out) == factors(folder));
    let facts = |report: &CompensationReport| serde_json::to_string(&report.linears).unwrap();
    assert!(facts(&resumed) == facts(whole));
}

#[test]
fn codes_budgets_biases_and_both_inputs_go_together_with_a_shared_a() {
    let root = tempfile::tempdir().unwrap();
    let none = perplexity(CompensationChoice::default());
    let budget = RankBudget::Bytes(compensated().1.summary.bytes);
    let allocation = AllocationRecipe { budget, min_rank: 0, multiple: 4, weights: RankWeights::Outputs };
    for (name, eora) in [
        ("coded-4", EoraRecipe { factor_bits: 4, ..grouped(8) }),
        ("divided", EoraRecipe { allocation: Some(allocation), ..grouped(24) }),
        ("affine", EoraRecipe { affine: true, ..grouped(8) }),
        ("mixed", EoraRecipe { inputs: EoraInputs::Mixed { mismatch: 0.5 }, ..grouped(8) }),
        ("lorc", EoraRecipe { solver: "lorc".to_owned(), ..grouped(8) }),
        (
            "equal",
            EoraRecipe {
                allocation: Some(AllocationRecipe { weights: RankWeights::Equal, ..allocation }),
                ..grouped(24)
            },
        ),
        ("awq", grouped(8)),
    ] {
        let mut recipe = job(&root.path().join(name), eora);
        if name == "awq" {
            // Scales are folded into the norms before query, key and value, and gate and up.
            let folded = Recipe { method: "awq".to_owned(), ..compression(&root.path().join("folded")) };
            compress(&folded, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
            recipe.compressed = folded.out;
        }
        let report = run(&recipe).unwrap();
        let adapter = read_adapter(&recipe.out).unwrap();
        assert_eq!(report.summary.bytes, bits_of(&adapter, &report.linears).div_ceil(8), "{name}");
        for linear in &report.linears {
            let factors = adapter.linears.get(&linear.name).map(|entry| &entry.factors);
            assert_eq!(factors.map_or(0, LowRank::rank), linear.rank, "{name}");
            for other in &linear.shared_with {
                let others = adapter.linears.get(other).map(|entry| &entry.factors);
                assert!(factors.map(LowRank::a) == others.map(LowRank::a), "{name}: {} and {other}", linear.name);
            }
        }
        if name == "awq" {
            let held = report.summary.compensation.unwrap().hold_out.unwrap();
            assert!(held.compensated < held.quantized, "{held:?}");
            continue;
        }
        if ["divided", "equal"].contains(&name) {
            assert!(report.summary.bytes <= compensated().1.summary.bytes);
            let ranks: Vec<usize> = report.linears.iter().map(|linear| linear.rank).collect();
            assert!(ranks.iter().any(|&rank| rank != ranks[0]), "{ranks:?}");
        }
        let found = perplexity(part(&recipe.out, None));
        assert!(found.is_finite() && found < none, "{name}: {found} {none}");
    }
}
