//! Bad input gives a typed error with subject and hint and leaves nothing behind.

use std::fs;
use std::path::Path;

use crate::common::{assets, backend, recipe};
use kintsugi_pipeline::{Recipe, compress};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress};

struct Scene {
    root: tempfile::TempDir,
    recipe: Recipe,
}

impl Scene {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("source");
        fs::create_dir(&source).unwrap();
        for entry in fs::read_dir(assets("tinystories-656k")).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
            }
        }
        let mut recipe = recipe(&source, &root.path().join("out"), "gptq", 4, 4);
        let calibration = recipe.calibration.as_mut().unwrap();
        calibration.sources[0].sequences = 2;
        calibration.length = 64;
        Scene { root, recipe }
    }

    fn source(&self, file: &str) -> std::path::PathBuf {
        self.recipe.source.join(file)
    }

    fn config(&self, change: impl FnOnce(&mut serde_json::Value)) {
        let path = self.source("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    fn refused(&self, code: ErrorCode, subject: &str) {
        let before = entries(self.root.path());
        let error = compress(&self.recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.subject.contains(subject), "{error:?}");
        assert!(!error.hint.is_empty(), "{error:?}");
        assert_eq!(entries(self.root.path()), before, "something stayed behind");
    }
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_scene_itself_is_accepted() {
    let scene = Scene::new();
    compress(&scene.recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    assert_eq!(entries(scene.root.path()), ["out", "source"]);
}

#[test]
fn a_missing_checkpoint() {
    let mut scene = Scene::new();
    scene.recipe.source = scene.root.path().join("nowhere");
    scene.refused(ErrorCode::CheckpointNotFound, "nowhere");
}

#[test]
fn a_missing_shard() {
    let scene = Scene::new();
    fs::remove_file(scene.source("model.safetensors")).unwrap();
    let index = r#"{"weight_map":{"lm_head.weight":"model-00001-of-00002.safetensors"}}"#;
    fs::write(scene.source("model.safetensors.index.json"), index).unwrap();
    scene.refused(ErrorCode::CheckpointShardMissing, "model-00001-of-00002.safetensors");
}

#[test]
fn a_truncated_file() {
    let scene = Scene::new();
    let path = scene.source("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1000]).unwrap();
    scene.refused(ErrorCode::CheckpointCorrupt, "model.safetensors");
}

#[test]
fn nan_weights() {
    let scene = Scene::new();
    let path = scene.source("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let start = 8 + header + text[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start + 40..start + 44].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    // Found in the second block, after the first one was compressed.
    scene.refused(ErrorCode::CheckpointNotFinite, name);
}

#[test]
fn an_unknown_architecture() {
    let scene = Scene::new();
    scene.config(|config| config["architectures"][0] = "RwkvForCausalLM".into());
    scene.refused(ErrorCode::ConfigArchitecture, "RwkvForCausalLM");
}

#[test]
fn a_config_with_another_shape() {
    let scene = Scene::new();
    scene.config(|config| config["intermediate_size"] = 385.into());
    scene.refused(ErrorCode::CheckpointShape, "mlp");
}

#[test]
fn a_tokenizer_of_another_model() {
    let scene = Scene::new();
    fs::copy(assets("llama-7m/tokenizer.json"), scene.source("tokenizer.json")).unwrap();
    scene.refused(ErrorCode::TokenizerInvalid, "tokenizer.json");
}

#[test]
fn an_output_folder_that_is_not_empty() {
    let scene = Scene::new();
    fs::create_dir(&scene.recipe.out).unwrap();
    fs::write(scene.recipe.out.join("precious"), "x").unwrap();
    scene.refused(ErrorCode::OutputNotEmpty, "out");
    assert_eq!(entries(&scene.recipe.out), ["precious"]);
}

#[test]
fn an_output_that_cannot_be_written() {
    let mut scene = Scene::new();
    fs::write(scene.root.path().join("file"), "x").unwrap();
    scene.recipe.out = scene.root.path().join("file").join("out");
    scene.refused(ErrorCode::OutputUnwritable, "out");
}

#[test]
fn an_empty_calibration_text() {
    let mut scene = Scene::new();
    let path = scene.root.path().join("empty.txt");
    fs::write(&path, "").unwrap();
    scene.recipe.calibration.as_mut().unwrap().sources[0].file = path;
    scene.refused(ErrorCode::TextTooShort, "empty.txt");
}

#[test]
fn a_calibration_text_that_is_not_text_even_where_the_method_does_not_need_it() {
    let mut scene = Scene::new();
    let path = scene.root.path().join("binary.txt");
    fs::write(&path, [0x66, 0xff, 0xfe]).unwrap();
    scene.recipe.method = "rtn".to_owned();
    scene.recipe.eora = None;
    scene.recipe.calibration.as_mut().unwrap().sources[0].file = path;
    scene.refused(ErrorCode::TextUnreadable, "binary.txt");
}

#[test]
fn calibration_beyond_the_context() {
    let mut scene = Scene::new();
    scene.recipe.calibration.as_mut().unwrap().length = 513;
    scene.refused(ErrorCode::ContextExceeded, "calibration.length");
}

#[test]
fn options_out_of_range() {
    type Spoil = fn(&mut Recipe);
    let spoil: [(Spoil, &str); 5] = [
        (|recipe| recipe.bits = 7, "bits"),
        (|recipe| recipe.group_size = Some(0), "groupSize"),
        (|recipe| recipe.damping = -1.0, "damping"),
        (|recipe| recipe.eora = Some(kintsugi_pipeline::EoraRecipe::uniform(0)), "eora.rank"),
        (|recipe| recipe.calibration = None, "calibration.file"),
    ];
    for (spoil, subject) in spoil {
        let mut scene = Scene::new();
        spoil(&mut scene.recipe);
        scene.refused(ErrorCode::OptionInvalid, subject);
    }
}

#[test]
fn a_cancelled_job_leaves_nothing() {
    let scene = Scene::new();
    let cancel = CancelToken::new();
    cancel.cancel();
    let error = compress(&scene.recipe, &backend(), &cancel, &Progress::new()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Cancelled);
    assert_eq!(entries(scene.root.path()), ["source"]);
}

#[test]
fn a_compressed_checkpoint_is_not_compressed_again() {
    let mut scene = Scene::new();
    compress(&scene.recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    scene.recipe.source = scene.recipe.out.clone();
    scene.recipe.out = scene.root.path().join("again");
    scene.refused(ErrorCode::QuantizationUnsupported, "out");
}
