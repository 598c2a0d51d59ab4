//! Every decoder family is compressed, written, loaded and run: the tiny random models of `__test__/vectors`.

use std::path::{Path, PathBuf};

use crate::common::{backend, load, recipe};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_model::DecoderSpec;
use kintsugi_pipeline::{compress, inspect};
use kintsugi_runtime::{CancelToken, Progress};

fn folders() -> Vec<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/families");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

/// Words of the tokenizer of the tiny models.
fn text() -> String {
    (0..640u32).map(|i| format!("t{} ", i.wrapping_mul(2_654_435_761) >> 26)).collect()
}

fn mean_loss(folder: &Path) -> f64 {
    let result = load(folder).perplexity(&text(), 32, None, &CancelToken::new(), &Progress::new()).unwrap();
    result.mean_negative_log_likelihood
}

#[test]
fn every_family_is_compressed_written_loaded_and_run() {
    let scratch = tempfile::tempdir().unwrap();
    let calibration = scratch.path().join("text.txt");
    std::fs::write(&calibration, text()).unwrap();
    for source in folders() {
        let name = source.file_name().unwrap().to_string_lossy().into_owned();
        let out = scratch.path().join(&name);
        let mut recipe = recipe(&source, &out, "gptq", 8, 4);
        recipe.group_size = Some(16);
        let settings = recipe.calibration.as_mut().unwrap();
        settings.sources[0].file.clone_from(&calibration);
        settings.sources[0].sequences = 16;
        (settings.length, settings.subset) = (32, true);
        let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();

        let spec = DecoderSpec::of(&Checkpoint::open(&source).unwrap()).unwrap();
        assert_eq!(report.linears.len(), spec.layers * spec.linears.len(), "{name}");
        for linear in &report.linears {
            let error = linear.error.unwrap();
            assert!(
                error.compensated <= error.quantized && error.quantized < 0.02,
                "{name} {}: {error:?}",
                linear.name
            );
        }
        let inspection = inspect(&out).unwrap();
        assert!(inspection.can_run, "{name}: {:?}", inspection.reason);
        assert_eq!(inspection.compensation.unwrap().linears, report.linears.len(), "{name}");
        let (before, after) = (mean_loss(&source), mean_loss(&out));
        assert!((after - before).abs() < 0.02 * before, "{name}: mean loss {before} became {after}");
    }
}

#[test]
fn scales_are_folded_in_every_family_that_takes_them() {
    let scratch = tempfile::tempdir().unwrap();
    let calibration = scratch.path().join("text.txt");
    std::fs::write(&calibration, text()).unwrap();
    for source in folders() {
        let name = source.file_name().unwrap().to_string_lossy().into_owned();
        let out = scratch.path().join(&name);
        let mut recipe = recipe(&source, &out, "awq", 8, 0);
        (recipe.group_size, recipe.clip) = (Some(16), true);
        let settings = recipe.calibration.as_mut().unwrap();
        settings.sources[0].file.clone_from(&calibration);
        (settings.sources[0].sequences, settings.length) = (16, 32);
        let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();

        let spec = DecoderSpec::of(&Checkpoint::open(&source).unwrap()).unwrap();
        let readers: usize = spec.family.folds.iter().map(|fold| fold.readers.len()).sum();
        let scaled = report.linears.iter().filter(|linear| linear.alpha.is_some()).count();
        assert_eq!(scaled, spec.layers * readers, "{name}");
        let (before, after) = (mean_loss(&source), mean_loss(&out));
        assert!((after - before).abs() < 0.02 * before, "{name}: mean loss {before} became {after}");
    }
}

#[test]
fn an_expert_that_no_token_reaches_is_compressed_all_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let source = folders().into_iter().find(|folder| folder.ends_with("qwen2-moe")).unwrap();
    let (calibration, out) = (scratch.path().join("text.txt"), scratch.path().join("out"));
    std::fs::write(&calibration, text()).unwrap();
    let mut recipe = recipe(&source, &out, "gptq", 8, 4);
    recipe.group_size = Some(16);
    let settings = recipe.calibration.as_mut().unwrap();
    settings.sources[0].file.clone_from(&calibration);
    // Two tokens with two experts each leave at least one of five alone.
    (settings.sources[0].sequences, settings.length) = (1, 2);
    let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    let alone: Vec<_> = report.linears.iter().filter(|linear| linear.calibration_tokens.is_none()).collect();
    assert!(alone.len() >= 2 * 3, "{}", alone.len());
    assert!(alone.iter().all(|linear| linear.name.contains("experts") && linear.rank == 0 && linear.error.is_none()));
    assert!(report.linears.iter().all(|linear| linear.calibration_tokens.is_none_or(|tokens| tokens <= 2)));
    assert!(report.summary.mean_error.is_some());
    assert!(mean_loss(&out).is_finite());
}
