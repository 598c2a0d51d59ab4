use std::time::Instant;

use kintsugi_checkpoint::{Checkpoint, CheckpointWriter, QuantizationConfig};
use kintsugi_model::{Backend, BlockWeights, DecoderSpec, ModelWeights, read_tokenizer};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, peak_memory_bytes, replace_file};
use kintsugi_weights::{Adapter, AdapterEntry, WeightMatrix};

use crate::{
    BlockCompressor, CalibrationStream, CalibrationText, CompressedBlock, MeanError, PhaseSeconds, Plan, Recipe,
    Report, Summary,
};

/// What `recipe` would do, from the headers of the checkpoint alone.
///
/// # Errors
/// Everything that [`compress`] refuses before its first unit of work, except the calibration text.
pub fn plan(recipe: &Recipe) -> Result<Plan> {
    recipe.validate()?;
    let checkpoint = Checkpoint::open(&recipe.source)?;
    let spec = DecoderSpec::of(&checkpoint)?;
    Plan::new(recipe, &checkpoint, &spec)
}

/// Compresses a checkpoint into a new folder.
///
/// Everything is written under `OUT.partial`, which becomes `OUT` by one rename.
///
/// # Errors
/// A refused recipe, checkpoint or text; what solvers, reading and writing report; `ERR_CANCELLED`. Nothing stays
/// behind then.
pub fn compress<B: Backend>(recipe: &Recipe, backend: &B, cancel: &CancelToken, progress: &Progress) -> Result<Report> {
    let started = Instant::now();
    recipe.validate()?;
    let checkpoint = Checkpoint::open(&recipe.source)?;
    let spec = DecoderSpec::of(&checkpoint)?;
    let plan = Plan::new(recipe, &checkpoint, &spec)?;
    let mut writer = CheckpointWriter::create(&recipe.out, &checkpoint)?;

    progress.begin("prepare", spec.layers as u64);
    let tokenizer = read_tokenizer(&checkpoint, &spec)?;
    let text = recipe.calibration.as_ref().map(|calibration| CalibrationText::read(calibration, &tokenizer, &spec));
    let stream = match text.transpose()? {
        Some(text) => {
            let outside = ModelWeights::read(&checkpoint, &spec)?;
            Some(CalibrationStream::new(backend, &spec, &outside.embedding, &text)?)
        }
        None => None,
    };
    let calibration_tokens = stream.as_ref().map_or(0, |stream| stream.tokens() as u64);
    let mut compressor = BlockCompressor::new(recipe, &spec, backend, stream)?;

    let mut read_seconds = 0.0;
    let mut write_seconds = timed(|| copy_outside(&mut writer, &checkpoint, &spec, cancel))?.1;
    let mut linears = Vec::new();
    let mut factors = Adapter::default();
    for block in 0..spec.layers {
        cancel.check()?;
        progress.at("compress", spec.block_name(block));
        let (weights, seconds) = timed(|| BlockWeights::read(&checkpoint, &spec, block))?;
        read_seconds += seconds;
        let compressed = compressor.compress(block, &weights, cancel)?;
        write_seconds += timed(|| write_block(&mut writer, &checkpoint, &spec, block, &compressed))?.1;
        for (linear, weight) in spec.linears.iter().zip(&compressed.weights.linears) {
            if let Some(low_rank) = &weight.low_rank {
                let entry = AdapterEntry { factors: low_rank.clone(), scaling: 1.0 };
                factors.linears.insert(spec.linear_name(block, linear), entry);
            }
        }
        linears.extend(compressed.linears);
        progress.advance(1);
    }

    progress.at("write", "");
    let finishing = Instant::now();
    if !factors.linears.is_empty() {
        writer.write_compensation(&factors)?;
    }
    let stored_bits: u64 = linears.iter().map(|linear| linear.stored_bits).sum();
    let mut report = Report {
        recipe: recipe.clone(),
        summary: Summary {
            bits_per_weight: stored_bits as f64 / plan.quantized_weights as f64,
            bytes: 0,
            source_bytes: plan.source_bytes,
            quantized_weights: plan.quantized_weights,
            calibration_tokens,
            mean_error: MeanError::over(&linears),
            seconds: 0.0,
            phases: PhaseSeconds { read: read_seconds, ..compressor.phases() },
            peak_memory_bytes: peak_memory_bytes(),
        },
        linears,
    };
    let config = quantization_config(recipe, &spec);
    report.summary.bytes = writer.seal(&config)?;
    report.summary.phases.write = write_seconds + finishing.elapsed().as_secs_f64();
    report.summary.seconds = started.elapsed().as_secs_f64();
    let text = serde_json::to_string_pretty(&report)
        .map_err(|error| Error::new(ErrorCode::Internal, format!("the report cannot be written: {error}")))?;
    replace_file(&writer.folder().join("report.json"), text.as_bytes())?;
    cancel.check()?;
    writer.commit()?;
    Ok(report)
}

/// Copies every tensor that does not belong to a block.
fn copy_outside(
    writer: &mut CheckpointWriter,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    cancel: &CancelToken,
) -> Result<()> {
    let prefix = format!("{}.", spec.name(spec.family.blocks));
    for tensor in checkpoint.tensors().filter(|tensor| !tensor.name.starts_with(&prefix)) {
        cancel.check()?;
        writer.copy(&tensor.name)?;
    }
    writer.end_unit()
}

/// Writes the Linears of a block in their compressed form and copies the rest of it.
fn write_block(
    writer: &mut CheckpointWriter,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    block: usize,
    compressed: &CompressedBlock,
) -> Result<()> {
    let mut written = Vec::with_capacity(spec.linears.len());
    for (linear, weight) in spec.linears.iter().zip(&compressed.weights.linears) {
        let name = spec.linear_name(block, linear);
        if let WeightMatrix::Quantized(matrix) = &weight.matrix {
            writer.write_linear(&name, matrix)?;
        }
        written.push(format!("{name}.weight"));
    }
    let prefix = format!("{}.", spec.block_name(block));
    for tensor in checkpoint.tensors().filter(|tensor| tensor.name.starts_with(&prefix)) {
        if !written.contains(&tensor.name) {
            writer.copy(&tensor.name)?;
        }
    }
    writer.end_unit()
}

fn quantization_config(recipe: &Recipe, spec: &DecoderSpec) -> QuantizationConfig {
    QuantizationConfig {
        bits: recipe.bits,
        group_size: recipe.group_size(),
        symmetric: recipe.symmetric,
        group_index: recipe.has_group_index(),
        ignore: std::iter::once(spec.family.head.to_owned()).chain(spec.routers()).collect(),
    }
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let started = Instant::now();
    Ok((work()?, started.elapsed().as_secs_f64()))
}
