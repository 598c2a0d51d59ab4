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
/// The output, what is there twice while parts are merged, the factors of all blocks once more, and the activations in
/// two files.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskPlan {
    /// Beside the output.
    pub needed_bytes: u64,
    /// Where the statistics are saved.
    pub statistics_bytes: u64,
}

impl DiskPlan {
    /// Plans for an output of `bytes`, of which `factor_bytes` are factors.
    ///
    /// # Errors
    /// What reading the checkpoint reports.
    pub(crate) fn new(
        recipe: &Recipe,
        checkpoint: &Checkpoint,
        spec: &DecoderSpec,
        bytes: u64,
        factor_bytes: u64,
    ) -> Result<Self> {
        let activations =
            recipe.passes().map_or(0, |c| 2 * ActivationBuffer::bytes(c.sequences * c.length, spec.hidden_size));
        let statistics_bytes = match recipe.save_statistics {
            Some(_) => StatisticsWriter::bytes(recipe, checkpoint, spec)?,
            None => 0,
        };
        let needed_bytes = bytes + bytes.min(MERGED_AT_ONCE) + factor_bytes + activations + SMALL_FILES;
        Ok(DiskPlan { needed_bytes, statistics_bytes })
    }

    /// Compares with what the disks have. What an interrupted job has left counts as there.
    ///
    /// # Errors
    /// `ERR_OUTPUT_SPACE` with both numbers.
    pub(crate) fn check(&self, recipe: &Recipe) -> Result<()> {
        let mut partial = recipe.out.as_os_str().to_os_string();
        partial.push(".partial");
        enough(&recipe.out, self.needed_bytes, folder_bytes(partial.as_ref()))?;
        recipe.save_statistics.as_ref().map_or(Ok(()), |path| {
            let mut partial = path.as_os_str().to_os_string();
            partial.push(".partial");
            // The file has its length from the start, and blocks only where it was written.
            enough(path, self.statistics_bytes, fs::metadata(&partial).map_or(0, |_| self.statistics_bytes))
        })
    }
}

fn enough(path: &Path, needed: u64, there: u64) -> Result<()> {
    let needed = needed.saturating_sub(there);
    match available_disk_bytes(path) {
        Some(available) if available < needed => {
            Err(Error::new(ErrorCode::OutputSpace, format!("the job needs {needed} bytes, the disk has {available}"))
                .subject(path.display())
                .hint("Free some space, or write to another disk"))
        }
        _ => Ok(()),
    }
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
        enough(&out, 1000, 0).unwrap();
        let error = enough(&out, u64::MAX, 5).unwrap_err();
        assert_eq!(error.code, ErrorCode::OutputSpace);
        assert!(error.message.contains(&(u64::MAX - 5).to_string()), "{error}");
        enough(&out, u64::MAX, u64::MAX).unwrap();
    }
}
