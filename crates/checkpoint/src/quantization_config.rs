use std::fmt;

use kintsugi_runtime::Result;
use kintsugi_weights::{CODE_BITS, GroupSize, QuantizedMatrix};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config_fields::{invalid, object, string_or, unsupported};
use crate::{FORMATS, LinearFormat};

/// The field that names the method, in every configuration.
const METHOD: &str = "quant_method";

/// How the Linears of a checkpoint are quantized and laid out: the `quantization_config` of its `config.json`, weights
/// only.
///
/// One scheme for every quantized Linear; which Linears are quantized is told by their tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// The layout of the tensors.
    pub format: &'static dyn LinearFormat,
    /// Width of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group_size: GroupSize,
    /// Whether the zero point of every group is `2^(bits−1)`.
    pub symmetric: bool,
    /// Whether Linears may carry the group of each column.
    pub group_index: bool,
    /// Linears that stay as they are. Other readers quantize every Linear that is not listed, so that `lm_head` must
    /// be here unless it is quantized; entries may begin with `re:`.
    pub ignore: Vec<String>,
}

impl QuantizationConfig {
    /// How matrices are stored under this configuration.
    pub(crate) fn scheme(&self) -> Scheme {
        let &QuantizationConfig { bits, group_size, symmetric, group_index, .. } = self;
        Scheme { bits, group_size, symmetric, group_index }
    }

    /// Understands the value of `quantization_config`.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED` for every method, layout or scheme that no format of the table reads,
    /// `ERR_CONFIG_INVALID` for a field that is missing or of the wrong type.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config = object(value, "quantization_config")?;
        match config.get(METHOD) {
            Some(Value::String(method)) => Self::from_fields(method, config),
            Some(_) => Err(invalid("quantization_config.quant_method", "a string")),
            None => Err(invalid("quantization_config.quant_method", "the name of the method")),
        }
    }

    /// Understands the fields of a configuration of `method`.
    ///
    /// # Errors
    /// As [`QuantizationConfig::from_json`].
    pub(crate) fn from_fields(method: &str, config: &Map<String, Value>) -> Result<Self> {
        let mut stranger = unsupported(METHOD, method);
        for format in FORMATS.iter().filter(|format| format.method() == method) {
            let mut fields =
                format.layout_fields().iter().filter(|&&field| config.get(field).is_some_and(|v| !v.is_null()));
            let (field, layout) = match fields.next() {
                Some(&field) => (field, string_or(config, field, "")?),
                None => ("", ""),
            };
            if format.layouts().contains(&layout.to_ascii_lowercase().as_str()) {
                return format.read_config(config);
            }
            stranger = unsupported(field, layout);
        }
        Err(stranger)
    }

    /// The value of `quantization_config`, with the fields that other readers of the format expect.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED` for what the format cannot say.
    pub fn to_json(&self) -> Result<Value> {
        self.format.write_config(self)
    }
}

/// How the weights of a configuration, or of one matrix, are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scheme {
    pub(crate) bits: u8,
    pub(crate) group_size: GroupSize,
    pub(crate) symmetric: bool,
    pub(crate) group_index: bool,
}

impl Scheme {
    /// How `matrix` is stored.
    pub(crate) fn of(matrix: &QuantizedMatrix) -> Self {
        Scheme {
            bits: matrix.bits(),
            group_size: matrix.group_size(),
            symmetric: matrix.zero_points().is_none(),
            group_index: matrix.group_index().is_some(),
        }
    }

    /// Whether a matrix stored like this can be read where `config` speaks of `stated`: a Linear whose columns are in
    /// order needs no index where others have one.
    pub(crate) fn fits(self, stated: Scheme) -> bool {
        self == stated || (stated.group_index && Scheme { group_index: true, ..self } == stated)
    }

    /// `bits` and `group_size` as configurations write them: −1 is one group per row.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED` for other widths, `ERR_CONFIG_INVALID` for sizes that are no size.
    pub(crate) fn grid(bits: i64, size: i64) -> Result<(u8, GroupSize)> {
        let group_size = match usize::try_from(size) {
            Ok(size) if size > 0 => GroupSize::Columns(size),
            _ if size == -1 => GroupSize::WholeRow,
            _ => return Err(invalid("group_size", "a positive number")),
        };
        Ok((Self::width(bits, "bits")?, group_size))
    }

    /// A code width that is known.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED`.
    pub(crate) fn width(bits: i64, field: &str) -> Result<u8> {
        let known = u8::try_from(bits).ok().filter(|bits| CODE_BITS.contains(bits));
        known.ok_or_else(|| unsupported(field, &bits.to_string()))
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grid = if self.symmetric { "symmetric" } else { "asymmetric" };
        match self.group_size {
            GroupSize::Columns(size) => write!(f, "{} bits, {grid}, groups of {size}", self.bits)?,
            GroupSize::WholeRow => write!(f, "{} bits, {grid}, one group per row", self.bits)?,
        }
        f.write_str(if self.group_index { ", with group index" } else { "" })
    }
}

/// The `group_size` that configurations write: −1 for one group per row.
pub(crate) fn group_size_number(group_size: GroupSize) -> i64 {
    match group_size {
        GroupSize::Columns(size) => i64::try_from(size).unwrap_or(i64::MAX),
        GroupSize::WholeRow => -1,
    }
}
