//! What the integration tests and benches of the pipeline share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod reference;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kintsugi_compress::AxisRule;
use kintsugi_kernels::Kernels;
use kintsugi_model::{CompensationChoice, CpuBackend, LoadOptions, LoadedModel, Precision};
use kintsugi_pipeline::{ActivationPlace, CalibrationKind, CalibrationRecipe, CalibrationSource, EoraRecipe, Recipe};
use kintsugi_runtime::{CancelToken, CpuLevel, Progress, ProgressSnapshot, ThreadPool};

pub(crate) fn assets(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

pub(crate) fn backend() -> CpuBackend {
    CpuBackend::with(Kernels::new(CpuLevel::best()).unwrap(), Precision::F32, ThreadPool::global())
}

/// The settings of the published tables: group 64, asymmetric, static groups, act-order, damping 0.01, the first
/// 64 sequences of 256 tokens.
pub(crate) fn recipe(source: &Path, out: &Path, method: &str, bits: u8, rank: usize) -> Recipe {
    Recipe {
        source: source.to_path_buf(),
        out: out.to_path_buf(),
        method: method.to_owned(),
        rounding: "rtn".to_owned(),
        bits,
        bit_budget: None,
        group_axis: AxisRule::Input,
        overrides: Vec::new(),
        format: "auto".to_owned(),
        group_size: Some(64),
        symmetric: false,
        clip: false,
        act_order: true,
        static_groups: true,
        damping: 0.01,
        scale_type: None,
        calibration: Some(CalibrationRecipe {
            sources: vec![CalibrationSource {
                file: assets("text/calibration-wikipedia.txt"),
                kind: CalibrationKind::Text,
                field: "text".to_owned(),
                sequences: 64,
                seed: None,
                hold_out: 0,
                weight: 1.0,
            }],
            length: 256,
            subset: false,
            activations: ActivationPlace::Auto,
        }),
        save_statistics: None,
        eora: (rank > 0).then(|| EoraRecipe::uniform(rank)),
        fresh: false,
        memory: None,
    }
}

pub(crate) fn load(path: &Path) -> LoadedModel {
    load_with(path, CompensationChoice::default())
}

pub(crate) fn load_with(path: &Path, compensation: CompensationChoice) -> LoadedModel {
    let (backend, precision) = ("cpu".to_owned(), Precision::F32);
    let options = LoadOptions { backend, precision, compensation, adapters: Vec::new() };
    LoadedModel::load(path, &options, &CancelToken::new(), &Progress::new()).unwrap()
}

pub(crate) fn perplexity(path: &Path, text: &str, length: usize) -> f64 {
    let text = std::fs::read_to_string(assets("text").join(text)).unwrap();
    load(path).perplexity(&text, length, None, &CancelToken::new(), &Progress::new()).unwrap().perplexity
}

/// Every file of a folder and of `eora/` in it but the report, which has times in it.
pub(crate) fn bytes_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(bytes_of(&path).into_iter().map(|(name, bytes)| (PathBuf::from("eora").join(name), bytes)));
        } else if path.file_name().unwrap() != "report.json" {
            files.insert(path.file_name().unwrap().into(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Runs a job, and disturbs it when its progress has come to a point.
pub(crate) fn disturbed<T>(
    there: impl Fn(&ProgressSnapshot) -> bool + Sync,
    disturb: impl FnOnce(&CancelToken) + Send,
    job: impl FnOnce(&CancelToken, &Progress) -> T,
) -> T {
    let (cancel, progress, over) = (CancelToken::new(), Progress::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) && !there(&progress.snapshot()) {
                std::thread::sleep(Duration::from_micros(50));
            }
            disturb(&cancel);
        });
        let outcome = job(&cancel, &progress);
        over.store(true, Ordering::Relaxed);
        outcome
    })
}

/// Runs a job until so many units of it are done, then cancels it.
pub(crate) fn interrupted<T>(done: u64, job: impl FnOnce(&CancelToken, &Progress) -> T) -> T {
    disturbed(|reading| reading.done >= done, CancelToken::cancel, job)
}
