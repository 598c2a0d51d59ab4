"""Whether rounded activations explain what llama.cpp computes otherwise with a GGUF file than this library.

    npm run build
    pip install torch transformers gguf tokenizers numpy
    python bench/peers/gguf_activations.py [TYPES]

llama.cpp multiplies codes with activations that it rounds to 8 bits: in blocks of 32 with a scale in half precision
(Q8_0, Q8_1) for Q8_0, Q4_0 and Q4_1, in blocks of 256 with a scale in f32 (Q8_K) for the K-quants. Here the weights that
the `gguf` package of llama.cpp reads from the file go into the model of transformers, which runs in f32 twice: as it
is, and with the input of every matrix in codes rounded like that. Printed are perplexity over the same 4 windows of 256
tokens as in gguf_llama_cpp.mjs, the greedy tokens, and where the two part by how much the logits of the two candidates
differ: compare both columns with that script's.
"""

import math
import pathlib
import sys
import tempfile

import gguf
import numpy
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from quantized_in_transformers import kintsugi

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "assets/llama-7m"
LENGTH, WINDOWS, TOKENS = 256, 4, 48
PROMPT = "Once upon a time, there was a little girl named Lily."
PLACES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def blocks_of_32(x):
    """Q8_0, and the codes of Q8_1."""
    parts = x.reshape(-1, 32)
    scale = parts.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, parts / scale, 0).round()
    return (codes * scale.half().float()).reshape(x.shape)


def blocks_of_256(x):
    """Q8_K: the value of the largest size becomes -127."""
    parts = x.reshape(-1, 256)
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    scale = -largest / 127
    codes = torch.where(scale != 0, parts / scale, 0).round().clamp(max=127)
    return (codes * scale).reshape(x.shape)


def place_of(name):
    """The module of transformers."""
    parts = name.removesuffix(".weight").split(".")
    return f"model.layers.{parts[1]}.{PLACES[parts[2]]}" if parts[0] == "blk" else PLACES[parts[0]]


def load(path):
    """The model with the weights of the file, and for each module in codes the type of these."""
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    types = {}
    with torch.no_grad():
        for tensor in gguf.GGUFReader(path).tensors:
            if not tensor.name.endswith(".weight"):
                continue
            values = torch.from_numpy(numpy.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32))
            place = place_of(tensor.name)
            parameter = model.get_submodule(place).weight
            values = values.reshape(parameter.shape)
            if (count := heads.get(place.rsplit(".", 1)[-1])) is not None:
                # In the file the two rows that turn together lie side by side.
                values = values.reshape(count, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(parameter.shape)
            parameter.copy_(values)
            if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
                types["lm_head" if place == "model.embed_tokens" else place] = tensor.tensor_type.name
    return model, types


def perplexity(model, ids):
    losses = []
    with torch.no_grad():
        for window in torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH):
            logits = model(window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


def greedy(model, prompt):
    tokens, rows = list(prompt), []
    with torch.no_grad():
        for _ in range(TOKENS):
            rows.append(model(torch.tensor([tokens])).logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt):], rows


def main():
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    text = (ROOT / "assets/text/eval-stories.txt").read_text()[: WINDOWS * LENGTH * 4]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    prompt = tokenizer.encode(PROMPT).ids
    notes = []
    print("| type | perplexity as it is | with rounded activations | same greedy tokens |\n|---|---|---|---|")
    for kind in (sys.argv[1] if len(sys.argv) > 1 else "Q8_0,Q6_K,Q4_K,Q4_1,Q4_0").split(","):
        with tempfile.TemporaryDirectory() as scratch:
            path = f"{scratch}/model.gguf"
            kintsugi("convert", SOURCE, "-o", path, "--format", f"gguf:{kind}", "--allow-requantize")
            model, types = load(path)
        plain, (tokens, rows) = perplexity(model, ids), greedy(model, prompt)
        for place, code in types.items():
            rounded = blocks_of_256 if code.endswith("_K") else blocks_of_32
            model.get_submodule(place).register_forward_pre_hook(lambda _, given, rounded=rounded: (rounded(given[0]),))
        other, (others, other_rows) = perplexity(model, ids), greedy(model, prompt)
        same = next((at for at, pair in enumerate(zip(tokens, others)) if pair[0] != pair[1]), TOKENS)
        print(f"| {kind} | {plain:.4f} | {other:.4f} | {same} of {TOKENS} |", flush=True)
        if same < TOKENS:
            one, two = tokens[same], others[same]
            gaps = [float(row[same][one] - row[same][two]) for row in (rows, other_rows)]
            apart = float((rows[same] - other_rows[same]).abs().mean())
            notes.append(
                f"{kind}, token {same}: {one} ({tokenizer.decode([one])!r}) or {two} ({tokenizer.decode([two])!r}); the logit "
                f"of the first is larger by {gaps[0]:.4f} as it is and by {gaps[1]:.4f} with rounded activations, which "
                f"change a logit by {apart:.4f} in the mean"
            )
    print("\n".join(["", *notes]))


main()
