//! Units that a writer has ended are read before the checkpoint is whole; what is not whole is refused.

use std::fs;
use std::path::Path;

use crate::fixture::{assert_refused, finish};
use crate::round_trip::{assert_nothing_left, config, failing, file_names, quantized, w4};
use kintsugi_checkpoint::{Checkpoint, CheckpointWriter, Kintsugi, QuantizationConfig};
use kintsugi_runtime::ErrorCode;
use kintsugi_weights::{ElementType, GroupSize, WeightMatrix};

/// A writer with two units that have ended, a tensor and a matrix.
fn two_units(target: &Path, source: &Checkpoint) -> CheckpointWriter {
    let mut writer = CheckpointWriter::create(target, source).unwrap();
    writer.copy("lm_head.weight").unwrap();
    writer.end_unit().unwrap();
    writer.write_linear("up", &quantized(4, 70, &w4(), ElementType::F16)).unwrap();
    writer.end_unit().unwrap();
    writer
}

#[test]
fn ended_units_are_read_as_the_checkpoint_that_they_become() {
    let (_folder, source, target) = failing();
    let writer = two_units(&target, &source);
    let facts = |checkpoint: &Checkpoint| {
        let tensors: Vec<(String, Vec<usize>)> =
            checkpoint.tensors().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
        let matrix = checkpoint.linear("up").unwrap().matrix;
        (tensors, matrix, checkpoint.dense("lm_head.weight").unwrap().to_f32(), checkpoint.config().clone())
    };
    let staged = facts(&writer.staged(&w4()).unwrap());
    assert_eq!(staged.1, WeightMatrix::Quantized(quantized(4, 70, &w4(), ElementType::F16)));
    finish(writer, &w4()).unwrap();
    assert!(staged == facts(&Checkpoint::open(&target).unwrap()));
}

#[test]
fn units_that_are_not_whole_or_not_described_are_not_read() {
    let refused = |code: ErrorCode, said: &QuantizationConfig, spoil: &dyn Fn(&mut CheckpointWriter)| {
        let (folder, source, target) = failing();
        let mut writer = two_units(&target, &source);
        spoil(&mut writer);
        let error = assert_refused(writer.staged(said), code);
        drop(writer);
        assert_nothing_left(&folder);
        error
    };
    let other_width = config(3, GroupSize::Columns(32), false, false);
    let error = refused(ErrorCode::QuantizationUnsupported, &other_width, &|_| {});
    assert_eq!(error.subject, "up");
    let other_format = QuantizationConfig { format: &Kintsugi, ..w4() };
    let error = refused(ErrorCode::QuantizationUnsupported, &other_format, &|_| {});
    assert_eq!(error.subject, "quantization_config");
    for part in 0..2 {
        let path = |writer: &CheckpointWriter| {
            let mut parts = file_names(writer.folder());
            assert_eq!(parts.len(), 2, "{parts:?}");
            writer.folder().join(parts.remove(part))
        };
        let error = refused(ErrorCode::CheckpointCorrupt, &w4(), &|writer| {
            let file = fs::File::options().write(true).open(path(writer)).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        });
        assert!(error.message.contains(if part == 0 { "'lm_head.weight'" } else { "'up." }), "{error}");
        refused(ErrorCode::CheckpointNotFound, &w4(), &|writer| fs::remove_file(path(writer)).unwrap());
    }
    // What is being written is not on the disk yet, and what was merged lies somewhere else.
    refused(ErrorCode::CheckpointCorrupt, &w4(), &|writer| assert_eq!(writer.copy("odd").unwrap(), 3));
    refused(ErrorCode::CheckpointNotFound, &w4(), &|writer| assert!(writer.seal(&w4()).unwrap() > 0));
}
