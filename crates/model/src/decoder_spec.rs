use kintsugi_checkpoint::Checkpoint;
use kintsugi_kernels::{Activation, Scores};
use kintsugi_runtime::{Error, ErrorCode, Result};
use serde_json::{Map, Value};

use crate::config_fields::{Fields, LARGEST_SIZE, MOST_LAYERS, invalid, unsupported};
use crate::rotary_spec::RotaryDefaults;
use crate::{
    AttentionShape, BiasRule, DecoderFamily, ExpertSpec, FAMILIES, LinearSlot, NormKind, PositionRule, ResidualRule,
    RotarySpec, TapPoint, WindowRule,
};

/// One Linear that every block of a decoder has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// What it does.
    pub slot: LinearSlot,
    /// Name inside the block.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// A decoder as its `config.json` describes it.
#[derive(Clone, Debug)]
pub struct DecoderSpec {
    /// Names and kinds.
    pub family: &'static DecoderFamily,
    /// Whether names in the checkpoint lack [`DecoderFamily::bare_prefix`].
    pub bare: bool,
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
    /// Epsilon of the norms.
    pub norm_epsilon: f32,
    /// Rotary position embedding; `None` where positions are learned.
    pub rotary: Option<RotarySpec>,
    /// That of the blocks with a window, where it is another.
    pub window_rotary: Option<RotarySpec>,
    /// Positions that each block attends to; `None` for all before.
    pub windows: Vec<Option<usize>>,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Whether attention and MLP both start from the input of their block.
    pub parallel: bool,
    /// What scores are multiplied with.
    pub score_scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub score_cap: Option<f32>,
    /// Logits likewise.
    pub logit_cap: Option<f32>,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// The Linears of a block, in the order of their computation.
    pub linears: Vec<LinearSpec>,
    /// Experts, where there are any.
    pub experts: Option<ExpertSpec>,
    /// Tokens that end a generation.
    pub end_tokens: Vec<u32>,
}

impl DecoderSpec {
    /// Reads the `config.json` of a checkpoint, and from its tensors how they are named.
    ///
    /// # Errors
    /// As [`DecoderSpec::from_config`].
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let mut spec = Self::from_config(checkpoint.config())?;
        let stored = |spec: &Self| checkpoint.tensor(&format!("{}.weight", spec.name(spec.family.embedding))).is_some();
        if spec.family.bare_prefix.is_some() && !stored(&spec) {
            spec.bare = true;
            spec.bare = stored(&spec);
        }
        Ok(spec)
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// `ERR_CONFIG_ARCHITECTURE` for a family that does not run here, `ERR_CONFIG_UNSUPPORTED` for a feature that
    /// the block does not compute, `ERR_CONFIG_INVALID` for a missing or impossible field.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let family = family(config)?;
        let fields = Fields(config);
        let sizes = family.sizes;
        let hidden_size = fields.size(sizes.hidden)?;
        let intermediate_size = match sizes.intermediate {
            (name, true) => fields.optional_size(name)?.unwrap_or(4 * hidden_size),
            (name, false) => fields.size(name)?,
        };
        let layers = fields.size(sizes.layers)?;
        if layers > MOST_LAYERS {
            return Err(invalid(sizes.layers, format!("{layers} is more than the {MOST_LAYERS} blocks that are read")));
        }
        let heads = fields.size(sizes.heads)?;
        let kv_heads = fields.optional_size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = match fields.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => return Err(invalid(sizes.hidden, format!("{hidden_size} is not a multiple of {heads} heads"))),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(invalid("num_key_value_heads", format!("{heads} heads cannot share {kv_heads} key heads")));
        }
        // Products of sizes stay far below an overflow then.
        if heads.checked_mul(head_dim).is_none_or(|width| width > LARGEST_SIZE) {
            let message = format!("{heads} heads of {head_dim} are wider than {LARGEST_SIZE}");
            return Err(invalid(sizes.heads, message));
        }
        for &flag in family.refused_flags {
            if fields.flag(flag) == Some(true) {
                return Err(unsupported(flag, format!("'{flag}'")));
            }
        }
        let (activation, default_activation) = family.activation;
        let context = fields.optional_size(sizes.context)?.unwrap_or(2048);
        let Rotaries { rotary, window_rotary, context_length } = rotary(family, fields, head_dim, context)?;
        let cap = |place: usize| match family.cap_fields {
            Some(names) => fields.positive(names[place]).map(|cap| cap.map(|cap| cap as f32)),
            None => Ok(None),
        };
        let score_width = match family.score_field {
            Some(name) => fields.positive(name)?.unwrap_or(head_dim as f64),
            None => head_dim as f64,
        };
        let scaled_scores = fields.flag("scale_attn_weights").unwrap_or(true);
        let mut spec = DecoderSpec {
            family,
            bare: false,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocabulary_size: fields.size("vocab_size")?,
            context_length,
            norm_epsilon: fields.positive(sizes.epsilon)?.unwrap_or(1e-6) as f32,
            rotary,
            window_rotary,
            windows: windows(family, fields, layers)?,
            activation: fields.activation(activation)?.unwrap_or(default_activation),
            parallel: match family.residual {
                ResidualRule::Sequential => false,
                ResidualRule::ParallelUnless(flag) => fields.flag(flag).unwrap_or(true),
            },
            score_scale: if scaled_scores { 1.0 / score_width.sqrt() as f32 } else { 1.0 },
            score_cap: cap(0)?,
            logit_cap: cap(1)?,
            embedding_scale: if family.scaled_embedding { (hidden_size as f64).sqrt() as f32 } else { 1.0 },
            tied_head: fields.flag("tie_word_embeddings").unwrap_or(family.tied_head),
            linears: Vec::new(),
            experts: family.experts.as_ref().map(|rule| ExpertSpec::read(rule, fields)).transpose()?,
            end_tokens: end_tokens(config.get("eos_token_id")),
        };
        let linear = |&(slot, name, bias): &(LinearSlot, &'static str, BiasRule)| {
            let (rows, columns) = spec.shape_of(slot);
            let bias = match bias {
                BiasRule::Never => false,
                BiasRule::Always => true,
                BiasRule::Config(flag) => fields.flag(flag).unwrap_or(false),
                BiasRule::Unless(flag) => fields.flag(flag).unwrap_or(true),
            };
            LinearSpec { slot, name: name.to_owned(), rows, columns, bias }
        };
        spec.linears = family.linears.iter().map(linear).collect();
        if let (Some(rule), Some(experts)) = (&family.experts, &spec.experts) {
            spec.linears.extend(experts.linears(rule, hidden_size));
        }
        Ok(spec)
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Attention of a block.
    pub fn attention_shape(&self, block: usize) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scores: Scores {
                scale: self.score_scale,
                cap: self.score_cap,
                window: self.windows.get(block).copied().flatten(),
            },
        }
    }

    /// The points where the Linears of a block read, stage by stage; see [`TapPoint::stage`].
    pub fn tap_stages(&self) -> Vec<Vec<TapPoint>> {
        let mut stages = vec![Vec::new(); TapPoint::STAGES];
        for point in self.linears.iter().map(|linear| linear.slot.tap()) {
            if !stages[point.stage()].contains(&point) {
                stages[point.stage()].push(point);
            }
        }
        stages
    }

    /// Names of the Linears in the blocks that choose experts. They are never compressed.
    pub fn routers(&self) -> Vec<String> {
        let names = self.family.experts.iter().flat_map(|rule| [Some(rule.router), rule.shared_gate]).flatten();
        let names: Vec<&str> = names.collect();
        (0..self.layers)
            .flat_map(|block| names.iter().map(move |name| format!("{}.{name}", self.block_name(block))))
            .collect()
    }

    /// A name of the family as the checkpoint has it.
    pub fn name(&self, name: &'static str) -> &'static str {
        let prefix = if self.bare { self.family.bare_prefix } else { None };
        prefix.and_then(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
    }

    /// Name of a block in the checkpoint.
    pub fn block_name(&self, block: usize) -> String {
        format!("{}.{block}", self.name(self.family.blocks))
    }

    /// Name of a Linear in the checkpoint.
    pub fn linear_name(&self, block: usize, linear: &LinearSpec) -> String {
        format!("{}.{}", self.block_name(block), linear.name)
    }

    /// Place in [`DecoderSpec::linears`] of what does this.
    pub fn place_of(&self, slot: LinearSlot) -> Option<usize> {
        self.linears.iter().position(|linear| linear.slot == slot)
    }

    /// Weights in the Linears of all blocks: those that compression works on.
    pub fn linear_parameters(&self) -> u64 {
        let block: u64 = self.linears.iter().map(|linear| linear.rows as u64 * linear.columns as u64).sum();
        block.saturating_mul(self.layers as u64)
    }

    /// Weights of the whole model.
    pub fn parameters(&self) -> u64 {
        let embedding = (self.vocabulary_size * self.hidden_size) as u64;
        let head_norms = if self.family.head_norms.is_some() { 2 * self.head_dim } else { 0 };
        let wide_norms = if self.family.branch_norms.is_some() { 4 } else { 2 };
        let parts = if self.family.norm == NormKind::Layer { 2 } else { 1 };
        let norms = self.layers * (wide_norms * self.hidden_size * parts + head_norms) + self.hidden_size * parts;
        let positions = if self.rotary.is_none() { self.context_length * self.hidden_size } else { 0 };
        let biases: usize = self.linears.iter().filter(|linear| linear.bias).map(|linear| linear.rows).sum();
        let routers = match (&self.experts, &self.family.experts) {
            (Some(experts), Some(rule)) => experts.count + usize::from(rule.shared_gate.is_some()),
            _ => 0,
        };
        let routers = self.layers * routers * self.hidden_size;
        let heads = if self.tied_head { 1 } else { 2 };
        embedding * heads + (positions + norms + routers + biases * self.layers) as u64 + self.linear_parameters()
    }

    fn expert_width(&self) -> usize {
        self.experts.as_ref().map_or(0, |experts| experts.width)
    }

    /// Outputs and inputs of a Linear.
    fn shape_of(&self, slot: LinearSlot) -> (usize, usize) {
        let (hidden, query, kv, mlp) = (self.hidden_size, self.query_width(), self.kv_width(), self.intermediate_size);
        match slot {
            LinearSlot::Query => (query, hidden),
            LinearSlot::Key | LinearSlot::Value => (kv, hidden),
            LinearSlot::QueryKeyValue => (query + 2 * kv, hidden),
            LinearSlot::Output => (hidden, query),
            LinearSlot::Gate | LinearSlot::Up => (mlp, hidden),
            LinearSlot::GateUp => (2 * mlp, hidden),
            LinearSlot::Down => (hidden, mlp),
            LinearSlot::ExpertGate(_) | LinearSlot::ExpertUp(_) => (self.expert_width(), hidden),
            LinearSlot::ExpertDown(_) => (hidden, self.expert_width()),
        }
    }
}

struct Rotaries {
    rotary: Option<RotarySpec>,
    window_rotary: Option<RotarySpec>,
    context_length: usize,
}

/// Reads rotary embedding. Newer configurations keep everything in `rope_parameters`, by kind of block where those
/// differ, older ones a base and an optional `rope_scaling`.
fn rotary(family: &DecoderFamily, fields: Fields<'_>, head_dim: usize, context: usize) -> Result<Rotaries> {
    let PositionRule::Rotary { base_field, base, share_field, share, window_base } = family.positions else {
        return Ok(Rotaries { rotary: None, window_rotary: None, context_length: context });
    };
    let defaults = RotaryDefaults {
        theta: fields.positive(base_field)?.unwrap_or(base),
        rotated_share: fields.positive(share_field)?.unwrap_or(share),
        head_dim,
        context,
        original_context: fields.optional_size("original_max_position_embeddings")?,
    };
    let parameters = fields.object("rope_parameters").or_else(|| fields.object("rope_scaling"));
    let Some((window_field, window_base)) = window_base else {
        let rotary = RotarySpec::read(parameters, &defaults)?;
        let context_length = rotary.extended_context.min(LARGEST_SIZE);
        return Ok(Rotaries { context_length, rotary: Some(rotary), window_rotary: None });
    };
    let of_kind = |kind: &str| parameters.and_then(|parameters| parameters.object(kind));
    let full = of_kind("full_attention").or(parameters.filter(|_| of_kind("sliding_attention").is_none()));
    let window_defaults = RotaryDefaults { theta: fields.positive(window_field)?.unwrap_or(window_base), ..defaults };
    Ok(Rotaries {
        rotary: Some(RotarySpec::read(full, &defaults)?),
        window_rotary: Some(RotarySpec::read(of_kind("sliding_attention"), &window_defaults)?),
        // Here `config.json` states the context that scaling leads to.
        context_length: context,
    })
}

/// The window of each block.
fn windows(family: &DecoderFamily, fields: Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    let used = match family.windows {
        WindowRule::Never => false,
        WindowRule::Everywhere | WindowRule::AllButEvery(_) => true,
        WindowRule::UpperBlocks => fields.flag("use_sliding_window").unwrap_or(false),
    };
    let window = if used { fields.optional_size("sliding_window")? } else { None };
    let Some(window) = window else { return Ok(vec![None; layers]) };
    let slides: Vec<bool> = match family.windows {
        WindowRule::Never | WindowRule::Everywhere => vec![true; layers],
        WindowRule::UpperBlocks => match layer_types(fields, layers)? {
            Some(slides) => slides,
            None => {
                let first = fields.optional_size("max_window_layers")?.unwrap_or(0);
                (0..layers).map(|block| block >= first).collect()
            }
        },
        WindowRule::AllButEvery(period) => match layer_types(fields, layers)? {
            Some(slides) => slides,
            None => {
                let period = fields.optional_size("sliding_window_pattern")?.unwrap_or(period);
                (1..=layers).map(|block| !block.is_multiple_of(period)).collect()
            }
        },
    };
    Ok(slides.into_iter().map(|slides| slides.then_some(window)).collect())
}

/// Which blocks `layer_types` gives a window to.
fn layer_types(fields: Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(value) = fields.value("layer_types") else { return Ok(None) };
    let kinds: Vec<&Value> = value.as_array().into_iter().flatten().collect();
    if kinds.len() != layers {
        return Err(invalid("layer_types", format!("it is not a list of {layers} kinds")));
    }
    let slides = |kind: &&Value| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(unsupported("layer_types", format!("blocks of the kind {kind}"))),
    };
    kinds.iter().map(slides).collect::<Result<_>>().map(Some)
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

fn end_tokens(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
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

    fn biases(spec: &DecoderSpec) -> Vec<bool> {
        spec.linears.iter().map(|linear| linear.bias).collect()
    }

    #[test]
    fn llama_and_qwen_differ_in_their_biases() {
        let llama = DecoderSpec::from_config(&config(&[])).unwrap();
        assert_eq!((llama.head_dim, llama.kv_width(), llama.query_width()), (8, 32, 64));
        assert_eq!(biases(&llama), [false; 7]);
        assert_eq!(llama.linear_name(1, &llama.linears[6]), "model.layers.1.mlp.down_proj");
        assert_eq!(llama.end_tokens, [2, 5]);
        let qwen = config(&[("architectures", serde_json::json!(["Qwen2ForCausalLM"]))]);
        let qwen = DecoderSpec::from_config(&qwen).unwrap();
        assert_eq!(biases(&qwen), [true, true, true, false, false, false, false]);
        let biased = DecoderSpec::from_config(&config(&[("attention_bias", Value::Bool(true))])).unwrap();
        assert_eq!(biases(&biased), [true, true, true, true, false, false, false]);
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
            ("rope_scaling", serde_json::json!({"rope_type": "mrope"}), ErrorCode::ConfigUnsupported, "mrope"),
            ("rope_scaling", serde_json::json!({"type": "linear"}), ErrorCode::ConfigInvalid, "factor"),
            ("rope_scaling", serde_json::json!({"type": "linear", "factor": -2}), ErrorCode::ConfigInvalid, "-2"),
            (
                "rope_scaling",
                serde_json::json!({"type": "longrope", "short_factor": [1.0]}),
                ErrorCode::ConfigInvalid,
                "long_factor",
            ),
            ("partial_rotary_factor", serde_json::json!(0.4), ErrorCode::ConfigInvalid, "even"),
            ("hidden_act", serde_json::json!("relu2"), ErrorCode::ConfigUnsupported, "relu2"),
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
    fn what_a_family_does_not_compute_is_refused_by_name() {
        let qwen = serde_json::json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8});
        let gpt2 = serde_json::json!({"n_embd": 64, "n_layer": 1, "n_head": 8});
        let yes = serde_json::json!(true);
        let cases = [
            ("Qwen3MoeForCausalLM", &qwen, "mlp_only_layers", serde_json::json!([1]), ErrorCode::ConfigUnsupported),
            ("Qwen3MoeForCausalLM", &qwen, "decoder_sparse_step", serde_json::json!(2), ErrorCode::ConfigUnsupported),
            ("Qwen3MoeForCausalLM", &qwen, "use_sliding_window", yes.clone(), ErrorCode::ConfigUnsupported),
            ("Qwen3MoeForCausalLM", &qwen, "num_experts_per_tok", serde_json::json!(5), ErrorCode::ConfigInvalid),
            ("Qwen3MoeForCausalLM", &qwen, "num_experts", serde_json::json!(1 << 20), ErrorCode::ConfigInvalid),
            ("GPT2LMHeadModel", &gpt2, "scale_attn_by_inverse_layer_idx", yes.clone(), ErrorCode::ConfigUnsupported),
            ("GPT2LMHeadModel", &gpt2, "add_cross_attention", yes.clone(), ErrorCode::ConfigUnsupported),
            ("Gemma3ForCausalLM", &gpt2, "use_bidirectional_attention", yes, ErrorCode::ConfigUnsupported),
        ];
        for (architecture, fields, key, value, code) in cases {
            let mut config = config(&[("architectures", serde_json::json!([architecture]))]);
            config.extend(fields.as_object().unwrap().clone());
            assert!(DecoderSpec::from_config(&config).is_ok(), "{architecture}");
            config.insert(key.into(), value);
            let error = DecoderSpec::from_config(&config).unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (code, key), "{architecture}");
        }
    }

    #[test]
    fn hostile_rotary_parameters_give_errors_or_numbers() {
        for kind in ["default", "linear", "dynamic", "llama3", "yarn", "longrope"] {
            for (number, size) in [(1e-300, 1), (1.0, 1), (1e300, 1 << 24), (2.0, 2)] {
                let rope = serde_json::json!({"rope_type": kind, "rope_theta": number, "factor": number,
                    "low_freq_factor": number, "high_freq_factor": number, "original_max_position_embeddings": size,
                    "short_factor": [number, number, number, number], "long_factor": [1, 1, 1, 1]});
                let spec = DecoderSpec::from_config(&config(&[("rope_parameters", rope)]));
                if let Ok(spec) = spec {
                    let rotary = spec.rotary.unwrap();
                    let turns = rotary.frequencies(spec.context_length);
                    assert!(turns.iter().all(|turn| turn.is_finite()) && rotary.scale().is_finite(), "{kind}");
                    assert!(spec.context_length <= 1 << 24, "{kind}");
                }
            }
        }
    }

    #[test]
    fn both_spellings_of_the_rotary_parameters_are_read() {
        let rotary = |key: &str, value| DecoderSpec::from_config(&config(&[(key, value)])).unwrap().rotary.unwrap();
        let old = rotary("rope_theta", serde_json::json!(500000.0));
        let new = rotary("rope_parameters", serde_json::json!({"rope_type": "default", "rope_theta": 500000.0}));
        assert_eq!(old, new);
        assert_eq!(old.frequencies(10)[1], 500_000f64.powf(-0.25));
        let old = rotary("rope_scaling", serde_json::json!({"type": "linear", "factor": 4.0}));
        let new = rotary("rope_parameters", serde_json::json!({"rope_type": "linear", "factor": 4.0}));
        assert_eq!(old, new);
        assert_eq!(*old.frequencies(10), [0.25, 0.025, 0.0025, 0.00025]);
        assert_eq!(old.extended_context, 4 * 2048);
    }

    #[test]
    fn windows_are_given_to_the_blocks_that_the_configuration_says() {
        let qwen = |changes: &[(&str, Value)]| {
            let mut all = vec![
                ("architectures", serde_json::json!(["Qwen2ForCausalLM"])),
                ("sliding_window", serde_json::json!(9)),
                ("max_window_layers", serde_json::json!(1)),
            ];
            all.extend_from_slice(changes);
            DecoderSpec::from_config(&config(&all))
        };
        let on = ("use_sliding_window", Value::Bool(true));
        assert_eq!(qwen(&[]).unwrap().windows, [None, None]);
        assert_eq!(qwen(std::slice::from_ref(&on)).unwrap().windows, [None, Some(9)]);
        let types = |kinds: [&str; 2]| ("layer_types", serde_json::json!(kinds));
        let stated = qwen(&[on.clone(), types(["sliding_attention", "full_attention"])]).unwrap();
        assert_eq!(stated.windows, [Some(9), None]);
        let error = qwen(&[on.clone(), types(["linear_attention", "full_attention"])]).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ConfigUnsupported, "layer_types"));
        let error = qwen(&[on, ("layer_types", serde_json::json!(["full_attention"]))]).unwrap_err();
        assert_eq!(error.code, ErrorCode::ConfigInvalid);
        let llama = config(&[("sliding_window", serde_json::json!(9))]);
        assert_eq!(DecoderSpec::from_config(&llama).unwrap().windows, [None, None]);
    }
}
