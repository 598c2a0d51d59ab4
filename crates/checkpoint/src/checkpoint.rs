use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, DenseMatrix, LinearWeight, WeightMatrix};
use serde_json::{Map, Value};

use crate::float8_scaling::Float8Scaling;
use crate::positional_file::read_bounded;
use crate::safetensors_file::wrong_shape;
use crate::tensor_set::TensorSet;
use crate::{FORMATS, LinearTensors, QuantizationConfig, TensorInfo, read_adapter};

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
    quantization: Option<QuantizationConfig>,
    float8: Option<Float8Scaling>,
    notices: Vec<String>,
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
        let config = read_config(&path.join("config.json"))?;
        let tensors = TensorSet::open(path)?;
        let stated = Self::QUANTIZATION_FIELDS.iter().filter_map(|&field| config.get(field));
        let stated = stated.into_iter().find(|value| !value.is_null());
        let float8 = stated.map(Float8Scaling::from_json).transpose()?.flatten();
        let integers = stated.filter(|_| float8.is_none());
        let mut quantization = integers.map(QuantizationConfig::from_json).transpose()?;
        if stated.is_none() {
            quantization = read_old_config(path, &tensors)?;
        }
        let notices = match &mut quantization {
            Some(quantization) => settle(quantization, &tensors)?.into_iter().collect(),
            None => Vec::new(),
        };
        Ok(Checkpoint(Arc::new(Opened { path: path.to_path_buf(), config, quantization, float8, notices, tensors })))
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
        self.0.quantization.as_ref()
    }

    /// What the folder says wrongly and was read otherwise, as sentences for the user.
    pub fn notices(&self) -> &[String] {
        &self.0.notices
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
        let matrix = match self.quantization_of(name)? {
            Some(config) => {
                let linear = LinearTensors::new(name, &self.0.tensors);
                WeightMatrix::Quantized(config.format.decode(config, &linear)?)
            }
            None => WeightMatrix::Dense(match self.float8_of(name) {
                Some(scaling) => scaling.decode(&LinearTensors::new(name, &self.0.tensors))?,
                None => self.dense(&format!("{name}.{DENSE}"))?,
            }),
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
        if let Some(config) = self.quantization_of(name)? {
            return config.format.shape(config, &LinearTensors::new(name, &self.0.tensors));
        }
        let weight = format!("{name}.weight");
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

    /// How the weight of the Linear `name` is scaled, `None` when it is not one of 8-bit floats.
    fn float8_of(&self, name: &str) -> Option<Float8Scaling> {
        let dtype = &self.tensor(&format!("{name}.{DENSE}"))?.dtype;
        self.0.float8.filter(|_| dtype == "F8_E4M3")
    }

    /// How the Linear `name` is quantized, `None` when it is not.
    fn quantization_of(&self, name: &str) -> Result<Option<&QuantizationConfig>> {
        let dense = self.tensor(&format!("{name}.{DENSE}"));
        let packed = packed_markers().find_map(|marker| self.tensor(&format!("{name}.{marker}")));
        let configured = self.quantization();
        let stored = match (dense, packed) {
            (Some(_), Some(_)) => {
                return Err(Error::new(ErrorCode::CheckpointCorrupt, "the Linear is stored both packed and unpacked")
                    .subject(name)
                    .hint("Two checkpoints may be mixed in the folder; download it again"));
            }
            (None, Some(packed)) => packed,
            (Some(dense), None) if dense.dtype == "I8" => dense,
            _ => return Ok(None),
        };
        let Some(configured) = configured else {
            return Err(Error::new(
                ErrorCode::QuantizationUnsupported,
                "config.json does not say how the Linear is quantized",
            )
            .subject(&stored.name)
            .hint("Take config.json with its quantization_config from the same source as the weights"));
        };
        if stored.name.strip_prefix(name) != Some(&format!(".{}", configured.format.marker())) {
            let message = format!("the Linear is not stored as {}, which config.json says", configured.format.name());
            return Err(Error::new(ErrorCode::QuantizationUnsupported, message)
                .subject(&stored.name)
                .hint("Take config.json with its quantization_config from the same source as the weights"));
        }
        Ok(Some(configured))
    }
}

/// The suffix of the tensor that a Linear has which is stored in one piece.
const DENSE: &str = "weight";

/// Files that said how weights are quantized before `config.json` did, and the method of those that name none.
const OLD_CONFIGS: [(&str, &str); 2] = [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

/// Suffixes that only packed Linears have.
fn packed_markers() -> impl Iterator<Item = &'static str> {
    FORMATS.iter().map(|format| format.marker()).filter(|&marker| marker != DENSE)
}

/// The configuration from one of the old files, which count only where a tensor is packed: some lie beside weights that
/// they do not belong to.
fn read_old_config(folder: &Path, tensors: &TensorSet) -> Result<Option<QuantizationConfig>> {
    let is_packed = |tensor: &TensorInfo| {
        tensor.name.rsplit_once('.').is_some_and(|(_, suffix)| packed_markers().any(|marker| marker == suffix))
    };
    if !tensors.iter().any(is_packed) {
        return Ok(None);
    }
    for (file, method) in OLD_CONFIGS {
        let path = folder.join(file);
        if path.exists() {
            let config = read_config(&path)?;
            let method = config.get("quant_method").and_then(Value::as_str).unwrap_or(method);
            return QuantizationConfig::from_fields(method, &config).map(Some);
        }
    }
    Ok(None)
}

/// Lets the format correct the configuration by the first Linear that is stored in it.
fn settle(quantization: &mut QuantizationConfig, tensors: &TensorSet) -> Result<Option<String>> {
    let format = quantization.format;
    let linear = tensors
        .iter()
        .find_map(|tensor| tensor.name.strip_suffix(format.marker()).and_then(|name| name.strip_suffix('.')));
    match linear {
        Some(name) => format.settle(quantization, &LinearTensors::new(name, tensors)),
        None => Ok(None),
    }
}

fn read_config(path: &Path) -> Result<Map<String, Value>> {
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
