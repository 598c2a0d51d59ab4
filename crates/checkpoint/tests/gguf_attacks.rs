//! One test per trick that a broken or hostile GGUF file can play. Each must end in a typed error that says with what
//! and what to do, never in a crash or an allocation that the file does not justify.

use std::fs;

use crate::fixture::assert_refused;
use kintsugi_checkpoint::Checkpoint;
use kintsugi_checkpoint::gguf::{GgufFile, GgufHeader, tokenizer_of};
use kintsugi_runtime::{Error, ErrorCode};
use proptest::prelude::*;

/// A file written byte by byte, with every count and offset under the control of the test.
#[derive(Clone)]
struct Raw {
    version: u32,
    tensor_count: Option<u64>,
    value_count: Option<u64>,
    values: Vec<(String, Vec<u8>)>,
    tensors: Vec<RawTensor>,
    alignment: usize,
    data: usize,
}

#[derive(Clone)]
struct RawTensor {
    name: String,
    dimensions: u32,
    shape: Vec<u64>,
    kind: u32,
    offset: u64,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

/// Type 8.
fn string(value: &str) -> Vec<u8> {
    [8u32.to_le_bytes().to_vec(), text(value)].concat()
}

/// Type 4.
fn number(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

/// Type 9: the type of elements, their number, their bytes.
fn array(kind: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes(), &kind.to_le_bytes(), count.to_le_bytes().as_slice(), bytes].concat()
}

fn tensor(name: &str, shape: &[u64], kind: u32, offset: u64) -> RawTensor {
    RawTensor { name: name.into(), dimensions: shape.len() as u32, shape: shape.to_vec(), kind, offset }
}

impl Raw {
    /// A sound file: two tensors, f32 `[2, 4]` and `Q8_0` `[1, 32]`.
    fn sound() -> Self {
        Raw {
            version: 3,
            tensor_count: None,
            value_count: None,
            values: vec![("general.architecture".into(), string("llama")), ("n".into(), number(7))],
            tensors: vec![tensor("a", &[4, 2], 0, 0), tensor("b", &[32, 1], 8, 32)],
            alignment: 32,
            data: 32 + 34,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.value_count.unwrap_or(self.values.len() as u64).to_le_bytes());
        for (name, value) in &self.values {
            out.extend(text(name));
            out.extend(value);
        }
        for tensor in &self.tensors {
            out.extend(text(&tensor.name));
            out.extend(tensor.dimensions.to_le_bytes());
            tensor.shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment) + self.data, 0);
        out
    }
}

#[track_caller]
fn refused(bytes: &[u8], code: ErrorCode) -> Error {
    assert_refused(GgufHeader::read(&bytes), code)
}

#[track_caller]
fn spoiled(code: ErrorCode, message: &str, spoil: impl FnOnce(&mut Raw)) {
    let mut raw = Raw::sound();
    spoil(&mut raw);
    let error = refused(&raw.bytes(), code);
    assert!(error.message.contains(message), "{error}");
}

const CORRUPT: ErrorCode = ErrorCode::CheckpointCorrupt;

#[test]
fn the_sound_file_is_read() {
    let bytes = Raw::sound().bytes();
    let header = GgufHeader::read(&bytes.as_slice()).unwrap();
    assert_eq!(header.metadata.unsigned("n").unwrap(), Some(7));
    assert_eq!(header.tensors["a"].shape, [2, 4]);
    assert_eq!(header.tensors["b"].bytes, 34);
    // Version 2, gaps between tensors and bytes behind the last one are in use.
    let raw = Raw { version: 2, data: 500, ..Raw::sound() };
    GgufHeader::read(&raw.bytes().as_slice()).unwrap();
}

#[test]
fn every_prefix_of_a_file() {
    let bytes = Raw::sound().bytes();
    for length in 0..bytes.len() {
        refused(&bytes[..length], CORRUPT);
    }
}

#[test]
fn another_magic_number() {
    let mut bytes = Raw::sound().bytes();
    bytes[..4].copy_from_slice(b"GGML");
    assert!(refused(&bytes, CORRUPT).message.contains("GGUF"));
}

#[test]
fn versions_that_are_not_read() {
    for (version, word) in [(1, "version 1"), (4, "version 4"), (0, "version 0"), (3 << 24, "big-endian")] {
        spoiled(ErrorCode::CheckpointDtype, word, |raw| raw.version = version);
    }
}

#[test]
fn counts_that_the_file_has_no_bytes_for() {
    for count in [100, 1 << 32, u64::MAX / 32, u64::MAX] {
        spoiled(CORRUPT, "", |raw| raw.tensor_count = Some(count));
        spoiled(CORRUPT, "", |raw| raw.value_count = Some(count));
    }
}

#[test]
fn texts_longer_than_the_file() {
    for length in [1 << 20, u64::MAX - 7, u64::MAX] {
        spoiled(CORRUPT, "claims", |raw| {
            raw.values[1].1 = [8u32.to_le_bytes().as_slice(), &length.to_le_bytes(), b"ab"].concat();
        });
    }
}

#[test]
fn a_text_that_is_not_utf_8() {
    spoiled(CORRUPT, "UTF-8", |raw| {
        raw.values[1].1 = [8u32.to_le_bytes().as_slice(), &2u64.to_le_bytes(), b"\xff\xfe"].concat();
    });
}

#[test]
fn names_over_their_limits() {
    spoiled(CORRUPT, "65535", |raw| raw.values[1].0 = "k".repeat(65_536));
    spoiled(CORRUPT, "1024", |raw| raw.tensors[0].name = "t".repeat(1025));
}

#[test]
fn types_of_values_that_do_not_exist() {
    for kind in [13u32, 255, u32::MAX] {
        spoiled(CORRUPT, "type", |raw| raw.values[1].1 = [kind.to_le_bytes(), [0; 4]].concat());
        spoiled(CORRUPT, "type", |raw| raw.values[1].1 = array(kind, 0, &[]));
    }
}

#[test]
fn arrays_longer_than_the_file() {
    for kind in (0..=12).filter(|&kind| kind != 9) {
        for count in [1 << 20, u64::MAX / 8, u64::MAX] {
            spoiled(CORRUPT, "claims", |raw| raw.values[1].1 = array(kind, count, &[0; 64]));
        }
    }
    spoiled(CORRUPT, "claims", |raw| raw.values[1].1 = array(9, u64::MAX, &[0; 64]));
}

#[test]
fn arrays_of_arrays_of_arrays() {
    let nested = |depth: usize| {
        let head = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
        [9u32.to_le_bytes().to_vec(), head.repeat(depth), array(0, 0, &[])[4..].to_vec()].concat()
    };
    spoiled(CORRUPT, "nested", |raw| raw.values[1].1 = nested(8));
    spoiled(CORRUPT, "nested", |raw| raw.values[1].1 = nested(100_000));
    let mut raw = Raw::sound();
    raw.values[1].1 = nested(3);
    GgufHeader::read(&raw.bytes().as_slice()).unwrap();
}

#[test]
fn truth_values_of_other_bytes() {
    spoiled(CORRUPT, "neither true nor false", |raw| raw.values[1].1 = [&7u32.to_le_bytes()[..], &[2]].concat());
    spoiled(CORRUPT, "neither true nor false", |raw| raw.values[1].1 = array(7, 2, &[1, 9]));
}

#[test]
fn names_that_stand_there_twice() {
    spoiled(CORRUPT, "twice", |raw| raw.values.push(raw.values[1].clone()));
    spoiled(CORRUPT, "twice", |raw| raw.tensors[1].name = "a".into());
}

#[test]
fn alignments_that_are_none() {
    for alignment in [0, 3, 48, 1 << 21, u32::MAX] {
        spoiled(CORRUPT, "aligned", |raw| raw.values.push(("general.alignment".into(), number(alignment))));
    }
    spoiled(ErrorCode::ConfigInvalid, "alignment", |raw| {
        raw.values.push(("general.alignment".into(), string("32")));
    });
}

#[test]
fn numbers_of_dimensions() {
    for dimensions in [0, 5, 1 << 20, u32::MAX] {
        spoiled(CORRUPT, "dimensions", |raw| raw.tensors[0].dimensions = dimensions);
    }
}

#[test]
fn sizes_that_overflow() {
    for shape in [[1 << 33, 1 << 33], [u64::MAX, 2], [1 << 62, 4], [u64::MAX / 4, 1]] {
        spoiled(CORRUPT, "", |raw| raw.tensors[0].shape = shape.to_vec());
    }
}

#[test]
fn rows_that_are_no_whole_blocks() {
    spoiled(CORRUPT, "whole blocks", |raw| raw.tensors[1].shape = vec![33, 1]);
    spoiled(CORRUPT, "whole blocks", |raw| {
        raw.tensors[1] = tensor("b", &[128, 1], 12, 32);
        raw.data = 1000;
    });
}

#[test]
fn types_of_tensors_that_do_not_exist() {
    for kind in [4, 5, 31, 36, 38, 99, u32::MAX] {
        spoiled(ErrorCode::QuantizationUnsupported, &kind.to_string(), |raw| raw.tensors[0].kind = kind);
    }
}

#[test]
fn types_of_tensors_that_are_not_read() {
    let mut raw = Raw::sound();
    raw.tensors[1] = tensor("b", &[256, 1], 19, 32);
    raw.data = 32 + 50;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, raw.bytes()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let error = assert_refused(file.matrix("b"), ErrorCode::QuantizationUnsupported);
    assert!(error.message.contains("IQ1_S") && error.hint.contains("Q4_K"), "{error}");
    assert_refused(file.matrix("c"), ErrorCode::CheckpointTensorMissing);
}

#[test]
fn offsets_outside_of_the_file() {
    for offset in [96, 1 << 40, u64::MAX - 31] {
        spoiled(CORRUPT, "", |raw| raw.tensors[1].offset = offset);
    }
    spoiled(CORRUPT, "4 bytes behind", |raw| raw.data -= 4);
}

#[test]
fn offsets_between_two_multiples_of_the_alignment() {
    spoiled(CORRUPT, "multiple", |raw| raw.tensors[1].offset = 33);
}

#[test]
fn tensors_in_the_same_place() {
    spoiled(CORRUPT, "overlap", |raw| raw.tensors[1].offset = 0);
    spoiled(CORRUPT, "overlap", |raw| {
        raw.tensors[0].shape = vec![4, 4];
        raw.data += 100;
    });
}

#[test]
fn a_part_of_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut raw = Raw::sound();
    raw.values.push(("split.count".into(), number(3)));
    fs::write(&path, raw.bytes()).unwrap();
    assert_refused(GgufFile::open(&path), ErrorCode::CheckpointShardMissing);
}

#[test]
fn a_folder_with_a_broken_file_and_with_two() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    fs::write(folder.path().join("model.gguf"), "x").unwrap();
    let error = assert_refused(Checkpoint::open(folder.path()), CORRUPT);
    assert!(error.subject.ends_with("model.gguf"), "{error}");
    fs::write(folder.path().join("second.GGUF"), "x").unwrap();
    let error = assert_refused(Checkpoint::open(folder.path()), ErrorCode::CheckpointNotFound);
    assert!(error.message.contains("several GGUF"), "{error}");
}

/// A file that opens as a checkpoint: one block of llama, all of it zeros.
fn model() -> Raw {
    let sizes = [
        ("context_length", 64),
        ("embedding_length", 32),
        ("block_count", 1),
        ("feed_forward_length", 32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ];
    let mut values: Vec<(String, Vec<u8>)> =
        sizes.iter().map(|(name, size)| (format!("llama.{name}"), number(*size))).collect();
    values.insert(0, ("general.architecture".into(), string("llama")));
    let tensors = vec![
        tensor("token_embd.weight", &[32, 4], 0, 0),
        tensor("blk.0.attn_q.weight", &[32, 32], 8, 512),
        tensor("blk.0.attn_k.weight", &[32, 16], 8, 512 + 1088),
    ];
    Raw { values, tensors, data: 512 + 1088 + 544, ..Raw::sound() }
}

#[track_caller]
fn open(raw: &Raw) -> Result<Checkpoint, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, raw.bytes()).unwrap();
    Checkpoint::open(&path)
}

#[test]
fn models_that_contradict_themselves() {
    type Spoil = fn(&mut Raw);
    let checkpoint = open(&model()).unwrap();
    assert_eq!(checkpoint.linear("model.layers.0.self_attn.q_proj").unwrap().matrix.rows(), 32);
    let cases: [(&str, ErrorCode, Spoil); 10] = [
        ("a second name of a block", ErrorCode::ConfigUnsupported, |raw| {
            raw.tensors[1].name = "blk.00.attn_q.weight".into();
        }),
        ("another architecture", ErrorCode::ConfigArchitecture, |raw| raw.values[0].1 = string("whale")),
        ("no architecture", ErrorCode::ConfigInvalid, |raw| drop(raw.values.remove(0))),
        ("an architecture that is a number", ErrorCode::ConfigInvalid, |raw| raw.values[0].1 = number(1)),
        ("a size that is missing", ErrorCode::ConfigInvalid, |raw| drop(raw.values.remove(2))),
        ("a size that is a text", ErrorCode::ConfigInvalid, |raw| raw.values[2].1 = string("32")),
        ("no heads", ErrorCode::ConfigInvalid, |raw| raw.values[5].1 = number(0)),
        ("heads that do not divide the rows", ErrorCode::CheckpointShape, |raw| raw.values[5].1 = number(5)),
        ("a tensor without meaning", ErrorCode::ConfigUnsupported, |raw| {
            raw.tensors[1].name = "blk.0.magic.weight".into()
        }),
        ("no embedding", ErrorCode::CheckpointTensorMissing, |raw| drop(raw.tensors.remove(0))),
    ];
    for (what, code, spoil) in cases {
        let mut raw = model();
        spoil(&mut raw);
        let Err(error) = open(&raw) else { panic!("{what}") };
        assert_eq!(error.code, code, "{what}: {error}");
        assert!(!error.subject.is_empty() && !error.hint.is_empty(), "{what}: {error}");
    }
}

#[test]
fn scales_that_are_not_finite() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut bytes = Raw::sound().bytes();
    let scale = bytes.len() - 34;
    bytes[scale..scale + 2].copy_from_slice(&0x7c00u16.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let error = assert_refused(GgufFile::open(&path).unwrap().matrix("b"), ErrorCode::CheckpointNotFinite);
    assert!(error.message.contains("row 0, column 0"), "{error}");
}

#[test]
fn vocabularies_that_contradict_themselves() {
    let tokens =
        |words: &[&str]| array(8, words.len() as u64, &words.iter().flat_map(|word| text(word)).collect::<Vec<u8>>());
    let scores = |count: usize| array(6, count as u64, &vec![0; 4 * count]);
    let kind = |name: &str| ("tokenizer.ggml.model".to_owned(), string(name));
    let value = |name: &str, bytes: Vec<u8>| (format!("tokenizer.ggml.{name}"), bytes);
    type Values = Vec<(String, Vec<u8>)>;
    let cases: Vec<(&str, Values)> = vec![
        ("nothing", vec![]),
        ("no tokens", vec![kind("llama")]),
        ("an unknown kind", vec![kind("rwkv"), value("tokens", tokens(&["a"]))]),
        ("a token twice", vec![kind("llama"), value("tokens", tokens(&["a", "a"])), value("scores", scores(2))]),
        ("no scores", vec![kind("llama"), value("tokens", tokens(&["a", "b"]))]),
        ("too few scores", vec![kind("llama"), value("tokens", tokens(&["a", "b"])), value("scores", scores(1))]),
        ("an unknown cut", vec![kind("gpt2"), value("tokens", tokens(&["a"])), value("pre", string("zebra"))]),
        ("a merge of one", vec![kind("gpt2"), value("tokens", tokens(&["a"])), value("merges", tokens(&["aa"]))]),
        ("tokens that are numbers", vec![kind("gpt2"), value("tokens", array(4, 1, &[0; 4]))]),
        (
            "a start token outside",
            vec![
                kind("llama"),
                value("tokens", tokens(&["a"])),
                value("scores", scores(1)),
                value("bos_token_id", number(9)),
            ],
        ),
    ];
    for (what, values) in cases {
        let raw = Raw { values, tensors: vec![], data: 0, ..Raw::sound() };
        let bytes = raw.bytes();
        let header = GgufHeader::read(&bytes.as_slice()).unwrap();
        let Err(error) = tokenizer_of(&header.metadata) else { panic!("{what}") };
        assert_eq!(error.code, ErrorCode::TokenizerInvalid, "{what}: {error}");
        assert!(!error.subject.is_empty() && !error.hint.is_empty(), "{what}: {error}");
    }
}

proptest! {
    #[test]
    fn changed_bytes_never_crash(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = model().bytes();
        for (place, byte) in changes {
            let place = place.index(600);
            bytes[place] = byte;
        }
        if let Ok(header) = GgufHeader::read(&bytes.as_slice()) {
            let _ = tokenizer_of(&header.metadata);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            for name in checkpoint.tensors().map(|tensor| tensor.name.clone()).collect::<Vec<_>>() {
                let _ = checkpoint.dense(&name);
                let _ = checkpoint.vector(&name);
            }
        }
    }
}
