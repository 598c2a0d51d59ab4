"""Records logits of tiny random models of every decoder family, as Hugging Face transformers computes them in float32.

    pip install torch transformers tokenizers safetensors
    python __test__/vectors/make_families.py

Writes families/NAME/{config.json, model.safetensors, tokenizer.json, logits.json}. The weights are random but of a
size at which every operation shows in the logits: biases, norms and projections are far from their initial values.
"""

import json
import pathlib

import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64
TOKENS = [5, 17, 3, 60, 17, 17, 42, 0, 63, 8, 29, 31, 2, 55, 11, 40, 7]
# Longer than every window and every original context below.
LONG = TOKENS + [9, 33, 61, 4, 4, 20, 51, 38, 1, 26, 47, 12, 58, 19, 35, 22, 6]

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)

# Few wide heads, so that fast and slow pairs of dimensions differ.
ROPE = SIZES | dict(intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16)


def llama(**rope):
    """A Llama whose contexts were 16 positions long before `rope` extended them to 64."""
    context = 16 if rope["rope_type"] == "dynamic" else 64
    rope = {"rope_theta": 100.0} | rope
    return transformers.LlamaConfig(**ROPE | dict(max_position_embeddings=context), rope_parameters=rope)


FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
    "llama-biased": transformers.LlamaConfig(
        **SIZES, rms_norm_eps=1e-6, rope_theta=500.0, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "qwen2": transformers.Qwen2Config(**SIZES, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False),
    "qwen2-tied": transformers.Qwen2Config(**SIZES, rms_norm_eps=1e-6, rope_theta=100.0, tie_word_embeddings=True),
    "llama-linear": llama(rope_type="linear", factor=4.0),
    "llama-dynamic": llama(rope_type="dynamic", factor=4.0),
    "llama-yarn": llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0),
    "llama-llama3": llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
        rope_theta=1000.0,
    ),
    "llama-longrope": llama(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=[1.0, 1.0, 1.05, 1.1, 1.2, 1.4, 1.5, 1.6],
        long_factor=[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    ),
    "llama-longrope-short": llama(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=32,
        short_factor=[1.0, 1.0, 1.05, 1.1, 1.2, 1.4, 1.5, 1.6],
        long_factor=[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    ),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=7, rms_norm_eps=1e-5),
    "qwen2-window": transformers.Qwen2Config(
        **SIZES, rms_norm_eps=1e-6, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12, rms_norm_eps=1e-6, attention_bias=True),
    "phi3": transformers.Phi3Config(
        **SIZES,
        original_max_position_embeddings=16,
        sliding_window=11,
        partial_rotary_factor=0.5,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0, 1.5],
            "long_factor": [1.2, 4.0],
        },
        pad_token_id=None,
    ),
    "gemma2": transformers.Gemma2Config(
        **SIZES,
        head_dim=12,
        sliding_window=7,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=12,
        sliding_window=7,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
    ),
    "gemma3-old": transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=12,
        sliding_window=7,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48
    ),
    "gpt-neox": transformers.GPTNeoXConfig(
        **{key: size for key, size in SIZES.items() if key != "num_key_value_heads"},
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "gpt-neox-sequential": transformers.GPTNeoXConfig(
        **{key: size for key, size in SIZES.items() if key != "num_key_value_heads"},
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        use_parallel_residual=False,
        attention_bias=False,
    ),
    "mixtral": transformers.MixtralConfig(
        **SIZES | dict(intermediate_size=24), num_local_experts=4, num_experts_per_tok=2, sliding_window=9
    ),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **SIZES,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        norm_topk_prob=False,
    ),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True
    ),
    "gpt2-bare": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, scale_attn_weights=False
    ),
}

# Vectors over the short prompt; all others run over the long one.
SHORT = ["llama", "llama-biased", "qwen2", "qwen2-tied", "llama-longrope-short"]
# Configurations that are stored as older versions of transformers wrote them.
OLD_SPELLING = ["llama-yarn", "qwen2-window", "gemma3-old", "gpt-neox-sequential"]


def tokenizer():
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def randomize(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(1.0 + 0.3 * noise)
            parameter.copy_(parameter.to(torch.bfloat16))


def spell_as_before(path):
    """Rotary parameters in fields of their own and in `rope_scaling` with `type`, and no `layer_types`."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 2
        rope = rope["full_attention"]
    neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind} | rope
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_bare(model, path):
    """As the checkpoints of GPT-2 by its authors: without the name of the base model, and `n_inner` left out."""
    tensors = {key.removeprefix("transformer."): value for key, value in model.state_dict().items()}
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def main():
    folder = pathlib.Path(__file__).parent / "families"
    for seed, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        tokens = TOKENS if name in SHORT else LONG
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        # The weights are exact in bfloat16, so they are stored in it.
        model.to(torch.bfloat16).save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        if name == "gpt2-bare":
            save_bare(model, folder / name / "model.safetensors")
        if name in OLD_SPELLING:
            spell_as_before(folder / name / "config.json")
        tokenizer().save(str(folder / name / "tokenizer.json"), pretty=False)
        record = {"tokens": tokens, "logits": [[round(v, 7) for v in row] for row in logits.tolist()]}
        (folder / name / "logits.json").write_text(json.dumps(record))
        print(name, "logits from", float(logits.min()), "to", float(logits.max()))


main()
