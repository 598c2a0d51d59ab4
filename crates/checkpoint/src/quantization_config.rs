use std::fmt;

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{GroupSize, INTEGER_BITS, QuantizedMatrix};
use serde_json::{Map, Value, json};

/// What `quant_method` says in files of this format.
const METHOD: &str = "compressed-tensors";
/// The one layout of compressed-tensors that is read and written.
const FORMAT: &str = "pack-quantized";
/// The release of compressed-tensors whose layout is written: dense packing of every width, packed zero points.
const VERSION: &str = "0.18.0";

const START_OVER: &str = "Supported is compressed-tensors 'pack-quantized' with integer weights of 2, 3, 4 or 8 bits; \
                          start from the unquantized checkpoint";

/// The `quantization_config` of `config.json` for compressed-tensors `pack-quantized`, weights only.
///
/// Format: `QuantizationConfig`, `QuantizationScheme` and `QuantizationArgs` of
/// <https://github.com/vllm-project/compressed-tensors>. One scheme for every quantized Linear; which Linears are
/// quantized is told by their tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// Width of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group_size: GroupSize,
    /// Whether the zero point of every group is `2^(bits−1)` and not stored.
    pub symmetric: bool,
    /// Whether Linears may carry `weight_g_idx`, the group of each column (`actorder: "group"`).
    pub group_index: bool,
    /// Linears that stay as they are. Other readers quantize every Linear that is not listed, so that `lm_head` must
    /// be here unless it is quantized; entries may begin with `re:`.
    pub ignore: Vec<String>,
}

impl QuantizationConfig {
    /// The name of the layout.
    pub fn format(&self) -> &'static str {
        FORMAT
    }

    /// How matrices are stored under this configuration.
    pub(crate) fn scheme(&self) -> Scheme {
        let &QuantizationConfig { bits, group_size, symmetric, group_index, .. } = self;
        Scheme { bits, group_size, symmetric, group_index }
    }

    /// Understands the value of `quantization_config`.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED` for every other method, layout or scheme, `ERR_CONFIG_INVALID` for a field that
    /// is missing or of the wrong type.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config = object(value, "quantization_config")?;
        match config.get("quant_method") {
            Some(Value::String(method)) if method == METHOD => {}
            Some(Value::String(method)) => return Err(unsupported("quant_method", method)),
            Some(_) => return Err(invalid("quantization_config.quant_method", "a string")),
            None => return Err(invalid("quantization_config.quant_method", "the name of the method")),
        }
        let layout = string_or(config, "format", FORMAT)?;
        if layout != FORMAT {
            return Err(unsupported("format", layout));
        }
        let status = string_or(config, "quantization_status", "compressed")?;
        if status != "compressed" {
            return Err(unsupported("quantization_status", status));
        }
        for field in ["kv_cache_scheme", "transform_config"] {
            require_empty(config, field)?;
        }
        if let Some(sparsity) = config.get("sparsity_config").and_then(|sparsity| sparsity.get("format"))
            && sparsity != "dense"
        {
            return Err(unsupported("sparsity_config.format", &sparsity.to_string()));
        }

        let groups = config.get("config_groups").ok_or_else(|| invalid("config_groups", "an object of schemes"))?;
        let mut scheme: Option<Scheme> = None;
        for (name, group) in object(groups, "config_groups")? {
            let parsed = Scheme::from_json(name, group)?;
            if scheme.replace(parsed).is_some_and(|first| first != parsed) {
                return Err(unsupported("config_groups", "several schemes that differ"));
            }
        }
        let Scheme { bits, group_size, symmetric, group_index } =
            scheme.ok_or_else(|| invalid("config_groups", "at least one scheme"))?;
        let ignore = match config.get("ignore") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(entries)) => entries
                .iter()
                .map(|entry| entry.as_str().map(str::to_string).ok_or_else(|| invalid("ignore", "a list of strings")))
                .collect::<Result<_>>()?,
            Some(_) => return Err(invalid("ignore", "a list of strings")),
        };
        Ok(QuantizationConfig { bits, group_size, symmetric, group_index, ignore })
    }

    /// The value of `quantization_config`. Only fields that every release of compressed-tensors with this layout knows.
    pub fn to_json(&self) -> Value {
        let (strategy, group_size) = match self.group_size {
            GroupSize::Columns(size) => ("group", json!(size)),
            GroupSize::WholeRow => ("channel", Value::Null),
        };
        let actorder = if self.group_index { json!("group") } else { Value::Null };
        json!({
            "quant_method": METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": self.bits,
                        "type": "int",
                        "symmetric": self.symmetric,
                        "strategy": strategy,
                        "group_size": group_size,
                        "actorder": actorder,
                        "dynamic": false,
                    },
                    "input_activations": null,
                    "output_activations": null,
                    "format": FORMAT,
                },
            },
            "ignore": self.ignore,
            "kv_cache_scheme": null,
            "global_compression_ratio": null,
            "version": VERSION,
        })
    }
}

/// How the weights of one `config_groups` entry, or one matrix, are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    bits: u8,
    group_size: GroupSize,
    symmetric: bool,
    group_index: bool,
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

    fn from_json(name: &str, group: &Value) -> Result<Self> {
        if group.is_array() {
            return Err(unsupported("config_groups", &format!("the preset '{name}'")));
        }
        let group = object(group, name)?;
        for field in ["input_activations", "output_activations"] {
            require_empty(group, field)?;
        }
        let layout = string_or(group, "format", FORMAT)?;
        if layout != FORMAT {
            return Err(unsupported("format", layout));
        }
        let weights = group.get("weights").filter(|weights| !weights.is_null());
        let weights = object(weights.ok_or_else(|| unsupported("weights", "none"))?, "weights")?;

        let kind = string_or(weights, "type", "int")?;
        if kind != "int" {
            return Err(unsupported("weights.type", kind));
        }
        let bits = integer_or(weights, "num_bits", 8)?;
        let bits = u8::try_from(bits)
            .ok()
            .filter(|bits| INTEGER_BITS.contains(bits))
            .ok_or_else(|| unsupported("weights.num_bits", &bits.to_string()))?;
        let symmetric = bool_or(weights, "symmetric", true)?;
        if weights.get("dynamic").is_some_and(|dynamic| *dynamic != false) {
            return Err(unsupported("weights.dynamic", "true"));
        }
        let size = integer_or(weights, "group_size", -1)?;
        let inferred = if size > 0 { "group" } else { "channel" };
        let group_size = match string_or(weights, "strategy", inferred)? {
            "group" => match usize::try_from(size) {
                Ok(size) if size > 0 => GroupSize::Columns(size),
                _ => return Err(invalid("weights.group_size", "a positive number")),
            },
            "channel" => GroupSize::WholeRow,
            other => return Err(unsupported("weights.strategy", other)),
        };
        let group_index = match weights.get("actorder") {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Bool(true)) => true,
            Some(Value::String(order)) => match order.as_str() {
                "group" | "dynamic" => true,
                "weight" | "static" => false,
                other => return Err(unsupported("weights.actorder", other)),
            },
            Some(_) => return Err(invalid("weights.actorder", "null, \"group\" or \"weight\"")),
        };
        Ok(Scheme { bits, group_size, symmetric, group_index })
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

fn object<'a>(value: &'a Value, field: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| invalid(field, "an object"))
}

fn string_or<'a>(map: &'a Map<String, Value>, field: &str, default: &'a str) -> Result<&'a str> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(invalid(field, "a string")),
    }
}

fn integer_or(map: &Map<String, Value>, field: &str, default: i64) -> Result<i64> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value.as_i64().ok_or_else(|| invalid(field, "an integer")),
    }
}

fn bool_or(map: &Map<String, Value>, field: &str, default: bool) -> Result<bool> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value.as_bool().ok_or_else(|| invalid(field, "true or false")),
    }
}

fn require_empty(map: &Map<String, Value>, field: &str) -> Result<()> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(map)) if map.is_empty() => Ok(()),
        Some(_) => Err(unsupported(field, "set")),
    }
}

fn unsupported(field: &str, value: &str) -> Error {
    Error::new(ErrorCode::QuantizationUnsupported, format!("the checkpoint is quantized with {field} {value}"))
        .subject(field)
        .hint(START_OVER)
}

fn invalid(field: &str, expected: &str) -> Error {
    Error::new(ErrorCode::ConfigInvalid, format!("'{field}' of the quantization config is not {expected}"))
        .subject(field)
        .hint("config.json is damaged; download it again")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> QuantizationConfig {
        QuantizationConfig {
            bits: 4,
            group_size: GroupSize::Columns(128),
            symmetric: false,
            group_index: true,
            ignore: vec!["lm_head".into()],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let whole_row = QuantizationConfig {
            bits: 3,
            group_size: GroupSize::WholeRow,
            symmetric: true,
            group_index: false,
            ignore: Vec::new(),
        };
        for config in [config(), whole_row] {
            assert_eq!(QuantizationConfig::from_json(&config.to_json()).unwrap(), config);
        }
    }

    #[test]
    fn the_config_of_a_published_checkpoint_is_read() {
        // The fields and defaults that llm-compressor writes for its W4A16 preset.
        let published = json!({
            "config_groups": { "group_0": {
                "format": "pack-quantized", "input_activations": null, "output_activations": null,
                "targets": ["Linear"],
                "weights": {
                    "actorder": "static", "block_structure": null, "dynamic": false, "group_size": 128, "num_bits": 4,
                    "observer": "memoryless_minmax", "observer_kwargs": {}, "scale_dtype": null, "strategy": "group",
                    "symmetric": true, "type": "int", "zp_dtype": null
                }
            } },
            "format": "pack-quantized", "global_compression_ratio": null, "ignore": ["lm_head", "re:.*gate$"],
            "kv_cache_scheme": null, "quant_method": "compressed-tensors", "quantization_status": "compressed",
            "sparsity_config": {}, "transform_config": {}, "version": "0.18.0"
        });
        let config = QuantizationConfig::from_json(&published).unwrap();
        assert_eq!((config.bits, config.group_size), (4, GroupSize::Columns(128)));
        assert!(config.symmetric && !config.group_index);
        assert_eq!(config.ignore, ["lm_head", "re:.*gate$"]);
    }

    #[test]
    fn other_methods_and_schemes_are_refused_by_name() {
        for method in ["gptq", "awq", "bitsandbytes", "fp8", "kintsugi-next"] {
            let error = QuantizationConfig::from_json(&json!({ "quant_method": method, "bits": 4 })).unwrap_err();
            assert_eq!(error.code, ErrorCode::QuantizationUnsupported);
            assert!(error.message.contains(method) && !error.hint.is_empty());
        }
        let changes: &[(&str, Value, ErrorCode)] = &[
            ("/format", json!("nvfp4-pack-quantized"), ErrorCode::QuantizationUnsupported),
            ("/kv_cache_scheme", json!({ "num_bits": 8 }), ErrorCode::QuantizationUnsupported),
            ("/config_groups", json!({}), ErrorCode::ConfigInvalid),
            ("/config_groups", json!({ "W4A16": ["Linear"] }), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0", json!(3), ErrorCode::ConfigInvalid),
            ("/config_groups/group_0/input_activations", json!({ "num_bits": 8 }), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0/weights/num_bits", json!(5), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0/weights/num_bits", json!("4"), ErrorCode::ConfigInvalid),
            ("/config_groups/group_0/weights/type", json!("float"), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0/weights/group_size", json!(0), ErrorCode::ConfigInvalid),
            ("/config_groups/group_0/weights/strategy", json!("block"), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0/weights/actorder", json!(7), ErrorCode::ConfigInvalid),
            ("/ignore", json!([1]), ErrorCode::ConfigInvalid),
        ];
        for (pointer, value, code) in changes {
            let mut json = config().to_json();
            *json.pointer_mut(pointer).unwrap() = value.clone();
            let error = QuantizationConfig::from_json(&json).unwrap_err();
            assert_eq!(error.code, *code, "{pointer} = {value}");
            assert!(!error.subject.is_empty() && !error.hint.is_empty());
        }
    }

    #[test]
    fn two_schemes_must_agree() {
        let mut json = config().to_json();
        let first = json["config_groups"]["group_0"].clone();
        json["config_groups"]["group_1"] = first;
        assert_eq!(QuantizationConfig::from_json(&json).unwrap(), config());
        json["config_groups"]["group_1"]["weights"]["num_bits"] = json!(8);
        assert_eq!(QuantizationConfig::from_json(&json).unwrap_err().code, ErrorCode::QuantizationUnsupported);
    }
}
