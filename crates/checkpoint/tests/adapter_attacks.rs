//! One test per trick that a broken or foreign adapter folder can play; each must end in `ERR_ADAPTER_INVALID` with a
//! subject and a hint.

use std::fs;

use crate::fixture::{Tensor, assert_refused, floats, safetensors, write_checkpoint};
use kintsugi_checkpoint::{Checkpoint, read_adapter};
use kintsugi_runtime::{Error, ErrorCode};
use kintsugi_weights::Adapter;
use serde_json::{Value, json};

const A: &str = "base_model.model.up.lora_A.weight";
const B: &str = "base_model.model.up.lora_B.weight";

fn adapter_config() -> Value {
    json!({ "peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["up"], "bias": "none" })
}

fn factors() -> Vec<Tensor> {
    vec![floats(A, &[1, 3], &[1.0, 2.0, 3.0]), floats(B, &[2, 1], &[1.0, 2.0])]
}

fn read(config: &Value, tensors: &[Tensor]) -> Result<Adapter, Error> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), safetensors(tensors)).unwrap();
    read_adapter(folder.path())
}

#[track_caller]
fn adapter_refused(config: &Value, tensors: &[Tensor]) -> Error {
    assert_refused(read(config, tensors), ErrorCode::AdapterInvalid)
}

#[track_caller]
fn adapter_field_refused(field: &str, value: Value) -> Error {
    let mut config = adapter_config();
    config[field] = value;
    adapter_refused(&config, &factors())
}

#[test]
fn adapter_is_sound_before_it_is_spoiled() {
    assert_eq!(read(&adapter_config(), &factors()).unwrap().linears["up"].scaling, 2.0);
}

#[test]
fn adapter_of_unknown_type() {
    assert!(adapter_field_refused("peft_type", json!("UNILORA")).message.contains("UNILORA"));
    assert!(adapter_field_refused("peft_type", json!(["LORA"])).message.contains("LORA"));
}

#[test]
fn adapter_with_a_variant_that_changes_the_meaning() {
    for (field, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("target_parameters", json!(["experts"])),
        ("init_lora_weights", json!("pissa_niter_4")),
    ] {
        assert!(adapter_field_refused(field, value).message.contains(field));
    }
}

#[test]
fn adapter_with_numbers_that_are_none() {
    for (field, value) in [
        ("r", json!(0)),
        ("r", json!(-1)),
        ("r", json!("8")),
        ("lora_alpha", json!(null)),
        ("use_rslora", json!("yes")),
        ("rank_pattern", json!([])),
        ("rank_pattern", json!({ "up": 0 })),
        ("alpha_pattern", json!({ "up": "2" })),
    ] {
        adapter_field_refused(field, value);
    }
}

#[test]
fn adapter_with_a_real_regular_expression() {
    assert!(adapter_field_refused("rank_pattern", json!({ "up|down": 2 })).message.contains("up|down"));
}

#[test]
fn adapter_with_one_factor() {
    for (absent, name) in [(A, "lora_A"), (B, "lora_B")] {
        let tensors: Vec<Tensor> = factors().into_iter().filter(|(name, ..)| *name != absent).collect();
        let error = adapter_refused(&adapter_config(), &tensors);
        assert!(error.message.contains(name) && error.subject == "up", "{error}");
    }
}

#[test]
fn adapter_without_factors() {
    adapter_refused(&adapter_config(), &[]);
}

#[test]
fn adapter_with_a_rank_that_the_config_denies() {
    let tensors = [floats(A, &[2, 3], &[0.0; 6]), floats(B, &[2, 2], &[0.0; 4])];
    adapter_refused(&adapter_config(), &tensors);
    let tensors = [floats(A, &[1, 3], &[0.0; 3]), floats(B, &[2, 2], &[0.0; 4])];
    adapter_refused(&adapter_config(), &tensors);
}

#[test]
fn adapter_with_other_tensors() {
    for name in [
        "base_model.model.up.lora_magnitude_vector",
        "base_model.model.embed.lora_embedding_A",
        "base_model.model.up.weight",
        "base_model.model.lora_A.weight",
        "up.lora_A.weight",
        "base_model.model.up.lora_A.a.b.weight",
    ] {
        let mut tensors = factors();
        tensors.push(floats(name, &[1], &[0.0]));
        assert_eq!(adapter_refused(&adapter_config(), &tensors).subject, name);
    }
}

#[test]
fn adapter_with_two_adapters_in_one_file() {
    let mut tensors = factors();
    tensors.push(floats("base_model.model.up.lora_A.other.weight", &[1, 3], &[0.0; 3]));
    adapter_refused(&adapter_config(), &tensors);
}

#[test]
fn adapter_with_nan() {
    let tensors = [floats(A, &[1, 3], &[0.0, f32::NAN, 0.0]), floats(B, &[2, 1], &[0.0; 2])];
    let error = adapter_refused(&adapter_config(), &tensors);
    assert!(error.subject == A && error.message.contains("row 0, column 1"), "{error}");
}

#[test]
fn adapter_folder_that_is_incomplete() {
    let folder = tempfile::tempdir().unwrap();
    assert_refused(read_adapter(folder.path()), ErrorCode::AdapterInvalid);
    fs::write(folder.path().join("adapter_config.json"), "{").unwrap();
    assert_refused(read_adapter(folder.path()), ErrorCode::AdapterInvalid);
    fs::write(folder.path().join("adapter_config.json"), adapter_config().to_string()).unwrap();
    assert_refused(read_adapter(folder.path()), ErrorCode::AdapterInvalid);
    fs::write(folder.path().join("adapter_model.bin"), "PK").unwrap();
    let error = assert_refused(read_adapter(folder.path()), ErrorCode::AdapterInvalid);
    assert!(error.message.contains("archive") && error.hint.contains("PEFT"), "{error}");
    let file = safetensors(&factors());
    fs::write(folder.path().join("adapter_model.safetensors"), &file[..file.len() - 1]).unwrap();
    assert_refused(read_adapter(folder.path()), ErrorCode::AdapterInvalid);
}

#[test]
fn compensation_that_does_not_fit_the_linears() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({}), &safetensors(&[floats("up.weight", &[2, 2], &[0.0; 4])]));
    let eora = folder.path().join("eora");
    fs::create_dir(&eora).unwrap();
    fs::write(eora.join("adapter_config.json"), adapter_config().to_string()).unwrap();
    fs::write(eora.join("adapter_model.safetensors"), safetensors(&factors())).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(assert_refused(checkpoint.compensation(), ErrorCode::AdapterInvalid).subject, "up");
}
