use std::fs;
use std::path::Path;

use kintsugi_checkpoint::Checkpoint;
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result, available_disk_bytes};
use serde::Serialize;

use crate::activation_buffer::ActivationBuffer;
use crate::{Recipe, StatisticsWriter};

/// Most bytes that parts and the files that they are merged into have in common: two files.
const MERGED_AT_ONCE: u64 = 10_000_000_000;
/// What small files take: configurations, tokenizer, ledger, report.
const SMALL_FILES: u64 = 64 << 20;

/// The disk space that a job takes at most while it runs.
///
/// The output, and beside it the larger of two things that are not there together: the factors of all blocks once more
/// with the activations of one or both models, in two files and one that replaces one of them; or what is there twice while parts are merged.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskPlan {
    /// Beside the output.
    pub needed_bytes: u64,
    /// Where the statistics are saved.
    pub statistics_bytes: u64,
}

impl DiskPlan {
    /// Plans for an output of so many bytes, of which the second number are factors, and `tokens` of calibration.
    ///
    /// # Errors
    /// What reading the checkpoint reports.
    pub(crate) fn new(
        recipe: &Recipe,
        checkpoint: &Checkpoint,
        spec: &DecoderSpec,
        (bytes, factor_bytes): (u64, u64),
        tokens: usize,
    ) -> Result<Self> {
        let streams = if recipe.eora.as_ref().is_some_and(|eora| eora.inputs.is_mixed()) { 2 } else { 1 };
        let activations = ActivationBuffer::bytes(tokens, spec.hidden_size).saturating_mul(3 * streams);
        let statistics_bytes = match recipe.save_statistics {
            Some(_) => StatisticsWriter::bytes(recipe, checkpoint, spec)?,
            None => 0,
        };
        let needed_bytes =
            bytes + activations.saturating_add(factor_bytes).max(bytes.min(MERGED_AT_ONCE)) + SMALL_FILES;
        Ok(DiskPlan { needed_bytes, statistics_bytes })
    }

    /// The same with so many bytes more beside the output.
    pub(crate) fn beside(self, bytes: u64) -> Self {
        DiskPlan { needed_bytes: self.needed_bytes.saturating_add(bytes), ..self }
    }

    /// Compares with what the disks have. What an interrupted job has left counts as there.
    ///
    /// # Errors
    /// `ERR_OUTPUT_SPACE` with both numbers.
    pub(crate) fn check(&self, recipe: &Recipe) -> Result<()> {
        let mut partial = recipe.out.as_os_str().to_os_string();
        partial.push(".partial");
        let output = self.needed_bytes.saturating_sub(folder_bytes(partial.as_ref()));
        let statistics = recipe.save_statistics.as_ref().map(|path| {
            let mut partial = path.as_os_str().to_os_string();
            partial.push(".partial");
            // The file has its length from the start, and blocks only where it was written.
            (path.as_path(), if Path::new(&partial).is_file() { 0 } else { self.statistics_bytes })
        });
        both(&recipe.out, output, statistics)
    }
}

/// Whether output and statistics find their bytes, on one disk or two.
fn both(out: &Path, output: u64, statistics: Option<(&Path, u64)>) -> Result<()> {
    match statistics {
        Some((path, bytes)) if on_one_disk(out, path) => enough(out, output.saturating_add(bytes)),
        Some((path, bytes)) => enough(out, output).and_then(|()| enough(path, bytes)),
        None => enough(out, output),
    }
}

fn enough(path: &Path, needed: u64) -> Result<()> {
    match available_disk_bytes(path) {
        Some(available) if available < needed => {
            Err(Error::new(ErrorCode::OutputSpace, format!("the job needs {needed} bytes, the disk has {available}"))
                .subject(path.display())
                .hint("Free some space, or write to another disk"))
        }
        _ => Ok(()),
    }
}

/// Whether two paths are or will be on one disk; `false` where the system does not tell.
fn on_one_disk(one: &Path, other: &Path) -> bool {
    matches!((disk_of(one), disk_of(other)), (Some(one), Some(other)) if one == other)
}

#[cfg(unix)]
fn disk_of(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    // What is not there yet will lie on the disk of its nearest folder.
    let absolute = std::path::absolute(path).ok()?;
    absolute.ancestors().find_map(|folder| Some(fs::metadata(folder).ok()?.dev()))
}

#[cfg(not(unix))]
fn disk_of(_: &Path) -> Option<u64> {
    None
}

/// Bytes of the files of a folder, and of those in it.
fn folder_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("in")).unwrap();
        fs::write(folder.path().join("in/file"), [0; 100]).unwrap();
        fs::write(folder.path().join("file"), [0; 11]).unwrap();
        assert_eq!(folder_bytes(folder.path()), 111);
        assert_eq!(folder_bytes(&folder.path().join("nothing")), 0);
        let out = folder.path().join("out");
        both(&out, 1000, None).unwrap();
        let error = both(&out, u64::MAX - 5, None).unwrap_err();
        assert_eq!(error.code, ErrorCode::OutputSpace);
        assert!(error.message.contains(&(u64::MAX - 5).to_string()), "{error}");
        // On one disk what each would find is not there for both.
        let most = available_disk_bytes(&out).unwrap() / 3 * 2;
        both(&out, most, None).unwrap();
        let statistics = folder.path().join("statistics");
        both(&out, 0, Some((&statistics, most))).unwrap();
        assert_eq!(both(&out, most, Some((&statistics, most))).unwrap_err().code, ErrorCode::OutputSpace);
    }
}
