use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value};

use crate::{BiasRule, DecoderFamily, FAMILIES, LinearSlot};

/// Largest size that a field of `config.json` may claim; far above any real model, far below an overflow.
const LARGEST_SIZE: u64 = 1 << 24;

/// A decoder as its `config.json` describes it.
#[derive(Clone, Debug)]
pub struct DecoderSpec {
    /// Names and biases.
    pub family: &'static DecoderFamily,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary_size: usize,
    /// Longest context that the model was made for.
    pub context_length: usize,
    /// Epsilon of the RMS norms.
    pub norm_epsilon: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Whether each Linear has a bias, in the order of [`LinearSlot::ALL`].
    pub biases: [bool; 7],
    /// Tokens that end a generation.
    pub end_tokens: Vec<u32>,
}

impl DecoderSpec {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// `ERR_CONFIG_ARCHITECTURE` for a family that does not run here, `ERR_CONFIG_UNSUPPORTED` for a feature that
    /// the block does not compute, `ERR_CONFIG_INVALID` for a missing or impossible field.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let family = family(config)?;
        let fields = Fields(config);
        let hidden_size = fields.size("hidden_size")?;
        let heads = fields.size("num_attention_heads")?;
        let kv_heads = fields.optional_size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = match fields.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => return Err(invalid("hidden_size", format!("{hidden_size} is not a multiple of {heads} heads"))),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(invalid("num_key_value_heads", format!("{heads} heads cannot share {kv_heads} key heads")));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", format!("rotary embedding needs an even head size, not {head_dim}")));
        }
        if let Some(activation) = fields.text("hidden_act").filter(|&name| name != "silu" && name != "swish") {
            return Err(unsupported("hidden_act", format!("the activation '{activation}'")));
        }
        for &flag in family.refused_flags {
            if fields.flag(flag) {
                return Err(unsupported(flag, format!("'{flag}'")));
            }
        }
        let biases = LinearSlot::ALL.map(|slot| match family.linears[slot.index()].1 {
            BiasRule::Never => false,
            BiasRule::Always => true,
            BiasRule::Config(flag) => fields.flag(flag),
        });
        Ok(DecoderSpec {
            family,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            layers: fields.size("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            vocabulary_size: fields.size("vocab_size")?,
            context_length: fields.optional_size("max_position_embeddings")?.unwrap_or(2048),
            norm_epsilon: fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope_theta: rope_theta(&fields)?,
            tied_head: fields.flag("tie_word_embeddings"),
            biases,
            end_tokens: end_tokens(config.get("eos_token_id")),
        })
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Outputs and inputs of a Linear.
    pub fn linear_shape(&self, slot: LinearSlot) -> (usize, usize) {
        match slot {
            LinearSlot::Query => (self.query_width(), self.hidden_size),
            LinearSlot::Key | LinearSlot::Value => (self.kv_width(), self.hidden_size),
            LinearSlot::Output => (self.hidden_size, self.query_width()),
            LinearSlot::Gate | LinearSlot::Up => (self.intermediate_size, self.hidden_size),
            LinearSlot::Down => (self.hidden_size, self.intermediate_size),
        }
    }

    /// Name of a block in the checkpoint.
    pub fn block_name(&self, block: usize) -> String {
        format!("{}.{block}", self.family.blocks)
    }

    /// Name of a Linear in the checkpoint.
    pub fn linear_name(&self, block: usize, slot: LinearSlot) -> String {
        format!("{}.{block}.{}", self.family.blocks, self.family.linears[slot.index()].0)
    }

    /// Weights in the Linears of all blocks: those that compression works on.
    pub fn linear_parameters(&self) -> u64 {
        let block: u64 = LinearSlot::ALL
            .iter()
            .map(|&slot| {
                let (rows, columns) = self.linear_shape(slot);
                rows as u64 * columns as u64
            })
            .sum();
        block * self.layers as u64
    }
}

fn family(config: &Map<String, Value>) -> Result<&'static DecoderFamily> {
    let architecture =
        config.get("architectures").and_then(Value::as_array).and_then(|names| names.first()).and_then(Value::as_str);
    let model_type = config.get("model_type").and_then(Value::as_str);
    let found = match (architecture, model_type) {
        (Some(name), _) => FAMILIES.iter().find(|family| family.architecture == name),
        (None, Some(name)) => FAMILIES.iter().find(|family| family.model_type == name),
        (None, None) => {
            return Err(Error::new(ErrorCode::ConfigInvalid, "config.json names no architecture")
                .subject("architectures")
                .hint("A Hugging Face config.json has \"architectures\": [\"LlamaForCausalLM\"] or the like"));
        }
    };
    found.ok_or_else(|| {
        let name = architecture.or(model_type).unwrap_or_default();
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.architecture).collect();
        Error::new(ErrorCode::ConfigArchitecture, format!("the architecture '{name}' is not supported"))
            .subject(name)
            .hint(format!("Supported are {}", known.join(", ")))
    })
}

fn rope_theta(fields: &Fields<'_>) -> Result<f64> {
    // Newer configs keep everything in `rope_parameters`, older ones a base and an optional `rope_scaling`.
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(object) = fields.0.get(key).and_then(Value::as_object) else { continue };
        let kind = object.get("rope_type").or_else(|| object.get("type")).and_then(Value::as_str).unwrap_or("default");
        if kind != "default" {
            return Err(unsupported(key, format!("the rotary scaling '{kind}'")));
        }
        if let Some(theta) = Fields(object).positive("rope_theta")? {
            return Ok(theta);
        }
    }
    Ok(fields.positive("rope_theta")?.unwrap_or(10_000.0))
}

fn end_tokens(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn optional_size(&self, name: &str) -> Result<Option<usize>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(size) if size > 0 && size <= LARGEST_SIZE => Ok(Some(size as usize)),
                _ => Err(invalid(name, format!("{value} is not a size between 1 and {LARGEST_SIZE}"))),
            },
        }
    }

    fn size(&self, name: &str) -> Result<usize> {
        self.optional_size(name)?.ok_or_else(|| invalid(name, "the field is missing".into()))
    }

    fn positive(&self, name: &str) -> Result<Option<f64>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(invalid(name, format!("{value} is not a positive number"))),
            },
        }
    }

    fn flag(&self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str)
    }
}

fn invalid(field: &str, message: String) -> Error {
    Error::new(ErrorCode::ConfigInvalid, format!("config.json: {field}: {message}"))
        .subject(field)
        .hint("Take config.json from the folder that the weights come from")
}

fn unsupported(field: &str, what: String) -> Error {
    Error::new(ErrorCode::ConfigUnsupported, format!("config.json asks for {what}, which is not supported"))
        .subject(field)
        .hint("Use a checkpoint without it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(changes: &[(&str, Value)]) -> Map<String, Value> {
        let text = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":172,
            "num_hidden_layers":2,"num_attention_heads":8,"num_key_value_heads":4,"vocab_size":512,
            "rms_norm_eps":1e-5,"tie_word_embeddings":true,"eos_token_id":[2,5]}"#;
        let mut config: Map<String, Value> = serde_json::from_str(text).unwrap();
        for (key, value) in changes {
            config.insert((*key).into(), value.clone());
        }
        config
    }

    #[test]
    fn llama_and_qwen_differ_in_their_biases() {
        let llama = DecoderSpec::from_config(&config(&[])).unwrap();
        assert_eq!((llama.head_dim, llama.kv_width(), llama.query_width()), (8, 32, 64));
        assert_eq!(llama.biases, [false; 7]);
        assert_eq!(llama.linear_name(1, LinearSlot::Down), "model.layers.1.mlp.down_proj");
        assert_eq!(llama.end_tokens, [2, 5]);
        let qwen = config(&[("architectures", serde_json::json!(["Qwen2ForCausalLM"]))]);
        let qwen = DecoderSpec::from_config(&qwen).unwrap();
        assert_eq!(qwen.biases, [true, true, true, false, false, false, false]);
        let biased = DecoderSpec::from_config(&config(&[("attention_bias", Value::Bool(true))])).unwrap();
        assert_eq!(biased.biases, [true, true, true, true, false, false, false]);
    }

    #[test]
    fn what_the_block_does_not_compute_is_refused_by_name() {
        let cases = [
            (
                "architectures",
                serde_json::json!(["MambaForCausalLM"]),
                ErrorCode::ConfigArchitecture,
                "MambaForCausalLM",
            ),
            ("rope_scaling", serde_json::json!({"rope_type": "llama3"}), ErrorCode::ConfigUnsupported, "llama3"),
            ("hidden_act", serde_json::json!("gelu"), ErrorCode::ConfigUnsupported, "gelu"),
            ("num_key_value_heads", serde_json::json!(3), ErrorCode::ConfigInvalid, "3 key heads"),
            ("hidden_size", serde_json::json!(-1), ErrorCode::ConfigInvalid, "-1"),
            ("vocab_size", serde_json::json!(1e300), ErrorCode::ConfigInvalid, "1e+300"),
            ("head_dim", serde_json::json!(7), ErrorCode::ConfigInvalid, "even"),
        ];
        for (key, value, code, part) in cases {
            let error = DecoderSpec::from_config(&config(&[(key, value)])).unwrap_err();
            assert_eq!(error.code, code, "{key}");
            assert!(error.message.contains(part), "{error}");
            assert!(!error.hint.is_empty() && !error.subject.is_empty());
        }
    }

    #[test]
    fn both_spellings_of_the_rotary_base_are_read() {
        let old = config(&[("rope_theta", serde_json::json!(500000.0))]);
        assert_eq!(DecoderSpec::from_config(&old).unwrap().rope_theta, 500_000.0);
        let new = config(&[("rope_parameters", serde_json::json!({"rope_type": "default", "rope_theta": 1e6}))]);
        assert_eq!(DecoderSpec::from_config(&new).unwrap().rope_theta, 1e6);
    }
}
