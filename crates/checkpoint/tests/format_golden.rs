//! Linears of every format whose words were worked out by hand from the published layouts.

use std::path::Path;

use crate::fixture::{finish, floats, raw_file, safetensors, words, write_checkpoint};
use kintsugi_checkpoint::{
    Awq, Checkpoint, CheckpointWriter, Gptq, Kintsugi, LinearFormat, QuantizationConfig, Scheme,
};
use kintsugi_weights::{ElementType, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts, WeightMatrix};
use serde_json::{Value, json};

/// The only Linear of a folder with these tensors and this `quantization_config`.
fn read(tensors: &[crate::fixture::Tensor], config: &Value) -> QuantizedMatrix {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({ "quantization_config": config }), &safetensors(tensors));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.notices(), [""; 0]);
    let WeightMatrix::Quantized(matrix) = checkpoint.linear("up").unwrap().matrix else { panic!("it is quantized") };
    assert_eq!(checkpoint.linear_shape("up").unwrap(), (matrix.rows(), matrix.columns()));
    matrix
}

/// The words of a tensor of a written file, by the reference implementation of safetensors.
fn stored_words(folder: &Path, name: &str) -> (Vec<usize>, Vec<u32>) {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::I32);
    let words = tensor.data().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    (tensor.shape().to_vec(), words)
}

/// A folder with `matrix` as its only Linear.
fn write(format: &'static dyn LinearFormat, matrix: &QuantizedMatrix) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    write_checkpoint(&source, &json!({ "vocab_size": 7 }), &raw_file("{}", &[]));
    let target = folder.path().join("target");
    let source = Checkpoint::open(&source).unwrap();
    let mut writer = CheckpointWriter::create(&target, &source).unwrap().format(format);
    writer.write_linear("up", matrix).unwrap();
    let config = QuantizationConfig::uniform(format, Scheme::of(matrix), vec!["lm_head".into()]);
    finish(writer, &config).unwrap();
    let written = Checkpoint::open(&target).unwrap();
    assert_eq!(written.quantization(), Some(&config));
    (folder, written)
}

// --- GPTQ ---

/// 32 outputs of 32 inputs in groups of 16: every row has the codes 0, 1, 2, … and starts again at 2^bits.
fn counting(bits: u8, zero_points: Option<Vec<u8>>, group_index: Option<Vec<u32>>) -> QuantizedMatrix {
    QuantizedMatrix::new(QuantizedParts {
        rows: 32,
        columns: 32,
        bits,
        group_size: GroupSize::Columns(16),
        codes: (0..32 * 32).map(|i| (i % 32 % (1 << bits.min(5))) as u8).collect(),
        scales: (0..64).map(|i| (1 + i % 2) as f32 * 0.25).collect(),
        scale_type: ElementType::F16,
        zero_points,
        group_index,
        ..QuantizedParts::default()
    })
    .unwrap()
}

/// What the words of a column are then: at 3 bits eight codes are 0o76543210 = 0xfac688, three bytes that repeat.
fn counting_words(bits: u8) -> Vec<u32> {
    match bits {
        2 => vec![0xe4e4_e4e4; 2],
        3 => vec![0x88fa_c688, 0xc688_fac6, 0xfac6_88fa],
        4 => vec![0x7654_3210, 0xfedc_ba98, 0x7654_3210, 0xfedc_ba98],
        _ => (0..8).map(|i| 0x0302_0100 + 0x0404_0404 * i).collect(),
    }
}

/// Each of `column` in every one of `rows` columns.
fn in_every_column(column: &[u32], rows: usize) -> Vec<u32> {
    column.iter().flat_map(|&word| vec![word; rows]).collect()
}

fn gptq_config(version: &str, bits: u8, symmetric: bool, act_order: bool) -> Value {
    json!({ "quant_method": "gptq", "checkpoint_format": version, "bits": bits, "group_size": 16, "sym": symmetric,
        "desc_act": act_order })
}

#[test]
fn gptq_is_read_at_every_width() {
    for bits in [2, 3, 4, 8] {
        for version in ["gptq", "gptq_v2"] {
            let width = usize::from(bits);
            let tensors = [
                words("up.qweight", &[width, 32], &in_every_column(&counting_words(bits), 32)),
                words("up.qzeros", &[2, width], &middle_words(bits, version)),
                halves("up.scales", &[2, 32], &[[0x3400; 32], [0x3800; 32]].concat()),
                words("up.g_idx", &[32], &(0..32).map(|k| k / 16).collect::<Vec<u32>>()),
            ];
            let matrix = read(&tensors, &gptq_config(version, bits, true, false));
            assert_eq!(matrix, counting(bits, None, None), "{version}, {bits} bits");
        }
    }
}

/// `qzeros` of two groups of 32 outputs on a symmetric grid: 2^(bits−1) in every field, less one in version 1.
fn middle_words(bits: u8, version: &str) -> Vec<u32> {
    let group = match (bits, version) {
        (2, "gptq") => vec![0x5555_5555; 2],
        (2, _) => vec![0xaaaa_aaaa; 2],
        // 0o33333333 and 0o44444444 are the bytes db b6 6d and 24 49 92, which repeat.
        (3, "gptq") => vec![0xdb6d_b6db, 0xb6db_6db6, 0x6db6_db6d],
        (3, _) => vec![0x2492_4924, 0x4924_9249, 0x9249_2492],
        (4, "gptq") => vec![0x7777_7777; 4],
        (4, _) => vec![0x8888_8888; 4],
        (_, "gptq") => vec![0x7f7f_7f7f; 8],
        _ => vec![0x8080_8080; 8],
    };
    group.repeat(2)
}

/// An f16 tensor of these bits.
fn halves(name: &'static str, shape: &[usize], values: &[u16]) -> crate::fixture::Tensor {
    (name, "F16", shape.to_vec(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

#[test]
fn gptq_is_written_at_every_width() {
    for bits in [2, 3, 4, 8] {
        for format in [&Gptq::V1, &Gptq::V2] {
            let (_folder, written) = write(format, &counting(bits, None, None));
            let width = usize::from(bits);
            let (shape, stored) = stored_words(written.path(), "up.qweight");
            assert_eq!(shape, [width, 32]);
            assert_eq!(stored, in_every_column(&counting_words(bits), 32), "{bits} bits");
            let (shape, stored) = stored_words(written.path(), "up.qzeros");
            assert_eq!(shape, [2, width]);
            assert_eq!(stored, middle_words(bits, format.name()), "{bits} bits");
            let (shape, stored) = stored_words(written.path(), "up.g_idx");
            assert_eq!((shape, stored), (vec![32], (0..32).map(|k| k / 16).collect()));
            assert_eq!(written.tensor("up.scales").unwrap().shape, [2, 32]);
        }
    }
}

#[test]
fn gptq_zero_points_are_stored_minus_one_in_version_1() {
    // The zero points 1 2 3 4 1 2 3 4 … along the outputs, the same in both groups.
    let zero_points: Vec<u8> = (0..32).flat_map(|row| [row % 4 + 1; 2]).collect();
    let stored = |format| {
        let (_folder, written) = write(format, &counting(3, Some(zero_points.clone()), None));
        assert_eq!(
            written.linear("up").unwrap().matrix,
            WeightMatrix::Quantized(counting(3, Some(zero_points.clone()), None))
        );
        stored_words(written.path(), "up.qzeros").1
    };
    // Eight fields 0 1 2 3 0 1 2 3 are 0o32103210 = 0x688688, and one more in each 0o43214321 = 0x8d18d1.
    let first = [0x8868_8688, 0x8688_6886, 0x6886_8868];
    let second = [0xd18d_18d1, 0x18d1_8d18, 0x8d18_d18d];
    assert_eq!(stored(&Gptq::V1), [first, first].concat());
    assert_eq!(stored(&Gptq::V2), [second, second].concat());
}

#[test]
fn gptq_act_order_becomes_the_group_index() {
    let index: Vec<u32> = (0..32).map(|column| column % 2).collect();
    let expected = counting(4, None, Some(index.clone()));
    let (_folder, written) = write(&Gptq::V2, &expected);
    assert_eq!(stored_words(written.path(), "up.g_idx").1, index);
    assert_eq!(written.linear("up").unwrap().matrix, WeightMatrix::Quantized(expected));
}

#[test]
fn gptq_without_index_has_columns_in_order() {
    let tensors = [
        words("up.qweight", &[1, 8], &[0x7654_3210; 8]),
        words("up.qzeros", &[1, 1], &[0x8765_4321]),
        floats("up.scales", &[1, 8], &[1.0; 8]),
    ];
    let config = json!({ "quant_method": "gptq", "bits": 4, "group_size": -1, "sym": false, "desc_act": false });
    let matrix = read(&tensors, &config);
    assert_eq!(matrix.group_size(), GroupSize::WholeRow);
    assert_eq!(matrix.codes()[..8], [0, 1, 2, 3, 4, 5, 6, 7]);
    // Version 1, as configurations without a version mean: one more than is stored.
    assert_eq!(matrix.zero_points().unwrap(), [2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(matrix.scale_type(), ElementType::F32);
}

#[test]
fn the_zero_point_that_wraps_in_version_1_is_read_as_zero() {
    let tensors = [
        words("up.qweight", &[1, 8], &[0; 8]),
        words("up.qzeros", &[1, 1], &[0x0000_00f3]),
        floats("up.scales", &[1, 8], &[1.0; 8]),
    ];
    let matrix = read(&tensors, &json!({ "quant_method": "gptq", "bits": 4, "group_size": -1, "sym": false }));
    assert_eq!(matrix.zero_points().unwrap(), [4, 0, 1, 1, 1, 1, 1, 1]);
}

#[test]
fn the_config_of_gptq_is_what_its_readers_expect() {
    let (_folder, written) = write(&Gptq::V2, &counting(4, None, None));
    let expected = json!({
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 16, "desc_act": false,
        "sym": true, "lm_head": false, "pack_dtype": "int32"
    });
    assert_eq!(written.config()["quantization_config"], expected);
    assert_eq!(written.config()["vocab_size"], 7);
    let (_folder, written) = write(&Gptq::V1, &counting(4, None, None));
    assert_eq!(written.config()["quantization_config"]["checkpoint_format"], "gptq");
}

#[test]
fn linears_that_stay_as_they_are_come_back() {
    let config = QuantizationConfig {
        format: &Gptq::V2,
        bits: 4,
        group_size: GroupSize::WholeRow,
        group_axis: GroupAxis::Input,
        symmetric: true,
        group_index: false,
        exceptions: Vec::new(),
        ignore: vec!["lm_head".into(), "re:.*gate$".into(), "model.embed".into()],
    };
    let json = config.to_json().unwrap();
    assert_eq!(json["dynamic"], json!({ "-:.*gate$": {}, r"-:^model\.embed$": {} }));
    let read = QuantizationConfig::from_json(&json).unwrap();
    assert_eq!(read.ignore, ["lm_head", "re:.*gate$", r"re:^model\.embed$"]);
    let nothing = QuantizationConfig { ignore: Vec::new(), ..config };
    for format in [&Gptq::V2 as &dyn LinearFormat, &Awq] {
        let nothing = QuantizationConfig { format, ..nothing.clone() };
        let json = nothing.to_json().unwrap();
        assert_eq!(json["lm_head"], true);
        assert_eq!(QuantizationConfig::from_json(&json).unwrap(), nothing);
    }
}

// --- AWQ ---

/// Eight outputs of two inputs in one group.
fn awq_matrix(zero_points: Option<Vec<u8>>) -> QuantizedMatrix {
    QuantizedMatrix::new(QuantizedParts {
        rows: 8,
        columns: 2,
        bits: 4,
        group_size: GroupSize::Columns(2),
        codes: (0..8).flat_map(|row| [row, row + 8]).collect(),
        scales: vec![0.25, 0.5, 1.0, 2.0, 0.25, 0.5, 1.0, 2.0],
        scale_type: ElementType::F16,
        zero_points,
        ..QuantizedParts::default()
    })
    .unwrap()
}

fn awq_file(zeros: u32) -> Vec<u8> {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""up.qweight":{"dtype":"I32","shape":[2,1],"data_offsets":[0,8]},"#,
        r#""up.qzeros":{"dtype":"I32","shape":[1,1],"data_offsets":[8,12]},"#,
        r#""up.scales":{"dtype":"F16","shape":[1,8],"data_offsets":[12,28]}}"#,
    );
    let padded = format!("{header:<width$}", width = header.len().next_multiple_of(8));
    // Of eight outputs the word holds 0 2 4 6 1 3 5 7 from the lowest nibble on.
    let mut data = [0x7531_6420u32, 0xfdb9_eca8, zeros].map(u32::to_le_bytes).concat();
    data.extend([0, 0x34, 0, 0x38, 0, 0x3c, 0, 0x40, 0, 0x34, 0, 0x38, 0, 0x3c, 0, 0x40]);
    raw_file(&padded, &data)
}

#[test]
fn the_golden_file_of_awq_is_written_and_read() {
    for (zero_points, zeros) in [(Some((1..9).collect()), 0x8642_7531), (None, 0x8888_8888)] {
        let matrix = awq_matrix(zero_points);
        let (_folder, written) = write(&Awq, &matrix);
        assert_eq!(std::fs::read(written.path().join("model.safetensors")).unwrap(), awq_file(zeros));
        assert_eq!(written.linear("up").unwrap().matrix, WeightMatrix::Quantized(matrix));
    }
}

#[test]
fn the_config_of_awq_is_what_its_readers_expect() {
    let (_folder, written) = write(&Awq, &awq_matrix(Some(vec![3; 8])));
    let mut expected = json!({
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 2, "zero_point": true,
        "modules_to_not_convert": ["lm_head"]
    });
    assert_eq!(written.config()["quantization_config"], expected);
    let (_folder, written) = write(&Awq, &awq_matrix(None));
    expected["sym"] = json!(true);
    assert_eq!(written.config()["quantization_config"], expected);
}

#[test]
fn awq_says_symmetric_by_its_data() {
    // transformers writes "sym": true whatever the grid; a checkpoint of AutoAWQ says nothing.
    let config = json!({ "quant_method": "awq", "version": "GEMM", "bits": 4, "group_size": 2, "zero_point": true });
    let mut resaved = config.clone();
    resaved["sym"] = json!(true);
    let open = |config: &Value, zeros| {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &json!({ "quantization_config": config }), &awq_file(zeros));
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let WeightMatrix::Quantized(matrix) = checkpoint.linear("up").unwrap().matrix else { panic!("quantized") };
        assert_eq!(checkpoint.notices(), [""; 0]);
        matrix
    };
    assert_eq!(open(&config, 0x8642_7531), awq_matrix(Some((1..9).collect())));
    assert_eq!(open(&resaved, 0x8642_7531), awq_matrix(Some((1..9).collect())));
    assert_eq!(open(&resaved, 0x8888_8888), awq_matrix(None));
    assert_eq!(open(&config, 0x8888_8888), awq_matrix(Some(vec![8; 8])));
}

// --- compressed-tensors int-quantized ---

fn bytes(name: &'static str, shape: &[usize], values: &[i8]) -> crate::fixture::Tensor {
    (name, "I8", shape.to_vec(), values.iter().map(|&value| value as u8).collect())
}

fn int_config(layout: &str, bits: u8, weights: Value) -> Value {
    let mut config = json!({ "quant_method": "compressed-tensors", "format": layout,
        "config_groups": { "group_0": { "targets": ["Linear"], "weights": { "num_bits": bits, "type": "int" } } } });
    let fields = config.pointer_mut("/config_groups/group_0/weights").unwrap().as_object_mut().unwrap();
    fields.extend(weights.as_object().unwrap().clone());
    config
}

#[test]
fn eight_bits_by_channel_are_read() {
    let tensors = [
        bytes("up.weight", &[2, 3], &[-128, 0, 127, 1, -1, 5]),
        floats("up.weight_scale", &[2, 1], &[0.5, 2.0]),
        floats("head.weight", &[1, 2], &[1.0, 2.0]),
    ];
    for layout in ["int-quantized", "naive-quantized"] {
        let mut config = int_config(layout, 8, json!({ "strategy": "channel", "symmetric": true }));
        // Activations that are rounded while the model runs change nothing about the weights.
        config["config_groups"]["group_0"]["input_activations"] =
            json!({ "num_bits": 8, "type": "int", "dynamic": true, "strategy": "token", "symmetric": true });
        let matrix = read(&tensors, &config);
        assert_eq!(matrix.codes(), [0, 128, 255, 129, 127, 133]);
        assert_eq!(matrix.to_f32(), [-64.0, 0.0, 63.5, 2.0, -2.0, 10.0]);
        assert_eq!((matrix.group_size(), matrix.zero_points()), (GroupSize::WholeRow, None));
    }
}

#[test]
fn four_bits_in_bytes_by_group_are_read() {
    let tensors = [
        bytes("up.weight", &[1, 4], &[-8, 7, 0, 3]),
        floats("up.weight_scale", &[1, 2], &[0.5, 2.0]),
        bytes("up.weight_zero_point", &[1, 2], &[-1, 7]),
        words("up.weight_g_idx", &[4], &[1, 0, 1, 0]),
    ];
    let weights = json!({ "strategy": "group", "group_size": 2, "symmetric": false, "actorder": "group" });
    let matrix = read(&tensors, &int_config("int-quantized", 4, weights));
    assert_eq!(matrix.codes(), [0, 15, 8, 11]);
    assert_eq!(matrix.zero_points().unwrap(), [7, 15]);
    assert_eq!(matrix.to_f32(), [-30.0, 4.0, -14.0, 2.0]);
}

// --- kintsugi ---

#[test]
fn groups_along_the_outputs_are_written_and_read_as_documented() {
    // Three outputs of four inputs in groups of two outputs, the last one shorter.
    let matrix = QuantizedMatrix::new(QuantizedParts {
        rows: 3,
        columns: 4,
        bits: 4,
        group_size: GroupSize::Columns(2),
        group_axis: GroupAxis::Output,
        codes: vec![0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        scales: vec![0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        scale_type: ElementType::F16,
        zero_points: Some(vec![1, 2, 3, 4, 5, 6, 7, 8]),
        ..QuantizedParts::default()
    })
    .unwrap();
    let (_folder, written) = write(&Kintsugi, &matrix);
    let stored = |name: &str| stored_words(written.path(), name);
    assert_eq!(stored("up.weight_packed"), (vec![3, 1], vec![0x3210, 0x7654, 0xba98]));
    assert_eq!(stored("up.weight_zero_point"), (vec![1], vec![0x8765_4321]));
    let expected = json!({
        "quant_method": "kintsugi", "version": 1, "bits": 4, "group_size": 2, "group_axis": "output",
        "symmetric": false, "group_index": false, "linears": {}, "ignore": ["lm_head"]
    });
    assert_eq!(written.config()["quantization_config"], expected);
    assert_eq!(written.linear("up").unwrap().matrix, WeightMatrix::Quantized(matrix.clone()));
    // Row 2 is in the second group: (8 − 5) · 4, (9 − 6) · 8 …
    assert_eq!(matrix.to_f32()[8..], [12.0, 24.0, 48.0, 96.0]);
}
