//! The decoder against published values and against itself: backends, levels, batches, adapters.

use std::path::PathBuf;

use kintsugi_checkpoint::{Checkpoint, read_adapter};
use kintsugi_kernels::{Kernels, PAGE_POSITIONS};
use kintsugi_model::{
    Backend, Batch, CandleBackend, CompensationChoice, CpuBackend, GenerateOptions, Generation, Model, Precision,
    SamplingOptions, Session,
};
use kintsugi_runtime::{CancelToken, CpuLevel, ErrorCode, Progress, ThreadPool};

fn assets(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

fn load<B: Backend>(name: &str, backend: B) -> Model<B> {
    let checkpoint = Checkpoint::open(&assets(name)).unwrap();
    Model::load(&checkpoint, backend, &CompensationChoice::default(), &CancelToken::new(), &Progress::new()).unwrap()
}

fn cpu(level: CpuLevel, precision: Precision) -> CpuBackend {
    CpuBackend::with(Kernels::new(level).unwrap(), precision, ThreadPool::global())
}

fn best() -> CpuBackend {
    cpu(CpuLevel::best(), Precision::F32)
}

fn perplexity<B: Backend>(model: &Model<B>, text: &str, length: usize, adapter: Option<&str>) -> (f64, u64) {
    let text = std::fs::read_to_string(assets("text").join(text)).unwrap();
    let result = model.perplexity(&text, length, adapter, &CancelToken::new(), &Progress::new()).unwrap();
    (result.perplexity, result.tokens)
}

/// Published perplexities (torch, float32) of the models in `assets/`, by text and window length.
const PUBLISHED: [(&str, &str, usize, u64, f64); 5] = [
    ("llama-7m", "eval-wikitext.txt", 256, 88_995, 100.61246),
    ("llama-7m", "eval-stories.txt", 512, 55_188, 17.52204),
    ("llama-7m", "eval-shakespeare.txt", 256, 25_500, 88.04405),
    ("tinystories-656k", "eval-stories.txt", 256, 48_195, 34.87576),
    ("tinystories-656k", "eval-shakespeare.txt", 512, 30_149, 535.05574),
];

fn published_on<B: Backend + Copy>(backend: B) {
    for name in ["llama-7m", "tinystories-656k"] {
        let model = load(name, backend);
        for (_, text, length, tokens, expected) in PUBLISHED.iter().filter(|row| row.0 == name) {
            let (found, predicted) = perplexity(&model, text, *length, None);
            assert_eq!(predicted, *tokens, "{name} {text}");
            assert!((found / expected - 1.0).abs() < 1e-3, "{name} {text}: {found}, published {expected}");
        }
    }
}

#[test]
fn perplexities_equal_the_published_ones_on_our_kernels() {
    published_on(best());
}

#[test]
fn perplexities_equal_the_published_ones_on_candle() {
    published_on(CandleBackend);
}

#[test]
fn adapters_give_the_published_perplexities() {
    let mut model = load("llama-7m", best());
    for name in ["shakespeare", "python"] {
        model.add_adapter(name, &read_adapter(&assets("adapters").join(name)).unwrap()).unwrap();
    }
    for (adapter, expected) in [(None, 88.044), (Some("shakespeare"), 51.198), (Some("python"), 89.819)] {
        let (found, _) = perplexity(&model, "eval-shakespeare.txt", 256, adapter);
        assert!((found / expected - 1.0).abs() < 1e-3, "{adapter:?}: {found}, published {expected}");
    }
    let text = "x ".repeat(600);
    let unknown = model.perplexity(&text, 256, Some("pyton"), &CancelToken::new(), &Progress::new()).unwrap_err();
    assert_eq!(unknown.code, ErrorCode::AdapterUnknown);
    assert!(unknown.hint.contains("python"));
}

/// Logits of every row of a prompt, prefilled in one batch.
fn logits<B: Backend>(model: &Model<B>, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(model).unwrap();
    let mut pages = Vec::new();
    session.pages.extend(&mut pages, tokens.len());
    let mut batch = Batch::new();
    batch.push(tokens.len(), 0, pages, None);
    model.forward(&mut session, tokens, &batch, &CancelToken::new()).unwrap();
    model.logits(&mut session, 0..tokens.len()).unwrap().into_owned()
}

#[test]
fn every_level_agrees_with_candle() {
    let reference = load("llama-7m", CandleBackend);
    let text = std::fs::read_to_string(assets("text/eval-shakespeare.txt")).unwrap();
    let tokens = reference.tokenizer().encode(&text[..1200], false).unwrap();
    let tokens = &tokens[..tokens.len().min(200)];
    let expected = logits(&reference, tokens);
    let scale = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    for level in CpuLevel::available() {
        // f32: rounding in another order. exact: activations rounded to bf16 (8 bits) before each of 57 products.
        for (precision, budget) in [(Precision::F32, 2e-5), (Precision::Exact, 2e-2)] {
            let found = logits(&load("llama-7m", cpu(level, precision)), tokens);
            let worst = found.iter().zip(&expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst / scale <= budget, "{level:?} {precision:?}: {}", worst / scale);
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_or_on_how_it_was_prefilled() {
    let model = load("tinystories-656k", cpu(CpuLevel::best(), Precision::Exact));
    let tokens: Vec<u32> = (0..150).map(|i| (i * 37 + 11) % 2000).collect();
    let alone = logits(&model, &tokens);
    let vocabulary = model.spec().vocabulary_size;

    // Beside another sequence, whose pages lie between its own.
    let mut session = Session::new(&model).unwrap();
    let other: Vec<u32> = (0..90).map(|i| (i * 53 + 5) % 2000).collect();
    let needed = tokens.len().div_ceil(PAGE_POSITIONS) as u32;
    let mut batch = Batch::new();
    batch.push(other.len(), 0, (0..2).map(|page| 2 * page + 1).collect(), None);
    batch.push(tokens.len(), 0, (0..needed).map(|page| 2 * page).collect(), None);
    model.forward(&mut session, &[other.as_slice(), &tokens].concat(), &batch, &CancelToken::new()).unwrap();
    let rows = other.len()..other.len() + tokens.len();
    assert_eq!(&*model.logits(&mut session, rows).unwrap(), alone, "batched");

    // In pieces, the last of them token by token.
    let mut session = Session::new(&model).unwrap();
    let pages: Vec<u32> = (0..needed).rev().collect();
    let mut done = 0;
    for rows in [70, 1, 50, 27, 1, 1] {
        let mut batch = Batch::new();
        batch.push(rows, done, pages.clone(), None);
        model.forward(&mut session, &tokens[done..done + rows], &batch, &CancelToken::new()).unwrap();
        let found = model.logits(&mut session, 0..rows).unwrap();
        assert_eq!(&*found, &alone[done * vocabulary..(done + rows) * vocabulary], "rows {done}.. in pieces");
        done += rows;
    }
}

fn continuation<B: Backend>(model: Model<B>, sampling: SamplingOptions, tokens: usize) -> (String, Vec<u32>) {
    let options = GenerateOptions { max_tokens: tokens, sampling, stop: Vec::new(), adapter: None, ignore_end: false };
    let mut generation = Generation::new(model.into(), "Once upon a time", options).unwrap();
    let (mut text, mut ids) = (String::new(), Vec::new());
    while let Some(piece) = generation.next_piece(&CancelToken::new()).unwrap() {
        text.push_str(&piece.text);
        ids.push(piece.token);
    }
    (text, ids)
}

#[test]
fn greedy_text_is_fluent_and_the_same_on_both_backends() {
    let greedy = SamplingOptions { temperature: 0.0, ..SamplingOptions::default() };
    let (text, ids) = continuation(load("tinystories-656k", best()), greedy.clone(), 24);
    // What transformers generates from the same prompt.
    assert!(text.starts_with(", a little girl named Lily lived in a small house with her mom"), "{text}");
    let (reference, reference_ids) = continuation(load("tinystories-656k", CandleBackend), greedy, 24);
    assert_eq!((text, ids), (reference, reference_ids));
}

#[test]
fn a_seed_repeats_a_sampled_text() {
    let sampling = |seed| SamplingOptions { temperature: 1.0, top_p: 0.95, seed: Some(seed), ..Default::default() };
    let once = continuation(load("tinystories-656k", best()), sampling(7), 20);
    assert_eq!(once, continuation(load("tinystories-656k", best()), sampling(7), 20));
    assert_ne!(once, continuation(load("tinystories-656k", best()), sampling(8), 20));
}

#[test]
fn a_cancelled_model_stops_with_its_own_code() {
    let model = load("tinystories-656k", best());
    let cancel = CancelToken::new();
    cancel.cancel();
    let text = "once upon a time ".repeat(100);
    let error = model.perplexity(&text, 64, None, &cancel, &Progress::new()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Cancelled);
}
