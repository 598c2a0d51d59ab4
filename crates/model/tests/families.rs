//! Tiny random models of every family against the logits that transformers computes for them.
//! The vectors are made by `__test__/vectors/make_families.py`.
#![allow(clippy::print_stdout, reason = "the deviations are worth a look: cargo test -- --nocapture")]

use std::path::{Path, PathBuf};

use kintsugi_checkpoint::Checkpoint;
use kintsugi_kernels::Kernels;
use kintsugi_model::{
    Backend, Batch, CandleBackend, CompensationChoice, CpuBackend, DecoderSpec, FAMILIES, Model, Precision, Session,
};
use kintsugi_runtime::{CancelToken, CpuLevel, Progress, ThreadPool};
use kintsugi_weights::{Adapter, AdapterEntry, ElementType, LowRank};
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

fn recorded(folder: &Path) -> Recorded {
    serde_json::from_slice(&std::fs::read(folder.join("logits.json")).unwrap()).unwrap()
}

fn load<B: Backend>(folder: &Path, backend: B) -> Model<B> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    Model::load(&checkpoint, backend, &CompensationChoice::default(), &CancelToken::new(), &Progress::new()).unwrap()
}

fn best() -> CpuBackend {
    CpuBackend::with(Kernels::new(CpuLevel::best()).unwrap(), Precision::F32, ThreadPool::global())
}

/// Logits of every row, in passes of the given numbers of rows.
fn logits<B: Backend>(model: &Model<B>, tokens: &[u32], passes: &[usize]) -> Vec<f32> {
    let mut session = Session::new(model).unwrap();
    let mut pages = Vec::new();
    session.pages.extend(&mut pages, tokens.len());
    let (mut done, mut logits) = (0, Vec::new());
    for &rows in passes {
        let mut batch = Batch::new();
        batch.push_part(rows, done, pages.clone(), None, tokens.len());
        model.forward(&mut session, &tokens[done..done + rows], &batch, &CancelToken::new()).unwrap();
        logits.extend_from_slice(&model.logits(&mut session, 0..rows).unwrap());
        done += rows;
    }
    logits
}

/// The largest difference from the recorded logits, as a share of the largest logit.
fn deviation<B: Backend>(folder: &Path, backend: B) -> f32 {
    let recorded = recorded(folder);
    let found = logits(&load(folder, backend), &recorded.tokens, &[recorded.tokens.len()]);
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
    let mut failures = Vec::new();
    for folder in folders() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut worst = deviation(&folder, CandleBackend);
        let mut line = format!("{name}: candle {worst:.1e}");
        for level in CpuLevel::available() {
            let backend = CpuBackend::with(Kernels::new(level).unwrap(), Precision::F32, ThreadPool::global());
            let found = deviation(&folder, backend);
            line += &format!(", {} {found:.1e}", level.name());
            worst = worst.max(found);
        }
        println!("{line}");
        if worst.is_nan() || worst > BUDGET {
            failures.push(line);
        }
    }
    assert!(failures.is_empty(), "beyond {BUDGET:e}:\n{}", failures.join("\n"));
}

#[test]
fn a_row_does_not_depend_on_how_its_sequence_was_cut_in_any_family() {
    for folder in folders() {
        let tokens = recorded(&folder).tokens;
        let model = load(&folder, best());
        let whole = logits(&model, &tokens, &[tokens.len()]);
        for passes in [vec![5, 1, 1, tokens.len() - 7], vec![1; tokens.len()]] {
            assert!(logits(&model, &tokens, &passes) == whole, "{} in {passes:?}", folder.display());
        }
    }
}

/// A random update of every Linear, half of them shrunk by their scaling.
fn adapter(spec: &DecoderSpec) -> Adapter {
    let mut state = 1u32;
    let mut noise = |count: usize| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next()).collect()
    };
    let mut adapter = Adapter::default();
    for block in 0..spec.layers {
        for (place, linear) in spec.linears.iter().enumerate() {
            let (b, a) = (noise(linear.rows * 3), noise(3 * linear.columns));
            let factors = LowRank::new(linear.rows, linear.columns, 3, b, a, ElementType::F32);
            let scaling = if place % 2 == 0 { 0.5 } else { 0.25 };
            adapter.linears.insert(spec.linear_name(block, linear), AdapterEntry { factors, scaling });
        }
    }
    adapter
}

/// Logits of two sequences in one batch, the first of them with the adapter.
fn two_sequences<B: Backend>(model: &Model<B>, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(model).unwrap();
    let mut batch = Batch::new();
    batch.push(tokens.len(), 0, vec![1], Some(0));
    batch.push(tokens.len(), 0, vec![0], None);
    model.forward(&mut session, &[tokens, tokens].concat(), &batch, &CancelToken::new()).unwrap();
    model.logits(&mut session, 0..2 * tokens.len()).unwrap().into_owned()
}

#[test]
fn adapters_reach_every_linear_of_their_rows_and_no_other_row() {
    for folder in folders() {
        let tokens = recorded(&folder).tokens;
        let (mut model, mut reference) = (load(&folder, best()), load(&folder, CandleBackend));
        let plain = logits(&model, &tokens, &[tokens.len()]);
        let adapter = adapter(model.spec());
        model.add_adapter("noise", &adapter).unwrap();
        reference.add_adapter("noise", &adapter).unwrap();
        let found = two_sequences(&model, &tokens);
        let (adapted, untouched) = found.split_at(plain.len());
        assert!(untouched == plain, "{}", folder.display());
        assert!(adapted != plain, "{}", folder.display());
        let expected = two_sequences(&reference, &tokens);
        let scale = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let worst = found.iter().zip(&expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / scale;
        assert!(worst <= 2e-5, "{}: {worst:e}", folder.display());
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
