"""Records logits of tiny random models of every decoder family, as Hugging Face transformers computes them in float32.

    pip install torch transformers tokenizers safetensors
    python __test__/vectors/make_families.py

Writes families/NAME/{config.json, model.safetensors, tokenizer.json, logits.json}. The weights are random but of a
size at which every operation shows in the logits: biases, norms and projections are far from their initial values.
"""

import json
import pathlib

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64
TOKENS = [5, 17, 3, 60, 17, 17, 42, 0, 63, 8, 29, 31, 2, 55, 11, 40, 7]

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)

FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
    "llama-biased": transformers.LlamaConfig(
        **SIZES, rms_norm_eps=1e-6, rope_theta=500.0, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "qwen2": transformers.Qwen2Config(**SIZES, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False),
    "qwen2-tied": transformers.Qwen2Config(**SIZES, rms_norm_eps=1e-6, rope_theta=100.0, tie_word_embeddings=True),
}


def tokenizer():
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def randomize(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() == 2:
                parameter.copy_(noise * (1.0 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(1.0 + 0.3 * noise)
            parameter.copy_(parameter.to(torch.bfloat16))


def main():
    folder = pathlib.Path(__file__).parent / "families"
    for seed, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
        with torch.no_grad():
            logits = model(torch.tensor([TOKENS])).logits[0]
        # The weights are exact in bfloat16, so they are stored in it.
        model.to(torch.bfloat16).save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        tokenizer().save(str(folder / name / "tokenizer.json"), pretty=False)
        record = {"tokens": TOKENS, "logits": [[round(v, 7) for v in row] for row in logits.tolist()]}
        (folder / name / "logits.json").write_text(json.dumps(record))
        print(name, "logits from", float(logits.min()), "to", float(logits.max()))


main()
