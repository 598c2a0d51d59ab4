/// A Linear of a decoder block, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearSlot {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Output projection of the attention.
    Output,
    /// Gate of the gated MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
}

/// A place in a block where Linears read their input. Linears of one point share their second moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TapPoint {
    /// Normed input: query, key, value.
    AttentionInput,
    /// Concatenated heads: output projection.
    AttentionOutput,
    /// Normed input of the MLP: gate, up.
    MlpInput,
    /// Gated activation: down projection.
    MlpActivation,
}

impl LinearSlot {
    /// Every slot, in the order in which a block computes them.
    pub const ALL: [LinearSlot; 7] = [
        LinearSlot::Query,
        LinearSlot::Key,
        LinearSlot::Value,
        LinearSlot::Output,
        LinearSlot::Gate,
        LinearSlot::Up,
        LinearSlot::Down,
    ];

    /// Where this Linear reads its input.
    pub const fn tap(self) -> TapPoint {
        match self {
            LinearSlot::Query | LinearSlot::Key | LinearSlot::Value => TapPoint::AttentionInput,
            LinearSlot::Output => TapPoint::AttentionOutput,
            LinearSlot::Gate | LinearSlot::Up => TapPoint::MlpInput,
            LinearSlot::Down => TapPoint::MlpActivation,
        }
    }

    /// Position in [`LinearSlot::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl TapPoint {
    /// Every point, in the order in which a block reaches them.
    pub const ALL: [TapPoint; 4] =
        [TapPoint::AttentionInput, TapPoint::AttentionOutput, TapPoint::MlpInput, TapPoint::MlpActivation];
}

/// When a Linear has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasRule {
    /// Never.
    Never,
    /// Always.
    Always,
    /// When this boolean of `config.json` is true.
    Config(&'static str),
}

/// What distinguishes one decoder family from another: names, biases. The block itself is the same for all.
#[derive(Debug)]
pub struct DecoderFamily {
    /// `architectures[0]` of `config.json`.
    pub architecture: &'static str,
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// Token embedding.
    pub embedding: &'static str,
    /// Prefix of the blocks; block `i` is `{blocks}.{i}`.
    pub blocks: &'static str,
    /// Norm after the last block.
    pub final_norm: &'static str,
    /// Output head.
    pub head: &'static str,
    /// Norm before the attention, inside a block.
    pub attention_norm: &'static str,
    /// Norm before the MLP, inside a block.
    pub mlp_norm: &'static str,
    /// Name inside the block and bias of each Linear, in the order of [`LinearSlot::ALL`].
    pub linears: [(&'static str, BiasRule); 7],
    /// Booleans of `config.json` that must be absent or false, because the block does not compute them.
    pub refused_flags: &'static [&'static str],
}

const LLAMA_ATTENTION_BIAS: BiasRule = BiasRule::Config("attention_bias");
const LLAMA_MLP_BIAS: BiasRule = BiasRule::Config("mlp_bias");

/// Every family that runs here.
pub const FAMILIES: &[DecoderFamily] = &[
    DecoderFamily {
        architecture: "LlamaForCausalLM",
        model_type: "llama",
        embedding: "model.embed_tokens",
        blocks: "model.layers",
        final_norm: "model.norm",
        head: "lm_head",
        attention_norm: "input_layernorm",
        mlp_norm: "post_attention_layernorm",
        linears: [
            ("self_attn.q_proj", LLAMA_ATTENTION_BIAS),
            ("self_attn.k_proj", LLAMA_ATTENTION_BIAS),
            ("self_attn.v_proj", LLAMA_ATTENTION_BIAS),
            ("self_attn.o_proj", LLAMA_ATTENTION_BIAS),
            ("mlp.gate_proj", LLAMA_MLP_BIAS),
            ("mlp.up_proj", LLAMA_MLP_BIAS),
            ("mlp.down_proj", LLAMA_MLP_BIAS),
        ],
        refused_flags: &[],
    },
    DecoderFamily {
        architecture: "Qwen2ForCausalLM",
        model_type: "qwen2",
        embedding: "model.embed_tokens",
        blocks: "model.layers",
        final_norm: "model.norm",
        head: "lm_head",
        attention_norm: "input_layernorm",
        mlp_norm: "post_attention_layernorm",
        linears: [
            ("self_attn.q_proj", BiasRule::Always),
            ("self_attn.k_proj", BiasRule::Always),
            ("self_attn.v_proj", BiasRule::Always),
            ("self_attn.o_proj", BiasRule::Never),
            ("mlp.gate_proj", BiasRule::Never),
            ("mlp.up_proj", BiasRule::Never),
            ("mlp.down_proj", BiasRule::Never),
        ],
        refused_flags: &["use_sliding_window"],
    },
];
