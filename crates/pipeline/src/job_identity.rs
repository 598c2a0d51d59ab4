use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use kintsugi_checkpoint::Checkpoint;
use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::compression::CalibrationData;

/// What the bytes that a job writes depend on.
///
/// # Errors
/// `ERR_CHECKPOINT_NOT_FOUND` when a file of a checkpoint has gone.
pub(crate) fn identity(
    recipe: &impl Serialize,
    checkpoints: &[&Checkpoint],
    calibration: &CalibrationData,
    engine: &str,
) -> Result<Value> {
    let mut inputs = Map::new();
    let mut files: Vec<PathBuf> = checkpoints.iter().flat_map(|checkpoint| checkpoint.files()).collect();
    if let CalibrationData::Saved(saved) = calibration {
        files.push(saved.path().to_path_buf());
    }
    files.sort();
    files.dedup();
    for file in files {
        let state = fs::metadata(&file).and_then(|metadata| {
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            Ok(format!("{} bytes of {}.{:09}", metadata.len(), modified.as_secs(), modified.subsec_nanos()))
        });
        let state = state.map_err(|error| Error::io(ErrorCode::CheckpointNotFound, &file, &error))?;
        inputs.insert(file.display().to_string(), state.into());
    }
    if let CalibrationData::Tokens(tokens) = calibration {
        let mut hasher = DefaultHasher::new();
        tokens.tokens().hash(&mut hasher);
        let (count, hash) = (tokens.tokens().len(), hasher.finish());
        inputs.insert("calibration".into(), format!("{count} tokens {hash:x}").into());
    }
    let recipe = serde_json::to_value(recipe)
        .map_err(|error| Error::new(ErrorCode::Internal, format!("the recipe cannot be recorded: {error}")))?;
    let version = env!("CARGO_PKG_VERSION");
    Ok(json!({ "version": version, "engine": engine, "recipe": recipe, "inputs": inputs }))
}

/// Whether a later run of a job may come further than this error: then what is done is kept.
pub(crate) fn is_worth_resuming(error: &Error) -> bool {
    use ErrorCode::{Cancelled, Io, OutputBusy, OutputUnwritable, ResumeMismatch};
    matches!(error.code, Cancelled | Io | OutputBusy | OutputUnwritable | ResumeMismatch)
}
