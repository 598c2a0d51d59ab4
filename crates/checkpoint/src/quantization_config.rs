use std::collections::BTreeMap;

use kintsugi_runtime::Result;
use kintsugi_weights::{GroupAxis, GroupSize};
use serde_json::{Map, Value};

use crate::config_fields::{invalid, object, string_or, unsupported};
use crate::{FORMATS, LinearFormat, LinearTarget, Scheme, SchemeException};

/// The field that names the method, in every configuration.
const METHOD: &str = "quant_method";

/// How the Linears of a checkpoint are quantized and laid out: the `quantization_config` of its `config.json`, weights
/// only.
///
/// Which Linears are quantized is told by their tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// The layout of the tensors.
    pub format: &'static dyn LinearFormat,
    /// Width of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Weights that share a scale.
    pub group_size: GroupSize,
    /// Which way they lie.
    pub group_axis: GroupAxis,
    /// Whether the zero point of every group is `2^(bits−1)`.
    pub symmetric: bool,
    /// Whether Linears may carry the group of each column.
    pub group_index: bool,
    /// Linears that are quantized otherwise; the first that matches counts. Those of the usual scheme may be listed too.
    pub exceptions: Vec<SchemeException>,
    /// Linears that stay as they are. Other readers quantize every Linear that is not listed, so that `lm_head` must
    /// be here unless it is quantized; entries may begin with `re:`.
    pub ignore: Vec<String>,
}

impl QuantizationConfig {
    /// A configuration of Linears that are all stored in the same way.
    pub fn uniform(format: &'static dyn LinearFormat, scheme: Scheme, ignore: Vec<String>) -> Self {
        let Scheme { bits, group_size, group_axis, symmetric, group_index } = scheme;
        QuantizationConfig {
            format,
            bits,
            group_size,
            group_axis,
            symmetric,
            group_index,
            exceptions: Vec::new(),
            ignore,
        }
    }

    /// The configuration that describes `linears`: the scheme of most of them, and where they differ all of them by
    /// name. `None` when there are none.
    pub fn describing(
        format: &'static dyn LinearFormat,
        linears: &BTreeMap<String, Scheme>,
        ignore: Vec<String>,
    ) -> Option<Self> {
        let group_index = linears.values().any(|scheme| scheme.group_index);
        let stated = |scheme: &Scheme| Scheme { group_index, ..*scheme };
        let mut counts: Vec<(Scheme, usize)> = Vec::new();
        for scheme in linears.values().map(stated) {
            match counts.iter_mut().find(|(counted, _)| *counted == scheme) {
                Some((_, count)) => *count += 1,
                None => counts.push((scheme, 1)),
            }
        }
        // The first of the most frequent ones.
        let most = counts.iter().map(|&(_, count)| count).max()?;
        let &(usual, _) = counts.iter().find(|&&(_, count)| count == most)?;
        let mixed = linears.values().any(|scheme| stated(scheme) != usual);
        let exceptions = linears
            .iter()
            .filter(|_| mixed)
            .map(|(name, scheme)| SchemeException { linears: LinearTarget::name(name), scheme: stated(scheme) })
            .collect();
        Some(QuantizationConfig { exceptions, ..Self::uniform(format, usual, ignore) })
    }

    /// How matrices are stored under this configuration, exceptions apart.
    pub fn scheme(&self) -> Scheme {
        let &QuantizationConfig { bits, group_size, group_axis, symmetric, group_index, .. } = self;
        Scheme { bits, group_size, group_axis, symmetric, group_index }
    }

    /// How the Linear `name` is stored, if it is quantized.
    pub fn scheme_of(&self, name: &str) -> Scheme {
        let exception = self.exceptions.iter().find(|exception| exception.linears.matches(name));
        exception.map_or(self.scheme(), |exception| exception.scheme)
    }

    /// This configuration as the Linear `name` alone sees it.
    pub(crate) fn of_linear(&self, name: &str) -> Self {
        Self::uniform(self.format, self.scheme_of(name), Vec::new())
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
            if !field.is_empty() {
                stranger = unsupported(field, layout);
            }
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
