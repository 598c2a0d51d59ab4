//! Biases beside B: they come back as they were written, are read as peft writes them, and every trick that a broken
//! folder can play with them ends in `ERR_ADAPTER_INVALID` with a subject and a hint.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::fixture::{Tensor, assert_refused, floats, safetensors};
use kintsugi_checkpoint::{AdapterFolder, read_adapter, write_adapter};
use kintsugi_runtime::{Error, ErrorCode};
use kintsugi_weights::{Adapter, AdapterEntry, ElementType, FactorBias, LowRank};
use serde_json::{Value, json};

fn update(rank: usize, centre: bool) -> LowRank {
    let values = |count: usize, step: f32| (0..count).map(|i| i as f32 * step - 1.0).collect::<Vec<f32>>();
    let bias = FactorBias { values: values(5, 0.3), centre: centre.then(|| values(rank, 0.7)) };
    LowRank::new(5, 3, rank, values(5 * rank, 0.25), values(3 * rank, 0.5), ElementType::Bf16).with_bias(bias)
}

fn adapter(centres: bool) -> Adapter {
    let entry = |rank| AdapterEntry { factors: update(rank, centres), scaling: 1.0 };
    let linears = BTreeMap::from([("layers.0.up".to_string(), entry(2)), ("layers.1.up".to_string(), entry(4))]);
    Adapter { linears, base_model: Some("base".into()) }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn biases_and_centres_come_back() {
    for centres in [true, false] {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("eora");
        write_adapter(&folder, &adapter(centres), "base").unwrap();
        assert_eq!(read_adapter(&folder).unwrap(), adapter(centres));
        assert_eq!(folder.join("factor_centres.safetensors").exists(), centres);
        assert_eq!(json_of(&folder.join("adapter_config.json"))["lora_bias"], true);
        let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let bias = tensors.tensor("base_model.model.layers.1.up.lora_B.bias").unwrap();
        assert_eq!((bias.dtype(), bias.shape()), (safetensors::Dtype::F32, &[5][..]));
        assert_eq!(tensors.len(), 6);
    }
}

#[test]
fn without_the_file_of_centres_the_same_function_is_read_but_cannot_be_divided() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("eora");
    write_adapter(&folder, &adapter(true), "base").unwrap();
    fs::remove_file(folder.join("factor_centres.safetensors")).unwrap();
    let found = read_adapter(&folder).unwrap();
    assert_eq!(found, adapter(false));
    assert!(found.linears.values().all(|entry| !entry.factors.is_divisible()));
}

#[test]
fn an_adapter_without_biases_is_written_as_ever() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("eora");
    let mut plain = adapter(true);
    for entry in plain.linears.values_mut() {
        entry.factors = entry.factors.clone().split_bias().0;
    }
    write_adapter(&folder, &plain, "base").unwrap();
    assert_eq!(read_adapter(&folder).unwrap(), plain);
    assert_eq!(json_of(&folder.join("adapter_config.json")).get("lora_bias"), None);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
    // peft knows all or none.
    let mut some = adapter(true);
    some.linears.insert("layers.0.up".into(), plain.linears["layers.0.up"].clone());
    let error = assert_refused(write_adapter(&root.path().join("some"), &some, "base"), ErrorCode::AdapterInvalid);
    assert_eq!(error.subject, "layers.0.up");
}

#[test]
fn who_takes_updates_of_weights_alone_refuses_biases() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("eora");
    write_adapter(&folder, &adapter(true), "base").unwrap();
    for open in [AdapterFolder::open, AdapterFolder::open_with_whole_modules] {
        let error = assert_refused(open(&folder), ErrorCode::AdapterInvalid);
        assert!(error.message.contains("lora_bias") && error.hint.contains("compensation"), "{error}");
    }
}

fn config() -> Value {
    json!({ "peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["up"], "lora_bias": true })
}

fn tensors() -> Vec<Tensor> {
    vec![
        floats("base_model.model.up.lora_A.weight", &[1, 3], &[1.0, 2.0, 3.0]),
        floats("base_model.model.up.lora_B.weight", &[2, 1], &[1.0, 2.0]),
    ]
}

fn with(tensor: Tensor) -> Vec<Tensor> {
    [tensors(), vec![tensor]].concat()
}

fn bias(values: &[f32]) -> Tensor {
    floats("base_model.model.up.lora_B.bias", &[values.len()], values)
}

fn read(config: &Value, tensors: &[Tensor], centres: Option<&[u8]>) -> Result<Adapter, Error> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), safetensors(tensors)).unwrap();
    if let Some(centres) = centres {
        fs::write(folder.path().join("factor_centres.safetensors"), centres).unwrap();
    }
    read_adapter(folder.path())
}

#[test]
fn a_bias_is_read_as_peft_writes_it() {
    for name in ["base_model.model.up.lora_B.bias", "base_model.model.up.lora_B.default.bias"] {
        let found = read(&config(), &with(floats(name, &[2], &[0.5, -0.5])), None).unwrap();
        let entry = &found.linears["up"];
        assert_eq!((entry.scaling, entry.factors.bias().unwrap().values.as_slice()), (2.0, &[0.5, -0.5][..]));
    }
}

#[test]
fn biases_that_are_missing_strange_or_unannounced() {
    let refused =
        |config: &Value, tensors: &[Tensor]| assert_refused(read(config, tensors, None), ErrorCode::AdapterInvalid);
    let error = refused(&config(), &tensors());
    assert!(error.message.contains("lora_bias") && error.subject == "up", "{error}");
    for odd in [
        bias(&[1.0]),
        bias(&[1.0, 2.0, 3.0]),
        bias(&[1.0, f32::NAN]),
        bias(&[f32::INFINITY, 0.0]),
        floats("base_model.model.up.lora_B.bias", &[2, 1], &[1.0, 2.0]),
        floats("base_model.model.up.lora_B.bias", &[], &[1.0]),
    ] {
        let error = refused(&config(), &with(odd));
        assert!(error.subject.contains("lora_B.bias"), "{error}");
    }
    let stranger = floats("base_model.model.down.lora_B.bias", &[2], &[0.0; 2]);
    let error = refused(&config(), &[with(bias(&[0.0; 2])), vec![stranger]].concat());
    assert!(error.subject.contains("down"), "{error}");
    let twice = floats("base_model.model.up.lora_B.other.bias", &[2], &[0.0; 2]);
    assert!(refused(&config(), &[with(bias(&[0.0; 2])), vec![twice]].concat()).message.contains("twice"));
    let of_a = floats("base_model.model.up.lora_A.bias", &[1], &[0.0]);
    refused(&config(), &[with(bias(&[0.0; 2])), vec![of_a]].concat());
    for lora_bias in [json!(false), json!(null)] {
        let mut silent = config();
        silent["lora_bias"] = lora_bias;
        assert!(refused(&silent, &with(bias(&[0.0; 2]))).message.contains("lora_bias"));
    }
    let mut odd = config();
    odd["lora_bias"] = json!("all");
    assert!(refused(&odd, &with(bias(&[0.0; 2]))).message.contains("lora_bias"));
}

#[test]
fn centres_that_are_damaged() {
    let sound = with(bias(&[1.0, 2.0]));
    let centre = |values: &[f32]| safetensors(&[floats("up.lora_A.centre", &[values.len()], values)]);
    assert!(read(&config(), &sound, Some(&centre(&[3.0]))).unwrap().linears["up"].factors.is_divisible());
    for odd in [
        centre(&[1.0, 2.0]),
        centre(&[]),
        centre(&[f32::NAN]),
        safetensors(&[floats("up.lora_A.centre", &[1, 1], &[1.0])]),
        safetensors(&[floats("down.lora_A.centre", &[1], &[1.0])]),
        b"no tensors".to_vec(),
    ] {
        assert_refused(read(&config(), &sound, Some(&odd)), ErrorCode::AdapterInvalid);
    }
}
