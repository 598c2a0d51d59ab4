//! Checkpoints that peers made: what is read equals what they unpack, to the last bit.
//!
//! `__test__/vectors/make_formats.py` makes the folders with compressed-tensors' own packers, and for GPTQ and AWQ with
//! an unpacker that follows the published layouts.

use std::path::Path;

use kintsugi_checkpoint::{
    Awq, BitsAndBytes, Checkpoint, CheckpointWriter, Float4, Gptq, IntQuantized, LinearFormat, MatrixForm,
    PackQuantized,
};
use kintsugi_weights::{QuantizedMatrix, WeightMatrix};

/// Folders with weights of 8-bit floats.
const FLOATS: [&str; 4] = ["float8-tensor", "float8-channel", "float8-block", "float8-fine-grained"];

fn open(name: &str) -> Checkpoint {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/formats");
    Checkpoint::open(&vectors.join(name)).unwrap()
}

/// The bits of `values`; zeros of both signs are one.
fn bits_of(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(|value| (value + 0.0).to_bits()).collect()
}

#[test]
fn what_peers_scaled_is_what_is_read() {
    for name in FLOATS {
        let checkpoint = open(name);
        let WeightMatrix::Dense(matrix) = checkpoint.linear("up").unwrap().matrix else { panic!("{name}") };
        assert_eq!(bits_of(matrix.to_f32()), bits_of(checkpoint.dense("expected").unwrap().to_f32()), "{name}");
    }
}

#[test]
fn what_peers_packed_is_what_is_read() {
    // Folder, format, bits, symmetric, act-order.
    let cases: [(&str, &dyn LinearFormat, u8, bool, bool); 15] = [
        ("pack-3-symmetric", &PackQuantized, 3, true, false),
        ("pack-4-asymmetric", &PackQuantized, 4, false, false),
        ("int-8-channel", &IntQuantized, 8, true, false),
        ("naive-4-asymmetric", &IntQuantized, 4, false, false),
        ("gptq-2", &Gptq::V1, 2, false, false),
        ("gptq-3-act-order", &Gptq::V1, 3, false, true),
        ("gptq-v2-3", &Gptq::V2, 3, false, false),
        ("gptq-v2-4-act-order", &Gptq::V2, 4, false, true),
        ("gptq-8-symmetric", &Gptq::V1, 8, true, true),
        ("awq", &Awq, 4, false, false),
        ("nvfp4", &Float4::Nv, 4, false, false),
        ("mxfp4", &Float4::Mx, 4, false, false),
        ("nf4", &BitsAndBytes::Nf4, 4, false, false),
        ("nf4-nested", &BitsAndBytes::Nf4, 4, false, false),
        ("fp4-nested", &BitsAndBytes::Fp4, 4, false, false),
    ];
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/vectors/formats");
    let folders = std::fs::read_dir(&vectors).unwrap().count();
    assert_eq!(folders, cases.len() + FLOATS.len(), "every folder is tested");
    let mut rewritten = 0;
    for (name, format, bits, symmetric, act_order) in cases {
        let checkpoint = open(name);
        assert_eq!(checkpoint.notices(), [""; 0], "{name}");
        let config = checkpoint.quantization().unwrap();
        assert_eq!(config.format, format, "{name}");
        assert_eq!(config.ignore, ["lm_head"], "{name}");
        let WeightMatrix::Quantized(matrix) = checkpoint.linear("up").unwrap().matrix else { panic!("{name}") };
        assert_eq!((matrix.bits(), matrix.is_symmetric()), (bits, symmetric), "{name}");
        assert_eq!(matrix.group_index().is_some(), act_order, "{name}");
        if format.check(&MatrixForm::of(&matrix)).is_ok() {
            assert_written_alike(&checkpoint, &matrix);
            rewritten += 1;
        }
        let expected = checkpoint.dense("expected").unwrap();
        assert_eq!((matrix.rows(), matrix.columns()), (expected.rows(), expected.columns()), "{name}");
        assert_eq!(bits_of(matrix.to_f32()), bits_of(expected.to_f32()), "{name}");
    } // All but the two that are read only, and the two of version 1 whose random zero points hold a 0.
    assert_eq!(rewritten, 6);
}

/// That writing `matrix` in the format that it was read from gives the tensors of the peer, byte for byte.
fn assert_written_alike(peer: &Checkpoint, matrix: &QuantizedMatrix) {
    let config = peer.quantization().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("target");
    let mut writer = CheckpointWriter::create(&target, peer).unwrap().format(config.format);
    writer.write_linear("up", matrix).unwrap();
    writer.seal(config).unwrap();
    writer.commit().unwrap();
    let read = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    let (theirs, ours) = (read(peer.path()), read(&target));
    let theirs = safetensors::SafeTensors::deserialize(&theirs).unwrap();
    let ours = safetensors::SafeTensors::deserialize(&ours).unwrap();
    assert_eq!(ours.len() + 1, theirs.len(), "all but what is expected");
    for (name, tensor) in ours.tensors() {
        let their = theirs.tensor(&name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (their.dtype(), their.shape()), "{name}");
        assert!(tensor.data() == their.data(), "{name}");
    }
}
