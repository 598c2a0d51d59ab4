//! One test per trick that a broken or hostile folder can play. Each must end in a typed error that says with what and
//! what to do, never in a crash or an allocation that the file does not justify.

use std::fs;
use std::path::Path;

use crate::fixture::{Tensor, assert_refused, floats, longs, raw_file, safetensors, words, write_checkpoint};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_runtime::{Error, ErrorCode};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The folder with these weights; the error that opening it gives.
#[track_caller]
fn open_refused(weights: &[u8], code: ErrorCode) -> Error {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({ "model_type": "llama" }), weights);
    assert_refused(Checkpoint::open(folder.path()), code)
}

#[track_caller]
fn header_refused(header: &str, data: usize) -> Error {
    open_refused(&raw_file(header, &vec![0; data]), ErrorCode::CheckpointCorrupt)
}

fn matrix() -> Tensor {
    floats("a.weight", &[2, 2], &[1.0, 2.0, 3.0, 4.0])
}

#[test]
fn empty_file() {
    open_refused(b"", ErrorCode::CheckpointCorrupt);
}

#[test]
fn truncated_file_says_how_many_bytes_are_missing() {
    let mut file = safetensors(&[matrix()]);
    file.truncate(file.len() - 5);
    let error = open_refused(&file, ErrorCode::CheckpointCorrupt);
    assert!(error.message.contains("5 bytes") && error.message.contains("missing"), "{error}");
}

#[test]
fn every_prefix_of_a_file() {
    let file = safetensors(&[matrix(), floats("b", &[1], &[0.0])]);
    for length in 0..file.len() {
        open_refused(&file[..length], ErrorCode::CheckpointCorrupt);
    }
}

#[test]
fn bytes_behind_the_last_tensor() {
    let mut file = safetensors(&[matrix()]);
    file.extend([0; 3]);
    assert!(open_refused(&file, ErrorCode::CheckpointCorrupt).message.contains("3 bytes"));
}

#[test]
fn header_longer_than_the_file() {
    let mut file = safetensors(&[matrix()]);
    let length = file.len() as u64;
    file[..8].copy_from_slice(&length.to_le_bytes());
    open_refused(&file, ErrorCode::CheckpointCorrupt);
}

#[test]
fn header_length_of_all_ones() {
    let mut file = safetensors(&[matrix()]);
    file[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    open_refused(&file, ErrorCode::CheckpointCorrupt);
}

#[test]
fn header_over_the_limit_of_the_format_in_a_sparse_file() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({}), &200_000_000u64.to_le_bytes());
    let file = fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
    file.set_len(300_000_000).unwrap();
    let error = assert_refused(Checkpoint::open(folder.path()), ErrorCode::CheckpointCorrupt);
    assert!(error.message.contains("100000000"), "{error}");
}

#[test]
fn overlapping_tensors() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
        "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    assert!(header_refused(header, 12).message.contains("overlaps"));
}

#[test]
fn two_tensors_in_the_same_place() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
        "b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    header_refused(header, 8);
}

#[test]
fn hole_between_tensors() {
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
        "b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#;
    assert!(header_refused(header, 12).message.contains("'b'"));
}

#[test]
fn hole_before_the_first_tensor() {
    header_refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8);
}

#[test]
fn offsets_that_run_backwards() {
    header_refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4);
}

#[test]
fn negative_offset() {
    header_refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}"#, 4);
}

#[test]
fn bytes_that_do_not_fit_type_and_shape() {
    let error = header_refused(r#"{"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,16]}}"#, 16);
    assert!(error.message.contains("needs 8 bytes"), "{error}");
}

#[test]
fn type_of_half_bytes_with_an_odd_count() {
    header_refused(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2);
}

#[test]
fn unknown_type() {
    header_refused(r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#, 4);
}

#[test]
fn shape_whose_product_overflows() {
    let header = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,0]}}"#;
    header_refused(header, 0);
}

#[test]
fn shape_whose_bits_overflow() {
    header_refused(r#"{"a":{"dtype":"F64","shape":[1152921504606846976],"data_offsets":[0,0]}}"#, 0);
}

#[test]
fn offset_at_the_end_of_the_number_range() {
    let header = r#"{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#;
    header_refused(header, 0);
}

#[test]
fn name_that_stands_twice() {
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
        "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert!(header_refused(header, 4).message.contains("twice"));
}

#[test]
fn header_that_is_not_utf8() {
    let mut file = safetensors(&[matrix()]);
    file[9] = 0xff;
    open_refused(&file, ErrorCode::CheckpointCorrupt);
}

#[test]
fn header_that_is_not_an_object() {
    header_refused("[1, 2, 3]", 0);
    header_refused("", 0);
    header_refused("null", 0);
}

#[test]
fn header_with_text_behind_it() {
    header_refused("{} {}", 0);
}

#[test]
fn header_of_deeply_nested_json() {
    header_refused(&format!("{{\"a\":{}", "[".repeat(1_000_000)), 0);
}

#[test]
fn metadata_that_is_not_text() {
    header_refused(r#"{"__metadata__":{"format":{"deep":1}}}"#, 0);
}

#[test]
fn nan_and_infinity_are_named_with_tensor_row_and_column() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let folder = tempfile::tempdir().unwrap();
        let weights = safetensors(&[
            floats("norm", &[2], &[1.0, value]),
            floats("up.weight", &[2, 3], &[0.0, 0.0, 0.0, 0.0, 0.0, value]),
        ]);
        write_checkpoint(folder.path(), &json!({}), &weights);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let error = assert_refused(checkpoint.linear("up"), ErrorCode::CheckpointNotFinite);
        assert_eq!(error.subject, "up.weight");
        assert!(error.message.contains("row 1, column 2"), "{error}");
        let error = assert_refused(checkpoint.vector("norm"), ErrorCode::CheckpointNotFinite);
        assert!(error.message.contains("position 1"), "{error}");
    }
}

#[test]
fn tensors_of_the_wrong_kind() {
    let folder = tempfile::tempdir().unwrap();
    let weights = safetensors(&[
        words("codes.weight", &[1, 1], &[7]),
        floats("cube.weight", &[1, 1, 1], &[0.0]),
        floats("bent.weight", &[2, 1], &[0.0, 0.0]),
        floats("bent.bias", &[3], &[0.0; 3]),
        ("void.weight", "F32", vec![usize::MAX, 0], Vec::new()),
    ]);
    // The product of the last shape is zero, so the file is sound; as a matrix it is not.
    write_checkpoint(folder.path(), &json!({}), &weights);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_refused(checkpoint.dense("codes.weight"), ErrorCode::CheckpointDtype);
    assert_refused(checkpoint.dense("cube.weight"), ErrorCode::CheckpointShape);
    assert_refused(checkpoint.vector("cube.weight"), ErrorCode::CheckpointShape);
    assert_refused(checkpoint.linear("bent"), ErrorCode::CheckpointShape);
    assert_refused(checkpoint.dense("void.weight"), ErrorCode::CheckpointShape);
    assert_refused(checkpoint.linear("absent"), ErrorCode::CheckpointTensorMissing);
}

#[test]
fn file_that_shrinks_while_it_is_open() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({}), &safetensors(&[matrix()]));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap().set_len(20).unwrap();
    assert_refused(checkpoint.linear("a"), ErrorCode::CheckpointCorrupt);
}

// --- the folder and its small files ---

#[test]
fn folder_that_does_not_exist() {
    assert_refused(Checkpoint::open(Path::new("no/such/folder")), ErrorCode::CheckpointNotFound);
}

#[test]
fn file_instead_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({}), &safetensors(&[]));
    assert_refused(Checkpoint::open(&folder.path().join("model.safetensors")), ErrorCode::CheckpointNotFound);
}

#[test]
fn config_missing() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), safetensors(&[])).unwrap();
    assert_refused(Checkpoint::open(folder.path()), ErrorCode::ConfigInvalid);
}

#[test]
fn config_that_is_no_object() {
    for text in ["", "{", "not json", "[]", "\"text\"", "{\"a\": \u{7f}}", &"[".repeat(100_000)] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), text).unwrap();
        assert_refused(Checkpoint::open(folder.path()), ErrorCode::ConfigInvalid);
    }
}

#[test]
fn config_that_is_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("config.json")).unwrap();
    assert_refused(Checkpoint::open(folder.path()), ErrorCode::ConfigInvalid);
}

#[test]
fn weights_missing_or_in_another_format() {
    for (file, word) in [("README.md", "safetensors"), ("pytorch_model.bin", "safe_serialization")] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        fs::write(folder.path().join(file), "x").unwrap();
        let error = assert_refused(Checkpoint::open(folder.path()), ErrorCode::CheckpointNotFound);
        assert!(error.hint.contains(word), "{error}");
    }
}

#[test]
fn tokenizer_missing() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({}), &safetensors(&[]));
    assert_refused(Checkpoint::open(folder.path()).unwrap().tokenizer_json(), ErrorCode::TokenizerInvalid);
}

// --- shards ---

/// A folder whose index is this text and whose shard `one.safetensors` holds the tensor `a.weight`.
fn sharded(index: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    fs::write(folder.path().join("one.safetensors"), safetensors(&[matrix()])).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[track_caller]
fn index_refused(index: &str, code: ErrorCode) -> Error {
    assert_refused(Checkpoint::open(sharded(index).path()), code)
}

#[test]
fn shard_missing() {
    let index = r#"{"weight_map":{"a.weight":"one.safetensors","b":"two.safetensors"}}"#;
    let error = index_refused(index, ErrorCode::CheckpointShardMissing);
    assert!(error.subject.ends_with("two.safetensors"));
}

#[test]
fn tensor_that_the_shard_lacks() {
    let index = r#"{"weight_map":{"a.weight":"one.safetensors","b":"one.safetensors"}}"#;
    assert_eq!(index_refused(index, ErrorCode::CheckpointTensorMissing).subject, "b");
}

#[test]
fn shard_outside_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret.safetensors");
    fs::write(&secret, safetensors(&[matrix()])).unwrap();
    let absolute = secret.to_string_lossy();
    for path in
        ["../one.safetensors", "a/../one.safetensors", "./one.safetensors", "..", "", &absolute, r"..\\one", "C:one"]
    {
        let index = format!(r#"{{"weight_map":{{"a.weight":"{path}"}}}}"#);
        index_refused(&index, ErrorCode::CheckpointCorrupt);
    }
}

#[test]
fn index_that_names_itself() {
    index_refused(r#"{"weight_map":{"a.weight":"model.safetensors.index.json"}}"#, ErrorCode::CheckpointCorrupt);
}

#[test]
fn folder_instead_of_a_shard() {
    let folder = sharded(r#"{"weight_map":{"a.weight":"two.safetensors"}}"#);
    fs::create_dir(folder.path().join("two.safetensors")).unwrap();
    assert_refused(Checkpoint::open(folder.path()), ErrorCode::CheckpointNotFound);
}

#[cfg(unix)]
#[test]
fn shards_that_link_to_each_other() {
    let folder = sharded(r#"{"weight_map":{"a.weight":"two.safetensors"}}"#);
    let (two, three) = (folder.path().join("two.safetensors"), folder.path().join("three.safetensors"));
    std::os::unix::fs::symlink(&three, &two).unwrap();
    std::os::unix::fs::symlink(&two, &three).unwrap();
    assert_refused(Checkpoint::open(folder.path()), ErrorCode::CheckpointNotFound);
}

#[test]
fn index_that_is_no_index() {
    for index in ["", "[]", "{}", r#"{"weight_map":[]}"#, r#"{"weight_map":{"a":1}}"#, &"{\"a\":".repeat(100_000)] {
        index_refused(index, ErrorCode::CheckpointCorrupt);
    }
}

#[test]
fn tensor_that_the_index_does_not_name_is_no_part_of_the_model() {
    let folder = sharded(r#"{"weight_map":{}}"#);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().tensors().count(), 0);
}

// --- quantized Linears: two outputs, sixteen inputs, 4 bits, groups of eight, asymmetric ---

fn packed() -> Vec<Tensor> {
    vec![
        words("up.weight_packed", &[2, 2], &[0x1234_5678; 4]),
        floats("up.weight_scale", &[2, 2], &[1.0; 4]),
        words("up.weight_zero_point", &[1, 2], &[0x88; 2]),
        longs("up.weight_shape", &[2, 16]),
        words("up.weight_g_idx", &[16], &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
    ]
}

fn quantization_config() -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": { "group_0": { "targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": false, "strategy": "group", "group_size": 8, "actorder": "group"
        } } },
        "ignore": ["lm_head"]
    })
}

fn open_packed(tensors: &[Tensor], config: &Value) -> (TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({ "quantization_config": config }), &safetensors(tensors));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

/// `packed()` with the tensor of the same name replaced; the error that reading the Linear gives.
#[track_caller]
fn packed_refused(tensor: Tensor, code: ErrorCode) -> Error {
    let mut tensors = packed();
    let name = tensor.0;
    match tensors.iter_mut().find(|(other, ..)| *other == name) {
        Some(slot) => *slot = tensor,
        None => tensors.push(tensor),
    }
    let (_folder, checkpoint) = open_packed(&tensors, &quantization_config());
    let error = assert_refused(checkpoint.linear("up"), code);
    assert!(error.subject.contains("up"), "{error}");
    error
}

#[test]
fn packed_tensors_are_sound_before_they_are_spoiled() {
    let (_folder, checkpoint) = open_packed(&packed(), &quantization_config());
    checkpoint.linear("up").unwrap();
}

#[test]
fn packed_tensor_of_the_wrong_shape() {
    packed_refused(words("up.weight_packed", &[2, 3], &[0; 6]), ErrorCode::CheckpointShape);
    packed_refused(words("up.weight_packed", &[4, 1], &[0; 4]), ErrorCode::CheckpointShape);
    packed_refused(words("up.weight_packed", &[4], &[0; 4]), ErrorCode::CheckpointShape);
}

#[test]
fn packed_tensor_of_the_wrong_type() {
    packed_refused(floats("up.weight_packed", &[2, 2], &[0.0; 4]), ErrorCode::CheckpointDtype);
}

#[test]
fn shape_tensor_that_promises_more_than_the_file_holds() {
    for shape in [[i64::MAX, i64::MAX], [1 << 40, 16], [2, 1 << 62], [-2, 16], [0, 16], [2, 0]] {
        packed_refused(longs("up.weight_shape", &shape), ErrorCode::CheckpointShape);
    }
    packed_refused(longs("up.weight_shape", &[2, 16, 1]), ErrorCode::CheckpointShape);
    packed_refused(floats("up.weight_shape", &[2], &[2.0, 16.0]), ErrorCode::CheckpointDtype);
}

#[test]
fn scales_of_the_wrong_shape_or_not_finite() {
    packed_refused(floats("up.weight_scale", &[2, 1], &[1.0; 2]), ErrorCode::CheckpointShape);
    packed_refused(floats("up.weight_scale", &[4], &[1.0; 4]), ErrorCode::CheckpointShape);
    let error =
        packed_refused(floats("up.weight_scale", &[2, 2], &[1.0, f32::NAN, 1.0, 1.0]), ErrorCode::CheckpointNotFinite);
    assert_eq!(error.subject, "up.weight_scale");
}

#[test]
fn zero_points_that_are_not_packed_along_the_rows() {
    packed_refused(words("up.weight_zero_point", &[2, 1], &[0; 2]), ErrorCode::CheckpointShape);
    packed_refused(("up.weight_zero_point", "I8", vec![2, 2], vec![0; 4]), ErrorCode::CheckpointDtype);
}

#[test]
fn group_index_out_of_range() {
    for group in [2, u32::MAX, 1 << 31] {
        let mut index = [0; 16];
        index[5] = group;
        let error = packed_refused(words("up.weight_g_idx", &[16], &index), ErrorCode::CheckpointCorrupt);
        assert!(error.message.contains("column 5"), "{error}");
    }
    packed_refused(words("up.weight_g_idx", &[15], &[0; 15]), ErrorCode::CheckpointShape);
}

#[test]
fn linear_that_is_packed_and_not() {
    packed_refused(floats("up.weight", &[2, 16], &[0.0; 32]), ErrorCode::CheckpointCorrupt);
}

#[test]
fn each_missing_tensor_of_a_packed_linear() {
    for absent in ["up.weight_scale", "up.weight_zero_point", "up.weight_shape"] {
        let tensors: Vec<Tensor> = packed().into_iter().filter(|(name, ..)| *name != absent).collect();
        let (_folder, checkpoint) = open_packed(&tensors, &quantization_config());
        let error = assert_refused(checkpoint.linear("up"), ErrorCode::CheckpointTensorMissing);
        assert_eq!(error.subject, absent);
    }
}

#[test]
fn tensors_that_the_config_denies() {
    let weights = "/config_groups/group_0/weights";
    for (field, value) in [("symmetric", json!(true)), ("actorder", Value::Null)] {
        let mut config = quantization_config();
        config.pointer_mut(weights).unwrap()[field] = value;
        let (_folder, checkpoint) = open_packed(&packed(), &config);
        assert_refused(checkpoint.linear("up"), ErrorCode::CheckpointCorrupt);
    }
}

#[test]
fn packed_linear_without_a_config() {
    let (_folder, checkpoint) = open_packed(&packed(), &Value::Null);
    assert_refused(checkpoint.linear("up"), ErrorCode::QuantizationUnsupported);
}

#[test]
fn linear_of_another_layout() {
    let (_folder, checkpoint) = open_packed(&[words("up.qweight", &[2, 2], &[0; 4])], &Value::Null);
    assert_refused(checkpoint.linear("up"), ErrorCode::QuantizationUnsupported);
}

#[test]
fn checkpoint_of_another_method() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({ "quantization_config": { "quant_method": "bitsandbytes", "bits": 4 } });
    write_checkpoint(folder.path(), &config, &safetensors(&[]));
    let error = assert_refused(Checkpoint::open(folder.path()), ErrorCode::QuantizationUnsupported);
    assert!(error.message.contains("bitsandbytes"));
}
