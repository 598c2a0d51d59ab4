//! Models that come from GGUF files compute what they computed before they were written as one.
#![allow(clippy::print_stdout, reason = "the deviations are worth a look: cargo test -- --nocapture")]

use std::path::{Path, PathBuf};

use kintsugi_checkpoint::Checkpoint;
use kintsugi_checkpoint::gguf::{GgufPlan, GgufSummary, GgufType, write_gguf};
use kintsugi_kernels::Kernels;
use kintsugi_model::{
    Backend, Batch, CandleBackend, CompensationChoice, CpuBackend, Model, Precision, Session, Tokenizer,
};
use kintsugi_runtime::{CancelToken, CpuLevel, Error, ErrorCode, Progress, ThreadPool};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Recorded {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn export(source: &Path, type_name: &str, target: &Path) -> Result<GgufSummary, Error> {
    let plan = GgufPlan::new(GgufType::written(type_name).unwrap());
    write_gguf(&Checkpoint::open(source)?, &plan, target, &CancelToken::new(), &Progress::new())
}

fn load<B: Backend>(path: &Path, backend: B) -> Model<B> {
    let checkpoint = Checkpoint::open(path).unwrap();
    Model::load(&checkpoint, backend, &CompensationChoice::default(), &CancelToken::new(), &Progress::new()).unwrap()
}

fn best() -> CpuBackend {
    CpuBackend::with(Kernels::new(CpuLevel::best()).unwrap(), Precision::F32, ThreadPool::global())
}

fn logits<B: Backend>(model: &Model<B>, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(model).unwrap();
    let mut pages = Vec::new();
    session.pages.extend(&mut pages, tokens.len());
    let mut batch = Batch::new();
    batch.push_part(tokens.len(), 0, pages, None, tokens.len());
    model.forward(&mut session, tokens, &batch, &CancelToken::new()).unwrap();
    model.logits(&mut session, 0..tokens.len()).unwrap().into_owned()
}

/// The largest difference, as a share of the largest value.
fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    found.iter().zip(expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / scale
}

/// The folder of a family with a tokenizer that GGUF can hold (that of the vectors is of whole words), and with those
/// settings that GGUF takes for granted. Gives whether settings were changed.
fn prepared(family: &Path, target: &Path) -> bool {
    std::fs::create_dir_all(target).unwrap();
    std::fs::copy(family.join("model.safetensors"), target.join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(family.join("config.json")).unwrap()).unwrap();
    let is_gemma = config["model_type"].as_str().unwrap().starts_with("gemma");
    let has_window = config["use_sliding_window"] == true;
    let changed = is_gemma || has_window || config["scale_attn_weights"] == false;
    if has_window {
        config["use_sliding_window"] = json!(false);
        config["layer_types"] = Value::Null;
    }
    if config["scale_attn_weights"] == false {
        config["scale_attn_weights"] = json!(true);
    }
    if is_gemma {
        config["query_pre_attn_scalar"] = config["head_dim"].clone();
        let full = if config["model_type"] == "gemma2" { "full_attention" } else { "sliding_attention" };
        config["layer_types"] = json!(["sliding_attention", full]);
    }
    std::fs::write(target.join("config.json"), config.to_string()).unwrap();
    let rows = config["vocab_size"].as_u64().unwrap();
    let letters = (0..rows).map(|id| (char::from(b'!' + id as u8).to_string(), json!(id)));
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "vocab": letters.collect::<serde_json::Map<_, _>>(), "merges": [] },
    });
    std::fs::write(target.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    changed
}

#[test]
fn every_family_computes_the_same_from_gguf() {
    // As in the comparison of the folders with transformers: f32 rounding in another order.
    const BUDGET: f32 = 1e-5;
    // What these families ask for GGUF does not say.
    const REFUSED: &[(&str, &str)] =
        &[("llama-dynamic", "rope_scaling"), ("qwen3", "model.layers.0.self_attn.o_proj.bias")];
    let scratch = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for entry in std::fs::read_dir(repository("__test__/vectors/families")).unwrap() {
        let family = entry.unwrap().path();
        let name = family.file_name().unwrap().to_string_lossy().into_owned();
        let (folder, file) = (scratch.path().join(&name), scratch.path().join(format!("{name}.gguf")));
        let changed = prepared(&family, &folder);
        let result = export(&folder, "F32", &file);
        if let Some((_, field)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            let error = result.expect_err(&name);
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ConfigUnsupported, *field), "{name}: {error}");
            continue;
        }
        if let Err(error) = result {
            failures.push(format!("{name}: {error}"));
            continue;
        }
        let recorded: Recorded = serde_json::from_slice(&std::fs::read(family.join("logits.json")).unwrap()).unwrap();
        let expected =
            if changed { logits(&load(&folder, CandleBackend), &recorded.tokens) } else { recorded.logits.concat() };
        let [candle, cpu] =
            [logits(&load(&file, CandleBackend), &recorded.tokens), logits(&load(&file, best()), &recorded.tokens)]
                .map(|found| deviation(&found, &expected));
        println!("{name}: candle {candle:.1e}, cpu {cpu:.1e}");
        if [candle, cpu].iter().any(|found| found.is_nan() || *found > BUDGET) {
            failures.push(format!("{name}: candle {candle:.1e}, cpu {cpu:.1e}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn codes_of_every_written_type_run_through_the_kernels() {
    let scratch = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..24).map(|place| place * 131 % 4096).collect();
    for type_name in ["Q8_0", "Q6_K", "Q4_K", "Q4_1", "Q4_0", "F16"] {
        let file = scratch.path().join(format!("{type_name}.gguf"));
        export(&repository("assets/llama-7m"), type_name, &file).unwrap();
        // The reference multiplies the dequantized matrix, the kernels its codes.
        let reference = logits(&load(&file, CandleBackend), &tokens);
        let found = deviation(&logits(&load(&file, best()), &tokens), &reference);
        println!("{type_name}: {found:.1e}");
        assert!(found < 1e-5, "{type_name}: {found}");
    }
}

#[test]
fn vocabularies_come_back_from_gguf() {
    let scratch = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(repository("assets/text/eval-wikitext.txt")).unwrap();
    for (name, special) in [("llama-7m", false), ("tinystories-656k", true)] {
        let folder = repository(&format!("assets/{name}"));
        let file = scratch.path().join(format!("{name}.gguf"));
        let summary = export(&folder, "F16", &file).unwrap();
        println!("{name}: {:?}", summary.notices);
        let read = |path: &Path| {
            let checkpoint = Checkpoint::open(path).unwrap();
            Tokenizer::from_json(&checkpoint.tokenizer_json().unwrap(), name).unwrap()
        };
        let (found, expected) = (read(&file), read(&folder));
        for piece in text.split_inclusive('\n').filter(|piece| !piece.trim().is_empty()).take(200) {
            let ids = expected.encode(piece, special).unwrap();
            assert_eq!(found.encode(piece, special).unwrap(), ids, "{name}: {piece:?}");
            assert_eq!(found.decode(&ids, true).unwrap(), expected.decode(&ids, true).unwrap());
        }
    }
}
