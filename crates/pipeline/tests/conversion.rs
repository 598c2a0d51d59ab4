//! Quantized Linears from one format to another.

use std::path::{Path, PathBuf};

use crate::common::{assets, backend, load, recipe};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_model::{BlockWeights, DecoderSpec};
use kintsugi_pipeline::{ConversionReport, ConvertRecipe, LinearOverride, Recipe, compress, convert, plan};
use kintsugi_runtime::{CancelToken, ErrorCode, Progress, Result};

/// Rounds the small model with `change` applied to a 4-bit recipe without calibration.
fn rounded(out: &Path, change: impl Fn(&mut Recipe)) {
    let mut recipe = recipe(&assets("tinystories-656k"), out, "rtn", 4, 0);
    recipe.calibration = None;
    recipe.group_size = Some(32);
    change(&mut recipe);
    compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
}

fn to(source: &Path, out: PathBuf, format: &str) -> ConvertRecipe {
    ConvertRecipe {
        source: source.to_path_buf(),
        out,
        format: format.to_owned(),
        allow_requantize: false,
        bits: None,
        group_size: None,
        dry_run: false,
    }
}

fn run(recipe: &ConvertRecipe) -> Result<ConversionReport> {
    convert(recipe, &CancelToken::new(), &Progress::new())
}

fn likelihood(path: &Path) -> u64 {
    let text = std::fs::read_to_string(assets("text/eval-stories.txt")).unwrap();
    let text: String = text.chars().take(2000).collect();
    let report = load(path).perplexity(&text, 128, None, &CancelToken::new(), &Progress::new()).unwrap();
    report.perplexity.to_bits()
}

fn given(linears: &str, bits: Option<u8>, group_size: Option<usize>) -> LinearOverride {
    LinearOverride { linears: linears.to_owned(), bits, group_size }
}

#[test]
fn a_grid_that_both_formats_hold_travels_bit_for_bit() {
    let scratch = tempfile::tempdir().unwrap();
    let first = scratch.path().join("first");
    rounded(&first, |_| {});
    let expected = likelihood(&first);
    let mut source = first;
    for format in ["gptq_v2", "awq", "compressed-tensors/pack-quantized", "f32"] {
        let out = scratch.path().join(format.replace('/', "-"));
        let report = run(&to(&source, out.clone(), format)).unwrap();
        assert_eq!((report.linears.len(), report.format.as_str()), (14, format));
        assert!(report.linears.iter().all(|linear| linear.exact && linear.error == 0.0));
        // Products with plain floats add in another order.
        if format != "f32" {
            assert_eq!(likelihood(&out), expected, "{format}");
        }
        let (before, after) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&out).unwrap());
        for linear in &report.linears {
            let values = |checkpoint: &Checkpoint| checkpoint.linear(&linear.name).unwrap().matrix.to_f32();
            assert_eq!(values(&before), values(&after), "{format}");
        }
        source = out;
    }
    // The last one is plain.
    assert_eq!(Checkpoint::open(&source).unwrap().quantization(), None);
    assert_eq!(
        run(&to(&source, scratch.path().join("again"), "awq")).unwrap_err().code,
        ErrorCode::QuantizationUnsupported
    );
}

#[test]
fn a_change_of_grid_states_its_cost_and_asks() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    rounded(&source, |recipe| recipe.bits = 8);
    let error = run(&to(&source, out.clone(), "awq")).unwrap_err();
    assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ConversionInexact, "format"));
    assert!(error.message.contains("14 of 14") && error.message.contains('%'), "{}", error.message);
    assert!(!out.exists() && !scratch.path().join("out.partial").exists());

    let measured = run(&ConvertRecipe { dry_run: true, ..to(&source, out.clone(), "awq") }).unwrap();
    assert!(!out.exists());
    let report = run(&ConvertRecipe { allow_requantize: true, ..to(&source, out.clone(), "awq") }).unwrap();
    let (original, written) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&out).unwrap());
    for (linear, planned) in report.linears.iter().zip(&measured.linears) {
        assert_eq!((linear.bits, linear.exact, linear.error.to_bits()), (4, false, planned.error.to_bits()));
        let (before, after) = (
            original.linear(&linear.name).unwrap().matrix.to_f32(),
            written.linear(&linear.name).unwrap().matrix.to_f32(),
        );
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
        let difference = square(&mut before.iter().zip(&after).map(|(&a, &b)| f64::from(b) - f64::from(a)));
        let norm = square(&mut before.iter().map(|&value| f64::from(value)));
        let share = (difference / norm).sqrt();
        assert!((share - linear.error).abs() <= 1e-9 * share, "{}: {share} {}", linear.name, linear.error);
        // Four bits of rounding in groups of 32.
        assert!((0.03..0.12).contains(&share), "{}: {share}", linear.name);
    }

    let narrower = ConvertRecipe { bits: Some(3), allow_requantize: true, ..to(&source, out.clone(), "gptq") };
    let error = run(&narrower).unwrap_err();
    assert_eq!(error.code, ErrorCode::OutputNotEmpty);
    let report = run(&ConvertRecipe { out: scratch.path().join("three"), format: "bf16".into(), ..narrower }).unwrap();
    // Eight bits of a code are one more than bf16 keeps of most products with a scale.
    assert!(report.linears.iter().all(|linear| !linear.exact && linear.error < 0.004 && linear.bits == 16));
}

#[test]
fn linears_with_options_of_their_own_are_written_and_read_in_every_format_that_can_say_so() {
    let scratch = tempfile::tempdir().unwrap();
    let mixed = scratch.path().join("mixed");
    let overrides = vec![given("*.down_proj", Some(8), Some(0)), given("model.layers.0.*", None, Some(64))];
    let change = |recipe: &mut Recipe| {
        recipe.bits = 3;
        recipe.symmetric = true;
        recipe.overrides = overrides.clone();
    };
    rounded(&mixed, change);
    let expected = likelihood(&mixed);
    let checkpoint = Checkpoint::open(&mixed).unwrap();
    let quantization = checkpoint.quantization().unwrap();
    // The narrow width of most Linears decides.
    assert_eq!(quantization.format.name(), "gptq");
    let scheme = |name: &str| quantization.scheme_of(name);
    use kintsugi_weights::GroupSize::{Columns, WholeRow};
    for (name, bits, group_size) in [
        ("model.layers.0.mlp.down_proj", 8, WholeRow),
        ("model.layers.1.mlp.down_proj", 8, WholeRow),
        ("model.layers.0.mlp.up_proj", 3, Columns(64)),
        ("model.layers.1.mlp.up_proj", 3, Columns(32)),
    ] {
        assert_eq!((scheme(name).bits, scheme(name).group_size), (bits, group_size), "{name}");
    }
    for format in ["compressed-tensors/pack-quantized", "gptq_v2"] {
        let out = scratch.path().join(format.replace('/', "-"));
        let report = run(&to(&mixed, out.clone(), format)).unwrap();
        assert!(report.linears.iter().all(|linear| linear.exact));
        assert_eq!(likelihood(&out), expected, "{format}");
    }
    let out = scratch.path().join("awq");
    let report = run(&ConvertRecipe { allow_requantize: true, ..to(&mixed, out.clone(), "awq") }).unwrap();
    assert!(report.linears.iter().all(|linear| linear.bits == 4));
    assert!(Checkpoint::open(&out).unwrap().quantization().unwrap().exceptions.is_empty());
}

#[test]
fn formats_that_cannot_hold_the_result_are_refused_before_anything_runs() {
    let scratch = tempfile::tempdir().unwrap();
    let base = Recipe { group_size: Some(32), ..recipe(&assets("llama-7m"), &scratch.path().join("out"), "rtn", 4, 0) };
    let refused = |change: &dyn Fn(&mut Recipe)| {
        let mut recipe = base.clone();
        change(&mut recipe);
        plan(&recipe).unwrap_err()
    };
    let unsupported = ErrorCode::QuantizationUnsupported;
    assert_eq!(refused(&|r| (r.format, r.bits) = ("awq".into(), 3)).code, unsupported);
    let version_1 = refused(&|r| r.format = "gptq".into());
    assert_eq!((version_1.code, version_1.subject.contains("model.layers.0")), (unsupported, true));
    assert!(version_1.hint.contains("gptq_v2"));
    let exception = given("*.v_proj", Some(8), None);
    assert_eq!(refused(&|r| (r.format, r.overrides) = ("awq".into(), vec![exception.clone()])).code, unsupported);
    assert_eq!(refused(&|r| r.format = "gtpq".into()).code, ErrorCode::OptionUnknown);
    assert_eq!(refused(&|r| r.overrides = vec![given("*.v_porj", Some(8), None)]).subject, "overrides");
    assert_eq!(refused(&|r| r.overrides = vec![given("*.v_proj", Some(7), None)]).subject, "overrides");
    for (bits, symmetric, format) in [
        (2, false, "gptq_v2"),
        (3, true, "gptq"),
        (4, false, "compressed-tensors/pack-quantized"),
        (5, true, "compressed-tensors/pack-quantized"),
        (8, true, "compressed-tensors/pack-quantized"),
    ] {
        assert_eq!(plan(&Recipe { bits, symmetric, ..base.clone() }).unwrap().format, format, "{bits}");
    }
    // A group that does not divide the inputs is nothing for GPTQ.
    let ragged = plan(&Recipe { bits: 2, group_size: Some(48), ..base.clone() }).unwrap();
    assert_eq!(ragged.format, "compressed-tensors/pack-quantized");
}

#[test]
fn codes_travel_to_gguf_and_back() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, file, back) =
        (scratch.path().join("source"), scratch.path().join("model.gguf"), scratch.path().join("back"));
    rounded(&source, |recipe| {
        recipe.symmetric = true;
        recipe.scale_type = Some(kintsugi_weights::ElementType::F16);
    });
    // Embedding and head are floats in the source and would be rounded.
    let error = run(&to(&source, file.clone(), "gguf:Q4_0")).unwrap_err();
    assert_eq!(error.code, ErrorCode::ConversionInexact);
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing stays");

    let report = run(&ConvertRecipe { allow_requantize: true, ..to(&source, file.clone(), "gguf:Q4_0") }).unwrap();
    let in_blocks = |name: &str| name.starts_with("model.layers.");
    assert_eq!(report.linears.iter().filter(|linear| in_blocks(&linear.name)).count(), 14);
    for linear in &report.linears {
        assert_eq!(linear.exact, in_blocks(&linear.name), "{}", linear.name);
    }
    assert_eq!(report.bytes, std::fs::metadata(&file).unwrap().len());
    assert_eq!(run(&to(&source, file.clone(), "gguf:Q4_0")).unwrap_err().code, ErrorCode::OutputNotEmpty);

    let report = run(&to(&file, back.clone(), "gptq")).unwrap();
    assert_eq!((report.source_format, report.linears.len()), ("gguf", 14));
    assert!(report.linears.iter().all(|linear| linear.exact));
    // Embedding and head are widened, so that their products add in another order.
    let (codes, plain) = (f64::from_bits(likelihood(&file)), f64::from_bits(likelihood(&back)));
    assert!((codes - plain).abs() < 1e-6 * plain, "{codes} {plain}");
    let quantization = Checkpoint::open(&back).unwrap().quantization().cloned().unwrap();
    assert_eq!((quantization.bits, quantization.symmetric), (4, true));

    let floats = scratch.path().join("floats.gguf");
    let report = run(&to(&assets("tinystories-656k"), floats.clone(), "gguf:F32")).unwrap();
    assert!(report.linears.iter().all(|linear| linear.exact && linear.bits == 32));
    assert_eq!(likelihood(&floats), likelihood(&assets("tinystories-656k")));
    assert_eq!(run(&to(&floats, scratch.path().join("x"), "gguf:Q4_2")).unwrap_err().code, ErrorCode::OptionUnknown);
}

#[test]
fn every_family_is_widened_as_it_keeps_its_plain_matrices() {
    let scratch = tempfile::tempdir().unwrap();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/families");
    for entry in std::fs::read_dir(root).unwrap() {
        let family = entry.unwrap().path();
        let name = family.file_name().unwrap().to_string_lossy().into_owned();
        let (source, out) = (scratch.path().join(format!("{name}-codes")), scratch.path().join(&name));
        let mut recipe = recipe(&family, &source, "rtn", 8, 0);
        (recipe.calibration, recipe.group_size) = (None, Some(16));
        compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        let report = run(&to(&source, out.clone(), "f32")).unwrap();
        assert!(report.linears.iter().all(|linear| linear.exact), "{name}");

        let (codes, plain) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&out).unwrap());
        let spec = DecoderSpec::of(&plain).unwrap();
        for block in 0..spec.layers {
            let read = |checkpoint: &Checkpoint| BlockWeights::read(checkpoint, &spec, block).unwrap().linears;
            for (before, after) in read(&codes).iter().zip(read(&plain)) {
                assert_eq!(before.matrix.to_f32(), after.matrix.to_f32(), "{name}");
            }
        }
        let kept = std::fs::read_to_string(out.join("config.json")).unwrap();
        assert!(!kept.contains("quantization_config"), "{name}");
    }
}

#[test]
fn every_family_becomes_a_gguf_file_that_holds_its_weights_and_is_the_same_each_time() {
    let scratch = tempfile::tempdir().unwrap();
    // That of the vectors is of whole words, which GGUF has no kind for.
    let letters: serde_json::Map<String, serde_json::Value> =
        (0..64u8).map(|id| (char::from(b'!' + id).to_string(), id.into())).collect();
    let step =
        serde_json::json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let mut written = Vec::new();
    for entry in std::fs::read_dir(assets("../__test__/vectors/families")).unwrap() {
        let family = entry.unwrap().path();
        let name = family.file_name().unwrap().to_string_lossy().into_owned();
        let folder = scratch.path().join(&name);
        std::fs::create_dir(&folder).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(family.join(file), folder.join(file)).unwrap();
        }
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let rows = config["vocab_size"].as_u64().unwrap() as usize;
        let vocab: serde_json::Map<_, _> = letters.clone().into_iter().take(rows).collect();
        let model = serde_json::json!({ "type": "BPE", "vocab": vocab, "merges": [] });
        let tokenizer = serde_json::json!(
            { "version": "1.0", "added_tokens": [], "pre_tokenizer": step, "decoder": step, "model": model }
        );
        std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();

        let files = ["one", "two"].map(|file| scratch.path().join(format!("{name}-{file}.gguf")));
        let reports: Result<Vec<_>> = files.iter().map(|file| run(&to(&folder, file.clone(), "gguf:F32"))).collect();
        match reports {
            Ok(reports) => {
                for linear in &reports[0].linears {
                    assert!(linear.exact, "{name}: {} {}", linear.name, linear.error);
                }
                assert!(std::fs::read(&files[0]).unwrap() == std::fs::read(&files[1]).unwrap(), "{name}: other bytes");
                written.push(name);
            }
            Err(error) => assert_eq!(error.code, ErrorCode::ConfigUnsupported, "{name}: {error:?}"),
        }
    }
    for name in ["gpt-neox", "gpt2", "llama", "phi3", "qwen2-moe"] {
        assert!(written.iter().any(|written| written == name), "{name}: {written:?}");
    }
}
