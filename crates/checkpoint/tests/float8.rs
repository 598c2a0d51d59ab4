//! Weights of 8-bit floats: what they mean, worked out by hand, and what is refused.

use crate::fixture::{Tensor, assert_refused, floats, safetensors, write_checkpoint};
use kintsugi_checkpoint::{Checkpoint, CheckpointWriter};
use kintsugi_runtime::{Error, ErrorCode};
use kintsugi_weights::{DenseMatrix, WeightMatrix};
use serde_json::{Value, json};

/// 1, 1.5, −1, 448, 2^−9, 0 and so on, row after row.
const CODES: [u8; 12] = [0x38, 0x3c, 0xb8, 0x7e, 0x01, 0x00, 0x38, 0x38, 0x38, 0x40, 0xc0, 0x30];

fn weight(codes: &[u8]) -> Tensor {
    ("up.weight", "F8_E4M3", vec![3, 4], codes.to_vec())
}

fn read(tensors: &[Tensor], config: &Value) -> Result<DenseMatrix, Error> {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({ "quantization_config": config }), &safetensors(tensors));
    let checkpoint = Checkpoint::open(folder.path())?;
    assert_eq!(checkpoint.quantization(), None, "floats are not quantized");
    assert_eq!(checkpoint.linear_shape("up")?, (3, 4));
    let WeightMatrix::Dense(matrix) = checkpoint.linear("up")?.matrix else { panic!("it is dense") };
    Ok(matrix)
}

fn block_config(rows: usize, columns: usize) -> Value {
    json!({ "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [rows, columns] })
}

fn float_config(strategy: &str) -> Value {
    json!({ "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": { "group_0": {
        "targets": ["Linear"], "weights": { "num_bits": 8, "type": "float", "strategy": strategy },
        "input_activations": { "num_bits": 8, "type": "float", "dynamic": true, "strategy": "token" } } } })
}

#[test]
fn tiles_have_a_scale_each_and_the_last_ones_are_smaller() {
    let tensors = [weight(&CODES), floats("up.weight_scale_inv", &[2, 2], &[1.0, 2.0, 4.0, 8.0])];
    let matrix = read(&tensors, &block_config(2, 3)).unwrap();
    let tiny = 2.0f32.powi(-9);
    assert_eq!(matrix.to_f32(), [1.0, 1.5, -1.0, 896.0, tiny, 0.0, 1.0, 2.0, 4.0, 8.0, -8.0, 4.0]);
}

#[test]
fn a_row_or_the_matrix_has_one_scale() {
    let by_row = [weight(&CODES), floats("up.weight_scale", &[3, 1], &[1.0, 2.0, 0.5])];
    let tiny = 2.0f32.powi(-8);
    let expected = [1.0, 1.5, -1.0, 448.0, tiny, 0.0, 2.0, 2.0, 0.5, 1.0, -1.0, 0.25];
    assert_eq!(read(&by_row, &float_config("channel")).unwrap().to_f32(), expected);
    for shape in [&[][..], &[1], &[1, 1]] {
        let whole = [weight(&CODES), floats("up.weight_scale", shape, &[2.0])];
        for config in [float_config("tensor"), json!({ "quant_method": "fp8" })] {
            let matrix = read(&whole, &config).unwrap();
            assert_eq!(matrix.to_f32()[..4], [2.0, 3.0, -2.0, 896.0]);
        }
    }
}

#[test]
fn weights_of_other_types_stay_as_they_are() {
    let tensors = [floats("up.weight", &[3, 4], &[1.0; 12])];
    assert_eq!(read(&tensors, &block_config(128, 128)).unwrap().to_f32(), [1.0; 12]);
}

#[test]
fn scales_that_do_not_fit_are_refused() {
    let scale = |shape: &[usize], values: &[f32]| [weight(&CODES), floats("up.weight_scale_inv", shape, values)];
    let config = block_config(2, 2);
    let fine = scale(&[2, 2], &[1.0; 4]);
    read(&fine, &config).unwrap();
    assert_refused(read(&fine[..1], &config), ErrorCode::CheckpointTensorMissing);
    assert_refused(read(&scale(&[4], &[1.0; 4]), &config), ErrorCode::CheckpointShape);
    assert_refused(read(&scale(&[1, 1], &[1.0]), &config), ErrorCode::CheckpointShape);
    assert_refused(read(&scale(&[2, 2], &[1.0, f32::NAN, 1.0, 1.0]), &config), ErrorCode::CheckpointNotFinite);
    // 448 of them is more than f32 holds.
    assert_refused(read(&scale(&[2, 2], &[1e37, 1e37, 1.0, 1.0]), &config), ErrorCode::CheckpointNotFinite);
    let nan = [weight(&[0x7f; 12]), floats("up.weight_scale_inv", &[2, 2], &[1.0; 4])];
    let error = assert_refused(read(&nan, &config), ErrorCode::CheckpointNotFinite);
    assert_eq!(error.subject, "up.weight");
}

#[test]
fn configurations_that_are_not_read_are_refused_by_name() {
    let fine = [weight(&CODES), floats("up.weight_scale_inv", &[2, 2], &[1.0; 4])];
    let changes = [
        ("/fmt", json!("e5m2"), ErrorCode::QuantizationUnsupported),
        ("/activation_scheme", json!("static"), ErrorCode::QuantizationUnsupported),
        ("/weight_block_size", json!([0, 2]), ErrorCode::ConfigInvalid),
        ("/weight_block_size", json!([2]), ErrorCode::ConfigInvalid),
        ("/weight_block_size", json!([2, -1]), ErrorCode::ConfigInvalid),
        ("/weight_block_size", json!("2x2"), ErrorCode::ConfigInvalid),
        ("/weight_block_size", json!([2, 2, 2]), ErrorCode::ConfigInvalid),
    ];
    for (pointer, value, code) in changes {
        let mut config = block_config(2, 2);
        *config.pointer_mut(pointer).unwrap() = value;
        assert_refused(read(&fine, &config), code);
    }
    let group = "/config_groups/group_0";
    for (field, value) in [
        ("weights/num_bits", json!(4)),
        ("weights/strategy", json!("tensor_group")),
        ("input_activations/dynamic", json!(false)),
    ] {
        let mut config = float_config("tensor");
        *config.pointer_mut(&format!("{group}/{field}")).unwrap() = value;
        assert_refused(read(&fine, &config), ErrorCode::QuantizationUnsupported);
    }
}

#[test]
fn eight_bit_floats_without_a_configuration_are_refused() {
    let fine = [weight(&CODES), floats("up.weight_scale_inv", &[2, 2], &[1.0; 4])];
    assert_refused(read(&fine, &Value::Null), ErrorCode::CheckpointDtype);
}

#[test]
fn eight_bit_floats_are_not_copied_without_their_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    let tensors = [weight(&CODES), floats("up.weight_scale_inv", &[2, 2], &[1.0; 4])];
    write_checkpoint(&source, &json!({ "quantization_config": block_config(2, 2) }), &safetensors(&tensors));
    let source = Checkpoint::open(&source).unwrap();
    let parts: Vec<&str> = source.parts_of("up").map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(parts, ["up.weight", "up.weight_scale_inv"]);
    let mut writer = CheckpointWriter::create(&folder.path().join("target"), &source).unwrap();
    let error = assert_refused(writer.copy("up.weight"), ErrorCode::QuantizationUnsupported);
    assert_eq!(error.subject, "up.weight");
}
