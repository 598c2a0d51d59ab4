//! A folder whose weights are a GGUF file, made of one in the layout of Hugging Face.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result};

use super::{GgufPlan, GgufSummary, write_gguf};
use crate::Checkpoint;
use crate::companion_files::remove_companions;
use crate::shard_index::ShardIndex;

/// Name of the file in such a folder.
pub const GGUF_FILE: &str = "model.gguf";

/// Writes the model in `folder` as `model.gguf` there, and removes what that file says: weights, configuration,
/// tokenizer. What else lies there stays: a compensation, a report, licences. Called again after an interruption before
/// the first file was removed, it does the same.
///
/// # Errors
/// What [`write_gguf`] reports; `ERR_INTERNAL` when codes would be rounded; `ERR_OUTPUT_UNWRITABLE`.
pub fn into_gguf_folder(
    folder: &Path,
    plan: &GgufPlan,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<GgufSummary> {
    let unwritable = |error: std::io::Error| Error::unwritable(folder, &error);
    let file = folder.join(GGUF_FILE);
    if file.exists() {
        fs::remove_file(&file).map_err(unwritable)?;
    }
    let source = Checkpoint::open(folder)?;
    let summary = write_gguf(&source, plan, &file, cancel, progress)?;
    if let Some(name) = summary.rounded.first() {
        let message = format!("the codes of the matrix do not fit {}", plan.linears.name);
        return Err(Error::new(ErrorCode::Internal, message).subject(name));
    }
    // From here on there is nothing to go back to.
    cancel.check()?;
    let mut replaced: BTreeSet<_> = source.tensors().map(|tensor| tensor.file.clone()).collect();
    drop(source);
    replaced.extend(["config.json", ShardIndex::FILE_NAME].map(|name| folder.join(name)));
    for path in replaced {
        if path.is_file() {
            fs::remove_file(&path).map_err(unwritable)?;
        }
    }
    remove_companions(folder)?;
    Checkpoint::open(folder)?;
    Ok(summary)
}
