//! What the layouts of compressed-tensors share: the `quantization_config` (`QuantizationConfig`, `QuantizationScheme`
//! and `QuantizationArgs` of <https://github.com/vllm-project/compressed-tensors>), and what stands beside the codes of
//! a Linear.

use kintsugi_runtime::Result;
use kintsugi_weights::{GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts};
use serde_json::{Map, Value, json};

use super::assemble;
use crate::config_fields::{bool_or, integer, invalid, object, require_empty, string_or, strings, unsupported};
use crate::scheme::ExpressionReader;
use crate::{LinearFormat, LinearTarget, LinearTensors, QuantizationConfig, Scheme, SchemeException};

/// What `quant_method` says.
pub(super) const METHOD: &str = "compressed-tensors";
/// The field that names the layout, of the whole and of each scheme.
pub(super) const LAYOUT_FIELD: &str = "format";
/// The target that means every Linear.
const CLASS: &str = "Linear";
/// The release of compressed-tensors whose layout is written: dense packing of every width, packed zero points.
const VERSION: &str = "0.18.0";

/// Suffixes of the tensors beside the codes.
pub(super) const SCALE: &str = "weight_scale";
pub(super) const ZERO_POINT: &str = "weight_zero_point";
pub(super) const GROUP_INDEX: &str = "weight_g_idx";

/// Joins `codes` `[rows, columns]` with the scales `[rows, groups]`, the zero points that `zero_points` reads for so many
/// groups, and the group index. Zero points and index are there if, and only if, the configuration speaks of them; of
/// the index that it may.
///
/// # Errors
/// As [`LinearFormat::decode`].
pub(super) fn join(
    config: &QuantizationConfig,
    linear: &LinearTensors<'_>,
    [rows, columns]: [usize; 2],
    codes: Vec<u8>,
    zero_points: impl FnOnce(usize) -> Result<Vec<u8>>,
) -> Result<QuantizedMatrix> {
    let groups = config.group_size.groups(columns);
    let (scales, scale_type) = linear.scales(SCALE, [rows, groups])?;
    let zero_points = if config.symmetric {
        linear.refuse_unannounced(ZERO_POINT, "the grid is asymmetric")?;
        None
    } else {
        Some(zero_points(groups)?)
    };
    let group_index = if !config.group_index {
        linear.refuse_unannounced(GROUP_INDEX, "columns have groups of their own")?;
        None
    } else if linear.has(GROUP_INDEX) {
        linear.group_index(GROUP_INDEX, columns, groups)?
    } else {
        None
    };
    let parts = QuantizedParts {
        rows,
        columns,
        bits: config.bits,
        group_size: config.group_size,
        codes,
        scales,
        scale_type,
        zero_points,
        group_index,
        ..QuantizedParts::default()
    };
    assemble(linear, parts)
}

/// Understands the configuration of a checkpoint that is laid out as `format`.
///
/// # Errors
/// `ERR_QUANTIZATION_UNSUPPORTED`, `ERR_CONFIG_INVALID`.
pub(super) fn read_config(
    format: &'static dyn LinearFormat,
    config: &Map<String, Value>,
) -> Result<QuantizationConfig> {
    read_schemes(format, config, "int")
}

/// Understands the configuration of a layout of four-bit floats in groups of `size` columns.
///
/// # Errors
/// As [`read_config`].
pub(super) fn read_float_config(
    format: &'static dyn LinearFormat,
    config: &Map<String, Value>,
    size: usize,
) -> Result<QuantizationConfig> {
    let read = read_schemes(format, config, "float")?;
    match read.scheme() {
        Scheme {
            bits: 4,
            group_size: GroupSize::Columns(groups),
            group_axis: GroupAxis::Input,
            symmetric: true,
            group_index: false,
        } if groups == size && read.exceptions.is_empty() => Ok(read),
        other => Err(unsupported("config_groups", &format!("{other} of floats"))),
    }
}

fn read_schemes(
    format: &'static dyn LinearFormat,
    config: &Map<String, Value>,
    number: &str,
) -> Result<QuantizationConfig> {
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
    // Groups that name Linears go before the one for the class of all Linears.
    let mut usual: Option<Scheme> = None;
    let mut exceptions = Vec::new();
    let mut expressions = ExpressionReader::new("config_groups");
    for (name, group) in object(groups, "config_groups")? {
        let scheme = read_scheme(format, number, name, group)?;
        let targets = strings(object(group, name)?, "targets")?;
        for target in &targets {
            match target.strip_prefix("re:") {
                _ if target == CLASS => {
                    if usual.replace(scheme).is_some_and(|first| first != scheme) {
                        return Err(unsupported("config_groups", "several schemes for all Linears"));
                    }
                }
                Some(expression) => {
                    exceptions.push(SchemeException { linears: expressions.read(expression)?, scheme });
                }
                None => exceptions.push(SchemeException { linears: LinearTarget::name(target), scheme }),
            }
        }
        if targets.is_empty() {
            usual.get_or_insert(scheme);
        }
    }
    let first = exceptions.first().map(|exception| exception.scheme);
    let usual = usual.or(first).ok_or_else(|| invalid("config_groups", "at least one scheme"))?;
    // Where all agree, names have nothing to tell.
    if exceptions.iter().all(|exception| exception.scheme == usual) {
        exceptions.clear();
    }
    let ignore = strings(config, "ignore")?;
    Ok(QuantizationConfig { exceptions, ..QuantizationConfig::uniform(format, usual, ignore) })
}

/// The configuration of a checkpoint in `layout`. Only fields that every release of compressed-tensors with this layout
/// knows.
pub(super) fn write_config(config: &QuantizationConfig, layout: &str) -> Value {
    let mut groups = Map::new();
    // Readers that fuse Linears match the class before they ask for the names of the parts, so the class is a target
    // only where names do not say everything.
    if config.exceptions.iter().all(|exception| exception.scheme != config.scheme()) {
        groups.insert("group_0".into(), write_group(config.scheme(), &[CLASS.to_owned()], layout));
    }
    // Linears of one scheme in one group, in the order in which schemes first appear.
    let mut rest: Vec<&SchemeException> = config.exceptions.iter().collect();
    while let Some(&first) = rest.first() {
        let (group, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|other| other.scheme == first.scheme);
        let targets: Vec<String> = group.iter().map(|exception| target(&exception.linears)).collect();
        groups.insert(format!("group_{}", groups.len()), write_group(first.scheme, &targets, layout));
        rest = others;
    }
    json!({
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": config.ignore,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
        "version": VERSION,
    })
}

fn write_group(scheme: Scheme, targets: &[String], layout: &str) -> Value {
    let (strategy, group_size) = match scheme.group_size {
        GroupSize::Columns(size) => ("group", json!(size)),
        GroupSize::WholeRow => ("channel", Value::Null),
    };
    let actorder = if scheme.group_index { json!("group") } else { Value::Null };
    json!({
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": strategy,
            "group_size": group_size,
            "actorder": actorder,
            "dynamic": false,
        },
        "input_activations": null,
        "output_activations": null,
        "format": layout,
    })
}

fn target(linears: &LinearTarget) -> String {
    if linears.is_expression() { format!("re:{}", linears.text()) } else { linears.text().to_owned() }
}

fn read_scheme(format: &dyn LinearFormat, number: &str, name: &str, group: &Value) -> Result<Scheme> {
    if group.is_array() {
        return Err(unsupported("config_groups", &format!("the preset '{name}'")));
    }
    let group = object(group, name)?;
    refuse_static_activations(group)?;
    require_empty(group, "output_activations")?;
    let layout = string_or(group, LAYOUT_FIELD, "")?;
    if !layout.is_empty() && !format.layouts().contains(&layout) {
        return Err(unsupported(LAYOUT_FIELD, layout));
    }
    let weights = group.get("weights").filter(|weights| !weights.is_null());
    let weights = object(weights.ok_or_else(|| unsupported("weights", "none"))?, "weights")?;

    let kind = string_or(weights, "type", "int")?;
    if kind != number {
        return Err(unsupported("weights.type", kind));
    }
    let bits = Scheme::width(integer(weights, "num_bits")?.unwrap_or(8), "weights.num_bits")?;
    let symmetric = bool_or(weights, "symmetric", true)?;
    if weights.get("dynamic").is_some_and(|dynamic| *dynamic != false) {
        return Err(unsupported("weights.dynamic", "true"));
    }
    let size = integer(weights, "group_size")?.unwrap_or(-1);
    let inferred = if size > 0 { "group" } else { "channel" };
    let group_size = match string_or(weights, "strategy", inferred)? {
        "group" | "tensor_group" => match usize::try_from(size) {
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
    Ok(Scheme { bits, group_size, group_axis: GroupAxis::Input, symmetric, group_index })
}

/// Activations that are rounded to 8-bit integers or 4-bit floats while the model runs leave no trace in the checkpoint: the weights
/// mean the same without, and computing with the activations as they are is the more exact reading. Activations with
/// stored scales, or in other types, are another model.
fn refuse_static_activations(group: &Map<String, Value>) -> Result<()> {
    let field = "input_activations";
    let Some(activations) = group.get(field).filter(|activations| !activations.is_null()) else { return Ok(()) };
    let activations = object(activations, field)?;
    if activations.is_empty() {
        return Ok(());
    }
    // "local": scales of groups are dynamic, the one of the tensor is stored and only shifts their range.
    let bits = integer(activations, "num_bits")?.unwrap_or(8);
    let kind = string_or(activations, "type", "int")?;
    let local = (bits, kind) == (4, "float");
    let dynamic = activations.get("dynamic").is_some_and(|dynamic| *dynamic == true || (local && *dynamic == "local"));
    if dynamic && matches!((bits, kind), (8, "int") | (4, "float")) {
        return Ok(());
    }
    let when = if dynamic { "dynamic" } else { "static" };
    Err(unsupported(field, &format!("of {when} {bits}-bit {kind}")))
}

#[cfg(test)]
mod tests {
    use kintsugi_runtime::ErrorCode;

    use super::*;
    use crate::PackQuantized;

    fn config() -> QuantizationConfig {
        let scheme = Scheme {
            bits: 4,
            group_size: GroupSize::Columns(128),
            group_axis: GroupAxis::Input,
            symmetric: false,
            group_index: true,
        };
        QuantizationConfig::uniform(&PackQuantized, scheme, vec!["lm_head".into()])
    }

    #[test]
    fn what_is_written_is_read() {
        let scheme = Scheme {
            bits: 3,
            group_size: GroupSize::WholeRow,
            group_axis: GroupAxis::Input,
            symmetric: true,
            group_index: false,
        };
        let whole_row = QuantizationConfig::uniform(&PackQuantized, scheme, Vec::new());
        let except = |linears, bits| SchemeException { linears, scheme: Scheme { bits, ..scheme } };
        let mixed = QuantizationConfig {
            exceptions: vec![
                except(LinearTarget::name("model.layers.0.mlp.down_proj"), 8),
                except(LinearTarget::name("model.layers.1.mlp.down_proj"), 8),
                except(LinearTarget::expression(r".*\.self_attn\.v_proj").unwrap(), 6),
            ],
            ..whole_row.clone()
        };
        assert_eq!(mixed.to_json().unwrap()["config_groups"].as_object().unwrap().len(), 3);
        for config in [config(), whole_row, mixed] {
            assert_eq!(QuantizationConfig::from_json(&config.to_json().unwrap()).unwrap(), config);
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
        for method in ["bitsandbytes", "hqq", "quark", "kintsugi-next"] {
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
            ("/config_groups/group_0/weights/num_bits", json!(7), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0/weights/num_bits", json!("4"), ErrorCode::ConfigInvalid),
            ("/config_groups/group_0/weights/type", json!("float"), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0/weights/group_size", json!(0), ErrorCode::ConfigInvalid),
            ("/config_groups/group_0/weights/strategy", json!("block"), ErrorCode::QuantizationUnsupported),
            ("/config_groups/group_0/weights/actorder", json!(7), ErrorCode::ConfigInvalid),
            ("/ignore", json!([1]), ErrorCode::ConfigInvalid),
        ];
        for (pointer, value, code) in changes {
            let mut json = config().to_json().unwrap();
            *json.pointer_mut(pointer).unwrap() = value.clone();
            let error = QuantizationConfig::from_json(&json).unwrap_err();
            assert_eq!(error.code, *code, "{pointer} = {value}");
            assert!(!error.subject.is_empty() && !error.hint.is_empty());
        }
    }

    #[test]
    fn groups_name_their_linears() {
        let mut json = config().to_json().unwrap();
        let first = json["config_groups"]["group_0"].clone();
        json["config_groups"]["group_1"] = first;
        assert_eq!(QuantizationConfig::from_json(&json).unwrap(), config());
        json["config_groups"]["group_1"]["weights"]["num_bits"] = json!(8);
        assert_eq!(QuantizationConfig::from_json(&json).unwrap_err().code, ErrorCode::QuantizationUnsupported);
        json["config_groups"]["group_1"]["targets"] = json!(["re:.*down_proj", "lm_head"]);
        let mixed = QuantizationConfig::from_json(&json).unwrap();
        assert_eq!(mixed.scheme_of("model.layers.0.mlp.up_proj"), config().scheme());
        for name in ["model.layers.0.mlp.down_proj", "lm_head"] {
            assert_eq!(mixed.scheme_of(name), Scheme { bits: 8, ..config().scheme() });
        }
        json["config_groups"]["group_1"]["targets"] = json!(["re:("]);
        assert_eq!(QuantizationConfig::from_json(&json).unwrap_err().code, ErrorCode::ConfigInvalid);
    }
}
