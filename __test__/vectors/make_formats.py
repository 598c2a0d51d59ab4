"""Small checkpoints of one quantized Linear in every format, with the matrix that they stand for.

    pip install torch compressed-tensors bitsandbytes safetensors numpy
    python __test__/vectors/make_formats.py

Writes formats/NAME/{config.json, model.safetensors}: the Linear `up` as a quantizer stores it, and its weight as the
tensor `expected`. compressed-tensors packs and unpacks its formats itself. Of GPTQ and AWQ the words are random bits,
which are valid content, and `expected` comes from an unpacker that follows the published layouts bit by bit: a code is
looked up where the layout says that it lies, one at a time.
"""

import json
import pathlib
import shutil

import numpy
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "formats"
ROWS, COLUMNS, GROUP = 32, 32, 8
GROUPS = COLUMNS // GROUP


def save(name, quantization, tensors, expected):
    folder = OUT / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}, indent=2) + "\n")
    tensors = {f"up.{suffix}": torch.as_tensor(tensor).contiguous() for suffix, tensor in tensors.items()}
    tensors["expected"] = torch.as_tensor(expected).to(torch.float32).contiguous()
    save_file(tensors, folder / "model.safetensors")


def compressed_tensors(name, layout, bits, strategy, symmetric, activations=None):
    group = GROUP if strategy == "group" else None
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations)
    groups = GROUPS if strategy == "group" else 1
    half = 1 << (bits - 1)
    # Scales in float32, so that the unpacker of compressed-tensors computes in float32.
    state = {"weight": torch.randn(ROWS, COLUMNS), "weight_scale": torch.rand(ROWS, groups) * 4 / half + 0.01}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, (ROWS, groups), dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    save(name, config, stored, expected)


def field(words, position, bits):
    """The code of `bits` bits that begins at bit `position` of a row of words."""
    code = 0
    for i in range(bits):
        bit = int(words[(position + i) // 32]) >> ((position + i) % 32) & 1
        code |= bit << i
    return code


def gptq(name, version, bits, act_order, symmetric, dtype):
    qweight = numpy.random.randint(0, 2**32, (COLUMNS * bits // 32, ROWS), dtype=numpy.uint32)
    qzeros = numpy.random.randint(0, 2**32, (GROUPS, ROWS * bits // 32), dtype=numpy.uint32)
    if symmetric:
        stored = (1 << (bits - 1)) - (version == "gptq")
        qzeros[:] = sum(stored << (bits * i) for i in range(32 // bits))
    scales = (torch.rand(GROUPS, ROWS) * 0.1 + 0.01).to(dtype)
    g_idx = numpy.arange(COLUMNS) // GROUP
    if act_order:
        numpy.random.shuffle(g_idx)
    expected = numpy.zeros((ROWS, COLUMNS), numpy.float32)
    for row in range(ROWS):
        for column in range(COLUMNS):
            group = g_idx[column]
            code = field(qweight[:, row], column * bits, bits)
            zero = field(qzeros[group], row * bits, bits)
            if version == "gptq":
                zero = (zero + 1) % (1 << bits)
            expected[row, column] = numpy.float32(code - zero) * numpy.float32(scales[group, row].item())
    config = {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "bits": bits,
        "group_size": GROUP,
        "desc_act": act_order,
        "sym": symmetric,
        "lm_head": False,
    }
    tensors = {
        "qweight": qweight.view(numpy.int32),
        "qzeros": qzeros.view(numpy.int32),
        "scales": scales,
        "g_idx": g_idx.astype(numpy.int32),
    }
    save(name, config, tensors, expected)


def awq(name):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight = numpy.random.randint(0, 2**32, (COLUMNS, ROWS // 8), dtype=numpy.uint32)
    qzeros = numpy.random.randint(0, 2**32, (GROUPS, ROWS // 8), dtype=numpy.uint32)
    scales = (torch.rand(GROUPS, ROWS) * 0.1 + 0.01).to(torch.float16)
    expected = numpy.zeros((ROWS, COLUMNS), numpy.float32)
    for row in range(ROWS):
        nibble = order.index(row % 8)
        for column in range(COLUMNS):
            group = column // GROUP
            code = int(qweight[column, row // 8]) >> (4 * nibble) & 15
            zero = int(qzeros[group, row // 8]) >> (4 * nibble) & 15
            expected[row, column] = numpy.float32(code - zero) * numpy.float32(scales[group, row].item())
    config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    tensors = {"qweight": qweight.view(numpy.int32), "qzeros": qzeros.view(numpy.int32), "scales": scales}
    save(name, config, tensors, expected)


def float8(name, layout, strategy, block=None):
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, block_structure=block)
    dynamic = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=dynamic)
    shape = {"tensor": (1,), "channel": (ROWS, 1), "block": (ROWS // 16, COLUMNS // 8)}[strategy]
    state = {"weight": torch.randn(ROWS, COLUMNS), "weight_scale": torch.rand(shape) * 0.1 + 0.01}
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    save(name, config, stored, expected)


def fine_grained_float8(name):
    """The layout of transformers' FineGrainedFP8Config; every byte but the two NaNs is a number."""
    codes = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    weight = codes.view(torch.float8_e4m3fn)
    scale = (torch.rand(ROWS // 16, COLUMNS // 8) * 0.1 + 0.01).to(torch.bfloat16)
    tiles = scale.to(torch.float32).repeat_interleave(16, 0).repeat_interleave(8, 1)
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 8],
        "modules_to_not_convert": ["lm_head"],
    }
    save(name, config, {"weight": weight, "weight_scale_inv": scale}, weight.to(torch.float32) * tiles)


def float4(name, layout, group, activations):
    """Scales and codes come from the packer; `expected` are its codes times its scales, in float32."""
    strategy = "tensor_group" if group == 16 else "group"
    kind = dict(num_bits=4, type="float", symmetric=True, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**kind),
        input_activations=QuantizationArgs(**kind, dynamic="local") if activations else None,
    )
    weight = torch.randn(ROWS, 64)
    groups = weight.reshape(ROWS, -1, group).abs().amax(-1)
    state = {"weight": weight}
    if group == 16:
        state["weight_global_scale"] = (448 * 6 / groups.max()).reshape(1)
        stored_scale = (groups / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn)
        state["weight_scale"] = stored_scale.to(torch.float32)
    else:
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(groups / 6)) + 1)
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(dict(state), scheme)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(values + [-value for value in values])
    packed = stored["weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(ROWS, -1).long()
    if group == 16:
        scale = stored["weight_scale"].to(torch.float32) / stored["weight_global_scale"]
    else:
        scale = torch.exp2(stored["weight_scale"].to(torch.float32) - 127)
    expected = table[codes] * scale.repeat_interleave(group, 1)
    # The unpacker of compressed-tensors rounds to bfloat16.
    unpacked = compressor.decompress(dict(stored), scheme)["weight"].to(torch.float32)
    assert torch.allclose(unpacked, expected, rtol=2**-7, atol=0)
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    save(name, config, {key: value for key, value in stored.items()}, expected)


def bits_and_bytes(name, kind, nested):
    import bitsandbytes.functional as functional

    weight = torch.randn(ROWS, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed}
    tensors |= {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
    save(name, config, tensors, functional.dequantize_4bit(packed, state))


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(0)
    numpy.random.seed(0)
    compressed_tensors("pack-3-symmetric", "pack-quantized", 3, "group", True)
    compressed_tensors("pack-4-asymmetric", "pack-quantized", 4, "group", False)
    dynamic = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    compressed_tensors("int-8-channel", "int-quantized", 8, "channel", True, dynamic)
    compressed_tensors("naive-4-asymmetric", "naive-quantized", 4, "group", False)
    gptq("gptq-2", "gptq", 2, False, False, torch.float16)
    gptq("gptq-3-act-order", "gptq", 3, True, False, torch.float16)
    gptq("gptq-v2-3", "gptq_v2", 3, False, False, torch.bfloat16)
    gptq("gptq-v2-4-act-order", "gptq_v2", 4, True, False, torch.float16)
    gptq("gptq-8-symmetric", "gptq", 8, True, True, torch.float16)
    awq("awq")
    float8("float8-tensor", "float-quantized", "tensor")
    float8("float8-channel", "float-quantized", "channel")
    float8("float8-block", "naive-quantized", "block", [16, 8])
    fine_grained_float8("float8-fine-grained")
    float4("nvfp4", "nvfp4-pack-quantized", 16, True)
    float4("mxfp4", "mxfp4-pack-quantized", 32, False)
    bits_and_bytes("nf4", "nf4", False)
    bits_and_bytes("nf4-nested", "nf4", True)
    bits_and_bytes("fp4-nested", "fp4", True)


if __name__ == "__main__":
    main()
