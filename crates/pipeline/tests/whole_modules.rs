//! Modules that adapters hold whole (`modules_to_save` of peft) in a merge.

use std::fs;
use std::path::{Path, PathBuf};

use crate::merges::{recipe, refused, run, vectors};
use kintsugi_checkpoint::{AdapterDescription, AdapterFolder, AdapterWriter, MergedModule, ModuleKind, WholeTensor};
use kintsugi_pipeline::{MergeChange, MergeRecipe, RankPadding, WholeModuleRule, changed_recipe, plan_merge};
use kintsugi_runtime::{CancelToken, ErrorCode};
use kintsugi_testkit::Random;
use kintsugi_weights::{ElementType, LowRank};
use serde_json::Value;

/// An adapter of one Linear, with `lm_head` whole (weight and bias) where it is given as numbers and their type.
fn write(folder: &Path, head: Option<(&[f32], ElementType)>) -> PathBuf {
    write_of("model.layers.0.mlp.up_proj", folder, head)
}

/// The same, of the Linear `module`.
fn write_of(module: &str, folder: &Path, head: Option<(&[f32], ElementType)>) -> PathBuf {
    let size = 6;
    let whole: Vec<WholeTensor> = head
        .iter()
        .flat_map(|(values, element_type)| {
            let tensor = |name: &str, shape: Vec<usize>| WholeTensor {
                name: name.to_string(),
                element_type: *element_type,
                bytes: (shape.iter().product::<usize>() * element_type.bits() / 8) as u64,
                shape,
            };
            [tensor("lm_head.bias", vec![2]), tensor("lm_head.weight", vec![values.len() / 2, 2])]
        })
        .collect();
    let description = AdapterDescription {
        base_model: Some("base".into()),
        task_type: Some("CAUSAL_LM".into()),
        fan_in_fan_out: false,
        targets_by_suffix: true,
        element_type: ElementType::F32,
        modules_to_save: if head.is_some() { vec!["lm_head".into()] } else { Vec::new() },
    };
    let (name, kind) = (module.to_string(), ModuleKind::Linear);
    let module = MergedModule { name, kind, out_features: size, in_features: size, rank: 2 };
    let mut random = Random::new(1);
    let mut values = || (0..size * 2).map(|_| random.normal() as f32).collect::<Vec<_>>();
    let factors = LowRank::new(size, size, 2, values(), values(), ElementType::F32);
    let mut writer = AdapterWriter::create(folder, description, vec![module], &whole).unwrap();
    let copy = |writer: &mut AdapterWriter| {
        writer
            .write_whole(|tensor, put| {
                let (values, element_type) = head.unwrap();
                let values = if tensor.name.ends_with("bias") { &values[..2] } else { values };
                values.iter().try_for_each(|value| match element_type {
                    ElementType::F32 => put(&value.to_le_bytes()),
                    ElementType::F16 => put(&half::f16::from_f32(*value).to_le_bytes()),
                    ElementType::Bf16 => put(&half::bf16::from_f32(*value).to_le_bytes()),
                })
            })
            .unwrap();
    };
    copy(&mut writer);
    writer.write(Some(&factors)).unwrap();
    copy(&mut writer);
    writer.finish().unwrap();
    folder.to_path_buf()
}

fn tensor(folder: &Path, name: &str) -> (Vec<u8>, ElementType, Vec<usize>) {
    let folder = AdapterFolder::open_with_whole_modules(folder).unwrap();
    let found = folder.whole_tensors().iter().find(|tensor| tensor.name == name).unwrap();
    let mut bytes = vec![0; found.bytes as usize];
    folder.read_whole(name, 0, &mut bytes).unwrap();
    (bytes, found.element_type, found.shape.clone())
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

const HEAD: [f32; 8] = [1.0, -2.0, 0.5, 4.0, 8.0, -0.25, 3.0, 0.125];

#[test]
fn one_or_equal_modules_are_carried_over() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    for element_type in ElementType::ALL {
        let of = |name: &str| path(&format!("{name}-{}", element_type.name()));
        let with = write(&of("with"), Some((&HEAD, element_type)));
        let same = write(&of("same"), Some((&HEAD, element_type)));
        let without = write(&of("without"), None);
        for (i, (folders, weights)) in
            [(vec![with.clone()], vec![0.5]), (vec![without, with.clone(), same], vec![1.0, -2.0, 0.0])]
                .iter()
                .enumerate()
        {
            for method in ["svd", "cat"] {
                let mut recipe = recipe(folders, weights, method, &of(&format!("out-{i}-{method}")));
                recipe.options.report = i == 0;
                assert_eq!(
                    plan_merge(&recipe, &CancelToken::new()).unwrap().whole_tensors,
                    ["lm_head.bias", "lm_head.weight"]
                );
                run(&recipe).unwrap();
                for name in ["lm_head.bias", "lm_head.weight"] {
                    assert_eq!(tensor(&recipe.out, name), tensor(&with, name));
                }
                assert_eq!(config(&recipe.out)["modules_to_save"], serde_json::json!(["lm_head"]));
                assert!(AdapterFolder::open(&recipe.out).unwrap_err().message.contains("modules_to_save"));
            }
        }
    }
}

#[test]
fn different_modules_are_refused_or_averaged_as_was_asked() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let other: Vec<f32> = HEAD.iter().map(|value| 3.0 * value + 1.0).collect();
    let folders = [
        write(&path("a"), Some((&HEAD, ElementType::F32))),
        write(&path("b"), None),
        write(&path("c"), Some((&other, ElementType::F32))),
    ];
    let of =
        |rule, weights: &[f64]| MergeRecipe { modules_to_save: rule, ..recipe(&folders, weights, "svd", &path("out")) };
    let error = refused(&of(WholeModuleRule::Equal, &[1.0; 3]), ErrorCode::AdapterInvalid);
    assert!(error.subject == "lm_head.bias" && error.hint.contains("mean"), "{error}");
    let error = refused(&of(WholeModuleRule::Refuse, &[1.0; 3]), ErrorCode::AdapterInvalid);
    assert!(error.message.contains("modules_to_save"), "{error}");
    for weights in [[-1.0, 1.0, 2.0], [0.0, 1.0, 0.0]] {
        assert_eq!(refused(&of(WholeModuleRule::Mean, &weights), ErrorCode::OptionInvalid).subject, "weights");
    }
    let mut served = of(WholeModuleRule::Mean, &[1.0; 3]);
    served.padding = RankPadding::Vllm;
    assert_eq!(refused(&served, ErrorCode::OptionInvalid).subject, "padding");

    // The weight of an adapter that has no such module says nothing about it.
    let mean = of(WholeModuleRule::Mean, &[1.0, 100.0, 3.0]);
    run(&mean).unwrap();
    let (bytes, ..) = tensor(&mean.out, "lm_head.weight");
    let found: Vec<f32> = bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect();
    let expected: Vec<f32> = HEAD.iter().zip(&other).map(|(a, c)| 0.25 * a + 0.75 * c).collect();
    assert_eq!(found, expected);
}

#[test]
fn what_is_damaged_or_missing_is_refused() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let mut broken = HEAD;
    broken[5] = f32::NAN;
    let nan = write(&path("nan"), Some((&broken, ElementType::F32)));
    let error = refused(&recipe(&[nan], &[1.0], "svd", &path("out")), ErrorCode::AdapterInvalid);
    assert_eq!(error.subject, "lm_head.weight");

    let wide = write(&path("wide"), Some((&HEAD, ElementType::F32)));
    let narrow = write(&path("narrow"), Some((&HEAD, ElementType::Bf16)));
    refused(&recipe(&[wide.clone(), narrow], &[1.0; 2], "svd", &path("out")), ErrorCode::ShapeMismatch);

    // The config names a module that the weights lack, or does not name one that they hold.
    let rename = |folder: &Path, names: Value| {
        let mut config = config(folder);
        config["modules_to_save"] = names;
        fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    };
    for names in [serde_json::json!(["lm_head", "score"]), serde_json::json!(["head"]), Value::Null, "lm_head".into()] {
        rename(&wide, names);
        refused(&recipe(std::slice::from_ref(&wide), &[1.0], "svd", &path("out")), ErrorCode::AdapterInvalid);
    }
    assert!(AdapterFolder::open(&vectors().join("first")).unwrap().whole_tensors().is_empty());
}

#[test]
fn a_module_has_factors_or_is_saved_whole() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let whole = write(&path("whole"), Some((&HEAD, ElementType::F32)));
    let plain = write(&path("plain"), None);
    // PEFT replaces all of these as a whole, and those below; the last is another module.
    for (i, module) in ["lm_head", "model.lm_head", "lm_head.dense", "model.lm_head.dense.0"].iter().enumerate() {
        let factors = write_of(module, &path(&format!("factors-{i}")), None);
        for method in ["svd", "cat"] {
            let both = recipe(&[factors.clone(), whole.clone()], &[1.0; 2], method, &path("out"));
            let error = refused(&both, ErrorCode::AdapterInvalid);
            assert!(error.subject == *module && error.message.contains("'lm_head'"), "{error}");
            assert_eq!(plan_merge(&both, &CancelToken::new()).unwrap_err().subject, *module);
        }
        let mut joined = recipe(&[plain.clone(), whole.clone()], &[1.0; 2], "svd", &path("out"));
        joined.compensation = Some(factors);
        assert_eq!(refused(&joined, ErrorCode::AdapterInvalid).subject, *module);
    }
    let other = write_of("my_lm_head", &path("other"), None);
    run(&recipe(&[other, whole], &[1.0; 2], "svd", &path("out"))).unwrap();
}

#[test]
fn a_whole_tensor_has_no_place_between_two_factors() {
    let out = tempfile::tempdir().unwrap();
    let name = "lm_head.lora_A.x";
    let whole = WholeTensor { name: name.to_string(), element_type: ElementType::F32, shape: vec![2], bytes: 8 };
    let module =
        MergedModule { name: "lm_head".into(), kind: ModuleKind::Linear, out_features: 4, in_features: 4, rank: 1 };
    let description = AdapterDescription {
        base_model: None,
        task_type: None,
        fan_in_fan_out: false,
        targets_by_suffix: true,
        element_type: ElementType::F32,
        modules_to_save: vec!["lm_head".into()],
    };
    let error = AdapterWriter::create(&out.path().join("out"), description, vec![module], &[whole]).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::AdapterInvalid, name));
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn a_source_whose_whole_module_has_changed_is_not_merged_again() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name);
    let (whole, plain) = (write(&path("whole"), Some((&HEAD, ElementType::F32))), write(&path("plain"), None));
    run(&recipe(std::slice::from_ref(&whole), &[1.0], "svd", &path("merged"))).unwrap();
    let change = MergeChange { merged: path("merged"), add: vec![(plain, 1.0)], remove: vec![], out: path("again") };
    let again = changed_recipe(&change).unwrap();
    // The factors stay what they were.
    let mut head = HEAD;
    head[7] += 1.0;
    fs::remove_dir_all(&whole).unwrap();
    write(&whole, Some((&head, ElementType::F32)));
    let error = refused(&again, ErrorCode::AdapterInvalid);
    assert!(error.subject == whole.display().to_string() && error.message.contains("changed"), "{error}");
    fs::remove_dir_all(&whole).unwrap();
    write(&whole, Some((&HEAD, ElementType::F32)));
    run(&again).unwrap();
}
