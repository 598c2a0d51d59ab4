//! Recipes, folders and dense updates that the tests of merging share.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kintsugi_checkpoint::{AdapterDescription, AdapterFolder, AdapterWriter, MergedModule, ModuleKind};
use kintsugi_merge::MergeOptions;
use kintsugi_pipeline::{MergeRecipe, MergeReport, RankPadding, WholeModuleRule, merge_adapters};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, ThreadPool};
use kintsugi_testkit::Random;
use kintsugi_weights::{ElementType, LowRank};

pub(crate) fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/merge")
}

pub(crate) fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/adapters")
}

pub(crate) fn recipe(adapters: &[PathBuf], weights: &[f64], method: &str, out: &Path) -> MergeRecipe {
    MergeRecipe {
        adapters: adapters.to_vec(),
        weights: weights.to_vec(),
        out: out.to_path_buf(),
        method: method.to_string(),
        options: MergeOptions::default(),
        factor_type: None,
        padding: RankPadding::Uniform,
        allow_different_bases: false,
        calibration: None,
        compensation: None,
        total_rank: None,
        modules_to_save: WholeModuleRule::Equal,
        expected: BTreeMap::new(),
    }
}

pub(crate) fn run_on(recipe: &MergeRecipe, threads: usize) -> Result<MergeReport, Error> {
    let pool = ThreadPool::with_threads(threads);
    merge_adapters(recipe, &pool, &CancelToken::new(), &Progress::new())
}

pub(crate) fn run(recipe: &MergeRecipe) -> Result<MergeReport, Error> {
    run_on(recipe, 2)
}

/// `scaling · B A`.
pub(crate) fn dense(factors: &LowRank, scaling: f64) -> Vec<f64> {
    let (r, n) = (factors.rank(), factors.in_features());
    let mut out = vec![0.0; factors.out_features() * n];
    for (i, row) in out.chunks_exact_mut(n).enumerate() {
        for l in 0..r {
            let b = f64::from(factors.b()[i * r + l]) * scaling;
            row.iter_mut().zip(&factors.a()[l * n..]).for_each(|(sum, &a)| *sum += b * f64::from(a));
        }
    }
    out
}

pub(crate) fn updates(folder: &Path) -> BTreeMap<String, Vec<f64>> {
    let folder = AdapterFolder::open(folder).unwrap();
    let update = |module: &str, scaling| dense(&folder.factors(module).unwrap(), scaling);
    folder.modules().iter().map(|module| (module.name.clone(), update(&module.name, module.scaling))).collect()
}

pub(crate) fn relative(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let wrong = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    wrong / norm(&mut expected.iter().copied()).max(f64::MIN_POSITIVE)
}

/// The exact weighted sum of folders.
pub(crate) fn sum(folders: &[PathBuf], weights: &[f64]) -> BTreeMap<String, Vec<f64>> {
    let mut all: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (folder, weight) in folders.iter().zip(weights) {
        for (module, update) in updates(folder) {
            let sum = all.entry(module).or_insert_with(|| vec![0.0; update.len()]);
            sum.iter_mut().zip(update).for_each(|(sum, value)| *sum += weight * value);
        }
    }
    all
}

/// An adapter of one square module.
pub(crate) fn write_adapter(folder: &Path, base: Option<&str>, fan_in_fan_out: bool, size: usize, rank: usize) {
    let description = AdapterDescription {
        base_model: base.map(str::to_string),
        task_type: None,
        fan_in_fan_out,
        targets_by_suffix: true,
        element_type: ElementType::F32,
        modules_to_save: Vec::new(),
    };
    let (name, kind) = ("model.layers.0.mlp.up_proj".to_string(), ModuleKind::Linear);
    let module = MergedModule { name, kind, out_features: size, in_features: size, rank };
    let mut random = Random::new(size as u64);
    let mut values = || (0..size * rank).map(|_| random.normal() as f32).collect::<Vec<_>>();
    let factors = LowRank::new(size, size, rank, values(), values(), ElementType::F32);
    let mut writer = AdapterWriter::create(folder, description, vec![module], &[]).unwrap();
    writer.write(Some(&factors)).unwrap();
    writer.finish().unwrap();
}

#[track_caller]
pub(crate) fn refused(recipe: &MergeRecipe, code: ErrorCode) -> Error {
    let parent = recipe.out.parent().unwrap();
    let before = fs::read_dir(parent).unwrap().count();
    let error = run(recipe).unwrap_err();
    assert_eq!(error.code, code, "{error}");
    assert!(!error.subject.is_empty() && !error.hint.is_empty(), "{error}");
    assert_eq!(fs::read_dir(parent).unwrap().count(), before, "something was written");
    error
}
