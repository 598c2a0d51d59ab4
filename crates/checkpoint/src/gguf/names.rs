//! How GGUF names tensors and sizes of each architecture, and what Hugging Face calls them.

use kintsugi_runtime::{Error, ErrorCode, Result};

use FieldKind::{Flag, Number, OptionalSize, Size};

/// An architecture as GGUF files hold it.
#[derive(Debug)]
pub(crate) struct GgufArchitecture {
    /// `general.architecture`, which also begins the names of its sizes.
    pub(crate) name: &'static str,
    /// `model_type` and `architectures[0]` of the checkpoints that are written so; reading gives the first, of
    /// `llama` Mixtral where there are experts, and Mistral where there is a window.
    pub(crate) families: &'static [(&'static str, &'static str)],
    /// Modules outside of blocks: in GGUF, in Hugging Face.
    pub(crate) outside: &'static [(&'static str, &'static str)],
    /// Modules inside of block `N`, behind `blk.N.` and behind the prefix with a dot.
    pub(crate) inside: &'static [BlockModule],
    /// What comes before the number of a block in Hugging Face.
    pub(crate) blocks: &'static str,
    /// Weights of norms are stored plus one.
    pub(crate) shifted_norms: bool,
    /// Hugging Face stores the weights of blocks as `[in, out]`.
    pub(crate) transposed: bool,
    /// llama.cpp asks for every bias of a block.
    pub(crate) needs_biases: bool,
    /// Sizes: what follows the name of the architecture, the field of `config.json`, kind.
    pub(crate) sizes: &'static [(&'static str, &'static str, FieldKind)],
    /// Fields of `config.json` with the activation of the MLP, the first that is there counts, and its names for the
    /// only one that llama.cpp computes.
    pub(crate) activations: &'static [(&'static str, &'static [&'static str])],
    /// The share of a head that turns: field of `config.json`, if the architecture knows one.
    pub(crate) rotary_share: Option<&'static str>,
    /// `query_pre_attn_scalar` is the width of a head, but for this number of blocks that of the model over its heads.
    pub(crate) score_width: Option<u64>,
    /// Blocks attend to a window, but for every one of that number.
    pub(crate) full_attention_every: Option<usize>,
    /// Booleans of `config.json` that the architecture implies, and what they are in `config.json` when missing.
    pub(crate) flags: &'static [(&'static str, bool, bool)],
}

/// A module of a block.
#[derive(Debug)]
pub(crate) struct BlockModule {
    pub(crate) gguf: &'static str,
    /// With `{}` for the number of an expert, where [`RowOrder::Experts`] says so.
    pub(crate) hugging_face: &'static str,
    pub(crate) rows: RowOrder,
}

/// How the rows of a matrix in GGUF lie compared with Hugging Face.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// The same way.
    Same,
    /// Of each query head, row `2i + j` is row `j · half + i`: pairs that turn together lie side by side.
    QueryPairs,
    /// The same with key heads.
    KeyPairs,
    /// All queries, then keys, then values; in Hugging Face those of one head after another.
    FusedHeads,
    /// The matrices of all experts in one tensor.
    Experts,
}

/// What a field of `config.json` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FieldKind {
    /// A whole number that must be there.
    Size,
    /// A whole number that may be missing.
    OptionalSize,
    /// A number that may be missing.
    Number,
    /// True or false, may be missing.
    Flag,
}

const fn module(gguf: &'static str, hugging_face: &'static str) -> BlockModule {
    BlockModule { gguf, hugging_face, rows: RowOrder::Same }
}

const fn ordered(gguf: &'static str, hugging_face: &'static str, rows: RowOrder) -> BlockModule {
    BlockModule { gguf, hugging_face, rows }
}

const LLAMA_SIZES: &[(&str, &str, FieldKind)] = &[
    ("context_length", "max_position_embeddings", Size),
    ("embedding_length", "hidden_size", Size),
    ("block_count", "num_hidden_layers", Size),
    ("feed_forward_length", "intermediate_size", OptionalSize),
    ("attention.head_count", "num_attention_heads", Size),
    ("attention.head_count_kv", "num_key_value_heads", OptionalSize),
    ("attention.key_length", "head_dim", OptionalSize),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Number),
    ("rope.freq_base", "rope_theta", Number),
    // What Mistral has and llama.cpp does not read.
    ("attention.sliding_window", "sliding_window", OptionalSize),
    ("expert_count", "num_local_experts", OptionalSize),
    ("expert_used_count", "num_experts_per_tok", OptionalSize),
];

const QWEN_SIZES: &[(&str, &str, FieldKind)] = &[
    ("context_length", "max_position_embeddings", Size),
    ("embedding_length", "hidden_size", Size),
    ("block_count", "num_hidden_layers", Size),
    ("feed_forward_length", "intermediate_size", OptionalSize),
    ("attention.head_count", "num_attention_heads", Size),
    ("attention.head_count_kv", "num_key_value_heads", OptionalSize),
    ("attention.key_length", "head_dim", OptionalSize),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Number),
    ("rope.freq_base", "rope_theta", Number),
];

const QWEN_EXPERT_SIZES: &[(&str, &str, FieldKind)] = &[
    ("context_length", "max_position_embeddings", Size),
    ("embedding_length", "hidden_size", Size),
    ("block_count", "num_hidden_layers", Size),
    ("feed_forward_length", "intermediate_size", OptionalSize),
    ("attention.head_count", "num_attention_heads", Size),
    ("attention.head_count_kv", "num_key_value_heads", OptionalSize),
    ("attention.key_length", "head_dim", OptionalSize),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Number),
    ("rope.freq_base", "rope_theta", Number),
    ("expert_count", "num_experts", Size),
    ("expert_used_count", "num_experts_per_tok", Size),
    ("expert_feed_forward_length", "moe_intermediate_size", Size),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size", OptionalSize),
];

const GEMMA_SIZES: &[(&str, &str, FieldKind)] = &[
    ("context_length", "max_position_embeddings", Size),
    ("embedding_length", "hidden_size", Size),
    ("block_count", "num_hidden_layers", Size),
    ("feed_forward_length", "intermediate_size", Size),
    ("attention.head_count", "num_attention_heads", Size),
    ("attention.head_count_kv", "num_key_value_heads", OptionalSize),
    ("attention.key_length", "head_dim", Size),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Number),
    ("attention.sliding_window", "sliding_window", OptionalSize),
    ("rope.freq_base", "rope_theta", Number),
    ("rope.freq_base_swa", "rope_local_base_freq", Number),
    ("attn_logit_softcapping", "attn_logit_softcapping", Number),
    ("final_logit_softcapping", "final_logit_softcapping", Number),
];

/// llama.cpp computes the approximation by tanh for all of them.
const GELU: &[&str] = &["gelu_pytorch_tanh", "gelu_new", "gelu", "gelu_fast"];

const OUTSIDE: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const QWEN: &[BlockModule] = &[
    module("attn_norm", "input_layernorm"),
    module("attn_q", "self_attn.q_proj"),
    module("attn_k", "self_attn.k_proj"),
    module("attn_v", "self_attn.v_proj"),
    module("attn_output", "self_attn.o_proj"),
    module("attn_q_norm", "self_attn.q_norm"),
    module("attn_k_norm", "self_attn.k_norm"),
    module("ffn_norm", "post_attention_layernorm"),
    module("ffn_gate", "mlp.gate_proj"),
    module("ffn_up", "mlp.up_proj"),
    module("ffn_down", "mlp.down_proj"),
    module("ffn_gate_inp", "mlp.gate"),
    ordered("ffn_gate_exps", "mlp.experts.{}.gate_proj", RowOrder::Experts),
    ordered("ffn_up_exps", "mlp.experts.{}.up_proj", RowOrder::Experts),
    ordered("ffn_down_exps", "mlp.experts.{}.down_proj", RowOrder::Experts),
    module("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    module("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    module("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    module("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];

const QWEN2: GgufArchitecture = GgufArchitecture {
    name: "qwen2",
    families: &[("qwen2", "Qwen2ForCausalLM")],
    outside: OUTSIDE,
    inside: QWEN,
    blocks: "model.layers",
    shifted_norms: false,
    transposed: false,
    needs_biases: false,
    sizes: QWEN_SIZES,
    activations: &[("hidden_act", &["silu", "swish"])],
    rotary_share: None,
    score_width: None,
    full_attention_every: None,
    flags: &[],
};

const GEMMA2: GgufArchitecture = GgufArchitecture {
    name: "gemma2",
    families: &[("gemma2", "Gemma2ForCausalLM")],
    inside: &[
        module("attn_norm", "input_layernorm"),
        module("attn_q", "self_attn.q_proj"),
        module("attn_k", "self_attn.k_proj"),
        module("attn_v", "self_attn.v_proj"),
        module("attn_output", "self_attn.o_proj"),
        module("attn_q_norm", "self_attn.q_norm"),
        module("attn_k_norm", "self_attn.k_norm"),
        module("post_attention_norm", "post_attention_layernorm"),
        module("ffn_norm", "pre_feedforward_layernorm"),
        module("ffn_gate", "mlp.gate_proj"),
        module("ffn_up", "mlp.up_proj"),
        module("ffn_down", "mlp.down_proj"),
        module("post_ffw_norm", "post_feedforward_layernorm"),
    ],
    shifted_norms: true,
    sizes: GEMMA_SIZES,
    activations: &[("hidden_activation", GELU), ("hidden_act", GELU)],
    score_width: Some(46),
    full_attention_every: Some(2),
    ..QWEN2
};

/// Every architecture that is read and written.
pub(crate) const ARCHITECTURES: &[GgufArchitecture] = &[
    GgufArchitecture {
        name: "llama",
        families: &[
            ("llama", "LlamaForCausalLM"),
            ("mistral", "MistralForCausalLM"),
            ("mixtral", "MixtralForCausalLM"),
        ],
        inside: &[
            module("attn_norm", "input_layernorm"),
            ordered("attn_q", "self_attn.q_proj", RowOrder::QueryPairs),
            ordered("attn_k", "self_attn.k_proj", RowOrder::KeyPairs),
            module("attn_v", "self_attn.v_proj"),
            module("attn_output", "self_attn.o_proj"),
            module("ffn_norm", "post_attention_layernorm"),
            module("ffn_gate", "mlp.gate_proj"),
            module("ffn_up", "mlp.up_proj"),
            module("ffn_down", "mlp.down_proj"),
            module("ffn_gate_inp", "block_sparse_moe.gate"),
            ordered("ffn_gate_exps", "block_sparse_moe.experts.{}.w1", RowOrder::Experts),
            ordered("ffn_up_exps", "block_sparse_moe.experts.{}.w3", RowOrder::Experts),
            ordered("ffn_down_exps", "block_sparse_moe.experts.{}.w2", RowOrder::Experts),
        ],
        sizes: LLAMA_SIZES,
        ..QWEN2
    },
    QWEN2,
    GgufArchitecture { name: "qwen3", families: &[("qwen3", "Qwen3ForCausalLM")], ..QWEN2 },
    GgufArchitecture {
        name: "qwen2moe",
        families: &[("qwen2_moe", "Qwen2MoeForCausalLM")],
        flags: &[("norm_topk_prob", false, false)],
        sizes: QWEN_EXPERT_SIZES,
        ..QWEN2
    },
    GgufArchitecture {
        name: "qwen3moe",
        families: &[("qwen3_moe", "Qwen3MoeForCausalLM")],
        flags: &[("norm_topk_prob", true, false)],
        sizes: QWEN_EXPERT_SIZES,
        ..QWEN2
    },
    GEMMA2,
    GgufArchitecture {
        name: "gemma3",
        families: &[("gemma3_text", "Gemma3ForCausalLM")],
        score_width: Some(62),
        full_attention_every: Some(6),
        ..GEMMA2
    },
    GgufArchitecture {
        name: "phi3",
        families: &[("phi3", "Phi3ForCausalLM")],
        inside: &[
            module("attn_norm", "input_layernorm"),
            module("attn_qkv", "self_attn.qkv_proj"),
            module("attn_output", "self_attn.o_proj"),
            module("ffn_norm", "post_attention_layernorm"),
            module("ffn_up", "mlp.gate_up_proj"),
            module("ffn_down", "mlp.down_proj"),
        ],
        sizes: &[
            ("context_length", "max_position_embeddings", Size),
            ("embedding_length", "hidden_size", Size),
            ("block_count", "num_hidden_layers", Size),
            ("feed_forward_length", "intermediate_size", Size),
            ("attention.head_count", "num_attention_heads", Size),
            ("attention.head_count_kv", "num_key_value_heads", OptionalSize),
            ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Number),
            ("attention.sliding_window", "sliding_window", OptionalSize),
            ("rope.freq_base", "rope_theta", Number),
            ("rope.scaling.original_context_length", "original_max_position_embeddings", OptionalSize),
        ],
        rotary_share: Some("partial_rotary_factor"),
        ..QWEN2
    },
    GgufArchitecture {
        name: "gpt2",
        families: &[("gpt2", "GPT2LMHeadModel")],
        outside: &[
            ("token_embd", "transformer.wte"),
            ("position_embd", "transformer.wpe"),
            ("output_norm", "transformer.ln_f"),
            ("output", "lm_head"),
        ],
        inside: &[
            module("attn_norm", "ln_1"),
            module("attn_qkv", "attn.c_attn"),
            module("attn_output", "attn.c_proj"),
            module("ffn_norm", "ln_2"),
            module("ffn_up", "mlp.c_fc"),
            module("ffn_down", "mlp.c_proj"),
        ],
        blocks: "transformer.h",
        transposed: true,
        needs_biases: true,
        sizes: &[
            ("context_length", "n_positions", Size),
            ("embedding_length", "n_embd", Size),
            ("block_count", "n_layer", Size),
            ("feed_forward_length", "n_inner", OptionalSize),
            ("attention.head_count", "n_head", Size),
            ("attention.layer_norm_epsilon", "layer_norm_epsilon", Number),
        ],
        activations: &[("activation_function", GELU)],
        flags: &[("scale_attn_weights", true, true)],
        ..QWEN2
    },
    GgufArchitecture {
        name: "gptneox",
        families: &[("gpt_neox", "GPTNeoXForCausalLM")],
        outside: &[
            ("token_embd", "gpt_neox.embed_in"),
            ("output_norm", "gpt_neox.final_layer_norm"),
            ("output", "embed_out"),
        ],
        inside: &[
            module("attn_norm", "input_layernorm"),
            ordered("attn_qkv", "attention.query_key_value", RowOrder::FusedHeads),
            module("attn_output", "attention.dense"),
            module("ffn_norm", "post_attention_layernorm"),
            module("ffn_up", "mlp.dense_h_to_4h"),
            module("ffn_down", "mlp.dense_4h_to_h"),
        ],
        blocks: "gpt_neox.layers",
        needs_biases: true,
        sizes: &[
            ("context_length", "max_position_embeddings", Size),
            ("embedding_length", "hidden_size", Size),
            ("block_count", "num_hidden_layers", Size),
            ("feed_forward_length", "intermediate_size", Size),
            ("attention.head_count", "num_attention_heads", Size),
            ("attention.layer_norm_epsilon", "layer_norm_eps", Number),
            ("rope.freq_base", "rotary_emb_base", Number),
            ("use_parallel_residual", "use_parallel_residual", Flag),
        ],
        activations: &[("hidden_act", GELU)],
        rotary_share: Some("rotary_pct"),
        ..QWEN2
    },
];

impl GgufArchitecture {
    /// The architecture of that name in GGUF.
    ///
    /// # Errors
    /// `ERR_CONFIG_ARCHITECTURE`.
    pub(crate) fn named(name: &str, subject: &str) -> Result<&'static Self> {
        ARCHITECTURES
            .iter()
            .find(|architecture| architecture.name == name)
            .ok_or_else(|| unsupported(&format!("the GGUF architecture '{name}'"), subject))
    }

    /// The architecture that checkpoints of this `model_type` are written as.
    ///
    /// # Errors
    /// `ERR_CONFIG_ARCHITECTURE`.
    pub(crate) fn of_family(class: &str, subject: &str) -> Result<&'static Self> {
        ARCHITECTURES
            .iter()
            .find(|architecture| architecture.families.iter().any(|&(_, known)| known == class))
            .ok_or_else(|| unsupported(&format!("writing '{class}' as GGUF"), subject))
    }

    /// What Hugging Face calls the module of a tensor, its block and its entry in the table; `None` for modules that
    /// the architecture does not have.
    pub(crate) fn module(&self, gguf: &str) -> Option<(String, RowOrder)> {
        if let Some(inside) = gguf.strip_prefix("blk.") {
            let (block, module) = inside.split_once('.')?;
            // "00" and "+0" would be second names of block 0.
            let block = block.parse::<u32>().ok().filter(|number| number.to_string() == block)?;
            let module = self.inside.iter().find(|known| known.gguf == module)?;
            return Some((format!("{}.{block}.{}", self.blocks, module.hugging_face), module.rows));
        }
        let (_, name) = self.outside.iter().find(|(known, _)| *known == gguf)?;
        Some(((*name).to_owned(), RowOrder::Same))
    }
}

impl RowOrder {
    /// The row of GGUF that is row `row` of Hugging Face, in a matrix of `rows` rows over `heads` heads.
    pub(crate) fn stored_row(self, row: usize, rows: usize, heads: usize) -> usize {
        match self {
            RowOrder::Same | RowOrder::Experts => row,
            RowOrder::QueryPairs | RowOrder::KeyPairs => {
                let width = rows / heads;
                let (head, inside) = (row / width, row % width);
                let (second, pair) = (inside / (width / 2), inside % (width / 2));
                head * width + 2 * pair + second
            }
            RowOrder::FusedHeads => {
                let width = rows / heads / 3;
                let (head, part, inside) = (row / (3 * width), row / width % 3, row % width);
                (part * heads + head) * width + inside
            }
        }
    }

    /// Whether a matrix of `rows` rows can be ordered so.
    pub(crate) fn fits(self, rows: usize, heads: usize) -> bool {
        let unit = match self {
            RowOrder::Same | RowOrder::Experts => return true,
            RowOrder::QueryPairs | RowOrder::KeyPairs => 2,
            RowOrder::FusedHeads => 3,
        };
        heads > 0 && rows.is_multiple_of(heads) && (rows / heads).is_multiple_of(unit)
    }
}

fn unsupported(what: &str, subject: &str) -> Error {
    let known: Vec<&str> = ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
    Error::new(ErrorCode::ConfigArchitecture, format!("{what} is not supported"))
        .subject(subject)
        .hint(format!("GGUF architectures that are read and written: {}", known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_permutations() {
        for (order, rows, heads) in
            [(RowOrder::QueryPairs, 48, 4), (RowOrder::FusedHeads, 72, 4), (RowOrder::KeyPairs, 8, 4)]
        {
            assert!(order.fits(rows, heads));
            let mut seen: Vec<usize> = (0..rows).map(|row| order.stored_row(row, rows, heads)).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..rows), "{order:?}");
        }
        assert!(!RowOrder::QueryPairs.fits(12, 4));
    }

    #[test]
    fn modules_have_one_name_each() {
        for architecture in ARCHITECTURES {
            let names = architecture.inside.iter().map(|module| module.hugging_face);
            let names = names.chain(architecture.outside.iter().map(|(_, name)| *name));
            let names: Vec<&str> = names.collect();
            for (place, name) in names.iter().enumerate() {
                assert!(!names[..place].contains(name), "{} has {name} twice", architecture.name);
            }
        }
    }
}
