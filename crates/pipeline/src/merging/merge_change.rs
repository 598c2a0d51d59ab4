use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::Deserialize;

use crate::MergeRecipe;

/// Largest `report.json` that is read.
const REPORT_LIMIT: u64 = 1 << 30;

/// Sources that join a merge or leave it.
#[derive(Clone, Debug)]
pub struct MergeChange {
    /// The folder that the earlier merge wrote.
    pub merged: PathBuf,
    /// Adapters that join, with their weights.
    pub add: Vec<(PathBuf, f64)>,
    /// Adapters that leave: as the report names them, or the last part of that.
    pub remove: Vec<String>,
    /// Folder that is written.
    pub out: PathBuf,
}

/// What is read of a `report.json`.
#[derive(Deserialize)]
struct Recorded {
    recipe: MergeRecipe,
    summary: RecordedSummary,
}

#[derive(Deserialize)]
struct RecordedSummary {
    adapters: Vec<RecordedAdapter>,
}

#[derive(Deserialize)]
struct RecordedAdapter {
    path: PathBuf,
    fingerprint: String,
}

/// The recipe of the merge that has some sources more or less than an earlier one, from what its `report.json` recorded.
///
/// Nothing is added to or taken out of the merged factors: no method but the sum could be undone in them, and not even
/// that after rounding. The merge is made anew from its sources, so that weights and config are, byte for byte, those of
/// a merge that never knew the removed ones. Adapters that stay must still be what they were, which
/// [`crate::merge_adapters`] checks by their fingerprints (and [`crate::plan_merge`] does not). A compensation and a
/// calibration are taken as they are.
///
/// # Errors
/// `ERR_ADAPTER_INVALID` when the folder was not written by a merge or sources that stay are gone,
/// `ERR_OPTION_INVALID` when a source to remove is not there or one to add already is.
pub fn changed_recipe(change: &MergeChange) -> Result<MergeRecipe> {
    let Recorded { mut recipe, summary } = recorded(&change.merged)?;
    let invalid = |message: String, subject: &str, hint: String| {
        Err(Error::new(ErrorCode::OptionInvalid, message).subject(subject).hint(hint))
    };
    let mut expected: BTreeMap<PathBuf, String> =
        summary.adapters.into_iter().map(|adapter| (adapter.path, adapter.fingerprint)).collect();
    for name in &change.remove {
        let named = canonical(Path::new(name));
        let is =
            |path: &PathBuf| canonical(path) == named || path.file_name().is_some_and(|last| last == name.as_str());
        let found: Vec<usize> = (0..recipe.adapters.len()).filter(|&i| is(&recipe.adapters[i])).collect();
        let &[place] = found.as_slice() else {
            let what = if found.is_empty() { "no source" } else { "more than one source" };
            let paths: Vec<String> = recipe.adapters.iter().map(|path| path.display().to_string()).collect();
            let hint = format!("The sources are {}", paths.join(", "));
            return invalid(format!("{what} of the merge is named '{name}'"), "remove", hint);
        };
        expected.remove(&recipe.adapters.remove(place));
        recipe.weights.remove(place);
    }
    for (path, weight) in &change.add {
        if recipe.adapters.iter().any(|source| canonical(source) == canonical(path)) {
            let hint = "Merge anew to give it another weight, or remove it first".to_string();
            return invalid(format!("'{}' is a source of the merge already", path.display()), "add", hint);
        }
        recipe.adapters.push(path.clone());
        recipe.weights.push(*weight);
    }
    if change.add.is_empty() && change.remove.is_empty() {
        let hint = "Name adapters to add or to remove".to_string();
        return invalid("nothing of the merge would change".into(), "add", hint);
    }
    if let Some(gone) = recipe.adapters.iter().find(|path| expected.contains_key(*path) && !path.is_dir()) {
        return Err(Error::new(
            ErrorCode::AdapterInvalid,
            "this source of the merge is gone, and a merge is made anew from its sources",
        )
        .subject(gone.display())
        .hint("Put it back under this path, seen from the current folder, or remove it from the merge too"));
    }
    recipe.out.clone_from(&change.out);
    recipe.expected = expected;
    Ok(recipe)
}

/// One name for each folder, however it is spelt; one that is not there keeps the given name.
fn canonical(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}

fn recorded(folder: &Path) -> Result<Recorded> {
    let path = folder.join("report.json");
    let invalid = |message: String| {
        Error::new(ErrorCode::AdapterInvalid, message)
            .subject(path.display())
            .hint("Give a folder that merge has written")
    };
    let mut text = String::new();
    let file = File::open(&path).map_err(|error| invalid(format!("the file cannot be read: {error}")))?;
    file.take(REPORT_LIMIT)
        .read_to_string(&mut text)
        .map_err(|error| invalid(format!("the file cannot be read: {error}")))?;
    let recorded: Recorded = serde_json::from_str(&text)
        .map_err(|error| invalid(format!("the file is not the report of a merge: {error}")))?;
    if recorded.recipe.weights.len() != recorded.recipe.adapters.len() {
        return Err(invalid("the recorded recipe does not have one weight for each adapter".into()));
    }
    Ok(recorded)
}
