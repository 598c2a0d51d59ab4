use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value};

use crate::float8_scaling::Float8Scaling;
use crate::tensor_set::TensorSet;
use crate::{Checkpoint, FORMATS, LinearTensors, QuantizationConfig, TensorInfo};

/// The suffix of the tensor of a Linear that is stored in one piece.
pub(crate) const DENSE: &str = "weight";

/// Files that said how weights are quantized before `config.json` did, and the method of those that name none.
const OLD_CONFIGS: [(&str, &str); 2] = [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

const OTHER_CONFIG: &str = "Take config.json with its quantization_config from the same source as the weights";

/// What a folder says about how its Linears are stored.
#[derive(Debug)]
pub(crate) struct LinearStorage {
    quantization: Option<QuantizationConfig>,
    float8: Option<Float8Scaling>,
    notices: Vec<String>,
}

/// How one Linear is stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StoredAs<'a> {
    /// Plain floats in `NAME.weight`.
    Dense,
    /// 8-bit floats with scales.
    Float8(Float8Scaling),
    /// Integer codes.
    Quantized(&'a QuantizationConfig),
}

impl LinearStorage {
    /// From `config.json`, or from a file of the time before it, corrected by the data.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED`, `ERR_CONFIG_INVALID`; what reading the tensors of a Linear reports.
    pub(crate) fn discover(folder: &Path, config: &Map<String, Value>, tensors: &TensorSet) -> Result<Self> {
        let mut stated = Checkpoint::QUANTIZATION_FIELDS.iter().filter_map(|&field| config.get(field));
        let stated = stated.find(|value| !value.is_null());
        let float8 = stated.map(Float8Scaling::from_json).transpose()?.flatten();
        let mut quantization = match stated {
            Some(_) if float8.is_some() => None,
            Some(stated) => Some(QuantizationConfig::from_json(stated)?),
            None => read_old_config(folder, tensors)?,
        };
        let notice = quantization.as_mut().map(|quantization| settle(quantization, tensors)).transpose()?;
        Ok(LinearStorage { quantization, float8, notices: notice.flatten().into_iter().collect() })
    }

    /// How weights are quantized to integers, if they are.
    pub(crate) fn quantization(&self) -> Option<&QuantizationConfig> {
        self.quantization.as_ref()
    }

    /// What was read otherwise than the folder says.
    pub(crate) fn notices(&self) -> &[String] {
        &self.notices
    }

    /// How the Linear `name` is stored; [`StoredAs::Dense`] too when it is not there at all.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_CORRUPT` for a Linear in two forms, `ERR_QUANTIZATION_UNSUPPORTED` for one in another form than
    /// the folder says.
    pub(crate) fn of(&self, name: &str, tensors: &TensorSet) -> Result<StoredAs<'_>> {
        let dense = tensors.get(&format!("{name}.{DENSE}"));
        let packed = packed_markers().find_map(|marker| tensors.get(&format!("{name}.{marker}")));
        let stored = match (dense, packed) {
            // Some formats keep their codes where plain weights lie.
            (Some(_), Some(packed)) if packed.name.starts_with(&format!("{name}.{DENSE}.")) => packed,
            (Some(_), Some(_)) => {
                return Err(Error::new(ErrorCode::CheckpointCorrupt, "the Linear is stored both packed and unpacked")
                    .subject(name)
                    .hint("Two checkpoints may be mixed in the folder; download it again"));
            }
            (None, Some(packed)) => packed,
            (Some(dense), None) if dense.dtype == "I8" => dense,
            (Some(dense), None) if dense.dtype == "F8_E4M3" => {
                return Ok(self.float8.map_or(StoredAs::Dense, StoredAs::Float8));
            }
            _ => return Ok(StoredAs::Dense),
        };
        let other = |message: String| {
            Err(Error::new(ErrorCode::QuantizationUnsupported, message).subject(&stored.name).hint(OTHER_CONFIG))
        };
        match &self.quantization {
            None => other("config.json does not say how the Linear is quantized".into()),
            Some(config) if stored.name != format!("{name}.{}", config.format.marker()) => {
                other(format!("the Linear is not stored as {}, which config.json says", config.format.name()))
            }
            Some(config) => Ok(StoredAs::Quantized(config)),
        }
    }
}

/// Suffixes that only packed Linears have.
pub(crate) fn packed_markers() -> impl Iterator<Item = &'static str> {
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
            let config = Checkpoint::read_config(&path)?;
            let method = config.get("quant_method").and_then(Value::as_str).unwrap_or(method);
            return QuantizationConfig::from_fields(method, &config).map(Some);
        }
    }
    Ok(None)
}

/// Lets the format correct the configuration by the first Linear that is stored in it.
fn settle(quantization: &mut QuantizationConfig, tensors: &TensorSet) -> Result<Option<String>> {
    let format = quantization.format;
    let name_of = |tensor: &'_ TensorInfo| -> Option<String> {
        Some(tensor.name.strip_suffix(format.marker())?.strip_suffix('.')?.to_owned())
    };
    match tensors.iter().find_map(name_of) {
        Some(name) => {
            let mut seen = quantization.of_linear(&name);
            let notice = format.settle(&mut seen, &LinearTensors::new(&name, tensors))?;
            quantization.format = seen.format;
            if quantization.exceptions.is_empty() {
                quantization.symmetric = seen.symmetric;
            }
            Ok(notice)
        }
        None => Ok(None),
    }
}
