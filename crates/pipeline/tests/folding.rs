//! Folding an adapter into a checkpoint: the sum in every layout of the base, rounded once, and refusals.

use std::fs;
use std::path::{Path, PathBuf};

use kintsugi_checkpoint::{
    AdapterDescription, AdapterFolder, AdapterWriter, Checkpoint, MergedModule, ModuleKind, WholeTensor,
};
use kintsugi_pipeline::{FoldRecipe, FoldReport, fold_adapter};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, ThreadPool};
use kintsugi_weights::{ElementType, LowRank};
use serde_json::Value;

fn assets(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

fn vectors(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors").join(name)
}

fn fold(
    checkpoint: &Path,
    adapter: &Path,
    out: &Path,
    weight: f64,
    kind: Option<ElementType>,
) -> Result<FoldReport, Error> {
    let recipe = FoldRecipe {
        checkpoint: checkpoint.to_path_buf(),
        adapter: adapter.to_path_buf(),
        weight,
        out: out.to_path_buf(),
        element_type: kind,
    };
    fold_adapter(&recipe, &ThreadPool::with_threads(2), &CancelToken::new(), &Progress::new())
}

#[test]
fn every_weight_is_the_rounded_sum_and_all_else_is_copied() {
    let (base, adapter) = (assets("llama-7m"), assets("adapters/shakespeare"));
    let out = tempfile::tempdir().unwrap();
    for kind in [None, Some(ElementType::F32)] {
        let path = out.path().join(format!("{kind:?}"));
        let report = fold(&base, &adapter, &path, 0.5, kind).unwrap();
        assert_eq!(report.modules, 56);
        let (before, after) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&path).unwrap());
        let folder = AdapterFolder::open(&adapter).unwrap();
        for tensor in before.tensors().filter(|tensor| tensor.shape.len() == 2) {
            let module = folder.module(tensor.name.trim_end_matches(".weight"));
            let (old, new) = (before.dense(&tensor.name).unwrap(), after.dense(&tensor.name).unwrap());
            assert_eq!(new.element_type(), kind.unwrap_or(ElementType::Bf16));
            let Some(module) = module else {
                assert_eq!(old.to_f32(), new.to_f32(), "{}", tensor.name);
                continue;
            };
            let factors = folder.factors(&module.name).unwrap();
            let (r, n) = (factors.rank(), factors.in_features());
            for (at, (old, new)) in old.to_f32().iter().zip(new.to_f32()).enumerate() {
                let (i, j) = (at / n, at % n);
                let products = (0..r).map(|l| f64::from(factors.b()[i * r + l]) * f64::from(factors.a()[l * n + j]));
                let expected = f64::from(*old) + 0.5 * module.scaling * products.sum::<f64>();
                let step = if kind.is_some() { f64::from(f32::EPSILON) } else { 2f64.powi(-7) };
                assert!((f64::from(new) - expected).abs() <= expected.abs() * step * 0.51 + 1e-12, "{}", tensor.name);
            }
        }
        let dtype = after.config().get("torch_dtype").or(after.config().get("dtype")).and_then(|value| value.as_str());
        assert_eq!(dtype, Some(if kind.is_some() { "float32" } else { "bfloat16" }));
        assert!(path.join("tokenizer.json").exists());
    }
}

#[test]
fn what_cannot_be_folded_is_refused_and_nothing_is_written() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("out");
    let (llama, shakespeare) = (assets("llama-7m"), assets("adapters/shakespeare"));
    let refused = |checkpoint: &Path, adapter: &Path, weight: f64, code: ErrorCode| {
        let error = fold(checkpoint, adapter, &path, weight, None).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(!error.subject.is_empty() && !error.hint.is_empty(), "{error}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    };
    refused(&assets("tinystories-656k"), &shakespeare, 1.0, ErrorCode::AdapterInvalid);
    refused(&llama, &vectors("merge/first"), 1.0, ErrorCode::AdapterInvalid);
    refused(&llama, &vectors("merge/embedding"), 1.0, ErrorCode::AdapterInvalid);
    refused(&vectors("formats/awq"), &shakespeare, 1.0, ErrorCode::QuantizationUnsupported);
    for gguf in fs::read_dir(vectors("gguf")).unwrap().map(|entry| entry.unwrap().path()) {
        if gguf.extension().is_some_and(|extension| extension == "gguf") {
            refused(&gguf, &shakespeare, 1.0, ErrorCode::QuantizationUnsupported);
        }
    }
    refused(&llama, &shakespeare, f64::NAN, ErrorCode::OptionInvalid);
    refused(&llama, &shakespeare, 1e300, ErrorCode::ValueNotFinite);
    refused(&llama, &out.path().join("missing"), 1.0, ErrorCode::AdapterInvalid);
}

/// A copy of a checkpoint of one file, with some bytes of it changed.
fn copy_with(source: &Path, folder: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    fs::create_dir(folder).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let file = folder.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}

/// Where the values of a tensor begin in a safetensors file.
fn start_of(file: &[u8], tensor: &str) -> usize {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    8 + length + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize
}

#[test]
fn values_that_the_written_type_cannot_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let shakespeare = assets("adapters/shakespeare");
    // A weight that the adapter changes, and one that is only narrowed.
    for (case, tensor) in ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"].into_iter().enumerate() {
        let base = folder.path().join(case.to_string());
        copy_with(&assets("llama-7m"), &base, |file| {
            let at = start_of(file, tensor);
            file[at..at + 2].copy_from_slice(&half::bf16::from_f32(7e4).to_le_bytes());
        });
        let path = out.path().join("out");
        let error = fold(&base, &shakespeare, &path, 1.0, Some(ElementType::F16)).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ValueNotFinite, tensor), "{error}");
        assert!(error.message.contains("f16"), "{error}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
        fold(&base, &shakespeare, &path, 1.0, None).unwrap();
        fs::remove_dir_all(&path).unwrap();
    }
}

/// An adapter of one Linear of the family vector `llama`, and these tensors whole.
fn adapter_with_whole(folder: &Path, whole: &[(&str, Vec<usize>)], value: f32, module: &str) -> PathBuf {
    let mut tensors: Vec<WholeTensor> = whole
        .iter()
        .map(|(name, shape)| WholeTensor {
            name: (*name).to_string(),
            element_type: ElementType::F32,
            bytes: 4 * shape.iter().product::<usize>() as u64,
            shape: shape.clone(),
        })
        .collect();
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    let description = AdapterDescription {
        base_model: None,
        task_type: None,
        fan_in_fan_out: false,
        targets_by_suffix: true,
        element_type: ElementType::F32,
        modules_to_save: vec!["lm_head".into(), "norm".into(), "embed_tokens".into(), "up_proj".into()]
            .into_iter()
            .filter(|name: &String| whole.iter().any(|(tensor, _)| tensor.contains(name.as_str())))
            .collect(),
    };
    let base = Checkpoint::open(&vectors("families/llama")).unwrap();
    let &[out_features, in_features] = base.tensor(&format!("{module}.weight")).unwrap().shape.as_slice() else {
        panic!("{module} is no matrix")
    };
    let merged = MergedModule { name: module.into(), kind: ModuleKind::Linear, out_features, in_features, rank: 1 };
    let mut writer = AdapterWriter::create(folder, description, vec![merged], &tensors).unwrap();
    let copy = |writer: &mut AdapterWriter| {
        let elements = |tensor: &WholeTensor| tensor.bytes / 4;
        let put_all = |tensor: &WholeTensor, put: &mut dyn FnMut(&[u8]) -> kintsugi_runtime::Result<()>| {
            (0..elements(tensor)).try_for_each(|at| put(&(value + at as f32).to_le_bytes()))
        };
        writer.write_whole(put_all).unwrap();
    };
    copy(&mut writer);
    let factors =
        LowRank::new(out_features, in_features, 1, vec![0.5; out_features], vec![0.25; in_features], ElementType::F32);
    writer.write(Some(&factors)).unwrap();
    copy(&mut writer);
    writer.finish().unwrap();
    folder.to_path_buf()
}

#[test]
fn modules_that_the_adapter_holds_whole_take_the_place_of_those_of_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let (base, module) = (vectors("families/llama"), "model.layers.0.mlp.up_proj");
    let before = Checkpoint::open(&base).unwrap();
    let (head, norm) = ("lm_head.weight", "model.norm.weight");
    let shape = |name: &str| before.tensor(name).unwrap().shape.clone();
    let whole = [(head, shape(head)), (norm, shape(norm))];
    let adapter = adapter_with_whole(&folder.path().join("adapter"), &whole, -3.0, module);
    for weight in [1.0, 0.25] {
        let out = folder.path().join(format!("out-{weight}"));
        let report = fold(&base, &adapter, &out, weight, Some(ElementType::F32)).unwrap();
        assert_eq!((report.modules, report.whole_tensors), (1, 2));
        let after = Checkpoint::open(&out).unwrap();
        for name in [head, norm] {
            let values = |checkpoint: &Checkpoint| match checkpoint.tensor(name).unwrap().shape.len() {
                1 => checkpoint.vector(name).unwrap(),
                _ => checkpoint.dense(name).unwrap().to_f32(),
            };
            for (at, (old, new)) in values(&before).into_iter().zip(values(&after)).enumerate() {
                let expected = f64::from(old) + weight * (f64::from(-3.0 + at as f32) - f64::from(old));
                assert!((f64::from(new) - expected).abs() <= expected.abs() * 6e-8, "{name} {at} {weight}");
            }
        }
        let changed = format!("{module}.weight");
        let (old, new) = (before.dense(&changed).unwrap().to_f32(), after.dense(&changed).unwrap().to_f32());
        assert!(old.iter().zip(&new).all(|(old, new)| (new - old - 0.125 * weight as f32).abs() < 1e-6));
    }

    let refused = |base: &Path, whole: &[(&str, Vec<usize>)], module: &str, subject: &str, part: &str| {
        let path = folder.path().join("refused");
        let adapter = adapter_with_whole(&path, whole, 1.0, module);
        let error = fold(base, &adapter, &folder.path().join("out"), 1.0, None).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::AdapterInvalid, subject), "{error}");
        assert!(error.message.contains(part) && !error.hint.is_empty(), "{error}");
        assert!(!folder.path().join("out").exists());
        fs::remove_dir_all(path).unwrap();
    };
    refused(&base, &[(head, vec![7, 2])], module, head, "[7, 2]");
    refused(&base, &[("lm_head.bias", vec![3])], module, "lm_head.bias", "no such tensor");
    let up = "model.layers.0.mlp.up_proj.weight";
    refused(&base, &[(up, shape(up))], module, module, "factors");
    let tied = folder.path().join("tied");
    copy_with(&base, &tied, |_| {});
    let mut config: Value = serde_json::from_slice(&fs::read(tied.join("config.json")).unwrap()).unwrap();
    config["tie_word_embeddings"] = true.into();
    fs::write(tied.join("config.json"), config.to_string()).unwrap();
    for name in [head, "model.embed_tokens.weight"] {
        refused(&tied, &[(name, shape(name))], module, name, "one weight");
    }
}

#[test]
fn an_embedding_that_is_the_head_is_refused_though_the_config_is_silent() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("adapter");
    let description = AdapterDescription {
        base_model: None,
        task_type: None,
        fan_in_fan_out: true,
        targets_by_suffix: true,
        element_type: ElementType::F32,
        modules_to_save: Vec::new(),
    };
    let (name, kind) = ("transformer.wte".to_string(), ModuleKind::Embedding);
    let module = MergedModule { name, kind, out_features: 32, in_features: 64, rank: 1 };
    let mut writer = AdapterWriter::create(&adapter, description, vec![module], &[]).unwrap();
    let factors = LowRank::new(32, 64, 1, vec![0.1; 32], vec![0.1; 64], ElementType::F32);
    writer.write(Some(&factors)).unwrap();
    writer.finish().unwrap();

    let cases =
        [("gpt2", None, true), ("gpt2", Some(false), false), ("other", None, true), ("other", Some(false), false)];
    for (case, (family, flag, tied)) in cases.into_iter().enumerate() {
        let base = folder.path().join(case.to_string());
        copy_with(&vectors("families/gpt2"), &base, |_| {});
        let mut config: Value = serde_json::from_slice(&fs::read(base.join("config.json")).unwrap()).unwrap();
        config["model_type"] = family.into();
        config.as_object_mut().unwrap().remove("tie_word_embeddings");
        if let Some(flag) = flag {
            config["tie_word_embeddings"] = flag.into();
        }
        fs::write(base.join("config.json"), config.to_string()).unwrap();
        let found = fold(&base, &adapter, &folder.path().join("out"), 1.0, None);
        if tied {
            let error = found.unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::AdapterInvalid, "transformer.wte"), "{error}");
            assert!(error.message.contains("head"), "{error}");
        } else {
            assert_eq!(found.unwrap().modules, 1, "{case}");
            fs::remove_dir_all(folder.path().join("out")).unwrap();
        }
    }
}
