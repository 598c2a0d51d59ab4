use kintsugi_kernels::Activation;

use crate::scale_fold::{ATTENTION_FOLDS, FUSED_FOLDS, GATED_FOLDS, PLAIN_MLP_FOLDS, SHARED_EXPERT_FOLDS};
use crate::{LinearSlot, ScaleFold};

/// When a Linear has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasRule {
    /// Never.
    Never,
    /// Always.
    Always,
    /// When this boolean of `config.json` is true.
    Config(&'static str),
    /// Unless this boolean of `config.json` is false.
    Unless(&'static str),
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
    /// Where `sliding_window` is set: those that `layer_types` says, else all but every n-th; `sliding_window_pattern`
    /// gives n, else the number here.
    AllButEvery(usize),
}

/// What a norm computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `weight · x / rms(x)`.
    Rms,
    /// `(1 + weight) · x / rms(x)`.
    RmsPlusOne,
    /// `weight · (x − mean(x)) / deviation(x) + bias`.
    Layer,
}

/// How the outputs of a projection to queries, keys and values lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusedHeads {
    /// All queries, then all keys, then all values.
    Apart,
    /// Query, key and value of one head after another.
    Together,
}

/// What the two branches of a block start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResidualRule {
    /// The MLP starts from the sum with the attention.
    Sequential,
    /// Both start from the input of the block, unless this boolean of `config.json` is false.
    ParallelUnless(&'static str),
}

/// Position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PositionRule {
    /// A learned vector per position, of this name.
    Learned(&'static str),
    /// Rotary.
    Rotary {
        /// Field with the base of the frequencies, where there is no object with rotary parameters.
        base_field: &'static str,
        /// The base where `config.json` gives none.
        base: f64,
        /// Field with the share of a head that turns.
        share_field: &'static str,
        /// The share where `config.json` gives none.
        share: f64,
        /// Field with the base of blocks with a window and its value where `config.json` gives none, if they turn
        /// by frequencies of their own.
        window_base: Option<(&'static str, f64)>,
    },
}

/// The experts of a family with a mixture in place of the MLP. Linears like [`LinearSlot::Down`] are then those of an
/// expert that sees every token.
#[derive(Clone, Copy, Debug)]
pub struct ExpertRule {
    /// The Linear that chooses experts, inside a block.
    pub router: &'static str,
    /// Expert `i` is `{experts}.{i}`, inside a block.
    pub experts: &'static str,
    /// Gate, up and down projection, inside an expert.
    pub names: [&'static str; 3],
    /// Fields with the number of experts; the first that is there counts.
    pub count: [&'static str; 2],
    /// Field with the width of an expert.
    pub width: &'static str,
    /// Field that says whether the shares of the chosen experts add up to one; `None` for always.
    pub normalized: Option<&'static str>,
    /// The Linear whose sigmoid is the share of the expert that sees every token, inside a block.
    pub shared_gate: Option<&'static str>,
}

/// How `config.json` spells the sizes of a decoder.
#[derive(Clone, Copy, Debug)]
pub struct SizeFields {
    /// Width of the residual stream.
    pub hidden: &'static str,
    /// Width of the MLP; four times that of the residual stream where it is absent and this says so.
    pub intermediate: (&'static str, bool),
    /// Number of blocks.
    pub layers: &'static str,
    /// Query heads.
    pub heads: &'static str,
    /// Longest context.
    pub context: &'static str,
    /// Epsilon of the norms.
    pub epsilon: &'static str,
}

/// What distinguishes one decoder family from another. The forward pass is the same for all.
#[derive(Clone, Copy, Debug)]
pub struct DecoderFamily {
    /// `architectures[0]` of `config.json`.
    pub architecture: &'static str,
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// What checkpoints of the decoder without its head leave out at the beginning of names, where such are in use.
    pub bare_prefix: Option<&'static str>,
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
    /// Norms of what the attention and the MLP add to the residual stream, inside a block.
    pub branch_norms: Option<[&'static str; 2]>,
    /// What attention and MLP start from.
    pub residual: ResidualRule,
    /// What each Linear of a block does, its name inside the block and its bias, in the order of their computation.
    pub linears: &'static [(LinearSlot, &'static str, BiasRule)],
    /// Factors per channel that operations can take from the Linears that read them, so that the block computes the same.
    /// None where attention and MLP both start from the input of the block.
    pub folds: &'static [ScaleFold],
    /// Experts of which each token goes through a few.
    pub experts: Option<ExpertRule>,
    /// Whether plain weights are stored as `[in, out]`.
    pub transposed: bool,
    /// How the outputs of [`LinearSlot::QueryKeyValue`] lie.
    pub fused_heads: FusedHeads,
    /// Field of `config.json` with the activation of the MLP, and the activation where it is absent.
    pub activation: (&'static str, Activation),
    /// Blocks that attend to a window.
    pub windows: WindowRule,
    /// How positions are told apart.
    pub positions: PositionRule,
    /// Whether embeddings are multiplied with the root of their width.
    pub scaled_embedding: bool,
    /// Field with the number whose inverse root scores are multiplied with; the width of a head where it is absent.
    pub score_field: Option<&'static str>,
    /// Fields with the caps of scores and of logits.
    pub cap_fields: Option<[&'static str; 2]>,
    /// Whether the head is the embedding where `config.json` does not say.
    pub tied_head: bool,
    /// Spelling of sizes.
    pub sizes: SizeFields,
    /// Booleans of `config.json` that must be absent or false, because the block does not compute them.
    pub refused_flags: &'static [&'static str],
}

const LLAMA_ATTENTION_BIAS: BiasRule = BiasRule::Config("attention_bias");
const LLAMA_MLP_BIAS: BiasRule = BiasRule::Config("mlp_bias");

/// Llama, which others are described by their difference from.
const LLAMA: DecoderFamily = DecoderFamily {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    bare_prefix: None,
    embedding: "model.embed_tokens",
    blocks: "model.layers",
    final_norm: "model.norm",
    head: "lm_head",
    norm: NormKind::Rms,
    attention_norm: "input_layernorm",
    mlp_norm: "post_attention_layernorm",
    head_norms: None,
    branch_norms: None,
    residual: ResidualRule::Sequential,
    linears: &[
        (LinearSlot::Query, "self_attn.q_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Key, "self_attn.k_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Value, "self_attn.v_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Output, "self_attn.o_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Gate, "mlp.gate_proj", LLAMA_MLP_BIAS),
        (LinearSlot::Up, "mlp.up_proj", LLAMA_MLP_BIAS),
        (LinearSlot::Down, "mlp.down_proj", LLAMA_MLP_BIAS),
    ],
    folds: GATED_FOLDS,
    experts: None,
    transposed: false,
    fused_heads: FusedHeads::Apart,
    activation: ("hidden_act", Activation::Silu),
    windows: WindowRule::Never,
    positions: rotary(10_000.0, None),
    scaled_embedding: false,
    score_field: None,
    cap_fields: None,
    tied_head: false,
    sizes: SizeFields {
        hidden: "hidden_size",
        intermediate: ("intermediate_size", false),
        layers: "num_hidden_layers",
        heads: "num_attention_heads",
        context: "max_position_embeddings",
        epsilon: "rms_norm_eps",
    },
    refused_flags: &[],
};

const fn rotary(base: f64, window_base: Option<(&'static str, f64)>) -> PositionRule {
    PositionRule::Rotary {
        base_field: "rope_theta",
        base,
        share_field: "partial_rotary_factor",
        share: 1.0,
        window_base,
    }
}

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
    DecoderFamily {
        architecture: "MixtralForCausalLM",
        model_type: "mixtral",
        linears: &[
            (LinearSlot::Query, "self_attn.q_proj", BiasRule::Never),
            (LinearSlot::Key, "self_attn.k_proj", BiasRule::Never),
            (LinearSlot::Value, "self_attn.v_proj", BiasRule::Never),
            (LinearSlot::Output, "self_attn.o_proj", BiasRule::Never),
        ],
        folds: ATTENTION_FOLDS,
        experts: Some(ExpertRule {
            router: "block_sparse_moe.gate",
            experts: "block_sparse_moe.experts",
            names: ["w1", "w3", "w2"],
            count: ["num_local_experts", "num_experts"],
            width: "intermediate_size",
            normalized: None,
            shared_gate: None,
        }),
        windows: WindowRule::Everywhere,
        positions: rotary(1_000_000.0, None),
        ..LLAMA
    },
    DecoderFamily {
        architecture: "Qwen2MoeForCausalLM",
        model_type: "qwen2_moe",
        linears: &[
            (LinearSlot::Query, "self_attn.q_proj", BiasRule::Unless("qkv_bias")),
            (LinearSlot::Key, "self_attn.k_proj", BiasRule::Unless("qkv_bias")),
            (LinearSlot::Value, "self_attn.v_proj", BiasRule::Unless("qkv_bias")),
            (LinearSlot::Output, "self_attn.o_proj", BiasRule::Never),
            (LinearSlot::Gate, "mlp.shared_expert.gate_proj", BiasRule::Never),
            (LinearSlot::Up, "mlp.shared_expert.up_proj", BiasRule::Never),
            (LinearSlot::Down, "mlp.shared_expert.down_proj", BiasRule::Never),
        ],
        folds: SHARED_EXPERT_FOLDS,
        experts: Some(ExpertRule { shared_gate: Some("mlp.shared_expert_gate"), ..QWEN_EXPERTS }),
        sizes: SizeFields { intermediate: ("shared_expert_intermediate_size", false), ..LLAMA.sizes },
        refused_flags: &["use_sliding_window"],
        ..LLAMA
    },
    DecoderFamily {
        architecture: "Qwen3MoeForCausalLM",
        model_type: "qwen3_moe",
        head_norms: Some(["self_attn.q_norm", "self_attn.k_norm"]),
        linears: &[
            (LinearSlot::Query, "self_attn.q_proj", LLAMA_ATTENTION_BIAS),
            (LinearSlot::Key, "self_attn.k_proj", LLAMA_ATTENTION_BIAS),
            (LinearSlot::Value, "self_attn.v_proj", LLAMA_ATTENTION_BIAS),
            (LinearSlot::Output, "self_attn.o_proj", LLAMA_ATTENTION_BIAS),
        ],
        folds: ATTENTION_FOLDS,
        experts: Some(QWEN_EXPERTS),
        refused_flags: &["use_sliding_window"],
        ..LLAMA
    },
    DecoderFamily {
        architecture: "Phi3ForCausalLM",
        model_type: "phi3",
        linears: &[
            (LinearSlot::QueryKeyValue, "self_attn.qkv_proj", BiasRule::Never),
            (LinearSlot::Output, "self_attn.o_proj", BiasRule::Never),
            (LinearSlot::GateUp, "mlp.gate_up_proj", BiasRule::Never),
            (LinearSlot::Down, "mlp.down_proj", BiasRule::Never),
        ],
        folds: FUSED_FOLDS,
        windows: WindowRule::Everywhere,
        ..LLAMA
    },
    DecoderFamily {
        architecture: "Gemma2ForCausalLM",
        model_type: "gemma2",
        windows: WindowRule::AllButEvery(2),
        cap_fields: Some(["attn_logit_softcapping", "final_logit_softcapping"]),
        ..GEMMA
    },
    DecoderFamily {
        architecture: "Gemma3ForCausalLM",
        model_type: "gemma3_text",
        head_norms: Some(["self_attn.q_norm", "self_attn.k_norm"]),
        windows: WindowRule::AllButEvery(6),
        positions: rotary(1_000_000.0, Some(("rope_local_base_freq", 10_000.0))),
        cap_fields: Some(["attn_logit_softcapping", "final_logit_softcapping"]),
        refused_flags: &["use_bidirectional_attention"],
        ..GEMMA
    },
    DecoderFamily {
        architecture: "GPT2LMHeadModel",
        model_type: "gpt2",
        bare_prefix: Some("transformer."),
        embedding: "transformer.wte",
        blocks: "transformer.h",
        final_norm: "transformer.ln_f",
        norm: NormKind::Layer,
        attention_norm: "ln_1",
        mlp_norm: "ln_2",
        linears: &[
            (LinearSlot::QueryKeyValue, "attn.c_attn", BiasRule::Always),
            (LinearSlot::Output, "attn.c_proj", BiasRule::Always),
            (LinearSlot::Up, "mlp.c_fc", BiasRule::Always),
            (LinearSlot::Down, "mlp.c_proj", BiasRule::Always),
        ],
        folds: PLAIN_MLP_FOLDS,
        transposed: true,
        activation: ("activation_function", Activation::GeluTanh),
        positions: PositionRule::Learned("transformer.wpe"),
        tied_head: true,
        sizes: SizeFields {
            hidden: "n_embd",
            intermediate: ("n_inner", true),
            layers: "n_layer",
            heads: "n_head",
            context: "n_positions",
            epsilon: "layer_norm_epsilon",
        },
        refused_flags: &["scale_attn_by_inverse_layer_idx", "add_cross_attention"],
        ..LLAMA
    },
    DecoderFamily {
        architecture: "GPTNeoXForCausalLM",
        model_type: "gpt_neox",
        embedding: "gpt_neox.embed_in",
        blocks: "gpt_neox.layers",
        final_norm: "gpt_neox.final_layer_norm",
        head: "embed_out",
        norm: NormKind::Layer,
        residual: ResidualRule::ParallelUnless("use_parallel_residual"),
        linears: &[
            (LinearSlot::QueryKeyValue, "attention.query_key_value", BiasRule::Unless("attention_bias")),
            (LinearSlot::Output, "attention.dense", BiasRule::Unless("attention_bias")),
            (LinearSlot::Up, "mlp.dense_h_to_4h", BiasRule::Always),
            (LinearSlot::Down, "mlp.dense_4h_to_h", BiasRule::Always),
        ],
        folds: &[],
        fused_heads: FusedHeads::Together,
        activation: ("hidden_act", Activation::Gelu),
        positions: PositionRule::Rotary {
            base_field: "rotary_emb_base",
            base: 10_000.0,
            share_field: "rotary_pct",
            share: 0.25,
            window_base: None,
        },
        sizes: SizeFields { epsilon: "layer_norm_eps", ..LLAMA.sizes },
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

const QWEN_EXPERTS: ExpertRule = ExpertRule {
    router: "mlp.gate",
    experts: "mlp.experts",
    names: ["gate_proj", "up_proj", "down_proj"],
    count: ["num_experts", "num_local_experts"],
    width: "moe_intermediate_size",
    normalized: Some("norm_topk_prob"),
    shared_gate: None,
};

/// What the Gemma families share.
const GEMMA: DecoderFamily = DecoderFamily {
    norm: NormKind::RmsPlusOne,
    mlp_norm: "pre_feedforward_layernorm",
    branch_norms: Some(["post_attention_layernorm", "post_feedforward_layernorm"]),
    linears: &[
        (LinearSlot::Query, "self_attn.q_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Key, "self_attn.k_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Value, "self_attn.v_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Output, "self_attn.o_proj", LLAMA_ATTENTION_BIAS),
        (LinearSlot::Gate, "mlp.gate_proj", BiasRule::Never),
        (LinearSlot::Up, "mlp.up_proj", BiasRule::Never),
        (LinearSlot::Down, "mlp.down_proj", BiasRule::Never),
    ],
    activation: ("hidden_activation", Activation::GeluTanh),
    scaled_embedding: true,
    score_field: Some("query_pre_attn_scalar"),
    tied_head: true,
    ..LLAMA
};
