//! One compressed-tensors checkpoint whose bytes were worked out by hand from the format.

use crate::fixture::{finish, raw_file, write_checkpoint};
use kintsugi_checkpoint::{Checkpoint, CheckpointWriter, PackQuantized, QuantizationConfig};
use kintsugi_weights::{ElementType, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts, WeightMatrix};
use serde_json::json;

/// Two outputs, three inputs, 4 bits, groups of two columns (the second has one), asymmetric.
///
/// In the signed numbers of the format the codes are −7 −6 −5 / 7 −8 0 and the zero points 0 −7 / −1 7.
fn matrix() -> QuantizedMatrix {
    QuantizedMatrix::new(QuantizedParts {
        rows: 2,
        columns: 3,
        bits: 4,
        group_size: GroupSize::Columns(2),
        codes: vec![1, 2, 3, 15, 0, 8],
        scales: vec![0.5, 2.0, 1.0, 4.0],
        scale_type: ElementType::Bf16,
        zero_points: Some(vec![8, 1, 7, 15]),
        ..QuantizedParts::default()
    })
    .unwrap()
}

fn config() -> QuantizationConfig {
    QuantizationConfig {
        format: &PackQuantized,
        bits: 4,
        group_size: GroupSize::Columns(2),
        group_axis: GroupAxis::Input,
        symmetric: false,
        group_index: false,
        exceptions: Vec::new(),
        ignore: vec!["lm_head".into()],
    }
}

fn golden_file() -> Vec<u8> {
    // Widest type first, then by name.
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""up.weight_shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},"#,
        r#""up.weight_packed":{"dtype":"I32","shape":[2,1],"data_offsets":[16,24]},"#,
        r#""up.weight_zero_point":{"dtype":"I32","shape":[1,2],"data_offsets":[24,32]},"#,
        r#""up.weight_scale":{"dtype":"BF16","shape":[2,2],"data_offsets":[32,40]}}"#,
    );
    let padded = format!("{header:<width$}", width = header.len().next_multiple_of(8));
    let data = [
        2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, // weight_shape: 2, 3
        0x21, 0x03, 0, 0, // row 0: codes 1, 2, 3 from the lowest nibble on
        0x0f, 0x08, 0, 0, // row 1: codes 15, 0, 8
        0x78, 0, 0, 0, // zero points of group 0 along the rows: 8, 7
        0xf1, 0, 0, 0, // zero points of group 1: 1, 15
        0x00, 0x3f, 0x00, 0x40, // 0.5, 2.0 in bfloat16
        0x80, 0x3f, 0x80, 0x40, // 1.0, 4.0
    ];
    raw_file(&padded, &data)
}

#[test]
fn the_golden_file_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let model_config = json!({ "model_type": "llama", "quantization_config": config().to_json().unwrap() });
    write_checkpoint(folder.path(), &model_config, &golden_file());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.quantization(), Some(&config()));
    assert_eq!(checkpoint.metadata()["format"], "pt");
    let linear = checkpoint.linear("up").unwrap();
    assert_eq!(linear.matrix, WeightMatrix::Quantized(matrix()));
    assert_eq!(linear.matrix.to_f32(), [-3.5, -3.0, 4.0, 8.0, -7.0, -28.0]);
    assert_eq!(checkpoint.linear_shape("up").unwrap(), (2, 3));
}

#[test]
fn the_golden_file_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let source_path = folder.path().join("source");
    let source_config = json!({ "model_type": "llama", "compression_config": null, "vocab_size": 7 });
    write_checkpoint(&source_path, &source_config, &raw_file("{}", &[]));
    let target = folder.path().join("target");
    let mut writer = CheckpointWriter::create(&target, &Checkpoint::open(&source_path).unwrap()).unwrap();
    assert_eq!(writer.write_linear("up", &matrix()).unwrap(), 40);
    finish(writer, &config()).unwrap();

    assert_eq!(std::fs::read(target.join("model.safetensors")).unwrap(), golden_file());
    let expected = r#"{
  "model_type": "llama",
  "vocab_size": 7,
  "quantization_config": {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
      "group_0": {
        "targets": [
          "Linear"
        ],
        "weights": {
          "num_bits": 4,
          "type": "int",
          "symmetric": false,
          "strategy": "group",
          "group_size": 2,
          "actorder": null,
          "dynamic": false
        },
        "input_activations": null,
        "output_activations": null,
        "format": "pack-quantized"
      }
    },
    "ignore": [
      "lm_head"
    ],
    "kv_cache_scheme": null,
    "global_compression_ratio": null,
    "version": "0.18.0"
  }
}
"#;
    assert_eq!(std::fs::read_to_string(target.join("config.json")).unwrap(), expected);
}
