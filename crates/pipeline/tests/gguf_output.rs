//! A compression whose result is a GGUF file.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::common::{assets, backend, disturbed, load, recipe};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_checkpoint::gguf::GgufFile;
use kintsugi_model::DecoderSpec;
use kintsugi_pipeline::{LinearOverride, Recipe, Report, compress, plan};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, ProgressSnapshot};
use kintsugi_weights::{ElementType, WeightMatrix};

/// GPTQ of `llama-7m` on the grid of `Q4_0`, on few tokens.
fn gguf_recipe(out: &Path, rank: usize) -> Recipe {
    let mut recipe = recipe(&assets("llama-7m"), out, "gptq", 4, rank);
    let calibration = recipe.calibration.as_mut().unwrap();
    (calibration.sources[0].sequences, calibration.length) = (2, 128);
    recipe.format = "gguf:Q4_0".to_owned();
    (recipe.group_size, recipe.symmetric, recipe.scale_type) = (Some(32), true, Some(ElementType::F16));
    recipe
}

fn finish(recipe: &Recipe) -> Report {
    compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap()
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_file_holds_the_codes_that_the_method_chose() {
    let scratch = tempfile::tempdir().unwrap();
    let (folder, file) = (scratch.path().join("folder"), scratch.path().join("file"));
    let eight = LinearOverride { linears: "*.down_proj".to_owned(), bits: Some(8), group_size: None };
    let asked = Recipe { overrides: vec![eight], ..gguf_recipe(&file, 4) };
    let packed = finish(&Recipe { out: folder.clone(), format: "auto".to_owned(), ..asked.clone() });
    let planned = plan(&asked).unwrap();
    let report = finish(&asked);
    assert_eq!((planned.format.as_str(), report.summary.format.as_str()), ("gguf:Q4_0", "gguf:Q4_0"));
    assert!(planned.disk.needed_bytes >= 2 * report.summary.bytes);
    let kept: BTreeSet<String> =
        names_in(&folder).into_iter().filter(|name| name.starts_with("LICENSE") || name == "eora").collect();
    let own = ["model.gguf", "report.json"].map(str::to_owned);
    assert_eq!(names_in(&file), kept.into_iter().chain(own).collect());

    let (before, after) = (Checkpoint::open(&folder).unwrap(), Checkpoint::open(&file).unwrap());
    let spec = DecoderSpec::of(&after).unwrap();
    for (name, block, linear) in (0..spec.layers)
        .flat_map(|block| spec.linears.iter().map(move |linear| (block, linear)))
        .map(|(block, linear)| (spec.linear_name(block, linear), block, linear))
    {
        let [before, after] = [&before, &after].map(|checkpoint| match checkpoint.linear(&name).unwrap().matrix {
            WeightMatrix::Quantized(matrix) => matrix,
            WeightMatrix::Dense(_) => panic!("{name} has no codes"),
        });
        assert_eq!(after.bits(), if linear.name.ends_with("down_proj") { 8 } else { 4 }, "block {block}");
        assert!(before.codes() == after.codes() && before.scales() == after.scales(), "{name}");
    }
    assert!(matches!(report.summary.notices.as_slice(), [notice] if notice.contains("eora/")), "llama.cpp lacks it");
    let metadata = GgufFile::open(&file.join("model.gguf")).unwrap();
    assert_eq!(metadata.metadata().text("general.name").unwrap(), Some("file"), "not that of the time of writing");
    let kinds: Vec<&str> = GgufFile::open(&file.join("model.gguf"))
        .unwrap()
        .tensors()
        .filter(|(name, tensor)| name.starts_with("blk.0.") && tensor.shape.len() == 2)
        .map(|(_, tensor)| tensor.gguf_type.name)
        .collect();
    assert_eq!(kinds.iter().filter(|&&kind| kind == "Q4_0").count(), 6, "{kinds:?}");
    assert_eq!(kinds.iter().filter(|&&kind| kind == "Q8_0").count(), 1, "{kinds:?}");

    // The compensation lies beside the file as it does beside a folder, and takes part when both are loaded.
    assert!(before.compensation().unwrap().unwrap().linears == after.compensation().unwrap().unwrap().linears);
    assert_eq!(packed.summary.mean_error, report.summary.mean_error);
    let perplexity = |path: &Path| {
        let text = fs::read_to_string(assets("text/eval-stories.txt")).unwrap();
        let text: String = text.chars().take(2000).collect();
        load(path).perplexity(&text, 128, None, &CancelToken::new(), &Progress::new()).unwrap().perplexity
    };
    // Embedding and head have six bits there.
    let (of_folder, of_file) = (perplexity(&folder), perplexity(&file));
    assert!((of_file / of_folder - 1.0).abs() < 0.01, "{of_file} from {of_folder}");
}

#[test]
fn an_interrupted_job_ends_in_the_same_file() {
    let scratch = tempfile::tempdir().unwrap();
    let asked = gguf_recipe(&scratch.path().join("out"), 0);
    finish(&asked);
    let undisturbed = fs::read(asked.out.join("model.gguf")).unwrap();
    // In the middle of the blocks, and when the file is being written.
    for (phase, done) in [("compress", 3), ("write", 20)] {
        fs::remove_dir_all(&asked.out).unwrap();
        let there = |reading: &ProgressSnapshot| reading.phase == phase && reading.done >= done;
        let outcome =
            disturbed(there, CancelToken::cancel, |cancel, progress| compress(&asked, &backend(), cancel, progress));
        assert_eq!(outcome.unwrap_err().code, ErrorCode::Cancelled, "{phase}");
        assert!(asked.out.with_file_name("out.partial").join("ledger.jsonl").is_file(), "{phase}");
        finish(&asked);
        assert!(fs::read(asked.out.join("model.gguf")).unwrap() == undisturbed, "{phase}");
        assert_eq!(names_in(scratch.path()).len(), 1, "{phase}");
    }
}

#[test]
fn what_no_type_holds_is_refused_with_the_grids_that_are_held() {
    let scratch = tempfile::tempdir().unwrap();
    let asked = gguf_recipe(&scratch.path().join("out"), 0);
    type Change = fn(&mut Recipe);
    let changes: [(&str, Change); 6] = [
        ("width", |recipe| recipe.bits = 3),
        ("groups", |recipe| recipe.group_size = Some(64)),
        ("whole rows", |recipe| recipe.group_size = None),
        ("zero points", |recipe| recipe.symmetric = false),
        ("scales", |recipe| recipe.scale_type = Some(ElementType::Bf16)),
        ("group index", |recipe| recipe.static_groups = false),
    ];
    for (what, change) in changes {
        let mut recipe = asked.clone();
        change(&mut recipe);
        let error = plan(&recipe).unwrap_err();
        assert_eq!(error.code, ErrorCode::QuantizationUnsupported, "{what}: {error}");
        assert!(error.subject.ends_with("q_proj"), "{what}: {}", error.subject);
        assert!(error.hint.contains("4 bits in groups of 32 inputs or 8 bits"), "{what}: {}", error.hint);
    }
    for (name, hint) in [("gguf:Q4_K", "convert afterwards"), ("gguf:Q4_1", "gguf:Q4_0"), ("gguf:q4_0", "gguf:Q4_0")] {
        let error = plan(&Recipe { format: name.to_owned(), ..asked.clone() }).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionUnknown, "format"), "{name}");
        assert!(error.hint.contains(hint), "{name}: {}", error.hint);
    }
}

#[test]
fn a_model_that_a_file_cannot_say_is_refused_before_anything_runs() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(assets("llama-7m")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
    }
    // GGUF has no name for such a tokenizer.
    let words = r#"{ "model": { "type": "WordLevel", "vocab": { "a": 0 }, "unk_token": "a" } }"#;
    fs::write(source.join("tokenizer.json"), words).unwrap();
    let asked = Recipe { source, ..gguf_recipe(&scratch.path().join("out"), 0) };
    let error = plan(&asked).unwrap_err();
    assert!(error.subject.ends_with("tokenizer.json") && error.message.contains("WordLevel"), "{error}");
    plan(&Recipe { format: "auto".to_owned(), ..asked }).unwrap();
}
