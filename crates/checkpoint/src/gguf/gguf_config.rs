//! The metadata of a GGUF file as a `config.json`, and the reverse.

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value, json};

use super::gguf_metadata::invalid;
use super::names::{FieldKind, GgufArchitecture};
use super::{GgufArray, GgufMetadata, GgufValue};

/// Control tokens that end a turn beside the one that the metadata names, as llama.cpp knows them.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<|end_of_text|>",
];

/// What the tensors say beside the metadata.
pub(crate) struct TensorFacts {
    /// Rows of the embedding.
    pub(crate) vocabulary: usize,
    /// Whether there is a head of its own.
    pub(crate) has_head: bool,
    /// Whether queries have biases.
    pub(crate) attention_bias: bool,
    /// Whether the MLP has.
    pub(crate) mlp_bias: bool,
    /// What frequencies of rotary embedding are divided by: for all lengths, or for long and short sequences.
    pub(crate) rotary_divisors: RotaryDivisors,
}

/// Divisors of rotary frequencies that are stored as tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct RotaryDivisors {
    pub(crate) short: Option<Vec<f32>>,
    pub(crate) long: Option<Vec<f32>>,
}

/// The `config.json` that says the same as the metadata.
///
/// # Errors
/// `ERR_CONFIG_INVALID` for values that are missing or of another type, `ERR_CONFIG_UNSUPPORTED` for what no field of
/// `config.json` means.
pub(crate) fn config_of(
    metadata: &GgufMetadata,
    architecture: &GgufArchitecture,
    facts: &TensorFacts,
) -> Result<Map<String, Value>> {
    let key = |suffix: &str| format!("{}.{suffix}", architecture.name);
    let experts = metadata.unsigned(&key("expert_count"))?.unwrap_or(0) > 0;
    let windowed = metadata.unsigned(&key("attention.sliding_window"))?.is_some();
    let special = match architecture.name {
        "llama" if experts => Some("mixtral"),
        "llama" if windowed => Some("mistral"),
        _ => None,
    };
    let families = architecture.families;
    let family = families.iter().find(|(model_type, _)| Some(*model_type) == special);
    let (model_type, class) = family.unwrap_or(&families[0]);
    let mut config = Map::new();
    config.insert("architectures".into(), json!([class]));
    config.insert("model_type".into(), json!(model_type));
    for &(suffix, field, kind) in architecture.sizes {
        let name = key(suffix);
        let value = match kind {
            FieldKind::Size => Some(json!(size_of(metadata, &name)?.ok_or_else(|| missing(&name))?)),
            FieldKind::OptionalSize => size_of(metadata, &name)?.map(|size| json!(size)),
            FieldKind::Number => number_of(metadata, &name)?.map(|number| json!(number)),
            FieldKind::Flag => metadata.flag(&name)?.map(|flag| json!(flag)),
        };
        if let Some(value) = value {
            config.insert(field.into(), value);
        }
    }
    if !experts {
        config.shift_remove("num_local_experts");
        config.shift_remove("num_experts_per_tok");
    }
    config.insert("vocab_size".into(), json!(facts.vocabulary));
    config.insert("tie_word_embeddings".into(), json!(!facts.has_head));
    config.insert("attention_bias".into(), json!(facts.attention_bias));
    config.insert("mlp_bias".into(), json!(facts.mlp_bias));
    for &(field, implied, _) in architecture.flags {
        config.insert(field.into(), json!(implied));
    }
    add_heads(metadata, architecture, &mut config)?;
    add_rotary_scaling(metadata, architecture, facts, &mut config)?;
    add_end_tokens(metadata, &mut config)?;
    Ok(config)
}

fn missing(name: &str) -> Error {
    Error::new(ErrorCode::ConfigInvalid, "the GGUF metadata lacks this value")
        .subject(name)
        .hint("The file holds no whole model, or was made by a faulty converter; take another copy")
}

/// A size; some files give it for each block, which must then agree.
fn size_of(metadata: &GgufMetadata, name: &str) -> Result<Option<u64>> {
    let Some(GgufValue::Array(_)) = metadata.get(name) else { return metadata.unsigned(name) };
    let sizes = metadata.integers(name)?.unwrap_or_default();
    match sizes.split_first() {
        Some((&first, others)) if others.iter().all(|&size| size == first) => {
            u64::try_from(first).map(Some).map_err(|_| invalid(name, "a list of sizes"))
        }
        _ => Err(Error::new(ErrorCode::ConfigUnsupported, "the blocks of the model have different sizes")
            .subject(name)
            .hint("Take a model whose blocks are all alike")),
    }
}

/// Numbers are stored in single precision: the shortest decimal that means the same is what the author wrote.
fn number_of(metadata: &GgufMetadata, name: &str) -> Result<Option<f64>> {
    let number = metadata.number(name)?;
    Ok(match metadata.get(name) {
        Some(GgufValue::F32(value)) => Some(shortest(*value)),
        _ => number,
    })
}

fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The width of heads, the share of them that turns and the scale of scores.
fn add_heads(metadata: &GgufMetadata, architecture: &GgufArchitecture, config: &mut Map<String, Value>) -> Result<()> {
    let key = |suffix: &str| format!("{}.{suffix}", architecture.name);
    let required = |suffix: &str| size_of(metadata, &key(suffix))?.ok_or_else(|| missing(&key(suffix)));
    let (width, heads) = (required("embedding_length")?, required("attention.head_count")?);
    if heads == 0 {
        return Err(invalid(&key("attention.head_count"), "a positive number"));
    }
    let head = size_of(metadata, &key("attention.key_length"))?.unwrap_or(width / heads);
    let value_head = size_of(metadata, &key("attention.value_length"))?.unwrap_or(head);
    let unsupported = |suffix: &str, message: String| {
        Err(Error::new(ErrorCode::ConfigUnsupported, message)
            .subject(key(suffix))
            .hint("This feature of the architecture is not computed here"))
    };
    if value_head != head {
        return unsupported("attention.value_length", format!("values are {value_head} wide, keys {head}"));
    }
    if let Some(turning) = size_of(metadata, &key("rope.dimension_count"))?.filter(|&turning| turning != head) {
        match architecture.rotary_share {
            Some(field) => drop(config.insert(field.into(), json!(turning as f64 / head as f64))),
            None if architecture.name == "gpt2" => {}
            None => {
                return unsupported("rope.dimension_count", format!("only {turning} of {head} dimensions turn"));
            }
        }
    } else if let Some(field) = architecture.rotary_share {
        config.insert(field.into(), json!(1.0));
    }
    if let Some(largest) = architecture.score_width {
        let scalar = if required("block_count")? == largest { width / heads } else { head };
        config.insert("query_pre_attn_scalar".into(), json!(scalar));
    }
    Ok(())
}

fn add_rotary_scaling(
    metadata: &GgufMetadata,
    architecture: &GgufArchitecture,
    facts: &TensorFacts,
    config: &mut Map<String, Value>,
) -> Result<()> {
    let key = |suffix: &str| format!("{}.rope.scaling.{suffix}", architecture.name);
    let context = metadata.unsigned(&format!("{}.context_length", architecture.name))?;
    let original = metadata.unsigned(&key("original_context_length"))?;
    let divisors = &facts.rotary_divisors;
    if divisors.short.is_some() || divisors.long.is_some() {
        let wide = |values: &Option<Vec<f32>>, other: &Option<Vec<f32>>| {
            let values = values.as_ref().or(other.as_ref());
            values.iter().flat_map(|values| values.iter().map(|&value| shortest(value))).collect::<Vec<f64>>()
        };
        let scaling = json!({
            "rope_type": "longrope",
            "short_factor": wide(&divisors.short, &divisors.long),
            "long_factor": wide(&divisors.long, &divisors.short),
            "attention_factor": number_of(metadata, &key("attn_factor"))?.unwrap_or(1.0),
            "original_max_position_embeddings": original.or(context),
        });
        config.insert("rope_scaling".into(), scaling);
        return Ok(());
    }
    let factor = number_of(metadata, &key("factor"))?;
    let mut scaling = Map::new();
    match metadata.text(&key("type"))? {
        None if factor.is_none_or(|factor| factor == 1.0) => return Ok(()),
        None | Some("linear") => {
            scaling.insert("rope_type".into(), json!("linear"));
            scaling.insert("factor".into(), json!(factor.ok_or_else(|| missing(&key("factor")))?));
        }
        Some("none") => return Ok(()),
        Some("yarn") => {
            let factor = factor.ok_or_else(|| missing(&key("factor")))?;
            scaling.insert("rope_type".into(), json!("yarn"));
            scaling.insert("factor".into(), json!(factor));
            if let Some(original) = original {
                scaling.insert("original_max_position_embeddings".into(), json!(original));
            }
            let share = number_of(metadata, &key("attn_factor"))?.filter(|&share| share != 1.0);
            if let Some(share) = share {
                scaling.insert("attention_factor".into(), json!(share * (1.0 + 0.1 * factor.ln())));
            }
            for (suffix, field) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(value) = number_of(metadata, &key(suffix))? {
                    scaling.insert(field.into(), json!(value));
                }
            }
        }
        Some(other) => {
            return Err(Error::new(ErrorCode::ConfigUnsupported, format!("the rotary scaling '{other}'"))
                .subject(key("type"))
                .hint("Supported in GGUF files are linear and yarn, and divisors of frequencies as tensors"));
        }
    }
    config.insert("rope_scaling".into(), Value::Object(scaling));
    Ok(())
}

/// The token that the metadata names, and those that its vocabulary marks as control tokens and that end a turn.
fn add_end_tokens(metadata: &GgufMetadata, config: &mut Map<String, Value>) -> Result<()> {
    let mut ends = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ends.extend(metadata.unsigned(&format!("tokenizer.ggml.{key}"))?);
    }
    let kinds = metadata.integers("tokenizer.ggml.token_type")?;
    if let (Some(tokens), Some(kinds)) = (metadata.strings("tokenizer.ggml.tokens")?, kinds) {
        let control = |(id, (token, kind)): (usize, (&String, &i64))| {
            (*kind == 3 && END_OF_TURN.contains(&token.as_str())).then_some(id as u64)
        };
        ends.extend(tokens.iter().zip(&kinds).enumerate().filter_map(control));
    }
    let mut unique = Vec::new();
    for end in ends {
        if !unique.contains(&end) {
            unique.push(end);
        }
    }
    if !unique.is_empty() {
        config.insert("eos_token_id".into(), json!(unique));
    }
    if let Some(start) = metadata.unsigned("tokenizer.ggml.bos_token_id")? {
        config.insert("bos_token_id".into(), json!(start));
    }
    Ok(())
}

/// The sizes of `config` under the names of GGUF.
///
/// # Errors
/// `ERR_CONFIG_INVALID` for missing or impossible fields, `ERR_CONFIG_UNSUPPORTED` for what GGUF cannot say.
pub(crate) fn metadata_of(config: &Map<String, Value>, architecture: &GgufArchitecture) -> Result<GgufMetadata> {
    let mut metadata = GgufMetadata::default();
    metadata.set_text("general.architecture", architecture.name);
    let key = |suffix: &str| format!("{}.{suffix}", architecture.name);
    // The number of experts has two spellings.
    let spellings = |name: &str| match name {
        "num_experts" | "num_local_experts" => ["num_experts", "num_local_experts"],
        _ => ["", ""],
    };
    let there = |name: &str| config.get(name).filter(|value| !value.is_null());
    let field_of = |name: &str| there(name).or_else(|| spellings(name).iter().find_map(|name| there(name)));
    let wrong = |field: &str, expected: &str| {
        Error::new(ErrorCode::ConfigInvalid, format!("'{field}' of config.json is not {expected}"))
            .subject(field)
            .hint("Take config.json from the folder that the weights come from")
    };
    let is_llama = config.get("model_type").is_some_and(|model_type| model_type == "llama");
    for &(suffix, field, kind) in architecture.sizes {
        if is_llama && field == "sliding_window" {
            continue;
        }
        let value = match (field_of(field), kind) {
            (None, FieldKind::Size) => return Err(wrong(field, "there, but needed")),
            (None, _) => continue,
            (Some(value), FieldKind::Size | FieldKind::OptionalSize) => {
                let size = value.as_u64().and_then(|size| u32::try_from(size).ok());
                GgufValue::U32(size.ok_or_else(|| wrong(field, "a size"))?)
            }
            (Some(value), FieldKind::Number) => {
                GgufValue::F32(value.as_f64().ok_or_else(|| wrong(field, "a number"))? as f32)
            }
            (Some(value), FieldKind::Flag) => {
                GgufValue::Bool(value.as_bool().ok_or_else(|| wrong(field, "true or false"))?)
            }
        };
        metadata.set(key(suffix), value);
    }
    let size = |name: &str| metadata.unsigned(&key(name)).ok().flatten();
    let (Some(width), Some(heads)) = (size("embedding_length"), size("attention.head_count").filter(|&h| h > 0)) else {
        return Err(wrong("num_attention_heads", "a positive number"));
    };
    let head = field_of("head_dim").and_then(Value::as_u64).unwrap_or(width / heads);
    let kv_heads = size("attention.head_count_kv").unwrap_or(heads);
    let feed_forward = size("feed_forward_length");
    let blocks = size("block_count").unwrap_or(0);
    let epsilon = metadata.get(&key("attention.layer_norm_rms_epsilon")).is_none();
    let small = |value: u64| GgufValue::U32(u32::try_from(value).unwrap_or(u32::MAX));
    metadata.set(key("attention.head_count_kv"), small(kv_heads));
    if architecture.name == "gpt2" {
        metadata.set(key("feed_forward_length"), small(feed_forward.unwrap_or(4 * width)));
        check_implied(config, architecture, blocks, width / heads, head)?;
        return Ok(metadata);
    }
    if architecture.name != "gptneox" && epsilon {
        metadata.set(key("attention.layer_norm_rms_epsilon"), GgufValue::F32(1e-6));
    }
    metadata.set(key("attention.key_length"), small(head));
    metadata.set(key("attention.value_length"), small(head));
    let own_share = || architecture.rotary_share.and_then(field_of).and_then(Value::as_f64);
    let share = config.get("rope_parameters").and_then(|parameters| parameters.get("partial_rotary_factor")?.as_f64());
    let share = share.or_else(own_share);
    let share = share.unwrap_or(if architecture.name == "gptneox" { 0.25 } else { 1.0 });
    if share != 1.0 && architecture.rotary_share.is_none() {
        let message = format!("in {} models of GGUF all dimensions of a head turn", architecture.name);
        return Err(Error::new(ErrorCode::ConfigUnsupported, message)
            .subject("partial_rotary_factor")
            .hint("The file would compute something else; keep the model in the layout of Hugging Face"));
    }
    metadata.set(key("rope.dimension_count"), small((head as f64 * share) as u64));
    check_implied(config, architecture, blocks, width / heads, head)?;
    Ok(metadata)
}

/// Refuses what GGUF does not say, because readers know it from the architecture, where this model has it otherwise.
fn check_implied(
    config: &Map<String, Value>,
    architecture: &GgufArchitecture,
    blocks: u64,
    width_of_heads: u64,
    head: u64,
) -> Result<()> {
    let other = |field: &str, message: String| {
        Err(Error::new(ErrorCode::ConfigUnsupported, message)
            .subject(field)
            .hint("The file would compute something else; keep the model in the layout of Hugging Face"))
    };
    let name = architecture.name;
    if let Some(largest) = architecture.score_width {
        let implied = if blocks == largest { width_of_heads } else { head };
        let stated = config.get("query_pre_attn_scalar").and_then(Value::as_f64);
        if stated.is_some_and(|stated| stated != implied as f64) {
            let message = format!("{name} models of GGUF with {blocks} blocks scale scores by {implied}");
            return other("query_pre_attn_scalar", message);
        }
    }
    if let Some(period) = architecture.full_attention_every {
        let types = config.get("layer_types").and_then(Value::as_array);
        let is_full = |kind: &Value| kind == "full_attention";
        let differs = |(block, kind): (usize, &Value)| is_full(kind) != (block + 1).is_multiple_of(period);
        if types.is_some_and(|types| types.iter().enumerate().any(differs)) {
            let message = format!("{name} models of GGUF attend to all positions in every block number {period}");
            return other("layer_types", message);
        }
        let stated =
            ["sliding_window_pattern", "_sliding_window_pattern"].iter().find_map(|field| config.get(*field)?.as_u64());
        if types.is_none() && stated.is_some_and(|stated| stated != period as u64) {
            return other("sliding_window_pattern", format!("{name} models of GGUF have the pattern {period}"));
        }
    }
    for &(field, implied, default) in architecture.flags {
        if config.get(field).and_then(Value::as_bool).unwrap_or(default) != implied {
            return other(field, format!("{name} models of GGUF imply that this is {implied}"));
        }
    }
    Ok(())
}

/// Says the rotary base and scaling of `config` in `metadata`; gives the divisors that become tensors.
///
/// # Errors
/// `ERR_CONFIG_UNSUPPORTED` for a scaling that GGUF does not know.
pub(crate) fn set_rotary_scaling(
    config: &Map<String, Value>,
    architecture: &GgufArchitecture,
    metadata: &mut GgufMetadata,
) -> Result<RotaryDivisors> {
    let key = |suffix: &str| format!("{}.rope.{suffix}", architecture.name);
    let unsupported = |message: String| {
        Err(Error::new(ErrorCode::ConfigUnsupported, message)
            .subject("rope_scaling")
            .hint("GGUF files hold linear, yarn, llama3 and longrope scaling"))
    };
    let parameters = ["rope_parameters", "rope_scaling"].iter().find_map(|name| config.get(*name)?.as_object());
    let Some(parameters) = parameters else { return Ok(RotaryDivisors::default()) };
    let full = parameters.get("full_attention").and_then(Value::as_object).unwrap_or(parameters);
    let number = |name: &str| full.get(name).and_then(Value::as_f64);
    if let Some(base) = number("rope_theta") {
        metadata.set(key("freq_base"), GgufValue::F32(base as f32));
    }
    let local = parameters.get("sliding_attention").and_then(|window| window.get("rope_theta")?.as_f64());
    if let Some(base) = local {
        metadata.set(key("freq_base_swa"), GgufValue::F32(base as f32));
    }
    let required = |name: &str| {
        number(name).ok_or_else(|| {
            Error::new(ErrorCode::ConfigInvalid, format!("the rotary scaling lacks '{name}'"))
                .subject("rope_scaling")
                .hint("Take config.json from the folder that the weights come from")
        })
    };
    let kind = ["rope_type", "type"].iter().find_map(|name| full.get(*name)?.as_str()).unwrap_or("default");
    let context = metadata.unsigned(&format!("{}.context_length", architecture.name))?.unwrap_or(0);
    let original = number("original_max_position_embeddings")
        .or_else(|| config.get("original_max_position_embeddings").and_then(Value::as_f64))
        .unwrap_or(context as f64);
    let original_value = GgufValue::U32(original as u32);
    match kind {
        "default" => {}
        "linear" => {
            metadata.set_text(key("scaling.type"), "linear");
            metadata.set(key("scaling.factor"), GgufValue::F32(required("factor")? as f32));
        }
        "yarn" => {
            let factor = number("factor").unwrap_or(context as f64 / original);
            let others = ["mscale", "mscale_all_dim", "attention_factor", "truncate"];
            if let Some(other) = others.iter().find(|name| full.get(**name).is_some_and(|value| !value.is_null())) {
                return unsupported(format!("yarn scaling with '{other}'"));
            }
            metadata.set_text(key("scaling.type"), "yarn");
            metadata.set(key("scaling.factor"), GgufValue::F32(factor as f32));
            metadata.set(key("scaling.original_context_length"), original_value);
            for (field, suffix) in [("beta_fast", "scaling.yarn_beta_fast"), ("beta_slow", "scaling.yarn_beta_slow")] {
                if let Some(value) = number(field) {
                    metadata.set(key(suffix), GgufValue::F32(value as f32));
                }
            }
        }
        "llama3" => {
            let bands = [required("factor")?, required("low_freq_factor")?, required("high_freq_factor")?];
            let base = number("rope_theta").or_else(|| config.get("rope_theta")?.as_f64()).unwrap_or(10_000.0);
            let head = metadata.unsigned(&key("dimension_count"))?.unwrap_or(0) as usize;
            let divisors: Vec<f32> =
                (0..head / 2).map(|pair| llama3_divisor(pair, head, base, bands, original)).collect();
            return Ok(RotaryDivisors { short: Some(divisors), long: None });
        }
        "longrope" | "su" => {
            let list = |name: &str| -> Option<Vec<f32>> {
                full.get(name)?.as_array()?.iter().map(|value| value.as_f64().map(|value| value as f32)).collect()
            };
            let (Some(short), Some(long)) = (list("short_factor"), list("long_factor")) else {
                return unsupported("longrope scaling without its factors".into());
            };
            let factor = number("factor").unwrap_or(context as f64 / original);
            let recommended = (1.0 + factor.max(1.0).ln() / original.ln()).sqrt();
            let attention = number("attention_factor").unwrap_or(recommended);
            if long == short && attention == 1.0 {
                return Ok(RotaryDivisors { short: Some(short), long: None });
            }
            metadata.set_text(key("scaling.type"), "longrope");
            metadata.set(key("scaling.attn_factor"), GgufValue::F32(attention as f32));
            metadata.set(key("scaling.original_context_length"), original_value);
            return Ok(RotaryDivisors { short: Some(short), long: Some(long) });
        }
        other => return unsupported(format!("the rotary scaling '{other}'")),
    }
    Ok(RotaryDivisors::default())
}

/// What the frequency of a pair of dimensions is divided by: long waves by the factor, short ones by one, those
/// between by a blend.
fn llama3_divisor(pair: usize, head: usize, base: f64, [factor, low, high]: [f64; 3], original: f64) -> f32 {
    let frequency = base.powf(-2.0 * pair as f64 / head as f64);
    let turns = original * frequency / (2.0 * std::f64::consts::PI);
    let divisor = if turns < low {
        factor
    } else if turns > high {
        1.0
    } else {
        let share = (turns - low) / (high - low);
        1.0 / ((1.0 - share) / factor + share)
    };
    divisor as f32
}

/// Texts of the source that say what the model is called.
pub(crate) fn set_identity(metadata: &mut GgufMetadata, config: &Map<String, Value>, name: &str) {
    let stated = config.get("_name_or_path").and_then(Value::as_str).filter(|stated| !stated.is_empty());
    metadata.set_text("general.type", "model");
    metadata.set_text("general.name", stated.unwrap_or(name));
    metadata.set("general.quantization_version", GgufValue::U32(2));
}

/// Token numbers of `config.json` that a GGUF names singly: the first of a list.
pub(crate) fn token_of(config: &Map<String, Value>, field: &str) -> Option<u32> {
    let value = config.get(field)?;
    let value = value.as_array().and_then(|list| list.first()).unwrap_or(value);
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// An array of i32.
pub(crate) fn integers(values: Vec<i32>) -> GgufValue {
    GgufValue::Array(GgufArray::I32(values))
}
