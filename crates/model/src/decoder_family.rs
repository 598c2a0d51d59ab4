use kintsugi_kernels::Activation;

use crate::LinearSlot;

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

/// Which blocks attend to a window of positions only, and to how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowRule {
    /// None.
    Never,
    /// All where `sliding_window` is set.
    Everywhere,
    /// Where `use_sliding_window` is true: those that `layer_types` says, else those from `max_window_layers` on.
    UpperBlocks,
}

/// What a norm computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `weight · x / rms(x)`.
    Rms,
}

/// What distinguishes one decoder family from another. The forward pass is the same for all.
#[derive(Clone, Copy, Debug)]
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
    /// What all norms compute.
    pub norm: NormKind,
    /// Norm before the attention, inside a block.
    pub attention_norm: &'static str,
    /// Norm before the MLP, inside a block.
    pub mlp_norm: &'static str,
    /// Norms of each query and each key head, inside a block.
    pub head_norms: Option<[&'static str; 2]>,
    /// What each Linear of a block does, its name inside the block and its bias, in the order of their computation.
    pub linears: &'static [(LinearSlot, &'static str, BiasRule)],
    /// Field of `config.json` with the activation of the MLP, and the activation where it is absent.
    pub activation: (&'static str, Activation),
    /// Blocks that attend to a window.
    pub windows: WindowRule,
    /// Base of the rotary frequencies where `config.json` gives none.
    pub rope_theta: f64,
    /// Booleans of `config.json` that must be absent or false, because the block does not compute them.
    pub refused_flags: &'static [&'static str],
}

const LLAMA_ATTENTION_BIAS: BiasRule = BiasRule::Config("attention_bias");
const LLAMA_MLP_BIAS: BiasRule = BiasRule::Config("mlp_bias");

/// Llama, which others are described by their difference from.
const LLAMA: DecoderFamily = DecoderFamily {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    embedding: "model.embed_tokens",
    blocks: "model.layers",
    final_norm: "model.norm",
    head: "lm_head",
    norm: NormKind::Rms,
    attention_norm: "input_layernorm",
    mlp_norm: "post_attention_layernorm",
    head_norms: None,
    linears: &[
        (LinearSlot::Query, "self_attn.q_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Key, "self_attn.k_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Value, "self_attn.v_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Output, "self_attn.o_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Gate, "mlp.gate_proj", LLAMA_MLP_BIAS),
        (LinearSlot::Up, "mlp.up_proj", LLAMA_MLP_BIAS),
        (LinearSlot::Down, "mlp.down_proj", LLAMA_MLP_BIAS),
    ],
    activation: ("hidden_act", Activation::Silu),
    windows: WindowRule::Never,
    rope_theta: 10_000.0,
    refused_flags: &[],
};

/// Every family that runs here.
pub const FAMILIES: &[DecoderFamily] = &[
    LLAMA,
    DecoderFamily {
        architecture: "MistralForCausalLM",
        model_type: "mistral",
        linears: SEVEN_WITHOUT_BIAS,
        windows: WindowRule::Everywhere,
        ..LLAMA
    },
    DecoderFamily {
        architecture: "Qwen2ForCausalLM",
        model_type: "qwen2",
        linears: &[
            (LinearSlot::Query, "self_attn.q_proj", BiasRule::Always),
            (LinearSlot::Key, "self_attn.k_proj", BiasRule::Always),
            (LinearSlot::Value, "self_attn.v_proj", BiasRule::Always),
            (LinearSlot::Output, "self_attn.o_proj", BiasRule::Never),
            (LinearSlot::Gate, "mlp.gate_proj", BiasRule::Never),
            (LinearSlot::Up, "mlp.up_proj", BiasRule::Never),
            (LinearSlot::Down, "mlp.down_proj", BiasRule::Never),
        ],
        windows: WindowRule::UpperBlocks,
        ..LLAMA
    },
    DecoderFamily {
        architecture: "Qwen3ForCausalLM",
        model_type: "qwen3",
        head_norms: Some(["self_attn.q_norm", "self_attn.k_norm"]),
        linears: &[
            (LinearSlot::Query, "self_attn.q_proj", LLAMA_ATTENTION_BIAS),
            (LinearSlot::Key, "self_attn.k_proj", LLAMA_ATTENTION_BIAS),
            (LinearSlot::Value, "self_attn.v_proj", LLAMA_ATTENTION_BIAS),
            (LinearSlot::Output, "self_attn.o_proj", LLAMA_ATTENTION_BIAS),
            (LinearSlot::Gate, "mlp.gate_proj", BiasRule::Never),
            (LinearSlot::Up, "mlp.up_proj", BiasRule::Never),
            (LinearSlot::Down, "mlp.down_proj", BiasRule::Never),
        ],
        windows: WindowRule::UpperBlocks,
        ..LLAMA
    },
];

/// The names of Llama, without any bias.
const SEVEN_WITHOUT_BIAS: &[(LinearSlot, &str, BiasRule)] = &[
    (LinearSlot::Query, "self_attn.q_proj", BiasRule::Never),
    (LinearSlot::Key, "self_attn.k_proj", BiasRule::Never),
    (LinearSlot::Value, "self_attn.v_proj", BiasRule::Never),
    (LinearSlot::Output, "self_attn.o_proj", BiasRule::Never),
    (LinearSlot::Gate, "mlp.gate_proj", BiasRule::Never),
    (LinearSlot::Up, "mlp.up_proj", BiasRule::Never),
    (LinearSlot::Down, "mlp.down_proj", BiasRule::Never),
];
