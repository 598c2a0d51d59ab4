//! Tiny random models of every family against the logits that transformers computes for them.
//! The vectors are made by `__test__/vectors/make_families.py`.

use std::path::{Path, PathBuf};

use kintsugi_checkpoint::Checkpoint;
use kintsugi_kernels::Kernels;
use kintsugi_model::{Backend, Batch, CandleBackend, CpuBackend, FAMILIES, Model, Precision, Session};
use kintsugi_runtime::{CancelToken, CpuLevel, Progress, ThreadPool};
use serde::Deserialize;

#[derive(Deserialize)]
struct Recorded {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn folders() -> Vec<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/families");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

/// The largest difference from the recorded logits, as a share of the largest logit.
fn deviation<B: Backend>(folder: &Path, backend: B) -> f32 {
    let recorded: Recorded = serde_json::from_slice(&std::fs::read(folder.join("logits.json")).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let model = Model::load(&checkpoint, backend, true, &CancelToken::new(), &Progress::new()).unwrap();
    let mut session = Session::new(&model).unwrap();
    let mut pages = Vec::new();
    session.pages.extend(&mut pages, recorded.tokens.len());
    let mut batch = Batch::new();
    batch.push(recorded.tokens.len(), 0, pages, None);
    model.forward(&mut session, &recorded.tokens, &batch, &CancelToken::new()).unwrap();
    let found = model.logits(&mut session, 0..recorded.tokens.len()).unwrap();
    let expected = recorded.logits.concat();
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(scale > 1.0, "logits this small show nothing");
    found.iter().zip(&expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / scale
}

#[test]
fn logits_are_those_of_transformers() {
    // f32 rounding in another order, through two blocks.
    const BUDGET: f32 = 1e-5;
    for folder in folders() {
        let candle = deviation(&folder, CandleBackend);
        assert!(candle <= BUDGET, "{} on candle: {candle:e}", folder.display());
        for level in CpuLevel::available() {
            let backend = CpuBackend::with(Kernels::new(level).unwrap(), Precision::F32, ThreadPool::global());
            let found = deviation(&folder, backend);
            assert!(found <= BUDGET, "{} on {level:?}: {found:e}", folder.display());
        }
    }
}

#[test]
fn every_family_has_a_vector() {
    let recorded: Vec<String> = folders()
        .iter()
        .map(|folder| Checkpoint::open(folder).unwrap().config()["architectures"][0].as_str().unwrap().to_owned())
        .collect();
    for family in FAMILIES {
        assert!(recorded.iter().any(|name| name == family.architecture), "{}", family.architecture);
    }
}
