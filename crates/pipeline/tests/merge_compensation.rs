//! The compensation of a compressed model and task adapters as one adapter, and merging by the statistics that the
//! compression has saved.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::common::backend;
use crate::merges::{assets as adapters, recipe, refused, relative, run, sum, updates, write_adapter};
use kintsugi_checkpoint::{AdapterFolder, Checkpoint, read_adapter};
use kintsugi_merge::{RankRule, ScaleRule};
use kintsugi_model::{Batch, CompensationChoice, Model, Session};
use kintsugi_pipeline::{MergeRecipe, RankPadding, compress, plan_merge};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress};
use kintsugi_weights::ElementType;

const EORA_RANK: usize = 8;

/// The small Llama in 3 bits with its compensation, and the statistics of its calibration. Made once.
struct Compressed {
    _folder: tempfile::TempDir,
    model: PathBuf,
    statistics: PathBuf,
}

fn compressed() -> &'static Compressed {
    static MADE: OnceLock<Compressed> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (model, statistics) = (folder.path().join("w3"), folder.path().join("statistics.safetensors"));
        let mut recipe = crate::common::recipe(&crate::common::assets("llama-7m"), &model, "rtn", 3, EORA_RANK);
        recipe.save_statistics = Some(statistics.clone());
        let calibration = recipe.calibration.as_mut().unwrap();
        (calibration.sources[0].sequences, calibration.length) = (8, 128);
        compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        Compressed { _folder: folder, model, statistics }
    })
}

fn task(name: &str) -> PathBuf {
    adapters().join(name)
}

/// Logits of every position of a short text, with an adapter beside what the model itself has.
fn logits(model: &Path, compensation: bool, adapter: &Path) -> Vec<f64> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let (cancel, progress) = (CancelToken::new(), Progress::new());
    let choice = CompensationChoice { own: compensation, ..CompensationChoice::nothing() };
    let mut model = Model::load(&checkpoint, backend(), &choice, &cancel, &progress).unwrap();
    model.add_adapter("a", &read_adapter(adapter).unwrap()).unwrap();
    let text = fs::read_to_string(crate::common::assets("text/eval-shakespeare.txt")).unwrap();
    let mut tokens = model.tokenizer().encode(&text[..400], false).unwrap();
    tokens.truncate(64);
    let mut session = Session::new(&model).unwrap();
    let mut batch = Batch::new();
    batch.push(tokens.len(), 0, (0..8).collect(), Some(model.adapter_index("a").unwrap()));
    model.forward(&mut session, &tokens, &batch, &cancel).unwrap();
    model.logits(&mut session, 0..tokens.len()).unwrap().iter().map(|&value| f64::from(value)).collect()
}

fn joined(folders: &[PathBuf], weights: &[f64], method: &str, out: &Path) -> MergeRecipe {
    MergeRecipe { compensation: Some(compressed().model.join("eora")), ..recipe(folders, weights, method, out) }
}

#[test]
fn the_joined_adapter_is_the_compensation_and_the_task_in_one() {
    let out = tempfile::tempdir().unwrap();
    let model = &compressed().model;
    for (name, folders, method) in
        [("one", vec![task("shakespeare")], "cat"), ("both", vec![task("shakespeare"), task("python")], "svd")]
    {
        let weights = vec![0.5; folders.len()];
        let [alone, together] = ["alone", "joined"].map(|kind| out.path().join(format!("{name}-{kind}")));
        run(&recipe(&folders, &weights, method, &alone)).unwrap();
        let report = run(&joined(&folders, &weights, method, &together)).unwrap();
        assert!(report.summary.rank == EORA_RANK + 8 && report.summary.joined.is_none());
        for module in &report.modules {
            let how = module.joined.as_ref().unwrap();
            assert_eq!((how.compensation_rank, how.merged_rank, how.error), (EORA_RANK, 8, 0.0), "{}", module.name);
        }
        let [apart, found] = [logits(model, true, &alone), logits(model, false, &together)];
        let error = relative(&found, &apart);
        assert!(error <= 1e-5, "{name}: {error:e}");
        // The compensation is no trifle, and neither is the task.
        assert!(relative(&logits(model, false, &alone), &apart) > 0.01);
        assert!(relative(&logits(model, false, &model.join("eora")), &apart) > 0.01);
    }
}

#[test]
fn the_compensation_stands_in_the_result_as_it_is() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let of_both = joined(&[task("shakespeare"), task("python")], &[1.0, 0.5], "lego", &path("both"));
    let plan = plan_merge(&of_both, &CancelToken::new()).unwrap();
    assert!(plan.modules.iter().all(|module| module.compensation_rank == EORA_RANK && module.rank == EORA_RANK + 8));
    run(&of_both).unwrap();
    let [eora, both] =
        [of_both.compensation.clone().unwrap(), path("both")].map(|path| AdapterFolder::open(&path).unwrap());
    assert_eq!(both.base_model(), eora.base_model());
    for module in eora.modules() {
        let [part, whole] = [&eora, &both].map(|folder| folder.factors(&module.name).unwrap());
        let (rank, width) = (whole.rank(), whole.in_features());
        assert_eq!(part.a(), &whole.a()[..EORA_RANK * width], "{}", module.name);
        let columns: Vec<f32> = whole.b().chunks_exact(rank).flat_map(|row| row[..EORA_RANK].to_vec()).collect();
        assert_eq!(part.b(), columns, "{}", module.name);
    }
    // vLLM gets a rank that it knows, and an energy target leaves the compensation alone.
    let served = MergeRecipe { padding: RankPadding::Vllm, out: path("served"), ..of_both.clone() };
    assert_eq!(run(&served).unwrap().summary.rank, 16);
    let mut energy = MergeRecipe { method: "svd".into(), padding: RankPadding::None, out: path("energy"), ..of_both };
    energy.options.rank = Some(RankRule::Energy { share: 0.7, most: 16 });
    for module in run(&energy).unwrap().modules {
        let how = module.joined.unwrap();
        assert!(how.compensation_rank == EORA_RANK && module.rank == EORA_RANK + how.merged_rank, "{}", module.name);
    }
}

#[test]
fn a_total_rank_cuts_both_together_and_statistics_say_where() {
    let out = tempfile::tempdir().unwrap();
    let folders = [task("shakespeare"), task("python")];
    let all = [compressed().model.join("eora"), task("shakespeare"), task("python")];
    let target = sum(&all, &[1.0, 0.5, 0.5]);
    let mut errors = Vec::new();
    for calibration in [None, Some(compressed().statistics.clone())] {
        let weighted = calibration.is_some();
        let path = out.path().join(format!("weighted-{weighted}"));
        let cut = MergeRecipe { total_rank: Some(12), calibration, ..joined(&folders, &[0.5, 0.5], "cat", &path) };
        let report = run(&cut).unwrap();
        assert_eq!(report.summary.rank, 12);
        let found = updates(&path);
        for module in &report.modules {
            let how = module.joined.as_ref().unwrap();
            let error = relative(&found[&module.name], &target[&module.name]);
            assert!((error - how.error).abs() <= 1e-5, "{} {error} {}", module.name, how.error);
            assert_eq!(how.weighted_error.is_some(), weighted);
        }
        let flat = |of: &BTreeMap<String, Vec<f64>>| of.values().flatten().copied().collect::<Vec<f64>>();
        let whole = report.summary.joined.unwrap();
        let error = relative(&flat(&found), &flat(&target));
        assert!((error - whole.error).abs() <= 1e-5, "{error} {}", whole.error);
        assert_eq!(whole.weighted_error.is_some(), weighted);
        let picture = fs::read_to_string(path.join("report.svg")).unwrap();
        assert!(picture.contains("before the cut to rank 12"));
        let total: f64 = report.modules.iter().map(|module| module.joined.as_ref().unwrap().error.powi(2)).sum();
        errors.push(total);
    }
    // Plain errors are least without statistics.
    assert!(errors[0] < errors[1], "{errors:?}");
    let path = out.path().join("x");
    let alone = MergeRecipe { total_rank: Some(4), ..recipe(&folders, &[1.0, 1.0], "svd", &path) };
    assert_eq!(refused(&alone, ErrorCode::OptionInvalid).subject, "totalRank");
    // No part is larger than what there is.
    let wide = MergeRecipe { total_rank: Some(4000), ..joined(&folders, &[1.0, 1.0], "cat", &path) };
    assert_eq!(run(&wide).unwrap().summary.rank, EORA_RANK + 16);
}

#[test]
fn a_total_rank_above_the_smaller_side_is_cut_to_it() {
    let out = tempfile::tempdir().unwrap();
    let [eora, first] = [("eora", 2), ("first", 3)].map(|(name, rank)| {
        let folder = out.path().join(name);
        write_adapter(&folder, None, false, 4, rank);
        folder
    });
    for padding in [RankPadding::None, RankPadding::Uniform] {
        for total_rank in [4, 5, 6, 64] {
            let path = out.path().join(format!("{padding:?}-{total_rank}"));
            let mut square = recipe(std::slice::from_ref(&first), &[1.0], "cat", &path);
            (square.compensation, square.total_rank, square.padding) = (Some(eora.clone()), Some(total_rank), padding);
            let plan = plan_merge(&square, &CancelToken::new()).unwrap();
            assert_eq!(plan.modules[0].rank, 4);
            let report = run(&square).unwrap();
            // Nothing is lost: a 4×4 matrix has no more directions.
            assert!(report.summary.rank <= 4 && report.summary.joined.unwrap().error <= 1e-5);
            for (module, update) in sum(&[eora.clone(), first.clone()], &[1.0, 1.0]) {
                assert!(relative(&updates(&path)[&module], &update) <= 1e-5);
            }
        }
    }
}

#[test]
fn what_will_be_cut_is_rounded_once() {
    let out = tempfile::tempdir().unwrap();
    let folders = [task("shakespeare"), task("python")];
    let path = |name: &str| out.path().join(name);
    // With all terms of the sum there is nothing that a merge before the cut may lose but by rounding.
    let cut = |name: &str, factor_type| MergeRecipe {
        total_rank: Some(12),
        factor_type: Some(factor_type),
        ..joined(&folders, &[0.5, 0.5], "cat", &path(name))
    };
    let narrow = run(&cut("bf16", ElementType::Bf16)).unwrap();
    let wide = run(&cut("f32", ElementType::F32)).unwrap();
    for (narrow, wide) in narrow.modules.iter().zip(&wide.modules) {
        assert_eq!(narrow.kept, wide.kept, "{}", narrow.name);
    }
    let [narrow, wide] = [path("bf16"), path("f32")].map(|path| AdapterFolder::open(&path).unwrap());
    for module in wide.modules() {
        let [narrow, wide] = [&narrow, &wide].map(|folder| folder.factors(&module.name).unwrap());
        let rounded = wide.a().iter().map(|&value| ElementType::Bf16.round(value));
        assert!(rounded.eq(narrow.a().iter().copied()), "{}", module.name);
    }
}

/// Weighted errors of all modules.
fn weighted_errors(recipe: &MergeRecipe) -> BTreeMap<String, f64> {
    let report = run(recipe).unwrap();
    assert!(report.summary.weighted_error.is_some());
    let of = |module: kintsugi_pipeline::ModuleMergeReport| (module.name, module.kept.unwrap().weighted_error.unwrap());
    report.modules.into_iter().map(of).collect()
}

#[test]
fn statistics_of_a_compression_weigh_the_errors_of_a_merge() {
    let out = tempfile::tempdir().unwrap();
    let folders = [task("shakespeare"), task("python")];
    let with = |name: &str, method: &str, scale| {
        let mut recipe = recipe(&folders, &[0.5, 0.5], method, &out.path().join(name));
        recipe.options.rank = Some(RankRule::Fixed(4));
        recipe.options.scale = scale;
        recipe.calibration = Some(compressed().statistics.clone());
        recipe
    };
    let best = weighted_errors(&with("svd", "svd", ScaleRule::Method));
    for (method, scale) in [
        ("lego", ScaleRule::Refit),
        ("tsv", ScaleRule::Refit),
        ("ties", ScaleRule::ClosedForm),
        ("svd", ScaleRule::Refit),
    ] {
        let others = weighted_errors(&with(&format!("{method}-{scale:?}"), method, scale));
        for (module, error) in &best {
            assert!(*error <= others[module] * (1.0 + 1e-5), "{method} {module}: {error} {}", others[module]);
        }
    }
    // Against plain svd, by the report of a refit that changes nothing of the directions of B.
    let plain = MergeRecipe { calibration: None, ..with("plain", "svd", ScaleRule::Method) };
    let report = run(&plain).unwrap();
    let weighted = run(&with("again", "svd", ScaleRule::Method)).unwrap();
    assert!(report.summary.weighted_error.is_none() && report.summary.error < weighted.summary.error);

    // What has no statistics is merged by the plain error.
    let refusal = |method: &str, scale| refused(&with("x", method, scale), ErrorCode::OptionInvalid);
    for method in ["cat", "lego", "linear", "dare-ties"] {
        let error = refusal(method, ScaleRule::Method);
        assert!(error.subject == "calibration" && error.message.contains(method), "{error}");
    }
    refusal("cat", ScaleRule::Refit);
    let mut other = with("x", "svd", ScaleRule::Method);
    other.adapters = ["first", "second"].map(|name| crate::merges::vectors().join(name)).to_vec();
    refused(&other, ErrorCode::StatisticsMismatch);
    let mut none = with("x", "svd", ScaleRule::Method);
    none.calibration = Some(compressed().model.join("model.safetensors"));
    refused(&none, ErrorCode::StatisticsMismatch);
    assert_eq!(AdapterFolder::open(&out.path().join("svd")).unwrap().modules()[0].element_type, ElementType::F32);
}
