use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, ElementType, LinearWeight, WeightMatrix};
use serde_json::{Map, Value};

use super::block_decoder::decode;
use super::block_format::BlockContent;
use super::gguf_config::{RotaryDivisors, TensorFacts, config_of};
use super::gguf_file::{GgufFile, GgufTensor};
use super::names::{GgufArchitecture, RowOrder};
use super::{GgufMetadata, GgufType};
use crate::TensorInfo;
use crate::safetensors_file::wrong_shape;
use crate::safetensors_writer::float_bytes;
use crate::tensor_set::missing_tensor;

/// Tensors with the divisors of rotary frequencies; they are no weights.
const ROTARY_DIVISORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];

/// Most experts of a block that are named one by one; published models have up to 512.
const MOST_EXPERTS: usize = 1 << 14;

/// The tensors of a GGUF file under the names of Hugging Face.
#[derive(Debug)]
pub(crate) struct GgufTensors {
    file: GgufFile,
    architecture: &'static GgufArchitecture,
    config: Map<String, Value>,
    tensors: BTreeMap<String, (TensorInfo, Place)>,
}

/// Where a tensor of Hugging Face lies in the file.
#[derive(Clone, Debug)]
struct Place {
    /// Name in the file.
    stored: String,
    /// The first of its rows: experts lie behind each other in one tensor.
    first_row: usize,
    order: RowOrder,
    /// What the order of the rows goes by.
    heads: usize,
    /// Whether one has been added to the values.
    shifted: bool,
}

impl GgufTensors {
    /// Opens a file and names its tensors.
    ///
    /// # Errors
    /// As [`GgufFile::open`]; `ERR_CONFIG_ARCHITECTURE`, `ERR_CONFIG_UNSUPPORTED` for tensors that the architecture is
    /// not known to have, `ERR_CONFIG_INVALID`, `ERR_CHECKPOINT_SHAPE`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let subject = path.display().to_string();
        let name = file.metadata().text("general.architecture")?.ok_or_else(|| {
            Error::new(ErrorCode::ConfigInvalid, "the GGUF metadata names no architecture")
                .subject("general.architecture")
                .hint("The file holds no language model")
        })?;
        let architecture = GgufArchitecture::named(name, &subject)?;
        let facts = facts_of(&file)?;
        let config = config_of(file.metadata(), architecture, &facts)?;
        let heads = |field: &str| config.get(field).and_then(Value::as_u64).map_or(0, |count| count as usize);
        let queries = heads("num_attention_heads").max(heads("n_head"));
        let keys = config.get("num_key_value_heads").and_then(Value::as_u64).map_or(queries, |count| count as usize);
        let mut tensors = BTreeMap::new();
        for (stored, tensor) in file.tensors().filter(|(name, _)| !ROTARY_DIVISORS.contains(&name.as_str())) {
            let unknown = || {
                Error::new(
                    ErrorCode::ConfigUnsupported,
                    format!("models of '{name}' are not known to have this tensor"),
                )
                .subject(stored)
                .hint("Its part in the computation is not known here, so the model would run wrongly")
            };
            let (module, part) = stored.rsplit_once('.').ok_or_else(unknown)?;
            let (hugging_face, order) = architecture.module(module).ok_or_else(unknown)?;
            // Scales of whole tensors, which some files have beside them, are not applied.
            if !matches!(part, "weight" | "bias") {
                return Err(unknown());
            }
            let place = Place {
                stored: stored.clone(),
                first_row: 0,
                order,
                heads: if order == RowOrder::KeyPairs { keys } else { queries },
                shifted: architecture.shifted_norms && tensor.shape.len() == 1 && part == "weight",
            };
            let info = |name: String, shape: Vec<usize>, bytes: u64| TensorInfo {
                name,
                dtype: tensor.gguf_type.name.to_string(),
                shape,
                bytes,
                file: path.to_path_buf(),
            };
            if order != RowOrder::Experts {
                // A vector of one weight per channel that GGUF keeps flat is a matrix of one row.
                let shape = match tensor.shape.as_slice() {
                    [width] if module.ends_with("ffn_gate_inp_shexp") => vec![1, *width],
                    shape => shape.to_vec(),
                };
                if !order.fits(shape[0], place.heads) {
                    return Err(wrong_shape(stored, &shape, &format!("rows in pairs over {} heads", place.heads)));
                }
                let name = format!("{hugging_face}.{part}");
                tensors.insert(name.clone(), (info(name, shape, tensor.bytes), place));
                continue;
            }
            let (&[experts, rows, columns], true) = (tensor.shape.as_slice(), tensor.bytes > 0) else {
                return Err(wrong_shape(stored, &tensor.shape, "[experts, rows, columns] without a zero"));
            };
            if experts > MOST_EXPERTS {
                return Err(wrong_shape(stored, &tensor.shape, &format!("at most {MOST_EXPERTS} experts")));
            }
            for expert in 0..experts {
                let name = format!("{}.{part}", hugging_face.replace("{}", &expert.to_string()));
                let place = Place { first_row: expert * rows, ..place.clone() };
                let bytes = tensor.bytes / experts as u64;
                tensors.insert(name.clone(), (info(name, vec![rows, columns], bytes), place));
            }
        }
        Ok(GgufTensors { file, architecture, config, tensors })
    }

    /// What a `config.json` would say.
    pub(crate) fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The values before the tensor table.
    pub(crate) fn metadata(&self) -> &GgufMetadata {
        self.file.metadata()
    }

    /// In name order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|(info, _)| info)
    }

    /// Those whose names begin with `prefix`, in name order.
    pub(crate) fn below(&self, prefix: String) -> impl Iterator<Item = &TensorInfo> {
        let range = self.tensors.range(prefix.clone()..);
        range.map(|(_, (info, _))| info).take_while(move |info| info.name.starts_with(&prefix))
    }

    /// What is known about a tensor.
    pub(crate) fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    /// The matrix of that name as it is stored: floats, or codes.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`, `ERR_QUANTIZATION_UNSUPPORTED` for a type that is not
    /// read, `ERR_CHECKPOINT_NOT_FINITE`.
    pub(crate) fn matrix(&self, name: &str) -> Result<WeightMatrix> {
        let (info, place) = self.place(name)?;
        let &[rows, columns] = info.shape.as_slice() else {
            return Err(wrong_shape(name, &info.shape, "[rows, columns]"));
        };
        if rows == 0 || columns == 0 {
            return Err(wrong_shape(name, &info.shape, "[rows, columns] without a zero"));
        }
        let tensor = self.stored(place)?;
        let bytes = self.ordered_rows(tensor, place, rows, columns)?;
        decode(name, tensor.gguf_type, rows, columns, &bytes)
    }

    /// The same with all its values as floats.
    ///
    /// # Errors
    /// As [`GgufTensors::matrix`].
    pub(crate) fn dense(&self, name: &str) -> Result<DenseMatrix> {
        Ok(match self.matrix(name)? {
            WeightMatrix::Dense(matrix) => matrix,
            quantized => DenseMatrix::from_f32(quantized.rows(), quantized.columns(), quantized.to_f32()),
        })
    }

    /// A vector as f32, all of it finite.
    ///
    /// # Errors
    /// As [`GgufTensors::matrix`].
    pub(crate) fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let (info, place) = self.place(name)?;
        let &[length] = info.shape.as_slice() else {
            return Err(wrong_shape(name, &info.shape, "[length]"));
        };
        if length == 0 {
            return Err(wrong_shape(name, &info.shape, "[length] without a zero"));
        }
        let tensor = self.stored(place)?;
        if !matches!(tensor.gguf_type.content, BlockContent::Float(_)) {
            let message = format!("the vector has type {}, expected F32, F16 or BF16", tensor.gguf_type.name);
            return Err(Error::new(ErrorCode::CheckpointDtype, message).subject(name).hint(GgufType::hint()));
        }
        let bytes = self.ordered_rows(tensor, place, length, 1)?;
        let mut values = decode(name, tensor.gguf_type, 1, length, &bytes)?.to_f32();
        if place.shifted {
            values.iter_mut().for_each(|value| *value -= 1.0);
        }
        Ok(values)
    }

    /// Type, shape and bytes of a tensor as a folder in the layout of Hugging Face would hold it, without codes.
    ///
    /// # Errors
    /// As [`GgufTensors::matrix`].
    pub(crate) fn plain(&self, name: &str) -> Result<(ElementType, Vec<usize>, Vec<u8>)> {
        let shape = self.require(name)?.shape.clone();
        if shape.len() == 1 {
            return Ok((ElementType::F32, shape, float_bytes(&self.vector(name)?, ElementType::F32)));
        }
        let in_block = name.starts_with(self.architecture.blocks);
        let matrix = match self.dense(name)? {
            matrix if self.architecture.transposed && in_block => matrix.transposed(),
            matrix => matrix,
        };
        let kind = matrix.element_type();
        Ok((kind, vec![matrix.rows(), matrix.columns()], float_bytes(&matrix.to_f32(), kind)))
    }

    /// The Linear `name`.
    ///
    /// # Errors
    /// As [`GgufTensors::matrix`].
    pub(crate) fn linear(&self, name: &str) -> Result<LinearWeight> {
        let matrix = self.matrix(&format!("{name}.weight"))?;
        let bias_name = format!("{name}.bias");
        let bias = match self.get(&bias_name) {
            Some(info) if info.shape != [matrix.rows()] => {
                return Err(wrong_shape(&bias_name, &info.shape, &format!("[{}]", matrix.rows())));
            }
            Some(_) => Some(self.vector(&bias_name)?),
            None => None,
        };
        Ok(LinearWeight { matrix, bias, low_rank: None })
    }

    /// Whether a tensor is a matrix of codes.
    pub(crate) fn has_codes(&self, name: &str) -> bool {
        let stored = self.place(name).and_then(|(info, place)| Ok((info, self.stored(place)?)));
        stored.is_ok_and(|(info, tensor)| {
            info.shape.len() == 2 && matches!(tensor.gguf_type.content, BlockContent::Codes(_))
        })
    }

    /// The type with codes that most weights of matrices have.
    pub(crate) fn main_type(&self) -> Option<&'static GgufType> {
        let mut weights: BTreeMap<u32, u64> = BTreeMap::new();
        for (_, tensor) in self.file.tensors().filter(|(_, tensor)| tensor.shape.len() > 1) {
            if !matches!(tensor.gguf_type.content, BlockContent::Float(_)) {
                *weights.entry(tensor.gguf_type.id).or_default() +=
                    tensor.bytes / tensor.gguf_type.block_bytes as u64 * tensor.gguf_type.block_elements as u64;
            }
        }
        let (&id, _) = weights.iter().max_by_key(|&(_, count)| count)?;
        GgufType::by_id(id)
    }

    /// The file.
    pub(crate) fn file(&self) -> &GgufFile {
        &self.file
    }

    /// What is known about a tensor, or `ERR_CHECKPOINT_TENSOR_MISSING`.
    pub(crate) fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.place(name).map(|(info, _)| info)
    }

    fn place(&self, name: &str) -> Result<&(TensorInfo, Place)> {
        self.tensors.get(name).ok_or_else(|| missing_tensor(name))
    }

    fn stored(&self, place: &Place) -> Result<&GgufTensor> {
        self.file.tensor(&place.stored).ok_or_else(|| Error::new(ErrorCode::Internal, "a tensor without a place"))
    }

    /// The bytes of the rows, in the order of Hugging Face.
    fn ordered_rows(&self, tensor: &GgufTensor, place: &Place, rows: usize, columns: usize) -> Result<Vec<u8>> {
        let width = columns / tensor.gguf_type.block_elements * tensor.gguf_type.block_bytes;
        let bytes = self.file.read_part(tensor, (place.first_row * width) as u64, rows * width)?;
        if matches!(place.order, RowOrder::Same | RowOrder::Experts) {
            return Ok(bytes);
        }
        let mut ordered = Vec::with_capacity(bytes.len());
        for row in 0..rows {
            let start = place.order.stored_row(row, rows, place.heads) * width;
            ordered.extend_from_slice(&bytes[start..start + width]);
        }
        Ok(ordered)
    }
}

/// What the tensors say beside the metadata.
fn facts_of(file: &GgufFile) -> Result<TensorFacts> {
    let embedding = file.tensor("token_embd.weight").map(|tensor| tensor.shape.clone());
    let Some(&[vocabulary, _]) = embedding.as_deref() else {
        return Err(Error::new(ErrorCode::CheckpointTensorMissing, "the file holds no embedding of tokens")
            .subject("token_embd.weight")
            .hint("The file holds a vocabulary only, or no language model"));
    };
    let has = |name: &str| file.tensor(name).is_some();
    Ok(TensorFacts {
        vocabulary,
        has_head: has("output.weight"),
        attention_bias: has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias"),
        mlp_bias: has("blk.0.ffn_up.bias"),
        rotary_divisors: rotary_divisors(file)?,
    })
}

fn rotary_divisors(file: &GgufFile) -> Result<RotaryDivisors> {
    let read = |name: &str| -> Result<Option<Vec<f32>>> {
        let Some(tensor) = file.tensor(name) else { return Ok(None) };
        let (&[length], BlockContent::Float(_)) = (tensor.shape.as_slice(), tensor.gguf_type.content) else {
            return Err(wrong_shape(name, &tensor.shape, "[pairs] of floats"));
        };
        if length == 0 {
            return Err(wrong_shape(name, &tensor.shape, "[pairs] without a zero"));
        }
        let bytes = file.read_part(tensor, 0, tensor.bytes as usize)?;
        Ok(Some(decode(name, tensor.gguf_type, 1, length, &bytes)?.to_f32()))
    };
    let [all, short, long] = ROTARY_DIVISORS;
    Ok(RotaryDivisors { short: read(short)?.or(read(all)?), long: read(long)? })
}

/// The path of the only GGUF file of a folder, `None` when there is none.
///
/// # Errors
/// `ERR_CHECKPOINT_NOT_FOUND` when there are several.
pub(crate) fn only_file_of(folder: &Path) -> Result<Option<PathBuf>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(None) };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files = paths.filter(|path| is_gguf(path) && path.is_file());
    let first = files.next();
    if first.is_some() && files.next().is_some() {
        return Err(Error::new(ErrorCode::CheckpointNotFound, "the folder holds several GGUF files")
            .subject(folder.display())
            .hint("Give the path of one of them"));
    }
    Ok(first)
}

/// Whether the name of a file says that it is GGUF.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}
