//! Checkpoints in the formats of others, from the folder to the perplexity.

use std::collections::HashSet;
use std::path::Path;

use crate::common::{assets, backend, load, recipe};
use kintsugi_checkpoint::{Awq, Checkpoint, CheckpointWriter, Gptq, Kintsugi, LinearFormat, QuantizationConfig};
use kintsugi_pipeline::{Recipe, compress, inspect};
use kintsugi_runtime::{CancelToken, Progress};
use kintsugi_testkit::float8_checkpoint::write_float8_checkpoint;
use kintsugi_weights::WeightMatrix;

/// Rounding to nearest, without calibration.
fn rtn(source: &Path, out: &Path, symmetric: bool) -> Recipe {
    let mut recipe = recipe(source, out, "rtn", 4, 0);
    recipe.symmetric = symmetric;
    recipe.calibration = None;
    compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    recipe
}

/// On the first 4000 characters of the evaluation text.
fn perplexity(path: &Path) -> f64 {
    let text = std::fs::read_to_string(assets("text/eval-stories.txt")).unwrap();
    let text: String = text.chars().take(4000).collect();
    load(path).perplexity(&text, 128, None, &CancelToken::new(), &Progress::new()).unwrap().perplexity
}

/// Writes the quantized Linears of `source` in another format and copies the rest.
fn rewrite(source: &Path, target: &Path, format: &'static dyn LinearFormat) {
    let source = Checkpoint::open(source).unwrap();
    let mut writer = CheckpointWriter::create(target, &source).unwrap().format(format);
    let mut replaced = HashSet::new();
    for tensor in source.tensors() {
        let Some(name) = tensor.name.strip_suffix(".weight_packed") else { continue };
        let WeightMatrix::Quantized(matrix) = source.linear(name).unwrap().matrix else { panic!("{name} is packed") };
        writer.write_linear(name, &matrix).unwrap();
        replaced.extend(source.parts_of(name).map(|tensor| &tensor.name));
    }
    for tensor in source.tensors().filter(|tensor| !replaced.contains(&tensor.name)) {
        writer.copy(&tensor.name).unwrap();
    }
    let config = QuantizationConfig { format, ..source.quantization().unwrap().clone() };
    writer.seal(&config).unwrap();
    writer.commit().unwrap();
}

#[test]
fn a_model_computes_the_same_in_every_format() {
    let scratch = tempfile::tempdir().unwrap();
    for symmetric in [true, false] {
        let packed = scratch.path().join(format!("packed-{symmetric}"));
        rtn(&assets("llama-7m"), &packed, symmetric);
        let expected = perplexity(&packed);
        // Zero points of 0, which version 1 has no place for, occur on asymmetric grids.
        let formats: &[&'static dyn LinearFormat] =
            if symmetric { &[&Gptq::V1, &Gptq::V2, &Awq, &Kintsugi] } else { &[&Gptq::V2, &Awq, &Kintsugi] };
        for &format in formats {
            let target = scratch.path().join(format!("{}-{symmetric}", format.name()));
            rewrite(&packed, &target, format);
            let found = perplexity(&target);
            assert_eq!(found.to_bits(), expected.to_bits(), "{}, symmetric: {symmetric}", format.name());
            let info = inspect(&target).unwrap();
            let quantization = info.quantization.unwrap();
            assert_eq!((quantization.format, quantization.symmetric), (format.name(), symmetric));
            assert!(info.can_run && !info.can_compress && info.notices.is_empty(), "{:?}", info.reason);
        }
    }
}

#[test]
fn eight_bit_floats_are_a_source_to_compress() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("float8"), scratch.path().join("out"));
    write_float8_checkpoint(&assets("llama-7m"), &source);
    let info = inspect(&source).unwrap();
    assert!(info.can_run && info.can_compress && info.quantization.is_none(), "{:?}", info.reason);
    let plain = perplexity(&assets("llama-7m"));
    let float8 = perplexity(&source);
    assert!((float8 / plain - 1.0).abs() < 0.02, "{float8} from {plain}");

    let recipe = rtn(&source, &out, false);
    let planned = kintsugi_pipeline::plan(&Recipe { out: scratch.path().join("other"), ..recipe }).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    assert!(written.tensors().all(|tensor| tensor.dtype != "F8_E4M3" && !tensor.name.ends_with("_scale_inv")));
    // The plan leaves out the shapes of the Linears, 16 bytes each.
    let linears = planned.linears.len() as u64;
    assert_eq!(planned.bytes, written.tensors().map(|tensor| tensor.bytes).sum::<u64>() - 16 * linears);
    let compressed = perplexity(&out);
    assert!((compressed / float8 - 1.0).abs() < 0.2, "{compressed} from {float8}");
}
