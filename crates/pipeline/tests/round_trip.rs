//! What is written equals what was in memory, whatever the threads.

use std::path::Path;
use std::sync::Arc;

use crate::common::{assets, backend, load, recipe};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_model::{
    BlockWeights, CpuBackend, DecoderSpec, GenerateOptions, Generation, LoadedModel, Model, ModelWeights,
    SamplingOptions, read_tokenizer,
};
use kintsugi_pipeline::{
    BlockCompressor, CalibrationInput, CalibrationStream, CalibrationTokens, MemoryPlan, Recipe, compress, plan,
};
use kintsugi_runtime::{CancelToken, Progress};

/// Compresses without writing anything.
fn compress_in_memory(recipe: &Recipe) -> Model<CpuBackend> {
    let backend = backend();
    let checkpoint = Checkpoint::open(&recipe.source).unwrap();
    let spec = DecoderSpec::from_config(checkpoint.config()).unwrap();
    let tokenizer = read_tokenizer(&checkpoint, &spec).unwrap();
    let outside = ModelWeights::read(&checkpoint, &spec).unwrap();
    let text = CalibrationTokens::read(recipe.calibration.as_ref().unwrap(), &checkpoint, &spec).unwrap();
    let stream = CalibrationStream::new(&checkpoint, &spec, &text, None).unwrap();
    let memory = MemoryPlan::new(recipe, &checkpoint, &spec, text.tokens().len()).unwrap();
    let mut compressor = BlockCompressor::new(
        recipe,
        &spec,
        &backend,
        CalibrationInput { stream: Some(stream), dense: None, saved: Vec::new() },
        &memory,
    )
    .unwrap();
    let mut model = Model::without_blocks(spec.clone(), backend, tokenizer, &outside).unwrap();
    for block in 0..spec.layers {
        let weights = BlockWeights::read(&checkpoint, &spec, block).unwrap();
        model.push_block(&compressor.compress(block, weights, &CancelToken::new()).unwrap().weights).unwrap();
    }
    model
}

fn evaluation_text() -> String {
    let text = std::fs::read_to_string(assets("text/eval-stories.txt")).unwrap();
    text.chars().take(20_000).collect()
}

fn greedy(model: Arc<Model<CpuBackend>>) -> Vec<u32> {
    let options = GenerateOptions {
        max_tokens: 40,
        sampling: SamplingOptions { temperature: 0.0, ..SamplingOptions::default() },
        stop: Vec::new(),
        adapter: None,
        ignore_end: true,
    };
    let mut generation = Generation::new(model, "Once upon a time", options).unwrap();
    std::iter::from_fn(|| generation.next_piece(&CancelToken::new()).unwrap().map(|piece| piece.token)).collect()
}

fn small(source: &str, out: &Path, bits: u8, rank: usize) -> Recipe {
    let mut recipe = recipe(&assets(source), out, "gptq", bits, rank);
    let calibration = recipe.calibration.as_mut().unwrap();
    calibration.sources[0].sequences = 8;
    calibration.length = 128;
    recipe
}

#[test]
fn the_reloaded_folder_is_the_model_that_was_in_memory() {
    let scratch = tempfile::tempdir().unwrap();
    for (source, bits, rank, symmetric) in
        [("tinystories-656k", 4, 0, false), ("tinystories-656k", 3, 8, true), ("llama-7m", 2, 8, false)]
    {
        let out = scratch.path().join(format!("{source}-{bits}"));
        let mut recipe = small(source, &out, bits, rank);
        recipe.symmetric = symmetric;
        let in_memory = compress_in_memory(&recipe);
        let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        let LoadedModel::Cpu(reloaded) = load(&out) else { panic!("the cpu backend was asked for") };

        let text = evaluation_text();
        let of = |model: &Model<CpuBackend>| {
            model.perplexity(&text, 128, None, &CancelToken::new(), &Progress::new()).unwrap().perplexity
        };
        assert_eq!(of(&in_memory).to_bits(), of(&reloaded).to_bits(), "{source} {bits} bits");
        assert_eq!(greedy(in_memory.into()), greedy(reloaded), "{source} {bits} bits");

        let planned = plan(&Recipe { out: scratch.path().join("other"), ..recipe }).unwrap();
        assert!((planned.bits_per_weight - report.summary.bits_per_weight).abs() < 1e-9);
        assert_eq!(planned.linears.len(), report.linears.len());
        let on_disk: u64 = std::fs::read_dir(&out)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
            .map(|path| std::fs::metadata(path).unwrap().len())
            .sum();
        assert!(on_disk <= report.summary.bytes && report.summary.bytes < on_disk + 2_000_000);
    }
}

#[test]
fn the_same_recipe_writes_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let written = |name: &str| {
        let out = scratch.path().join(name);
        let recipe = small("tinystories-656k", &out, 3, 4);
        compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        ["model.safetensors", "eora/adapter_model.safetensors"].map(|file| std::fs::read(out.join(file)).unwrap())
    };
    assert!(written("first") == written("second"));
}

#[test]
fn true_sequential_capture_compresses_too() {
    let scratch = tempfile::tempdir().unwrap();
    let errors = [false, true].map(|subset| {
        let mut recipe = small("tinystories-656k", &scratch.path().join(subset.to_string()), 3, 0);
        recipe.calibration.as_mut().unwrap().subset = subset;
        let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        report.linears.iter().map(|linear| linear.error.unwrap().quantized).collect::<Vec<_>>()
    });
    // q, k and v of the first block read the same input either way; everything after them does not.
    assert_eq!(errors[0][..3], errors[1][..3]);
    assert_ne!(errors[0][3..], errors[1][3..]);
}
