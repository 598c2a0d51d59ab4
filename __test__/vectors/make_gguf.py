"""Makes, with the gguf package of llama.cpp,

- __test__/vectors/gguf/types/TYPE.gguf: blocks of random bytes as tensor "blocks", and the values that the package reads
  from them as tensor "values". Scales are random half-precision numbers, subnormal and negative ones among them, but
  finite;
- __test__/vectors/gguf/tinystories-656k.gguf: the model of assets/ with tensors of several types, as llama.cpp's
  converter lays out a Llama: rows of queries and keys in pairs, the vocabulary with scores.

    pip install gguf==0.19.0 safetensors && python __test__/vectors/make_gguf.py
"""

import json

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors.numpy import load_file

OUT = Path(__file__).parent / "gguf" / "types"
MODEL = Path(__file__).parents[2] / "assets" / "tinystories-656k"
ROWS, BLOCKS = 3, 2
# Bytes of a block where half-precision numbers begin.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
    T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.IQ4_NL: [0], T.IQ4_XS: [0], T.TQ1_0: [52], T.TQ2_0: [64],
    T.MXFP4: [], T.NVFP4: [],
}


MODULES = {
    "self_attn.q_proj": ("attn_q", T.Q8_0), "self_attn.k_proj": ("attn_k", T.Q5_1),
    "self_attn.v_proj": ("attn_v", T.Q8_0), "self_attn.o_proj": ("attn_output", T.Q5_0),
    "mlp.gate_proj": ("ffn_gate", T.Q8_0), "mlp.up_proj": ("ffn_up", T.Q5_1), "mlp.down_proj": ("ffn_down", T.F16),
}


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Of each head, the two rows that turn together lie side by side."""
    width, columns = rows.shape[0] // heads, rows.shape[1]
    return rows.reshape(heads, 2, width // 2, columns).swapaxes(1, 2).reshape(rows.shape)


def make_model() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    weights = load_file(MODEL / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(OUT.parent / "tinystories-656k.gguf", "llama")
    writer.add_name("TinyStories-656K")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    vocabulary = tokenizer["model"]["vocab"]
    ranks = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault(merge.replace(" ", ""), rank)
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(token, 1e6)) for token in tokens])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_unk_token_id(vocabulary["<unk>"])
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0].content }}")

    def add(name: str, values: np.ndarray, kind: T) -> None:
        values = values.astype(np.float32)
        if kind in (T.F32, T.F16):
            writer.add_tensor(name, values.astype(np.float16 if kind == T.F16 else np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", weights["lm_head.weight"], T.Q8_0)
    add("output_norm.weight", weights["model.norm.weight"], T.F32)
    for block in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{block}", f"blk.{block}"
        add(f"{target}.attn_norm.weight", weights[f"{source}.input_layernorm.weight"], T.F32)
        add(f"{target}.ffn_norm.weight", weights[f"{source}.post_attention_layernorm.weight"], T.F32)
        for name, (short, kind) in MODULES.items():
            values = weights[f"{source}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                values = paired(values, heads if short == "attn_q" else kv_heads)
            add(f"{target}.{short}.weight", values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    make_model()
    OUT.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(20)
    for kind, halves in HALVES.items():
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ROWS * BLOCKS, size), dtype=np.uint8)
        for place in halves:
            scales = random.integers(0, 1 << 16, ROWS * BLOCKS, dtype=np.uint16)
            # Infinities and NaN have all five bits of the exponent.
            scales = np.where(scales & 0x7C00 == 0x7C00, scales & 0x83FF, scales).astype(np.uint16)
            blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
        if kind == T.MXFP4:
            blocks[:, 0] = [0, 1, 2, 127, 200, 252]
        if kind == T.NVFP4:
            blocks[0, :4] = [0x00, 0x7F, 0x01, 0x7E]
        rows = blocks.reshape(ROWS, BLOCKS * size)
        values = gguf.dequantize(rows, kind).astype(np.float32)
        assert np.isfinite(values).all() and values.shape == (ROWS, BLOCKS * elements), kind
        writer = gguf.GGUFWriter(OUT / f"{kind.name}.gguf", "llama")
        writer.add_tensor("blocks", rows, raw_dtype=kind)
        writer.add_tensor("values", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    main()
