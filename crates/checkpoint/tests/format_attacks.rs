//! Broken and hostile Linears of GPTQ, AWQ, int-quantized and our own format. Each must end in a typed error that says with what and
//! what to do.

use crate::fixture::{Tensor, assert_refused, floats, safetensors, words, write_checkpoint};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_runtime::{Error, ErrorCode};
use proptest::prelude::*;
use serde_json::{Value, json};

fn read(tensors: &[Tensor], config: &Value) -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({ "quantization_config": config }), &safetensors(tensors));
    Checkpoint::open(folder.path())?.linear("up").map(|_| ())
}

fn bytes(name: &'static str, shape: &[usize], values: &[i8]) -> Tensor {
    (name, "I8", shape.to_vec(), values.iter().map(|&value| value as u8).collect())
}

/// Sixteen outputs of sixteen inputs in groups of eight, 4 bits, asymmetric, act-order.
fn gptq() -> (Vec<Tensor>, Value) {
    let tensors = vec![
        words("up.qweight", &[2, 16], &[0x1234_5678; 32]),
        words("up.qzeros", &[2, 2], &[0x1234_5678; 4]),
        floats("up.scales", &[2, 16], &[1.0; 32]),
        words("up.g_idx", &[16], &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
    ];
    let config = json!({ "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 8,
        "sym": false, "desc_act": true });
    (tensors, config)
}

/// The same sizes in AWQ, without act-order.
fn awq() -> (Vec<Tensor>, Value) {
    let tensors = vec![
        words("up.qweight", &[16, 2], &[0x1234_5678; 32]),
        words("up.qzeros", &[2, 2], &[0x1234_5678; 4]),
        floats("up.scales", &[2, 16], &[1.0; 32]),
    ];
    let config = json!({ "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 8, "zero_point": true });
    (tensors, config)
}

/// Two outputs of four inputs in groups of two, 4 bits in bytes, asymmetric, act-order.
fn int_quantized() -> (Vec<Tensor>, Value) {
    let tensors = vec![
        bytes("up.weight", &[2, 4], &[1, -2, 3, -4, 5, -6, 7, -8]),
        floats("up.weight_scale", &[2, 2], &[1.0; 4]),
        bytes("up.weight_zero_point", &[2, 2], &[0; 4]),
        words("up.weight_g_idx", &[4], &[0, 1, 0, 1]),
    ];
    let config = json!({ "quant_method": "compressed-tensors", "format": "int-quantized",
        "config_groups": { "group_0": { "targets": ["Linear"], "weights": { "num_bits": 4, "type": "int",
            "symmetric": false, "strategy": "group", "group_size": 2, "actorder": "group" } } } });
    (tensors, config)
}

/// Four outputs of eight inputs in groups of two outputs, 4 bits, asymmetric.
fn kintsugi() -> (Vec<Tensor>, Value) {
    let tensors = vec![
        words("up.weight_packed", &[4, 1], &[0x1234_5678; 4]),
        floats("up.weight_scale", &[2, 8], &[1.0; 16]),
        words("up.weight_zero_point", &[2], &[0x1234_5678; 2]),
        ("up.weight_shape", "I64", vec![2], [4i64, 8].iter().flat_map(|size| size.to_le_bytes()).collect()),
    ];
    let config = json!({ "quant_method": "kintsugi", "version": 1, "bits": 4, "group_size": 2, "group_axis": "output",
        "symmetric": false, "linears": { "up": { "bits": 4 } } });
    (tensors, config)
}

/// The sound Linear with one tensor replaced (or added); the error that reading it gives.
#[track_caller]
fn spoiled(sound: fn() -> (Vec<Tensor>, Value), tensor: Tensor, code: ErrorCode) -> Error {
    let (mut tensors, config) = sound();
    let name = tensor.0;
    tensors.retain(|(other, ..)| *other != name);
    tensors.push(tensor);
    let error = assert_refused(read(&tensors, &config), code);
    assert!(error.subject.contains("up"), "{error}");
    error
}

/// The sound Linear with a field of the configuration changed; the error that opening or reading it gives.
#[track_caller]
fn misconfigured(sound: fn() -> (Vec<Tensor>, Value), pointer: &str, value: Value, code: ErrorCode) -> Error {
    let (tensors, mut config) = sound();
    match config.pointer_mut(pointer) {
        Some(field) => *field = value,
        None => config[pointer.trim_start_matches('/')] = value,
    }
    assert_refused(read(&tensors, &config), code)
}

#[test]
fn linears_are_sound_before_they_are_spoiled() {
    for sound in [gptq, awq, int_quantized, kintsugi] {
        let (tensors, config) = sound();
        read(&tensors, &config).unwrap();
    }
}

#[test]
fn each_missing_tensor() {
    for (sound, absent) in [
        (gptq as fn() -> _, "up.qzeros"),
        (gptq, "up.scales"),
        (gptq, "up.g_idx"),
        (awq, "up.qzeros"),
        (awq, "up.scales"),
        (int_quantized, "up.weight_scale"),
        (int_quantized, "up.weight_zero_point"),
        (kintsugi, "up.weight_shape"),
        (kintsugi, "up.weight_scale"),
        (kintsugi, "up.weight_zero_point"),
    ] {
        let (mut tensors, config): (Vec<Tensor>, Value) = sound();
        tensors.retain(|(name, ..)| *name != absent);
        let error = assert_refused(read(&tensors, &config), ErrorCode::CheckpointTensorMissing);
        assert_eq!(error.subject, absent);
    }
}

#[test]
fn tensors_of_the_wrong_shape() {
    for sound in [gptq as fn() -> _, awq] {
        for shape in [&[4, 1][..], &[4], &[1, 4]] {
            spoiled(sound, words("up.qzeros", shape, &[0; 4]), ErrorCode::CheckpointShape);
        }
        for shape in [&[16, 2][..], &[32]] {
            spoiled(sound, floats("up.scales", shape, &[1.0; 32]), ErrorCode::CheckpointShape);
        }
        spoiled(sound, words("up.qweight", &[32], &[0; 32]), ErrorCode::CheckpointShape);
        spoiled(sound, words("up.qweight", &[0, 16], &[]), ErrorCode::CheckpointShape);
        spoiled(sound, words("up.qweight", &[16, 0], &[]), ErrorCode::CheckpointShape);
    }
    // The sizes of the tensors decide the sizes of the Linear, so the others no longer fit.
    spoiled(gptq, words("up.qweight", &[4, 16], &[0; 64]), ErrorCode::CheckpointShape);
    spoiled(gptq, words("up.g_idx", &[15], &[0; 15]), ErrorCode::CheckpointShape);
    spoiled(awq, words("up.qweight", &[8, 4], &[0; 32]), ErrorCode::CheckpointShape);
    spoiled(int_quantized, bytes("up.weight", &[4, 2], &[0; 8]), ErrorCode::CheckpointShape);
    spoiled(int_quantized, bytes("up.weight", &[8], &[0; 8]), ErrorCode::CheckpointShape);
    spoiled(int_quantized, bytes("up.weight_zero_point", &[2, 1], &[0; 2]), ErrorCode::CheckpointShape);
    spoiled(int_quantized, floats("up.weight_scale", &[2], &[1.0; 2]), ErrorCode::CheckpointShape);
}

#[test]
fn tensors_of_the_wrong_type() {
    for sound in [gptq as fn() -> _, awq] {
        spoiled(sound, floats("up.qzeros", &[2, 2], &[0.0; 4]), ErrorCode::CheckpointDtype);
        spoiled(sound, words("up.scales", &[2, 16], &[0; 32]), ErrorCode::CheckpointDtype);
    }
    spoiled(gptq, ("up.qweight", "I16", vec![2, 16], vec![0; 64]), ErrorCode::CheckpointDtype);
    spoiled(awq, ("up.qweight", "I16", vec![16, 2], vec![0; 64]), ErrorCode::CheckpointDtype);
    spoiled(gptq, floats("up.g_idx", &[16], &[0.0; 16]), ErrorCode::CheckpointDtype);
    spoiled(int_quantized, words("up.weight_zero_point", &[2, 2], &[0; 4]), ErrorCode::CheckpointDtype);
}

#[test]
fn sizes_that_no_width_fits() {
    // At 3 bits 32 codes fill three words; 17 outputs leave the words of zero points unfinished.
    misconfigured(gptq, "/bits", json!(3), ErrorCode::CheckpointShape);
    spoiled(gptq, words("up.qweight", &[2, 17], &[0; 34]), ErrorCode::CheckpointShape);
}

#[test]
fn group_index_out_of_range() {
    for group in [2, u32::MAX, 1 << 31] {
        let mut index = [0; 16];
        index[5] = group;
        let error = spoiled(gptq, words("up.g_idx", &[16], &index), ErrorCode::CheckpointCorrupt);
        assert!(error.message.contains("column 5"), "{error}");
    }
    spoiled(int_quantized, words("up.weight_g_idx", &[4], &[0, 1, 2, 1]), ErrorCode::CheckpointCorrupt);
}

#[test]
fn scales_that_are_not_finite() {
    for value in [f32::NAN, f32::INFINITY] {
        let mut scales = [1.0; 32];
        scales[17] = value;
        for sound in [gptq as fn() -> _, awq] {
            let error = spoiled(sound, floats("up.scales", &[2, 16], &scales), ErrorCode::CheckpointNotFinite);
            assert_eq!(error.subject, "up.scales");
        }
        let scales = floats("up.weight_scale", &[2, 2], &[1.0, value, 1.0, 1.0]);
        spoiled(int_quantized, scales, ErrorCode::CheckpointNotFinite);
    }
}

#[test]
fn codes_that_do_not_fit_the_width() {
    let error =
        spoiled(int_quantized, bytes("up.weight", &[2, 4], &[1, -2, 3, -4, 5, 8, 7, -8]), ErrorCode::CheckpointCorrupt);
    assert!(error.message.contains("8 in row 1, column 1"), "{error}");
    spoiled(int_quantized, bytes("up.weight_zero_point", &[2, 2], &[0, -9, 0, 0]), ErrorCode::CheckpointCorrupt);
}

#[test]
fn every_prefix_of_a_file_is_refused() {
    for sound in [gptq, awq, int_quantized] {
        let (tensors, config) = sound();
        let file = safetensors(&tensors);
        for length in (0..file.len()).step_by(7) {
            let folder = tempfile::tempdir().unwrap();
            write_checkpoint(folder.path(), &json!({ "quantization_config": config }), &file[..length]);
            assert_refused(Checkpoint::open(folder.path()), ErrorCode::CheckpointCorrupt);
        }
    }
}

#[test]
fn configurations_that_lie_about_the_data() {
    misconfigured(gptq, "/bits", json!(8), ErrorCode::CheckpointShape);
    misconfigured(gptq, "/group_size", json!(4), ErrorCode::CheckpointShape);
    misconfigured(gptq, "/group_size", json!(-1), ErrorCode::CheckpointShape);
    let error = misconfigured(gptq, "/desc_act", json!(false), ErrorCode::CheckpointCorrupt);
    assert!(error.message.contains("desc_act"), "{error}");
    let error = misconfigured(gptq, "/sym", json!(true), ErrorCode::CheckpointCorrupt);
    assert!(error.message.contains("symmetric"), "{error}");
    misconfigured(awq, "/group_size", json!(4), ErrorCode::CheckpointShape);
    let weights = "/config_groups/group_0/weights";
    for (field, value, code) in [
        ("num_bits", json!(2), ErrorCode::CheckpointCorrupt),
        ("group_size", json!(4), ErrorCode::CheckpointShape),
        ("symmetric", json!(true), ErrorCode::CheckpointCorrupt),
        ("actorder", Value::Null, ErrorCode::CheckpointCorrupt),
    ] {
        misconfigured(int_quantized, &format!("{weights}/{field}"), value, code);
    }
    // Another layout of the same names.
    let (tensors, _) = gptq();
    assert_refused(read(&tensors, &awq().1), ErrorCode::CheckpointShape);
    assert_refused(read(&tensors, &int_quantized().1), ErrorCode::QuantizationUnsupported);
    assert_refused(read(&tensors, &Value::Null), ErrorCode::QuantizationUnsupported);
    let (tensors, _) = int_quantized();
    assert_refused(read(&tensors, &gptq().1), ErrorCode::QuantizationUnsupported);
    assert_refused(read(&tensors, &Value::Null), ErrorCode::QuantizationUnsupported);
}

#[test]
fn absurd_numbers_in_a_configuration() {
    for size in [json!(0), json!(-2), json!(i64::MIN), json!(1.5), json!("128"), json!([])] {
        misconfigured(gptq, "/group_size", size.clone(), ErrorCode::ConfigInvalid);
        misconfigured(awq, "/group_size", size, ErrorCode::ConfigInvalid);
    }
    // One group, so the scales of two no longer fit.
    misconfigured(gptq, "/group_size", json!(i64::MAX), ErrorCode::CheckpointShape);
    for bits in [json!(0), json!(5), json!(-4), json!(256), json!(i64::MAX)] {
        misconfigured(gptq, "/bits", bits.clone(), ErrorCode::QuantizationUnsupported);
        misconfigured(awq, "/bits", bits, ErrorCode::QuantizationUnsupported);
    }
    misconfigured(gptq, "/bits", Value::Null, ErrorCode::ConfigInvalid);
    misconfigured(gptq, "/sym", json!("yes"), ErrorCode::ConfigInvalid);
    misconfigured(gptq, "/checkpoint_format", json!(2), ErrorCode::ConfigInvalid);
    misconfigured(gptq, "/dynamic", json!([1]), ErrorCode::ConfigInvalid);
    misconfigured(gptq, "/dynamic", json!({ "+:(": { "bits": 8 } }), ErrorCode::ConfigInvalid);
    misconfigured(gptq, "/dynamic", json!({ "+:.*": 8 }), ErrorCode::ConfigInvalid);
    misconfigured(awq, "/modules_to_not_convert", json!([1]), ErrorCode::ConfigInvalid);
}

#[test]
fn layouts_and_features_that_are_not_read_are_refused_by_name() {
    for (sound, field, value, named) in [
        (gptq as fn() -> _, "/checkpoint_format", json!("marlin"), "marlin"),
        (gptq, "/checkpoint_format", json!("gptq_p"), "gptq_p"),
        (gptq, "/checkpoint_format", json!("bitblas"), "bitblas"),
        (gptq, "/is_marlin_format", json!(true), "is_marlin_format"),
        (gptq, "/pack_dtype", json!("int64"), "int64"),
        (gptq, "/dynamic", json!({ "+:.*down.*": { "bits": 8, "adapter": {} } }), "+:.*down.* with adapter"),
        (awq, "/version", json!("gemv"), "gemv"),
        (awq, "/version", json!("gemv_fast"), "gemv_fast"),
        (awq, "/version", json!("llm-awq"), "llm-awq"),
        (awq, "/bits", json!(8), "bits 8"),
    ] {
        let error = misconfigured(sound, field, value, ErrorCode::QuantizationUnsupported);
        assert!(error.message.contains(named), "{error}");
    }
    let group = "/config_groups/group_0";
    for (field, value, named) in [
        ("weights/strategy", json!("tensor"), "tensor"),
        ("weights/type", json!("float"), "float"),
        ("format", json!("pack-quantized"), "pack-quantized"),
    ] {
        let pointer = format!("{group}/{field}");
        let (tensors, mut config) = int_quantized();
        config["config_groups"]["group_0"]["format"] = json!("int-quantized");
        *config.pointer_mut(&pointer).unwrap() = value;
        let error = assert_refused(read(&tensors, &config), ErrorCode::QuantizationUnsupported);
        assert!(error.message.contains(named), "{error}");
    }
}

#[test]
fn activations_that_change_the_model_are_refused_by_name() {
    for (activations, named) in [
        (json!({ "num_bits": 8, "type": "int", "dynamic": false, "strategy": "tensor" }), "static 8-bit int"),
        (json!({ "num_bits": 8, "type": "int" }), "static 8-bit int"),
        (json!({ "num_bits": 8, "type": "float", "dynamic": true }), "dynamic 8-bit float"),
        (json!({ "num_bits": 4, "type": "int", "dynamic": true }), "dynamic 4-bit int"),
        (json!({ "num_bits": 8, "type": "int", "dynamic": "local" }), "static 8-bit int"),
    ] {
        let (tensors, mut config) = int_quantized();
        config["config_groups"]["group_0"]["input_activations"] = activations;
        let error = assert_refused(read(&tensors, &config), ErrorCode::QuantizationUnsupported);
        assert!(error.message.contains("input_activations") && error.message.contains(named), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Tensors of any sizes under any configuration end in a Linear or in an error that says with what.
    #[test]
    fn sizes_that_have_nothing_to_do_with_each_other(
        sizes in prop::collection::vec(0usize..9, 7),
        factor in prop::sample::select(vec![1usize, 3, 8, 32]),
        bits in prop::sample::select(vec![2, 3, 4, 8]),
        group_size in prop::sample::select(vec![-1i64, 1, 5, 8, 16, 1 << 40]),
        (symmetric, act_order) in any::<(bool, bool)>(),
        method in prop::sample::select(vec!["gptq", "awq"]),
        word in any::<u32>(),
    ) {
        let [a, b, c, d, e, f, g] = sizes[..] else { unreachable!() };
        let b = b * factor;
        let tensors = [
            words("up.qweight", &[a, b], &vec![word; a * b]),
            words("up.qzeros", &[c, d], &vec![word; c * d]),
            floats("up.scales", &[e, f * factor], &vec![1.0; e * f * factor]),
            words("up.g_idx", &[g * factor], &vec![word % 4; g * factor]),
        ];
        let config = json!({ "quant_method": method, "bits": bits, "group_size": group_size, "sym": symmetric,
            "desc_act": act_order });
        if let Err(error) = read(&tensors, &config) {
            prop_assert!(!error.subject.is_empty() && !error.hint.is_empty(), "{}", error);
        }
    }
}

#[test]
fn our_own_format_is_trusted_no_more_than_others() {
    let sizes = |rows: i64, columns: i64| {
        let bytes = [rows, columns].iter().flat_map(|size| size.to_le_bytes()).collect();
        ("up.weight_shape", "I64", vec![2], bytes)
    };
    for (rows, columns) in [(0, 8), (4, 0), (-4, 8), (4, 9), (5, 8), (i64::MAX, 8), (4, i64::MAX), (1 << 62, 1 << 62)] {
        spoiled(kintsugi, sizes(rows, columns), ErrorCode::CheckpointShape);
    }
    spoiled(kintsugi, floats("up.weight_scale", &[4, 4], &[1.0; 16]), ErrorCode::CheckpointShape);
    spoiled(kintsugi, floats("up.weight_scale", &[2, 8], &[f32::NAN; 16]), ErrorCode::CheckpointNotFinite);
    spoiled(kintsugi, words("up.weight_zero_point", &[3], &[0; 3]), ErrorCode::CheckpointShape);
    spoiled(kintsugi, words("up.weight_g_idx", &[8], &[0; 8]), ErrorCode::CheckpointCorrupt);
    misconfigured(kintsugi, "/version", json!(2), ErrorCode::QuantizationUnsupported);
    misconfigured(kintsugi, "/version", Value::Null, ErrorCode::ConfigInvalid);
    misconfigured(kintsugi, "/bits", json!(7), ErrorCode::QuantizationUnsupported);
    misconfigured(kintsugi, "/group_size", json!(0), ErrorCode::ConfigInvalid);
    misconfigured(kintsugi, "/group_axis", json!("diagonal"), ErrorCode::QuantizationUnsupported);
    misconfigured(kintsugi, "/group_axis", json!("input"), ErrorCode::CheckpointShape);
    misconfigured(kintsugi, "/symmetric", json!(true), ErrorCode::CheckpointCorrupt);
    misconfigured(kintsugi, "/linears/up/bits", json!(2), ErrorCode::CheckpointShape);
    misconfigured(kintsugi, "/linears", json!(["up"]), ErrorCode::ConfigInvalid);
    misconfigured(kintsugi, "/linears/up", json!(4), ErrorCode::ConfigInvalid);
}
