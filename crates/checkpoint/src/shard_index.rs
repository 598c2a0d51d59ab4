use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::Deserialize;
use serde_json::json;

use crate::positional_file::read_bounded;

/// Largest index that is read; that of a 700B mixture of experts has about 10 MB.
const INDEX_LIMIT: u64 = 100_000_000;

/// `model.safetensors.index.json`: which file of the folder holds which tensor.
#[derive(Debug, Deserialize)]
pub(crate) struct ShardIndex {
    /// Tensor name → file name.
    pub(crate) weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// The name of the file.
    pub(crate) const FILE_NAME: &'static str = "model.safetensors.index.json";

    /// Reads the index and checks that every shard it names is a plain file name.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND` when the file cannot be read, `ERR_CHECKPOINT_CORRUPT` when it is no index or names
    /// a file outside the folder.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = read_bounded(path, INDEX_LIMIT).map_err(|error| {
            Error::io(ErrorCode::CheckpointNotFound, path, &error).hint("Check that the file may be read")
        })?;
        let corrupt = |message: String| {
            Error::new(ErrorCode::CheckpointCorrupt, message)
                .subject(path.display())
                .hint("The index is damaged; download or copy it again")
        };
        let index: ShardIndex =
            serde_json::from_slice(&bytes).map_err(|error| corrupt(format!("the index is not valid: {error}")))?;
        if let Some(shard) = index.shards().into_iter().find(|shard| !is_plain_file_name(shard)) {
            return Err(corrupt(format!("the index names '{shard}', which is not the name of a file in this folder")));
        }
        Ok(index)
    }

    /// The bytes of an index over `weight_map`; `total_size` is the sum of all tensors in bytes.
    pub(crate) fn to_bytes(&self, total_size: u64) -> Vec<u8> {
        let index = json!({ "metadata": { "total_size": total_size }, "weight_map": self.weight_map });
        format!("{index:#}\n").into_bytes()
    }

    /// Every file that the index names, once, in name order.
    pub(crate) fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Neither a path upwards, nor an absolute one, nor one that another system would read as such.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(_)))
        && components.next().is_none()
        && !name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_pass() {
        for name in ["model-00001-of-00002.safetensors", "a b", "..x"] {
            assert!(is_plain_file_name(name), "{name}");
        }
        for name in ["", ".", "..", "../x", "/etc/passwd", "a/b", "a/", "./a", "..\\x", "C:x", "C:\\x", "a\0b"] {
            assert!(!is_plain_file_name(name), "{name}");
        }
    }
}
