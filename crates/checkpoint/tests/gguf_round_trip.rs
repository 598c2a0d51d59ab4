//! What is written as GGUF is read back: floats and codes bit for bit, rounded values close to the source.

use std::fs;
use std::path::{Path, PathBuf};

use crate::fixture::{assert_refused, finish};
use kintsugi_checkpoint::gguf::{
    GgufEntry, GgufFile, GgufMetadata, GgufPlan, GgufSummary, GgufType, GgufValue, GgufWriter, exact_type, write_gguf,
};
use kintsugi_checkpoint::{Checkpoint, CheckpointWriter, PackQuantized, QuantizationConfig};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress};
use kintsugi_weights::{ElementType, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts, WeightMatrix};
use tempfile::TempDir;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn kind(name: &str) -> &'static GgufType {
    GgufType::written(name).unwrap()
}

fn export(source: &Checkpoint, plan: &GgufPlan, path: &Path) -> Result<GgufSummary, Error> {
    write_gguf(source, plan, path, &CancelToken::new(), &Progress::new())
}

/// The checkpoint in `path` as a GGUF file of `type_name`.
fn written(path: &Path, type_name: &str) -> (TempDir, Checkpoint, GgufSummary) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model.gguf");
    let summary = export(&Checkpoint::open(path).unwrap(), &GgufPlan::new(kind(type_name)), &target).unwrap();
    assert_eq!(summary.bytes, fs::metadata(&target).unwrap().len());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing stays beside the file");
    let checkpoint = Checkpoint::open(&target).unwrap();
    (folder, checkpoint, summary)
}

/// Root of the mean square of the differences, as a share of that of the values.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    (difference / square(&mut expected.iter().map(|&value| f64::from(value)))).sqrt()
}

#[test]
fn floats_come_back_as_they_were() {
    let path = repository("assets/llama-7m");
    let source = Checkpoint::open(&path).unwrap();
    for type_name in ["BF16", "F32"] {
        let (_folder, checkpoint, summary) = written(&path, type_name);
        assert_eq!((summary.rounded.len(), summary.notices.len()), (0, 0));
        assert_eq!(checkpoint.tensors().count(), source.tensors().count());
        for tensor in source.tensors() {
            if tensor.shape.len() == 1 {
                assert_eq!(checkpoint.vector(&tensor.name).unwrap(), source.vector(&tensor.name).unwrap());
            } else {
                let (found, expected) = (checkpoint.dense(&tensor.name).unwrap(), source.dense(&tensor.name).unwrap());
                assert_eq!(found.to_f32(), expected.to_f32(), "{} in {type_name}", tensor.name);
            }
        }
        for field in ["architectures", "hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "vocab_size"]
        {
            assert_eq!(checkpoint.config()[field], source.config()[field], "{field}");
        }
        assert_eq!(checkpoint.config()["tie_word_embeddings"], true);
        assert!(checkpoint.quantization().is_none() && checkpoint.block_type().is_none());
    }
}

#[test]
fn the_same_call_gives_the_same_bytes() {
    let path = repository("assets/tinystories-656k");
    let files: Vec<Vec<u8>> = (0..2)
        .map(|_| {
            let (folder, _, _) = written(&path, "Q4_0");
            fs::read(folder.path().join("model.gguf")).unwrap()
        })
        .collect();
    assert!(files[0] == files[1]);
}

#[test]
fn rounded_matrices_are_close() {
    // Measured on these weights: 0.0058, 0.0182, 0.0757, 0.0743, 0.0877 at most.
    let budgets = [("Q8_0", 0.0065), ("Q6_K", 0.022), ("Q4_K", 0.085), ("Q4_1", 0.09), ("Q4_0", 0.1)];
    let path = repository("assets/llama-7m");
    let source = Checkpoint::open(&path).unwrap();
    for (type_name, budget) in budgets {
        let (_folder, checkpoint, _) = written(&path, type_name);
        assert_eq!(checkpoint.block_type().unwrap().name, type_name);
        let mut worst = 0f64;
        for tensor in source.tensors().filter(|tensor| tensor.name.contains("proj")) {
            let linear = tensor.name.strip_suffix(".weight").unwrap();
            let WeightMatrix::Quantized(found) = checkpoint.linear(linear).unwrap().matrix else {
                panic!("{linear} is not in codes")
            };
            worst = worst.max(relative_error(&found.to_f32(), &source.dense(&tensor.name).unwrap().to_f32()));
        }
        assert!(worst < budget, "{type_name}: {worst}");
        assert!(worst > budget / 4.0, "{type_name}: {worst} is better than such a grid can be");
    }
}

/// The plain way to round a block, which the search must not be worse than: the largest value ends the grid.
fn plainly_rounded(values: &[f32]) -> Vec<f32> {
    let rounded = values.chunks(32).flat_map(|group| {
        let largest = group.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
        let scale = ElementType::F16.round(largest / -8.0);
        group.iter().map(move |value| (value / scale).round().clamp(-8.0, 7.0) * scale)
    });
    rounded.collect()
}

#[test]
fn the_search_is_better_than_plain_rounding() {
    let path = repository("assets/llama-7m");
    let source = Checkpoint::open(&path).unwrap();
    let (_folder, checkpoint, _) = written(&path, "Q4_0");
    for tensor in source.tensors().filter(|tensor| tensor.name.contains("mlp")) {
        let values = source.dense(&tensor.name).unwrap().to_f32();
        let found = relative_error(&checkpoint.dense(&tensor.name).unwrap().to_f32(), &values);
        let plain = relative_error(&plainly_rounded(&values), &values);
        assert!(found < 0.97 * plain, "{}: {found} against {plain}", tensor.name);
    }
}

#[test]
fn codes_of_every_written_type_are_recognized_and_come_back() {
    for type_name in ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"] {
        let file = GgufFile::open(&repository(&format!("__test__/vectors/gguf/types/{type_name}.gguf"))).unwrap();
        let WeightMatrix::Quantized(matrix) = file.matrix("blocks").unwrap() else { panic!("{type_name}") };
        assert_eq!(exact_type(&matrix), Some(kind(type_name)));
    }
}

fn grid(bits: u8, group: GroupSize, scale_type: ElementType, zero_points: Option<u8>) -> QuantizedMatrix {
    let (rows, columns) = (4, 256);
    let groups = group.groups(columns);
    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits,
        group_size: group,
        codes: (0..rows * columns).map(|place| (place * 7 % (1 << bits)) as u8).collect(),
        scales: (0..rows * groups).map(|place| scale_type.round(0.01 + place as f32 * 0.001)).collect(),
        scale_type,
        zero_points: zero_points.map(|zero| vec![zero; rows * groups]),
        ..QuantizedParts::default()
    })
    .unwrap()
}

#[test]
fn grids_of_other_formats_find_the_type_that_holds_them() {
    let f16 = ElementType::F16;
    let of = |bits, size, zero| exact_type(&grid(bits, GroupSize::Columns(size), f16, zero)).map(|found| found.name);
    assert_eq!(of(4, 32, None), Some("Q4_0"));
    assert_eq!(of(4, 128, None), Some("Q4_0"));
    assert_eq!(of(3, 64, None), Some("Q4_0"));
    assert_eq!(of(8, 128, None), Some("Q8_0"));
    assert_eq!(of(4, 32, Some(8)), Some("Q4_0"));
    // Products of scales and zero points have too many bits for half precision, but bytes hold the differences.
    assert_eq!(of(4, 32, Some(5)), Some("Q8_0"));
    assert_eq!(of(4, 32, Some(4)), Some("Q4_1"));
    assert_eq!(of(8, 32, Some(9)), None);
    assert_eq!(of(4, 16, None), None);
    assert_eq!(exact_type(&grid(4, GroupSize::WholeRow, f16, None)).map(|found| found.name), Some("Q4_0"));
    assert_eq!(exact_type(&grid(4, GroupSize::Columns(32), ElementType::F32, None)), None);
}

#[test]
fn a_gguf_file_is_copied_or_rounded_again() {
    let (folder, checkpoint, _) = written(&repository("assets/llama-7m"), "Q4_K");
    let copy = folder.path().join("copy.gguf");
    let summary = export(&checkpoint, &GgufPlan::new(kind("Q8_0")), &copy).unwrap();
    assert_eq!(summary.rounded.len(), 0);
    let same = Checkpoint::open(&copy).unwrap();
    let other = folder.path().join("other.gguf");
    let summary = export(&checkpoint, &GgufPlan { keep_codes: false, ..GgufPlan::new(kind("Q8_0")) }, &other).unwrap();
    assert_eq!(summary.rounded.len(), 57);
    let rounded = Checkpoint::open(&other).unwrap();
    for tensor in checkpoint.tensors().filter(|tensor| tensor.shape.len() == 2) {
        let expected = checkpoint.dense(&tensor.name).unwrap().to_f32();
        assert_eq!(same.dense(&tensor.name).unwrap().to_f32(), expected);
        assert!(relative_error(&rounded.dense(&tensor.name).unwrap().to_f32(), &expected) < 0.0065);
    }
    assert_eq!(rounded.block_type().unwrap().name, "Q8_0");
    assert_eq!(rounded.tokenizer_json().unwrap(), checkpoint.tokenizer_json().unwrap());
}

#[test]
fn a_folder_is_made_of_a_gguf_file() {
    let (folder, checkpoint, _) = written(&repository("assets/llama-7m"), "BF16");
    let target = folder.path().join("folder");
    let mut writer = CheckpointWriter::create(&target, &checkpoint).unwrap();
    for tensor in checkpoint.tensors() {
        writer.copy(&tensor.name).unwrap();
    }
    let plain = QuantizationConfig {
        format: &PackQuantized,
        bits: 4,
        group_size: GroupSize::WholeRow,
        group_axis: GroupAxis::Input,
        symmetric: true,
        group_index: false,
        exceptions: Vec::new(),
        ignore: Vec::new(),
    };
    finish(writer, &plain).unwrap();
    let (found, source) =
        (Checkpoint::open(&target).unwrap(), Checkpoint::open(&repository("assets/llama-7m")).unwrap());
    for tensor in source.tensors().filter(|tensor| tensor.shape.len() == 2) {
        assert_eq!(found.tensor(&tensor.name).unwrap().dtype, "BF16");
        assert_eq!(found.dense(&tensor.name).unwrap(), source.dense(&tensor.name).unwrap(), "{}", tensor.name);
    }
    assert_eq!(found.config(), checkpoint.config());
    assert_eq!(found.tokenizer_json().unwrap(), checkpoint.tokenizer_json().unwrap());
}

#[test]
fn failures_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model.gguf");
    let source = Checkpoint::open(&repository("assets/llama-7m")).unwrap();
    let plan = GgufPlan::new(kind("F16"));
    let cancel = CancelToken::new();
    cancel.cancel();
    let error = write_gguf(&source, &plan, &target, &cancel, &Progress::new()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Cancelled);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    fs::write(&target, b"here first").unwrap();
    assert_refused(export(&source, &plan, &target), ErrorCode::OutputNotEmpty);
    assert_eq!(fs::read(&target).unwrap(), b"here first");
}

#[test]
fn a_tensor_of_another_length_than_announced_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut metadata = GgufMetadata::default();
    metadata.set("n", GgufValue::U8(1));
    let entry = GgufEntry { name: "a".into(), gguf_type: kind("F32"), shape: vec![2] };
    let mut writer = GgufWriter::create(&path, &metadata, std::slice::from_ref(&entry)).unwrap();
    assert_eq!(writer.write(&[0; 9]).unwrap_err().code, ErrorCode::Internal);
    drop(writer);
    let mut writer = GgufWriter::create(&path, &metadata, std::slice::from_ref(&entry)).unwrap();
    writer.write(&[0; 4]).unwrap();
    assert_eq!(writer.finish().unwrap_err().code, ErrorCode::Internal);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
