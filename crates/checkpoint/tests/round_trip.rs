//! What is written is read back bit for bit, the same bytes come out every time, and a failure leaves nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::fixture::{assert_refused, finish, floats, raw_file, safetensors, write_checkpoint};
use kintsugi_checkpoint::{
    Checkpoint, CheckpointWriter, PackQuantized, QuantizationConfig, read_adapter, write_adapter,
};
use kintsugi_runtime::ErrorCode;
use kintsugi_weights::{
    Adapter, AdapterEntry, ElementType, FactorCodes, GroupAxis, GroupSize, LowRank, QuantizedMatrix, QuantizedParts,
    WeightMatrix,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Pseudo-random, so that a failure repeats.
fn numbers(seed: u64) -> impl FnMut() -> u32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    }
}

pub(crate) fn quantized(
    rows: usize,
    columns: usize,
    config: &QuantizationConfig,
    scale_type: ElementType,
) -> QuantizedMatrix {
    let mut next = numbers((rows * 1000 + columns) as u64);
    let groups = config.group_size.groups(columns);
    let limit = 1u32 << config.bits;
    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits: config.bits,
        group_size: config.group_size,
        codes: (0..rows * columns).map(|_| (next() % limit) as u8).collect(),
        scales: (0..rows * groups).map(|_| scale_type.round((next() % 4096) as f32 / 1024.0 - 1.0)).collect(),
        scale_type,
        zero_points: (!config.symmetric).then(|| (0..rows * groups).map(|_| (next() % limit) as u8).collect()),
        group_index: config.group_index.then(|| (0..columns).map(|_| next() % groups as u32).collect()),
        ..QuantizedParts::default()
    })
    .unwrap()
}

pub(crate) fn config(bits: u8, group_size: GroupSize, symmetric: bool, group_index: bool) -> QuantizationConfig {
    QuantizationConfig {
        format: &PackQuantized,
        bits,
        group_size,
        group_axis: GroupAxis::Input,
        symmetric,
        group_index,
        exceptions: Vec::new(),
        ignore: vec!["lm_head".into()],
    }
}

pub(crate) fn w4() -> QuantizationConfig {
    config(4, GroupSize::Columns(32), false, false)
}

/// A source with two matrices, a vector and everything that stands beside them.
fn source(folder: &Path) -> Checkpoint {
    let path = folder.join("source");
    let weights = safetensors(&[
        floats("lm_head.weight", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        floats("model.norm.weight", &[2], &[7.0, 8.0]),
        floats("up.weight", &[2, 2], &[1.0; 4]),
        floats("up.bias", &[2], &[0.5, -0.5]),
        ("odd", "U8", vec![3], vec![1, 2, 3]),
    ]);
    let stale = json!({ "vocab_size": 3, "compression_config": { "quant_method": "compressed-tensors",
        "config_groups": { "group_0": { "targets": ["Linear"], "weights": { "num_bits": 8 } } } }, "zebra": 1 });
    write_checkpoint(&path, &stale, &weights);
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "Notice.txt", "README.md"]
    {
        fs::write(path.join(name), format!("the {name}")).unwrap();
    }
    fs::write(path.join("modeling_custom.py"), "code stays behind").unwrap();
    fs::write(path.join("training_args.bin"), "so does this").unwrap();
    Checkpoint::open(&path).unwrap()
}

pub(crate) fn file_names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn write_example(target: &Path, source: &Checkpoint, shard_bytes: u64) -> u64 {
    let mut writer = CheckpointWriter::create(target, source).unwrap().shard_bytes(shard_bytes);
    writer.copy("lm_head.weight").unwrap();
    writer.end_unit().unwrap();
    for block in 0..3 {
        for name in ["up", "down"] {
            let name = format!("model.layers.{block}.{name}");
            writer.write_linear(&name, &quantized(20 + block, 70, &w4(), ElementType::Bf16)).unwrap();
        }
        writer.end_unit().unwrap();
    }
    writer.copy("model.norm.weight").unwrap();
    assert_eq!(writer.copy("odd").unwrap(), 3);
    finish(writer, &w4()).unwrap()
}

#[test]
fn a_written_folder_holds_weights_config_and_companions() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let target = folder.path().join("target");
    let bytes = write_example(&target, &source, u64::MAX);

    let expected = [
        "LICENSE",
        "Notice.txt",
        "ORIGINAL_README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(file_names(&target), expected);
    assert_eq!(bytes, expected.iter().map(|name| fs::metadata(target.join(name)).unwrap().len()).sum::<u64>());

    let written = Checkpoint::open(&target).unwrap();
    assert_eq!(written.quantization(), Some(&w4()));
    assert_eq!(written.config()["vocab_size"], 3);
    assert!(written.config().get("compression_config").is_none());
    assert_eq!(written.tokenizer_json().unwrap(), b"the tokenizer.json");
    assert_eq!(written.dense("lm_head.weight").unwrap(), source.dense("lm_head.weight").unwrap());
    assert_eq!(written.vector("model.norm.weight").unwrap(), [7.0, 8.0]);
    assert_eq!(written.tensor("odd").unwrap().dtype, "U8");
    assert!(written.tensor("up.weight").is_none(), "only what was copied is there");
    for block in 0..3 {
        let linear = written.linear(&format!("model.layers.{block}.down")).unwrap();
        assert_eq!(linear.matrix, WeightMatrix::Quantized(quantized(20 + block, 70, &w4(), ElementType::Bf16)));
    }
}

#[test]
fn the_same_calls_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    for shard_bytes in [u64::MAX, 1000] {
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        write_example(&first, &source, shard_bytes);
        write_example(&second, &source, shard_bytes);
        assert_eq!(file_names(&first), file_names(&second));
        for name in file_names(&first) {
            assert_eq!(fs::read(first.join(&name)).unwrap(), fs::read(second.join(&name)).unwrap(), "{name}");
        }
        fs::remove_dir_all(&first).unwrap();
        fs::remove_dir_all(&second).unwrap();
    }
}

#[test]
fn shards_hold_the_same_tensors_as_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let (single, sharded) = (folder.path().join("single"), folder.path().join("sharded"));
    write_example(&single, &source, u64::MAX);
    write_example(&sharded, &source, 1000);

    let shards: Vec<String> = file_names(&sharded).into_iter().filter(|name| name.starts_with("model-")).collect();
    assert!(shards.len() > 3);
    for (i, shard) in shards.iter().enumerate() {
        assert_eq!(*shard, format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len()));
        // The reference implementation reads every one.
        let bytes = fs::read(sharded.join(shard)).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let total: usize = reference.iter().map(|(_, tensor)| tensor.data().len()).sum();
        assert!(total <= 1000 || reference.len() == 1);
    }
    let index: Value =
        serde_json::from_slice(&fs::read(sharded.join("model.safetensors.index.json")).unwrap()).unwrap();
    let (single, sharded) = (Checkpoint::open(&single).unwrap(), Checkpoint::open(&sharded).unwrap());
    assert_eq!(index["metadata"]["total_size"], single.tensors().map(|tensor| tensor.bytes).sum::<u64>());
    assert_eq!(index["weight_map"].as_object().unwrap().len(), single.tensors().count());
    for (left, right) in single.tensors().zip(sharded.tensors()) {
        assert_eq!((&left.name, &left.dtype, &left.shape), (&right.name, &right.dtype, &right.shape));
    }
    for name in ["model.layers.0.up", "model.layers.2.down", "lm_head"] {
        assert_eq!(single.linear(name).unwrap(), sharded.linear(name).unwrap());
    }
}

#[test]
fn a_bias_is_read_with_its_linear() {
    let folder = tempfile::tempdir().unwrap();
    let linear = source(folder.path()).linear("up").unwrap();
    assert_eq!(linear.bias.as_deref(), Some(&[0.5, -0.5][..]));
    assert_eq!(linear.low_rank, None);
}

#[test]
fn a_model_without_quantized_linears_says_nothing_about_quantization() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let target = folder.path().join("target");
    let mut writer = CheckpointWriter::create(&target, &source).unwrap();
    writer.copy("up.weight").unwrap();
    finish(writer, &w4()).unwrap();
    assert_eq!(Checkpoint::open(&target).unwrap().quantization(), None);
}

// --- failures leave nothing ---

/// A source in its folder, and the name of a target beside it that must not exist afterwards.
pub(crate) fn failing() -> (TempDir, Checkpoint, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let target = folder.path().join("target");
    (folder, source, target)
}

#[track_caller]
pub(crate) fn assert_nothing_left(folder: &TempDir) {
    assert_eq!(file_names(folder.path()), ["source"]);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let (folder, source, target) = failing();
    let mut writer = CheckpointWriter::create(&target, &source).unwrap();
    writer.write_linear("up", &quantized(4, 70, &w4(), ElementType::F16)).unwrap();
    assert_eq!(file_names(folder.path()), ["source", "target.partial"]);
    drop(writer);
    assert_nothing_left(&folder);
}

#[test]
fn a_matrix_that_the_configuration_does_not_describe_is_refused() {
    let other = [
        config(3, GroupSize::Columns(32), false, false),
        config(4, GroupSize::Columns(64), false, false),
        config(4, GroupSize::Columns(32), true, false),
        config(4, GroupSize::Columns(32), false, true),
    ];
    for other in other {
        let (folder, source, target) = failing();
        let mut writer = CheckpointWriter::create(&target, &source).unwrap();
        writer.write_linear("up", &quantized(4, 70, &w4(), ElementType::F16)).unwrap();
        writer.write_linear("down", &quantized(4, 70, &other, ElementType::F16)).unwrap();
        assert_refused(finish(writer, &w4()), ErrorCode::QuantizationUnsupported);
        assert_nothing_left(&folder);
    }
}

#[test]
fn linears_with_and_without_group_index_live_together() {
    let (_folder, source, target) = failing();
    let with_index = config(4, GroupSize::Columns(32), false, true);
    let (up, down) = (quantized(4, 70, &with_index, ElementType::F16), quantized(4, 20, &w4(), ElementType::F16));
    let mut writer = CheckpointWriter::create(&target, &source).unwrap();
    writer.write_linear("up", &up).unwrap();
    writer.write_linear("down", &down).unwrap();
    finish(writer, &with_index).unwrap();
    let written = Checkpoint::open(&target).unwrap();
    assert_eq!(written.linear("up").unwrap().matrix, WeightMatrix::Quantized(up));
    assert_eq!(written.linear("down").unwrap().matrix, WeightMatrix::Quantized(down));
}

#[test]
fn a_tensor_that_the_source_lacks_is_refused() {
    let (folder, source, target) = failing();
    let mut writer = CheckpointWriter::create(&target, &source).unwrap();
    assert_eq!(assert_refused(writer.copy("absent"), ErrorCode::CheckpointTensorMissing).subject, "absent");
    drop(writer);
    assert_nothing_left(&folder);
}

#[test]
fn a_tensor_is_written_once() {
    let (_folder, source, target) = failing();
    let mut writer = CheckpointWriter::create(&target, &source).unwrap();
    writer.copy("odd").unwrap();
    assert_eq!(writer.copy("odd").unwrap_err().code, ErrorCode::Internal);
}

#[test]
fn a_source_that_shrinks_is_refused() {
    let (folder, source, target) = failing();
    let mut writer = CheckpointWriter::create(&target, &source).unwrap();
    fs::File::options().write(true).open(source.path().join("model.safetensors")).unwrap().set_len(30).unwrap();
    assert_refused(writer.copy("odd"), ErrorCode::CheckpointCorrupt);
    drop(writer);
    assert_nothing_left(&folder);
}

#[test]
fn an_output_that_cannot_be_written_is_refused() {
    let (folder, source, target) = failing();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("precious"), "x").unwrap();
    assert_refused(CheckpointWriter::create(&target, &source), ErrorCode::OutputNotEmpty);
    assert_refused(
        CheckpointWriter::create(&target.join("precious").join("below"), &source),
        ErrorCode::OutputUnwritable,
    );
    assert_eq!(file_names(folder.path()), ["source", "target"]);
    assert_eq!(file_names(&target), ["precious"]);
}

// --- adapters ---

fn low_rank(out_features: usize, in_features: usize, rank: usize, factor_type: ElementType) -> LowRank {
    let mut next = numbers((out_features + rank) as u64);
    let mut values = |count: usize| (0..count).map(|_| (next() % 999) as f32 / 77.0 - 5.0).collect::<Vec<f32>>();
    let (b, a) = (values(out_features * rank), values(rank * in_features));
    LowRank::new(out_features, in_features, rank, b, a, factor_type)
}

fn adapter(scalings: [f32; 3]) -> Adapter {
    let entry = |rank, factor_type, scaling| AdapterEntry { factors: low_rank(7, 5, rank, factor_type), scaling };
    Adapter {
        linears: BTreeMap::from([
            ("model.layers.1.attn.Wqkv".to_string(), entry(3, ElementType::Bf16, scalings[0])),
            ("model.layers.10.attn.Wqkv".to_string(), entry(8, ElementType::F16, scalings[1])),
            ("model.layers.1.mlp.up_proj".to_string(), entry(2, ElementType::F32, scalings[2])),
        ]),
        base_model: Some("base".into()),
    }
}

#[test]
fn an_adapter_comes_back_with_its_types_scalings_and_names() {
    for scalings in [[1.0; 3], [4.0; 3], [0.3, 1.0, 1.0 / 3.0]] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter");
        write_adapter(&path, &adapter(scalings), "base").unwrap();
        assert_eq!(read_adapter(&path).unwrap(), adapter(scalings));
        assert_eq!(file_names(folder.path()), ["adapter"]);
        assert_eq!(file_names(&path), ["adapter_config.json", "adapter_model.safetensors"]);
    }
}

#[test]
fn ranks_and_alphas_are_explicit_and_identical_at_scaling_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    write_adapter(&path, &adapter([1.0; 3]), "base").unwrap();
    let config: Value = serde_json::from_slice(&fs::read(path.join("adapter_config.json")).unwrap()).unwrap();
    let ranks =
        json!({ "model.layers.1.attn.Wqkv": 3, "model.layers.1.mlp.up_proj": 2, "model.layers.10.attn.Wqkv": 8 });
    assert_eq!(config["rank_pattern"], ranks);
    assert_eq!(config["alpha_pattern"], ranks);
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(8), &json!(8)));
    assert_eq!(config["target_modules"], json!(["Wqkv", "up_proj"]));
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["task_type"], "CAUSAL_LM");
    assert_eq!(config["base_model_name_or_path"], "base");

    let bytes = fs::read(path.join("adapter_model.safetensors")).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let a = reference.tensor("base_model.model.model.layers.10.attn.Wqkv.lora_A.weight").unwrap();
    assert_eq!((a.dtype(), a.shape()), (safetensors::Dtype::F16, &[8, 5][..]));
    let b = reference.tensor("base_model.model.model.layers.10.attn.Wqkv.lora_B.weight").unwrap();
    assert_eq!(b.shape(), [7, 8]);
}

#[test]
fn one_scaling_for_all_is_also_the_common_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    write_adapter(&path, &adapter([2.0; 3]), "base").unwrap();
    let config: Value = serde_json::from_slice(&fs::read(path.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(8), &json!(16)));
}

#[test]
fn scalings_are_those_of_peft() {
    let read = |mut config: Value, rank: usize| {
        config["peft_type"] = json!("LORA");
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let tensors = [
            floats("base_model.model.layers.1.up.lora_A.default.weight", &[rank, 1], &vec![1.0; rank]),
            floats("base_model.model.layers.1.up.lora_B.default.weight", &[1, rank], &vec![1.0; rank]),
        ];
        fs::write(folder.path().join("adapter_model.safetensors"), safetensors(&tensors)).unwrap();
        read_adapter(folder.path()).unwrap().linears["layers.1.up"].scaling
    };
    assert_eq!(read(json!({ "r": 4, "lora_alpha": 8 }), 4), 2.0);
    assert_eq!(read(json!({ "r": 16, "lora_alpha": 16, "use_rslora": true }), 16), 4.0);
    assert_eq!(read(json!({ "r": 8, "lora_alpha": 16, "rank_pattern": { "up": 2 } }), 2), 8.0);
    let both =
        json!({ "r": 8, "lora_alpha": 16, "rank_pattern": { "1.up": 4 }, "alpha_pattern": { "^layers.1.up": 3 } });
    assert_eq!(read(both, 4), 0.75);
    // The first pattern that matches counts.
    let first = json!({ "r": 8, "lora_alpha": 8, "alpha_pattern": { "down": 1, "up": 24, "layers.1.up": 80 } });
    assert_eq!(read(first, 8), 3.0);
}

#[test]
fn an_adapter_that_peft_could_not_load_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let mut odd_name = adapter([1.0; 3]);
    let entry = odd_name.linears.pop_first().unwrap().1;
    odd_name.linears.insert("layers.[0]".into(), entry);
    let mut infinite = adapter([1.0; 3]);
    infinite.linears.first_entry().unwrap().get_mut().scaling = f32::INFINITY;
    let mut no_rank = adapter([1.0; 3]);
    no_rank.linears.first_entry().unwrap().get_mut().factors = low_rank(7, 5, 0, ElementType::F32);
    for broken in [odd_name, infinite, no_rank, Adapter::default()] {
        assert_refused(write_adapter(&path, &broken, "base"), ErrorCode::AdapterInvalid);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_compensation_travels_with_its_checkpoint() {
    let (folder, source, target) = failing();
    let mut writer = CheckpointWriter::create(&target, &source).unwrap();
    writer.write_linear("up", &quantized(7, 5, &w4(), ElementType::F16)).unwrap();
    let factors = low_rank(7, 5, 2, ElementType::Bf16);
    let linears = BTreeMap::from([("up".to_string(), AdapterEntry { factors, scaling: 1.0 })]);
    let mut compensation = Adapter { linears, base_model: None };
    assert_eq!(writer.write_compensation(&Adapter::default()).unwrap(), 0);
    let bytes = writer.write_compensation(&compensation).unwrap();
    assert!(finish(writer, &w4()).unwrap() > bytes);
    assert_eq!(file_names(folder.path()), ["source", "target"]);

    compensation.base_model = Some("target".into());
    let written = Checkpoint::open(&target).unwrap();
    assert_eq!(written.compensation().unwrap(), Some(compensation));
    assert_eq!(source.compensation().unwrap(), None);
}

// --- properties ---

fn configs() -> impl Strategy<Value = QuantizationConfig> {
    let bits = prop::sample::select(vec![2u8, 3, 4, 8]);
    let group_size = prop::sample::select(vec![
        GroupSize::Columns(32),
        GroupSize::Columns(64),
        GroupSize::Columns(128),
        GroupSize::WholeRow,
    ]);
    (bits, group_size, any::<bool>(), any::<bool>()).prop_map(|(bits, group_size, symmetric, index)| {
        // An order of columns needs groups of columns.
        config(bits, group_size, symmetric, index && group_size != GroupSize::WholeRow)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn quantized_matrices_come_back_bit_for_bit(
        config in configs(),
        rows in 1usize..70,
        columns in 1usize..300,
        scale_type in prop::sample::select(ElementType::ALL.to_vec()),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let source_path = folder.path().join("source");
        write_checkpoint(&source_path, &json!({}), &raw_file("{}", &[]));
        let target = folder.path().join("target");
        let matrix = quantized(rows, columns, &config, scale_type);
        let mut writer = CheckpointWriter::create(&target, &Checkpoint::open(&source_path).unwrap()).unwrap();
        writer.write_linear("up", &matrix).unwrap();
        finish(writer, &config).unwrap();
        let written = Checkpoint::open(&target).unwrap();
        prop_assert_eq!(written.quantization(), Some(&config));
        prop_assert_eq!(written.linear_shape("up").unwrap(), (rows, columns));
        prop_assert_eq!(written.linear("up").unwrap().matrix, WeightMatrix::Quantized(matrix));
    }

    /// Whatever is done to a file, opening it ends in a checkpoint that the reference implementation accepts too, or
    /// in an error.
    #[test]
    fn a_file_with_changed_bytes_is_read_like_the_reference_or_refused(
        changes in prop::collection::vec((0usize..400, prop::sample::select(b"{}[]\",:0123456789 aFx\xff\0".to_vec())), 1..6),
    ) {
        let mut file = safetensors(&[
            floats("a.weight", &[2, 2], &[1.0; 4]),
            ("b", "U8", vec![10], vec![0; 10]),
            ("c", "F16", vec![0, 3], Vec::new()),
        ]);
        for (position, byte) in changes {
            let position = position % file.len();
            file[position] = byte;
        }
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &json!({}), &file);
        match Checkpoint::open(folder.path()) {
            Ok(checkpoint) => {
                let reference = safetensors::SafeTensors::deserialize(&file);
                prop_assert!(reference.is_ok());
                prop_assert_eq!(checkpoint.tensors().count(), reference.unwrap().len());
                for tensor in checkpoint.tensors() {
                    let _ = checkpoint.dense(&tensor.name);
                    let _ = checkpoint.vector(&tensor.name);
                }
            }
            Err(error) => prop_assert_eq!(error.code, ErrorCode::CheckpointCorrupt),
        }
    }
}

/// Codes of 4 bits for two modules, in groups of 4.
fn coded_adapter() -> Adapter {
    let matrix = |rows: usize, columns: usize| {
        let codes = (0..rows * columns).map(|i| (i * 7 % 15 + 1) as u8).collect();
        let group_size = GroupSize::Columns(4);
        let scales = (0..rows * columns.div_ceil(4)).map(|i| (17 + i % 15) as f32 / 1024.0).collect();
        let scale_type = ElementType::Bf16;
        let parts =
            QuantizedParts { rows, columns, bits: 4, group_size, codes, scales, scale_type, ..Default::default() };
        QuantizedMatrix::new(parts).unwrap()
    };
    let entry = |out, rank, input| {
        let factors = LowRank::of_codes(FactorCodes { b: matrix(out, rank), a: matrix(rank, input) });
        AdapterEntry { factors, scaling: 1.0 }
    };
    Adapter {
        linears: BTreeMap::from([
            ("layers.0.Wqkv".to_string(), entry(6, 3, 10)),
            ("layers.0.up".into(), entry(3, 5, 4)),
        ]),
        base_model: Some("base".into()),
    }
}

#[test]
fn quantized_factors_come_back_as_their_codes_and_as_plain_floats_without_the_scales() {
    let folder = tempfile::tempdir().unwrap();
    let (path, adapter) = (folder.path().join("adapter"), coded_adapter());
    write_adapter(&path, &adapter, "base").unwrap();
    assert_eq!(read_adapter(&path).unwrap(), adapter);
    let scales = path.join("factor_scales.safetensors");
    let whole = fs::read(&scales).unwrap();
    // A scale that is not that of its values, and what is no file of scales.
    let mut wrong = whole.clone();
    let last = wrong.len() - 1;
    wrong[last] ^= 0x40;
    let text = String::from_utf8_lossy(&whole).into_owned();
    assert!(text.contains("kintsugi.factors"));
    let renamed = whole.windows(9).position(|bytes| bytes == b"kintsugi.").map(|at| {
        let mut bytes = whole.clone();
        bytes[at] = b'x';
        bytes
    });
    for bytes in [wrong, renamed.unwrap(), whole[..whole.len() - 1].to_vec(), Vec::new()] {
        fs::write(&scales, bytes).unwrap();
        assert_refused(read_adapter(&path), ErrorCode::AdapterInvalid);
    }
    fs::remove_file(&scales).unwrap();
    let plain = read_adapter(&path).unwrap();
    for (name, entry) in &plain.linears {
        let expected = &adapter.linears[name].factors;
        assert!(entry.factors.codes().is_none());
        assert_eq!((entry.factors.a(), entry.factors.b()), (expected.a(), expected.b()));
    }
}
