use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, DenseMatrix, LinearWeight, WeightMatrix};
use serde_json::{Map, Value};

use crate::linear_storage::{DENSE, LinearStorage, StoredAs, packed_markers};
use crate::positional_file::read_bounded;
use crate::safetensors_file::wrong_shape;
use crate::tensor_set::TensorSet;
use crate::{LinearTensors, QuantizationConfig, TensorInfo, read_adapter};

/// Largest `config.json` that is read.
const CONFIG_LIMIT: u64 = 16_000_000;
/// Largest `tokenizer.json` that is read; those of 250k tokens have about 35 MB.
const TOKENIZER_LIMIT: u64 = 500_000_000;

/// A folder in Hugging Face layout, opened: `config.json` and the headers of its safetensors files are read and
/// checked, weights are read when they are asked for. Cheap to clone; may be read by many threads at once.
#[derive(Clone, Debug)]
pub struct Checkpoint(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    config: Map<String, Value>,
    storage: LinearStorage,
    tensors: TensorSet,
}

impl Checkpoint {
    /// The folder with the compensation inside a checkpoint.
    pub(crate) const COMPENSATION_FOLDER: &'static str = "eora";
    /// Where `config.json` says how weights are quantized; the second name is that of old files.
    pub(crate) const QUANTIZATION_FIELDS: [&'static str; 2] = ["quantization_config", "compression_config"];

    /// Opens a folder.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND` without folder or weights, `ERR_CONFIG_INVALID`, `ERR_QUANTIZATION_UNSUPPORTED`, and
    /// `ERR_CHECKPOINT_SHARD_MISSING`, `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_CORRUPT` for what is wrong
    /// with the weights.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let folder = fs::metadata(path).map_err(|error| {
            Error::io(ErrorCode::CheckpointNotFound, path, &error).hint("Give the path of a checkpoint folder")
        })?;
        if !folder.is_dir() {
            return Err(Error::new(ErrorCode::CheckpointNotFound, "the path is not a folder")
                .subject(path.display())
                .hint("Give the folder that holds config.json and the weights, not a file in it"));
        }
        let config = Self::read_config(&path.join("config.json"))?;
        let tensors = TensorSet::open(path)?;
        let storage = LinearStorage::discover(path, &config, &tensors)?;
        Ok(Checkpoint(Arc::new(Opened { path: path.to_path_buf(), config, storage, tensors })))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// `config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        &self.0.config
    }

    /// How weights are quantized to integers, if they are. Weights of 8-bit floats are not.
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        self.0.storage.quantization()
    }

    /// What the folder says wrongly and was read otherwise, as sentences for the user.
    pub fn notices(&self) -> &[String] {
        self.0.storage.notices()
    }

    /// The strings that the safetensors files carry beside their tensors. Some writers name tied tensors here
    /// (`model.embed_tokens.weight` → `lm_head.weight`); such aliases are not resolved.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.0.tensors.metadata()
    }

    /// Every tensor, in name order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.0.tensors.iter()
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.0.tensors.get(name)
    }

    /// Whether the Linear `name` is stored, in whatever form.
    pub fn has_linear(&self, name: &str) -> bool {
        packed_markers().chain([DENSE]).any(|suffix| self.tensor(&format!("{name}.{suffix}")).is_some())
    }

    /// The names of the Linears that are quantized to codes, in order.
    pub fn quantized_linears(&self) -> Vec<String> {
        let Some(config) = self.quantization() else { return Vec::new() };
        let marker = format!(".{}", config.format.marker());
        let names = self.tensors().filter_map(|tensor| tensor.name.strip_suffix(&marker));
        let is_quantized = |name: &&str| matches!(self.0.storage.of(name, &self.0.tensors), Ok(StoredAs::Quantized(_)));
        names.filter(is_quantized).map(str::to_owned).collect()
    }

    /// The tensors that the Linear `name` consists of, without its bias.
    pub fn parts_of(&self, name: &str) -> impl Iterator<Item = &TensorInfo> {
        self.0.tensors.below(format!("{name}.")).filter(|tensor| !tensor.name.ends_with(".bias"))
    }

    /// A matrix `[rows, columns]` of f32, f16 or bf16, all of it finite.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_SHAPE`, and
    /// `ERR_CHECKPOINT_NOT_FINITE` with tensor, row and column.
    pub fn dense(&self, name: &str) -> Result<DenseMatrix> {
        self.0.tensors.matrix(name)
    }

    /// A vector of f32, f16 or bf16 as f32, all of it finite.
    ///
    /// # Errors
    /// As [`Checkpoint::dense`].
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        self.0.tensors.vector(name)
    }

    /// The Linear `name`, e.g. `model.layers.0.mlp.up_proj`: its quantized tensors or `NAME.weight`, and `NAME.bias`
    /// where there is one. Weights of 8-bit floats come as f32, scaled. Without compensation, which
    /// [`Checkpoint::compensation`] gives.
    ///
    /// # Errors
    /// As [`Checkpoint::dense`]; `ERR_QUANTIZATION_UNSUPPORTED` when the tensors are of another layout,
    /// `ERR_CHECKPOINT_CORRUPT` when they contradict each other or `config.json`.
    pub fn linear(&self, name: &str) -> Result<LinearWeight> {
        let tensors = LinearTensors::new(name, &self.0.tensors);
        let matrix = match self.0.storage.of(name, &self.0.tensors)? {
            StoredAs::Quantized(config) => {
                WeightMatrix::Quantized(config.format.decode(&config.of_linear(name), &tensors)?)
            }
            StoredAs::Float8(scaling) => WeightMatrix::Dense(scaling.decode(&tensors)?),
            StoredAs::Dense => WeightMatrix::Dense(self.dense(&format!("{name}.{DENSE}"))?),
        };
        let bias_name = format!("{name}.bias");
        let bias = match self.tensor(&bias_name) {
            Some(info) if info.shape != [matrix.rows()] => {
                return Err(wrong_shape(&bias_name, &info.shape, &format!("[{}]", matrix.rows())));
            }
            Some(_) => Some(self.vector(&bias_name)?),
            None => None,
        };
        Ok(LinearWeight { matrix, bias, low_rank: None })
    }

    /// Outputs and inputs of the Linear `name`, without reading its weights.
    ///
    /// # Errors
    /// As [`Checkpoint::linear`].
    pub fn linear_shape(&self, name: &str) -> Result<(usize, usize)> {
        if let StoredAs::Quantized(config) = self.0.storage.of(name, &self.0.tensors)? {
            return config.format.shape(&config.of_linear(name), &LinearTensors::new(name, &self.0.tensors));
        }
        let weight = format!("{name}.{DENSE}");
        let (_, stored) = self.0.tensors.require(&weight)?;
        match *stored.shape.as_slice() {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(wrong_shape(&weight, &stored.shape, "[rows, columns]")),
        }
    }

    /// The bytes of `tokenizer.json`.
    ///
    /// # Errors
    /// `ERR_TOKENIZER_INVALID` when it is missing or cannot be read.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>> {
        let path = self.path().join("tokenizer.json");
        read_bounded(&path, TOKENIZER_LIMIT).map_err(|error| {
            Error::new(ErrorCode::TokenizerInvalid, format!("tokenizer.json cannot be read: {error}"))
                .subject(path.display())
                .hint("Copy tokenizer.json of the model into the folder; other tokenizer files are not read")
        })
    }

    /// The compensation that lies in the folder `eora/`, if there is one, checked against the Linears.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when it is damaged or does not fit.
    pub fn compensation(&self) -> Result<Option<Adapter>> {
        let folder = self.path().join(Self::COMPENSATION_FOLDER);
        if !folder.is_dir() {
            return Ok(None);
        }
        let adapter = read_adapter(&folder)?;
        for (name, entry) in &adapter.linears {
            let invalid = |message: String| {
                Error::new(ErrorCode::AdapterInvalid, message)
                    .subject(name)
                    .hint("The folder 'eora' belongs to another checkpoint; compress the model again")
            };
            let (rows, columns) = self.linear_shape(name).map_err(|error| invalid(error.message))?;
            let (out_features, in_features) = (entry.factors.out_features(), entry.factors.in_features());
            if (rows, columns) != (out_features, in_features) {
                return Err(invalid(format!(
                    "the compensation is for a {out_features}×{in_features} matrix, the Linear is {rows}×{columns}"
                )));
            }
        }
        Ok(Some(adapter))
    }

    /// The tensors, for the writer that copies them.
    pub(crate) fn tensor_set(&self) -> &TensorSet {
        &self.0.tensors
    }

    /// Reads `config.json`, or another file of its kind.
    ///
    /// # Errors
    /// `ERR_CONFIG_INVALID`.
    pub(crate) fn read_config(path: &Path) -> Result<Map<String, Value>> {
        let name = path.file_name().unwrap_or_default().display();
        let bytes = read_bounded(path, CONFIG_LIMIT).map_err(|error| {
            Error::new(ErrorCode::ConfigInvalid, format!("{name} cannot be read: {error}"))
                .subject(path.display())
                .hint("Give the folder of a Hugging Face checkpoint; it has a config.json")
        })?;
        let invalid = |message: String| {
            Error::new(ErrorCode::ConfigInvalid, message)
                .subject(path.display())
                .hint("The file is damaged; download it again")
        };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(config)) => Ok(config),
            Ok(_) => Err(invalid(format!("{name} is not an object"))),
            Err(error) => Err(invalid(format!("{name} is not valid JSON: {error}"))),
        }
    }
}
