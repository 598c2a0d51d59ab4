use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, DenseValues};

use crate::safetensors_file::{SafetensorsFile, StoredTensor, not_finite, wrong_shape};
use crate::shard_index::ShardIndex;

/// What the header of a file says about a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Type as safetensors names it: `BF16`, `F32`, `I32`, …
    pub dtype: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Length of the data.
    pub bytes: u64,
    /// The file that holds it.
    pub file: PathBuf,
}

/// The tensors of a folder, whether they lie in one file or in shards.
#[derive(Debug)]
pub(crate) struct TensorSet {
    files: Vec<SafetensorsFile>,
    /// With the position in `files`.
    tensors: BTreeMap<String, (TensorInfo, usize)>,
    metadata: BTreeMap<String, String>,
}

impl TensorSet {
    /// The name of the only file of an unsharded checkpoint.
    pub(crate) const SINGLE_FILE: &'static str = "model.safetensors";

    /// Whether a folder holds safetensors under the names that [`TensorSet::open`] looks for.
    pub(crate) fn is_in(folder: &Path) -> bool {
        folder.join(Self::SINGLE_FILE).exists() || folder.join(ShardIndex::FILE_NAME).exists()
    }

    /// Opens `model.safetensors`, else the shards that `model.safetensors.index.json` names (the order of
    /// transformers), and checks every header.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND` when there is neither, `ERR_CHECKPOINT_SHARD_MISSING`,
    /// `ERR_CHECKPOINT_TENSOR_MISSING` when a shard lacks what the index places in it, `ERR_CHECKPOINT_CORRUPT`.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(Self::SINGLE_FILE);
        if single.exists() {
            return Ok(Self::from_files(vec![SafetensorsFile::open(&single)?]));
        }
        let index = folder.join(ShardIndex::FILE_NAME);
        if index.exists() {
            return Self::open_shards(folder, &ShardIndex::read(&index)?);
        }
        Err(Error::new(ErrorCode::CheckpointNotFound, "the folder holds no model.safetensors and no index of shards")
            .subject(folder.display())
            .hint(hint_for_other_formats(folder)))
    }

    fn open_shards(folder: &Path, index: &ShardIndex) -> Result<Self> {
        let mut files = Vec::new();
        let mut positions = BTreeMap::new();
        for shard in index.shards() {
            let path = folder.join(shard);
            if matches!(fs::metadata(&path), Err(error) if error.kind() == ErrorKind::NotFound) {
                return Err(Error::new(ErrorCode::CheckpointShardMissing, "a shard that the index names is missing")
                    .subject(path.display())
                    .hint(format!("Download {shard} into the folder")));
            }
            positions.insert(shard, files.len());
            files.push(SafetensorsFile::open(&path)?);
        }
        for (name, shard) in &index.weight_map {
            if files[positions[shard.as_str()]].tensor(name).is_none() {
                return Err(Error::new(
                    ErrorCode::CheckpointTensorMissing,
                    format!("the index places the tensor in {shard}, which does not hold it"),
                )
                .subject(name)
                .hint("Index and shards may belong to different models; download the folder again"));
            }
        }
        let mut set = Self::from_files(files);
        // The index decides where a tensor that several shards hold is read, and which are part of the model.
        set.tensors = index
            .weight_map
            .iter()
            .filter_map(|(name, shard)| {
                let position = positions[shard.as_str()];
                Some((name.clone(), (info(name, set.files[position].tensor(name)?, &set.files[position]), position)))
            })
            .collect();
        Ok(set)
    }

    /// The tensors of one file that is no checkpoint of its own (an adapter).
    pub(crate) fn open_file(path: &Path) -> Result<Self> {
        Ok(Self::from_files(vec![SafetensorsFile::open(path)?]))
    }

    /// The tensors of some files.
    pub(crate) fn from_files(files: Vec<SafetensorsFile>) -> Self {
        let mut tensors = BTreeMap::new();
        let mut metadata = BTreeMap::new();
        for (position, file) in files.iter().enumerate() {
            for (name, stored) in file.tensors() {
                tensors.insert(name.clone(), (info(name, stored, file), position));
            }
            metadata.extend(file.metadata().clone());
        }
        TensorSet { files, tensors, metadata }
    }

    /// In name order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|(info, _)| info)
    }

    /// Those whose names begin with `prefix`, in name order.
    pub(crate) fn below(&self, prefix: String) -> impl Iterator<Item = &TensorInfo> {
        self.tensors
            .range(prefix.clone()..)
            .map(|(_, (info, _))| info)
            .take_while(move |info| info.name.starts_with(&prefix))
    }

    /// What is known about a tensor.
    pub(crate) fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    /// The strings of `__metadata__` of all files.
    pub(crate) fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// File and place of a tensor, or `ERR_CHECKPOINT_TENSOR_MISSING`.
    pub(crate) fn require(&self, name: &str) -> Result<(&SafetensorsFile, &StoredTensor)> {
        let found = self.tensors.get(name).and_then(|&(_, position)| {
            let file = &self.files[position];
            Some((file, file.tensor(name)?))
        });
        found.ok_or_else(|| missing_tensor(name))
    }

    /// A float tensor of two dimensions, all of it finite.
    pub(crate) fn matrix(&self, name: &str) -> Result<DenseMatrix> {
        let (file, stored) = self.require(name)?;
        file.read_matrix(name, stored)
    }

    /// The bytes of one row of a tensor: what lies at `row` of its outermost dimension.
    pub(crate) fn row_bytes(&self, name: &str, row: usize) -> Result<Vec<u8>> {
        let (file, stored) = self.require(name)?;
        let rows = stored.shape.first().copied().unwrap_or(0);
        if row >= rows {
            return Err(wrong_shape(name, &stored.shape, &format!("more than {row} rows")));
        }
        let bytes = stored.bytes / rows as u64;
        let mut found = vec![0; bytes as usize];
        file.read_part(stored, bytes * row as u64, &mut found)?;
        Ok(found)
    }

    /// A float tensor of one dimension as f32, all of it finite.
    pub(crate) fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let (file, stored) = self.require(name)?;
        let &[length] = stored.shape.as_slice() else {
            return Err(wrong_shape(name, &stored.shape, "[length]"));
        };
        let values = match file.read_floats(name, stored)? {
            DenseValues::F32(values) => values,
            narrow => DenseMatrix::new(1, length, narrow).to_f32(),
        };
        match values.iter().position(|value| !value.is_finite()) {
            Some(position) => Err(not_finite(name, &format!("position {position}"))),
            None => Ok(values),
        }
    }
}

/// `ERR_CHECKPOINT_TENSOR_MISSING` for `name`.
pub(crate) fn missing_tensor(name: &str) -> Error {
    Error::new(ErrorCode::CheckpointTensorMissing, "the checkpoint does not hold this tensor")
        .subject(name)
        .hint("The checkpoint may be incomplete or belong to another architecture than its configuration says")
}

fn info(name: &str, stored: &StoredTensor, file: &SafetensorsFile) -> TensorInfo {
    TensorInfo {
        name: name.to_string(),
        dtype: stored.dtype.to_string(),
        shape: stored.shape.clone(),
        bytes: stored.bytes,
        file: file.path().to_path_buf(),
    }
}

/// Names what the folder holds instead, so that the way out is clear.
fn hint_for_other_formats(folder: &Path) -> String {
    let names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    if names.iter().any(|name| name.starts_with("pytorch_model") && name.contains(".bin")) {
        return "It holds pytorch_model.bin; save the model again with safe_serialization=True".into();
    }
    "Give the folder of a Hugging Face checkpoint in safetensors".into()
}
