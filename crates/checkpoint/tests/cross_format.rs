//! The same matrix in every format that can hold it, and what happens to those that cannot.

use std::path::Path;

use crate::fixture::{assert_refused, finish, floats, raw_file, safetensors, words, write_checkpoint};
use kintsugi_checkpoint::{
    Awq, Checkpoint, CheckpointWriter, FORMATS, Gptq, IntQuantized, Kintsugi, LinearFormat, LinearTarget, MatrixForm,
    PackQuantized, QuantizationConfig, Scheme, SchemeException, linear_format,
};
use kintsugi_runtime::{Error, ErrorCode};
use kintsugi_weights::{CODE_BITS, ElementType, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts, WeightMatrix};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Pseudo-random parts, so that a failure repeats. Zero points are at least `least_zero`.
fn parts(
    rows: usize,
    columns: usize,
    bits: u8,
    group_size: GroupSize,
    least_zero: Option<u8>,
    group_index: bool,
) -> QuantizedParts {
    let mut state = (rows * 1000 + columns * 10) as u64 + u64::from(bits);
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let groups = group_size.groups(columns);
    let limit = 1u32 << bits;
    QuantizedParts {
        rows,
        columns,
        bits,
        group_size,
        codes: (0..rows * columns).map(|_| (next() % limit) as u8).collect(),
        scales: (0..rows * groups).map(|_| (1 + next() % 255) as f32 / 512.0).collect(),
        scale_type: ElementType::F16,
        zero_points: least_zero.map(|least| {
            let least = u32::from(least);
            (0..rows * groups).map(|_| (least + next() % (limit - least)) as u8).collect()
        }),
        // Never in the order of the groups, which is no index.
        group_index: group_index
            .then(|| (0..columns as u32).map(|column| (next() + u32::from(column == 0)) % groups as u32).collect()),
        ..QuantizedParts::default()
    }
}

fn matrix(parts: QuantizedParts) -> QuantizedMatrix {
    QuantizedMatrix::new(parts).unwrap()
}

fn config(format: &'static dyn LinearFormat, matrix: &QuantizedMatrix) -> QuantizationConfig {
    QuantizationConfig::uniform(format, Scheme::of(matrix), vec!["lm_head".into()])
}

/// Writes `matrix` as the Linear `up` of a folder and opens that.
fn written(folder: &Path, format: &'static dyn LinearFormat, matrix: &QuantizedMatrix) -> Result<Checkpoint, Error> {
    let source = folder.join("source");
    if !source.exists() {
        write_checkpoint(&source, &json!({}), &raw_file("{}", &[]));
    }
    let target = folder.join(format.name().replace('/', "-"));
    let mut writer = CheckpointWriter::create(&target, &Checkpoint::open(&source)?)?.format(format);
    writer.write_linear("up", matrix)?;
    finish(writer, &config(format, matrix))?;
    Checkpoint::open(&target)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_matrix_reads_back_equal_from_every_format_that_holds_it(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        group_size in prop::sample::select(vec![GroupSize::Columns(16), GroupSize::Columns(32), GroupSize::WholeRow]),
        rows in 1usize..4,
        columns in 1usize..6,
        least_zero in prop::sample::select(vec![None, Some(0), Some(1)]),
        index in any::<bool>(),
        scale_type in prop::sample::select(ElementType::ALL.to_vec()),
    ) {
        let index = index && group_size.groups(columns * 32) > 2;
        let mut parts = parts(rows * 32, columns * 32, bits, group_size, least_zero, index);
        parts.scale_type = scale_type;
        let matrix = matrix(parts);
        let folder = tempfile::tempdir().unwrap();
        let narrow = scale_type != ElementType::F32;
        let smallest = MatrixForm::of(&matrix).smallest_zero_point;
        let holds: [(&'static dyn LinearFormat, bool); 5] = [
            (&PackQuantized, true),
            (&Kintsugi, true),
            (&Gptq::V1, narrow && smallest != Some(0)),
            (&Gptq::V2, narrow),
            (&Awq, narrow && bits == 4 && !index),
        ];
        for (format, holds) in holds {
            match written(folder.path(), format, &matrix) {
                Ok(checkpoint) => {
                    prop_assert!(holds, "{}", format.name());
                    prop_assert_eq!(checkpoint.notices(), [""; 0]);
                    prop_assert_eq!(checkpoint.quantization(), Some(&config(format, &matrix)));
                    prop_assert_eq!(checkpoint.linear_shape("up").unwrap(), (matrix.rows(), matrix.columns()));
                    prop_assert_eq!(checkpoint.linear("up").unwrap().matrix, WeightMatrix::Quantized(matrix.clone()));
                }
                Err(error) => {
                    prop_assert!(!holds, "{}", error);
                    prop_assert_eq!(error.code, ErrorCode::QuantizationUnsupported);
                }
            }
        }
    }
}

#[test]
fn the_same_matrix_gives_the_same_bytes() {
    let matrix = matrix(parts(64, 96, 4, GroupSize::Columns(32), Some(1), false));
    for format in [&PackQuantized as &dyn LinearFormat, &Gptq::V1, &Gptq::V2, &Awq, &Kintsugi] {
        let [first, second] = [(); 2].map(|()| {
            let folder = tempfile::tempdir().unwrap();
            let checkpoint = written(folder.path(), format, &matrix).unwrap();
            ["config.json", "model.safetensors"].map(|name| std::fs::read(checkpoint.path().join(name)).unwrap())
        });
        assert!(first == second, "{}", format.name());
    }
}

#[test]
fn names_are_looked_up_in_the_table() {
    for format in FORMATS {
        assert_eq!(linear_format(format.name()).unwrap(), *format);
        assert_eq!(FORMATS.iter().filter(|other| other.name() == format.name()).count(), 1);
    }
    let error = assert_refused(linear_format("gptq-v2"), ErrorCode::OptionUnknown);
    assert!(error.hint.contains("gptq_v2") && error.hint.contains("awq"), "{error}");
}

#[test]
fn every_layout_has_one_format() {
    for format in FORMATS {
        for layout in format.layouts() {
            let same =
                |other: &&&dyn LinearFormat| other.method() == format.method() && other.layouts().contains(layout);
            assert_eq!(FORMATS.iter().filter(same).count(), 1, "{} {layout}", format.method());
        }
    }
}

/// Groups of `size` along the outputs.
fn along_outputs(rows: usize, columns: usize, bits: u8, size: usize, symmetric: bool) -> QuantizedMatrix {
    let turned = parts(columns, rows, bits, GroupSize::Columns(size), (!symmetric).then_some(0), false);
    matrix(QuantizedParts { rows, columns, group_axis: GroupAxis::Output, ..turned })
}

#[test]
fn groups_along_the_outputs_have_one_format() {
    for bits in CODE_BITS {
        for (rows, columns, size, symmetric) in [(64, 33, 32, false), (70, 5, 32, true), (3, 100, 64, false)] {
            let matrix = along_outputs(rows, columns, bits, size, symmetric);
            let folder = tempfile::tempdir().unwrap();
            let checkpoint = written(folder.path(), &Kintsugi, &matrix).unwrap();
            assert_eq!(checkpoint.quantization(), Some(&config(&Kintsugi, &matrix)));
            assert_eq!(checkpoint.linear("up").unwrap().matrix, WeightMatrix::Quantized(matrix.clone()));
            for format in [&PackQuantized as &'static dyn LinearFormat, &Gptq::V2] {
                let error = assert_refused(written(folder.path(), format, &matrix), ErrorCode::QuantizationUnsupported);
                assert!(error.hint.contains("kintsugi") && !error.hint.contains("awq"), "{error}");
            }
        }
    }
}

#[test]
fn linears_may_differ_in_the_axis() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    write_checkpoint(&source, &json!({}), &raw_file("{}", &[]));
    let mut writer = CheckpointWriter::create(&target, &Checkpoint::open(&source).unwrap()).unwrap().format(&Kintsugi);
    let matrices = [
        ("down", matrix(parts(64, 96, 4, GroupSize::Columns(32), Some(0), false))),
        ("gate", along_outputs(64, 96, 4, 32, false)),
        ("up", along_outputs(64, 96, 3, 64, true)),
        ("v", matrix(parts(64, 96, 4, GroupSize::Columns(32), Some(0), false))),
    ];
    for (name, matrix) in &matrices {
        writer.write_linear(name, matrix).unwrap();
    }
    let written = writer.quantization(Vec::new()).unwrap();
    let except = |name: &str, at: usize| SchemeException {
        linears: LinearTarget::name(name),
        scheme: Scheme::of(&matrices[at].1),
    };
    finish(writer, &written).unwrap();
    let checkpoint = Checkpoint::open(&target).unwrap();
    let read = checkpoint.quantization().unwrap();
    assert_eq!(read.exceptions, [except("gate", 1), except("up", 2)]);
    for (name, matrix) in &matrices {
        assert_eq!(checkpoint.linear(name).unwrap().matrix, WeightMatrix::Quantized(matrix.clone()), "{name}");
    }
}

// --- what a format cannot hold ---

#[test]
fn a_matrix_that_a_format_cannot_hold_is_refused_with_one_that_can() {
    let base = || parts(64, 96, 4, GroupSize::Columns(32), Some(1), false);
    let with = |change: fn(&mut QuantizedParts)| {
        let mut parts = base();
        change(&mut parts);
        parts
    };
    let narrow = |rows, columns| parts(rows, columns, 4, GroupSize::Columns(32), Some(1), false);
    let zero = with(|parts| parts.zero_points.as_mut().unwrap()[5] = 0);
    let f32_scales = || with(|parts| parts.scale_type = ElementType::F32);
    let cases: [(&'static dyn LinearFormat, QuantizedParts, &str, &[&str]); 12] = [
        (&IntQuantized, base(), "not written", &["pack-quantized", "gptq", "gptq_v2", "awq"]),
        (&Awq, parts(64, 96, 3, GroupSize::Columns(32), None, false), "3 bits", &["pack-quantized", "gptq_v2"]),
        (&Awq, parts(64, 96, 4, GroupSize::Columns(32), None, true), "groups of their own", &["gptq_v2"]),
        (&Awq, narrow(60, 96), "60 outputs", &["pack-quantized"]),
        (&Awq, narrow(64, 80), "group size 32", &["pack-quantized"]),
        (&Awq, f32_scales(), "f32", &["pack-quantized"]),
        (&Gptq::V2, narrow(40, 96), "40 outputs", &["pack-quantized", "awq"]),
        (&Gptq::V2, parts(64, 72, 4, GroupSize::Columns(8), None, false), "72 inputs", &["awq"]),
        (&Gptq::V2, parts(64, 96, 4, GroupSize::Columns(36), None, false), "group size 36", &["pack-quantized"]),
        (&Gptq::V2, parts(64, 96, 4, GroupSize::Columns(128), None, false), "group size 128", &["pack-quantized"]),
        (&Gptq::V1, f32_scales(), "f32", &["pack-quantized"]),
        (&Gptq::V1, zero, "zero point 0", &["pack-quantized", "gptq_v2", "awq"]),
    ];
    for (format, parts, reason, others) in cases {
        let folder = tempfile::tempdir().unwrap();
        let error = assert_refused(written(folder.path(), format, &matrix(parts)), ErrorCode::QuantizationUnsupported);
        assert_eq!(error.subject, "up");
        assert!(error.message.contains(reason) && error.message.contains(format.name()), "{error}");
        for other in others {
            assert!(error.hint.contains(other), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the source stays");
    }
}

#[test]
fn a_configuration_that_the_format_cannot_say_is_refused() {
    let scheme = Scheme::of(&matrix(parts(32, 32, 4, GroupSize::WholeRow, Some(0), false)));
    let awq = |ignore: &str| QuantizationConfig::uniform(&Awq, scheme, vec![ignore.into()]);
    awq("lm_head").to_json().unwrap();
    let error = assert_refused(awq("re:.*gate$").to_json(), ErrorCode::QuantizationUnsupported);
    assert!(error.hint.contains("pack-quantized"));
    assert_refused(
        QuantizationConfig { format: &IntQuantized, ..awq("lm_head") }.to_json(),
        ErrorCode::QuantizationUnsupported,
    );
}

#[test]
fn writer_and_configuration_must_name_the_same_format() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    write_checkpoint(&source, &json!({}), &raw_file("{}", &[]));
    let matrix = matrix(parts(64, 96, 4, GroupSize::Columns(32), None, false));
    let target = folder.path().join("target");
    let mut writer = CheckpointWriter::create(&target, &Checkpoint::open(&source).unwrap()).unwrap().format(&Gptq::V2);
    writer.write_linear("up", &matrix).unwrap();
    assert_refused(finish(writer, &config(&Gptq::V1, &matrix)), ErrorCode::QuantizationUnsupported);
    assert!(!target.exists());
}

// --- labels that the data deny ---

/// A symmetric GPTQ folder whose zero points are all `stored`, under this label.
fn labelled(version: Option<&str>, bits: u8, stored: u8) -> (tempfile::TempDir, Checkpoint) {
    let width = usize::from(bits);
    let mut zeros = vec![0; width];
    kintsugi_weights::pack_codes(&[stored; 32], bits, &mut zeros);
    let tensors = [
        words("up.qweight", &[width, 32], &vec![0x1234_5678; width * 32]),
        words("up.qzeros", &[1, width], &zeros),
        floats("up.scales", &[1, 32], &[0.5; 32]),
        words("up.g_idx", &[32], &[0; 32]),
    ];
    let mut quantization =
        json!({ "quant_method": "gptq", "bits": bits, "group_size": -1, "sym": true, "desc_act": false });
    if let Some(version) = version {
        quantization["checkpoint_format"] = json!(version);
    }
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({ "quantization_config": quantization }), &safetensors(&tensors));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

#[test]
fn a_wrong_version_of_gptq_is_detected_and_reported() {
    for bits in [2u8, 3, 4, 8] {
        let middle = 1u8 << (bits - 1);
        for (label, said) in [(None, &Gptq::V1), (Some("gptq"), &Gptq::V1), (Some("gptq_v2"), &Gptq::V2)] {
            for (stored, held) in [(middle - 1, &Gptq::V1), (middle, &Gptq::V2)] {
                let (_folder, checkpoint) = labelled(label, bits, stored);
                assert_eq!(checkpoint.quantization().unwrap().format, held as &dyn LinearFormat);
                if said == held {
                    assert_eq!(checkpoint.notices(), [""; 0]);
                } else {
                    let [notice] = checkpoint.notices() else { panic!("one notice") };
                    assert!(notice.contains("up.qzeros") && notice.contains(held.name()), "{notice}");
                }
                let WeightMatrix::Quantized(matrix) = checkpoint.linear("up").unwrap().matrix else { panic!() };
                assert_eq!(matrix.zero_points(), None);
            }
        }
    }
}

#[test]
fn zero_points_that_fit_neither_version_are_refused() {
    let (_folder, checkpoint) = labelled(Some("gptq"), 4, 5);
    let error = assert_refused(checkpoint.linear("up"), ErrorCode::CheckpointCorrupt);
    assert_eq!(error.subject, "up.qzeros");
    assert!(error.message.contains("zero point 5"), "{error}");
}

// --- configurations beside config.json ---

#[test]
fn files_of_the_time_before_config_json_are_read() {
    let gptq = [
        words("up.qweight", &[1, 8], &[0x7654_3210; 8]),
        words("up.qzeros", &[1, 1], &[0x7777_7777]),
        floats("up.scales", &[1, 8], &[1.0; 8]),
    ];
    let awq = [
        words("up.qweight", &[8, 1], &[0x7531_6420; 8]),
        words("up.qzeros", &[1, 1], &[0x8888_8888]),
        floats("up.scales", &[1, 8], &[1.0; 8]),
    ];
    let of_gptq = json!({ "bits": 4, "group_size": -1, "damp_percent": 0.01, "desc_act": false, "static_groups": false,
        "sym": true, "true_sequential": true, "model_name_or_path": null, "model_file_base_name": "model" });
    let of_awq = json!({ "zero_point": true, "q_group_size": 8, "w_bit": 4, "version": "GEMM" });
    let cases: [(&str, &Value, &[crate::fixture::Tensor], &dyn LinearFormat); 2] =
        [("quantize_config.json", &of_gptq, &gptq, &Gptq::V1), ("quant_config.json", &of_awq, &awq, &Awq)];
    for (file, config, tensors, format) in cases {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &json!({}), &safetensors(tensors));
        std::fs::write(folder.path().join(file), config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.quantization().unwrap().format, format);
        let WeightMatrix::Quantized(matrix) = checkpoint.linear("up").unwrap().matrix else { panic!() };
        assert_eq!(matrix.codes().len(), 64);
        assert!(checkpoint.has_linear("up") && !checkpoint.has_linear("down"));
    }
}

#[test]
fn an_old_file_beside_plain_weights_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &json!({}), &safetensors(&[floats("up.weight", &[1, 1], &[1.0])]));
    std::fs::write(folder.path().join("quantize_config.json"), "not even JSON").unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().quantization(), None);
}
