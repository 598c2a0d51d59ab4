use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, DenseMatrix, LinearWeight, WeightMatrix};
use serde_json::{Map, Value};

use crate::adapter_folder::AdapterFolder;
use crate::gguf::{GgufTensors, GgufType, chat_template_of, is_gguf, only_file_of, tokenizer_of};
use crate::linear_storage::{DENSE, LinearStorage, StoredAs, packed_markers};
use crate::positional_file::read_bounded;
use crate::safetensors_file::{SafetensorsFile, StoredTensor, wrong_shape};
use crate::tensor_set::{TensorSet, missing_tensor};
use crate::{LinearTensors, QuantizationConfig, TensorInfo, read_adapter};

/// Largest `config.json` that is read.
const CONFIG_LIMIT: u64 = 16_000_000;
/// Largest `tokenizer.json` that is read; those of 250k tokens have about 35 MB.
const TOKENIZER_LIMIT: u64 = 500_000_000;

/// A folder in Hugging Face layout, or a GGUF file, opened: `config.json` and the headers of its safetensors files are
/// read and checked, weights are read when they are asked for. Cheap to clone; may be read by many threads at once.
///
/// A GGUF file shows itself under the names of Hugging Face, so that callers need not know.
#[derive(Clone, Debug)]
pub struct Checkpoint(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    weights: Weights,
}

/// Where the weights lie.
#[derive(Debug)]
enum Weights {
    /// In the safetensors files of a folder.
    Folder {
        /// `config.json`.
        config: Map<String, Value>,
        storage: LinearStorage,
        tensors: TensorSet,
    },
    /// In a GGUF file.
    Gguf(GgufTensors),
}

impl Checkpoint {
    /// The folder with the compensation inside a checkpoint.
    pub(crate) const COMPENSATION_FOLDER: &'static str = "eora";
    /// Where `config.json` says how weights are quantized; the second name is that of old files.
    pub(crate) const QUANTIZATION_FIELDS: [&'static str; 2] = ["quantization_config", "compression_config"];

    /// Opens a folder, or a GGUF file; a folder without safetensors and with exactly one GGUF file is that file.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND` without folder or weights, `ERR_CONFIG_INVALID`, `ERR_QUANTIZATION_UNSUPPORTED`, and
    /// `ERR_CHECKPOINT_SHARD_MISSING`, `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_CORRUPT` for what is wrong
    /// with the weights; those of [`crate::gguf::GgufFile::open`].
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let entry = fs::metadata(path).map_err(|error| {
            Error::io(ErrorCode::CheckpointNotFound, path, &error).hint("Give the path of a checkpoint folder")
        })?;
        let file = if entry.is_dir() {
            let lacks_weights = !TensorSet::is_in(path);
            if lacks_weights { only_file_of(path)? } else { None }
        } else if is_gguf(path) {
            Some(path.to_path_buf())
        } else {
            return Err(Error::new(ErrorCode::CheckpointNotFound, "the path is neither a folder nor a GGUF file")
                .subject(path.display())
                .hint("Give the folder that holds config.json and the weights, not a file in it"));
        };
        let Some(file) = file else {
            let config = Self::read_config(&path.join("config.json"))?;
            return Self::of_tensors(path, config, TensorSet::open(path)?);
        };
        let weights = Weights::Gguf(GgufTensors::open(&file)?);
        Ok(Checkpoint(Arc::new(Opened { path: path.to_path_buf(), weights })))
    }

    /// The checkpoint that `tensors` in the files of a folder will be with that configuration.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] of a folder.
    pub(crate) fn of_tensors(path: &Path, config: Map<String, Value>, tensors: TensorSet) -> Result<Checkpoint> {
        let storage = LinearStorage::discover(path, &config, &tensors)?;
        let weights = Weights::Folder { config, storage, tensors };
        Ok(Checkpoint(Arc::new(Opened { path: path.to_path_buf(), weights })))
    }

    /// The folder, or the file, that was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// `config.json`, or what it would say.
    pub fn config(&self) -> &Map<String, Value> {
        match &self.0.weights {
            Weights::Folder { config, .. } => config,
            Weights::Gguf(tensors) => tensors.config(),
        }
    }

    /// The files that the configuration, the weights and the compensation are read from.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.tensors().map(|tensor| tensor.file.clone()).collect();
        if let Weights::Folder { .. } = self.0.weights {
            files.push(self.path().join("config.json"));
        }
        if self.path().is_dir() {
            let compensation = self.path().join(Self::COMPENSATION_FOLDER);
            files.extend(
                AdapterFolder::FILE_NAMES.map(|name| compensation.join(name)).into_iter().filter(|f| f.is_file()),
            );
        }
        files.sort();
        files.dedup();
        files
    }

    /// How weights are quantized to integers, if one scheme of a Hugging Face checkpoint says so. Weights of 8-bit
    /// floats are not, and those of GGUF files have a type each: [`Checkpoint::block_type`].
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        match &self.0.weights {
            Weights::Folder { storage, .. } => storage.quantization(),
            Weights::Gguf(_) => None,
        }
    }

    /// The type with codes that most weights of a GGUF file have; `None` when it holds floats, and for folders.
    pub fn block_type(&self) -> Option<&'static GgufType> {
        match &self.0.weights {
            Weights::Folder { .. } => None,
            Weights::Gguf(tensors) => tensors.main_type(),
        }
    }

    /// Whether matrices that the architecture keeps as `[in, out]` are stored as `[out, in]` like all others.
    pub fn rows_are_outputs(&self) -> bool {
        matches!(self.0.weights, Weights::Gguf(_))
    }

    /// What the folder says wrongly and was read otherwise, as sentences for the user.
    pub fn notices(&self) -> &[String] {
        match &self.0.weights {
            Weights::Folder { storage, .. } => storage.notices(),
            Weights::Gguf(_) => &[],
        }
    }

    /// The strings that the safetensors files carry beside their tensors. Some writers name tied tensors here
    /// (`model.embed_tokens.weight` → `lm_head.weight`); such aliases are not resolved.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        match &self.0.weights {
            Weights::Folder { tensors, .. } => tensors.metadata(),
            Weights::Gguf(_) => &NONE,
        }
    }

    /// Every tensor, in name order.
    pub fn tensors(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        match &self.0.weights {
            Weights::Folder { tensors, .. } => Box::new(tensors.iter()),
            Weights::Gguf(tensors) => Box::new(tensors.iter()),
        }
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        match &self.0.weights {
            Weights::Folder { tensors, .. } => tensors.get(name),
            Weights::Gguf(tensors) => tensors.get(name),
        }
    }

    /// Whether the Linear `name` is stored, in whatever form.
    pub fn has_linear(&self, name: &str) -> bool {
        packed_markers().chain([DENSE]).any(|suffix| self.tensor(&format!("{name}.{suffix}")).is_some())
    }

    /// The names of the Linears that are quantized to codes, in order; of a GGUF file the embedding may be among them.
    pub fn quantized_linears(&self) -> Vec<String> {
        let marker = self.quantization().map_or(DENSE, |config| config.format.marker());
        let suffix = format!(".{marker}");
        let names = self.tensors().filter_map(|tensor| tensor.name.strip_suffix(&suffix));
        names.filter(|name| self.is_quantized(name)).map(str::to_owned).collect()
    }

    /// Whether the Linear `name` is quantized to codes.
    pub fn is_quantized(&self, name: &str) -> bool {
        match &self.0.weights {
            Weights::Folder { storage, tensors, .. } => matches!(storage.of(name, tensors), Ok(StoredAs::Quantized(_))),
            Weights::Gguf(tensors) => tensors.has_codes(&format!("{name}.{DENSE}")),
        }
    }

    /// The tensors that the Linear `name` consists of, without its bias.
    pub fn parts_of(&self, name: &str) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        let prefix = format!("{name}.");
        let weighs = |tensor: &&TensorInfo| !tensor.name.ends_with(".bias");
        match &self.0.weights {
            Weights::Folder { tensors, .. } => Box::new(tensors.below(prefix).filter(weighs)),
            Weights::Gguf(tensors) => Box::new(tensors.below(prefix).filter(weighs)),
        }
    }

    /// A matrix `[rows, columns]` of f32, f16 or bf16, all of it finite. That of a GGUF file may have been stored in
    /// codes; it comes as f32 then.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_SHAPE`, and
    /// `ERR_CHECKPOINT_NOT_FINITE` with tensor, row and column.
    pub fn dense(&self, name: &str) -> Result<DenseMatrix> {
        match &self.0.weights {
            Weights::Folder { tensors, .. } => tensors.matrix(name),
            Weights::Gguf(tensors) => tensors.dense(name),
        }
    }

    /// A vector of f32, f16 or bf16 as f32, all of it finite.
    ///
    /// # Errors
    /// As [`Checkpoint::dense`].
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        match &self.0.weights {
            Weights::Folder { tensors, .. } => tensors.vector(name),
            Weights::Gguf(tensors) => tensors.vector(name),
        }
    }

    /// Whether [`Checkpoint::row_bytes`] reads no more than the row.
    pub fn reads_single_rows(&self) -> bool {
        matches!(self.0.weights, Weights::Folder { .. })
    }

    /// The bytes of a row of a tensor as they are stored: what lies at `row` of its outermost dimension. Of a GGUF the
    /// whole tensor is read, and its row is given as f32.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE` when there is no such row, and what reading reports.
    pub fn row_bytes(&self, name: &str, row: usize) -> Result<Vec<u8>> {
        let tensors = match &self.0.weights {
            Weights::Folder { tensors, .. } => return tensors.row_bytes(name, row),
            Weights::Gguf(tensors) => tensors,
        };
        let matrix = tensors.matrix(name)?;
        if row >= matrix.rows() {
            return Err(Error::new(ErrorCode::CheckpointShape, format!("the tensor has only {} rows", matrix.rows()))
                .subject(name)
                .hint("The file belongs to another model"));
        }
        let mut values = vec![0.0; matrix.columns()];
        matrix.row_to_f32(row, &mut values);
        Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
    }

    /// The Linear `name`, e.g. `model.layers.0.mlp.up_proj`: its quantized tensors or `NAME.weight`, and `NAME.bias`
    /// where there is one. Weights of 8-bit floats come as f32, scaled. Without compensation, which
    /// [`Checkpoint::compensation`] gives.
    ///
    /// # Errors
    /// As [`Checkpoint::dense`]; `ERR_QUANTIZATION_UNSUPPORTED` when the tensors are of another layout,
    /// `ERR_CHECKPOINT_CORRUPT` when they contradict each other or `config.json`.
    pub fn linear(&self, name: &str) -> Result<LinearWeight> {
        let (storage, set) = match &self.0.weights {
            Weights::Folder { storage, tensors, .. } => (storage, tensors),
            Weights::Gguf(tensors) => return tensors.linear(name),
        };
        let tensors = LinearTensors::new(name, set);
        let matrix = match storage.of(name, set)? {
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
        if let Weights::Folder { storage, tensors, .. } = &self.0.weights
            && let StoredAs::Quantized(config) = storage.of(name, tensors)?
        {
            return config.format.shape(&config.of_linear(name), &LinearTensors::new(name, tensors));
        }
        let weight = format!("{name}.{DENSE}");
        let shape = match &self.0.weights {
            Weights::Folder { tensors, .. } => &tensors.require(&weight)?.1.shape,
            Weights::Gguf(tensors) => &tensors.require(&weight)?.shape,
        };
        match *shape.as_slice() {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(wrong_shape(&weight, shape, "[rows, columns]")),
        }
    }

    /// What errors about the tokenizer name: the path of `tokenizer.json`, or of the GGUF file.
    pub fn tokenizer_name(&self) -> String {
        match &self.0.weights {
            Weights::Folder { .. } => self.path().join("tokenizer.json").display().to_string(),
            Weights::Gguf(_) => self.path().display().to_string(),
        }
    }

    /// The bytes of `tokenizer.json`, or of one that says the same as the vocabulary of a GGUF file.
    ///
    /// # Errors
    /// `ERR_TOKENIZER_INVALID` when it is missing or cannot be read.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>> {
        if let Weights::Gguf(tensors) = &self.0.weights {
            return Ok(tokenizer_of(tensors.metadata())?.to_string().into_bytes());
        }
        let path = self.path().join("tokenizer.json");
        read_bounded(&path, TOKENIZER_LIMIT).map_err(|error| {
            Error::new(ErrorCode::TokenizerInvalid, format!("tokenizer.json cannot be read: {error}"))
                .subject(path.display())
                .hint("Copy tokenizer.json of the model into the folder; other tokenizer files are not read")
        })
    }

    /// The template that turns a conversation into text, where there is one: `chat_template.jinja`, else the field of
    /// `tokenizer_config.json`, or what a GGUF file carries.
    ///
    /// # Errors
    /// `ERR_TOKENIZER_INVALID` for a file that cannot be read.
    pub fn chat_template(&self) -> Result<Option<String>> {
        let invalid = |path: &Path, message: String| {
            Error::new(ErrorCode::TokenizerInvalid, message)
                .subject(path.display())
                .hint("The file is damaged; download it again")
        };
        if let Weights::Gguf(tensors) = &self.0.weights {
            return chat_template_of(tensors.metadata());
        }
        let own = self.path().join("chat_template.jinja");
        if own.exists() {
            let bytes = read_bounded(&own, CONFIG_LIMIT).map_err(|error| invalid(&own, error.to_string()))?;
            return String::from_utf8(bytes).map(Some).map_err(|error| invalid(&own, error.to_string()));
        }
        let path = self.path().join("tokenizer_config.json");
        if !path.exists() {
            return Ok(None);
        }
        let config = Self::read_config(&path).map_err(|error| invalid(&path, error.message))?;
        let template = match config.get("chat_template") {
            // Several under names: the one without a purpose of its own is called default.
            Some(Value::Array(list)) => {
                list.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str())
            }
            other => other.and_then(Value::as_str),
        };
        Ok(template.map(str::to_owned))
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
        self.check_compensation(&adapter)?;
        Ok(Some(adapter))
    }

    /// Checks the factors of a compensation against the Linears.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` for factors of a Linear that is not there, or has another shape.
    pub fn check_compensation(&self, adapter: &Adapter) -> Result<()> {
        for (name, entry) in &adapter.linears {
            let invalid = |message: String| {
                Error::new(ErrorCode::AdapterInvalid, message)
                    .subject(name)
                    .hint("The compensation belongs to another checkpoint; make one for this")
            };
            let (rows, columns) = self.linear_shape(name).map_err(|error| invalid(error.message))?;
            let (out_features, in_features) = (entry.factors.out_features(), entry.factors.in_features());
            if (rows, columns) != (out_features, in_features) {
                return Err(invalid(format!(
                    "the compensation is for a {out_features}×{in_features} matrix, the Linear is {rows}×{columns}"
                )));
            }
        }
        Ok(())
    }

    /// File and place of a tensor in safetensors, for the writer that copies it.
    pub(crate) fn stored(&self, name: &str) -> Result<(&SafetensorsFile, &StoredTensor)> {
        match &self.0.weights {
            Weights::Folder { tensors, .. } => tensors.require(name),
            Weights::Gguf(_) => Err(missing_tensor(name)),
        }
    }

    /// The GGUF file.
    pub(crate) fn gguf(&self) -> Option<&GgufTensors> {
        match &self.0.weights {
            Weights::Folder { .. } => None,
            Weights::Gguf(tensors) => Some(tensors),
        }
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
