"""Whether what `kintsugi compress` writes is, for others, the model that it is here.

    npm run build
    pip install torch transformers compressed-tensors safetensors tokenizers numpy
    python bench/peers/quantized_in_transformers.py [CASE ...]

`assets/llama-7m` is compressed in each way; perplexity over 8 windows of 256 tokens of `assets/text/eval-stories.txt` and
48 greedy tokens are compared with those of `kintsugi eval` and `kintsugi generate` in f32. The reader is

* compressed-tensors: transformers with the library compressed-tensors, by `from_pretrained` alone (see `opened`);
* GPTQ and AWQ: an unpacker in numpy, written from the definition of the layouts (a code is the number in the bits where
  the layout says that it lies), whose weights go into the plain model of transformers. No library of the format runs
  without a GPU.

Exits with 1 when perplexities are more than 0.01 % apart, or a greedy token differs.
"""

import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "assets/llama-7m"
TEXT = ROOT / "assets/text/eval-stories.txt"
CALIBRATION = ROOT / "assets/text/calibration-wikipedia.txt"
LENGTH, WINDOWS, TOKENS = 256, 8, 48
PROMPT = "Once upon a time, there was a little girl named Lily."
TOLERANCE = 1e-4

RTN = ["--method", "rtn"]
GPTQ = ["--method", "gptq", "--calibration", CALIBRATION, "--sequences", "16", "--length", "256"]
AWQ = ["--method", "awq", "--calibration", CALIBRATION, "--sequences", "16", "--length", "256"]
MIXED = ["--override", "*.down_proj=8:64", "--override", "*.layers.0.*=8"]
PACKED = ["--format", "compressed-tensors/pack-quantized"]
CASES = {
    "ct 4 bits, groups of 128": [*RTN, *PACKED],
    "ct 4 bits, groups of 64": [*RTN, *PACKED, "--group-size", "64"],
    "ct 4 bits, groups of 64, symmetric": [*RTN, *PACKED, "--group-size", "64", "--symmetric"],
    "ct 4 bits, whole rows": [*RTN, *PACKED, "--group-size", "whole"],
    "ct 8 bits, groups of 128": [*RTN, *PACKED, "--bits", "8"],
    "ct 8 bits, whole rows, symmetric": [*RTN, *PACKED, "--bits", "8", "--group-size", "whole", "--symmetric"],
    "ct 3 bits, groups of 64": [*RTN, *PACKED, "--bits", "3", "--group-size", "64"],
    "ct 4 bits, some 8, symmetric": [*RTN, *PACKED, *MIXED, "--symmetric"],
    "ct 4 bits, GPTQ": [*GPTQ, *PACKED],
    "ct 4 bits, AWQ": [*AWQ, *PACKED, "--group-size", "64"],
    "gptq v1 4 bits, symmetric": [*RTN, "--format", "gptq", "--symmetric"],
    "gptq v2 2 bits, groups of 64": [*GPTQ, "--format", "gptq_v2", "--bits", "2", "--group-size", "64"],
    "gptq v2 3 bits, groups of 64": [*GPTQ, "--format", "gptq_v2", "--bits", "3", "--group-size", "64"],
    "gptq v2 4 bits": [*RTN, "--format", "gptq_v2"],
    "gptq v2 4 bits, group index": [*GPTQ, "--format", "gptq_v2", "--no-static-groups"],
    "gptq v2 8 bits": [*RTN, "--format", "gptq_v2", "--bits", "8"],
    "gptq v2 4 bits, some 8": [*RTN, "--format", "gptq_v2", *MIXED],
    "awq 4 bits": [*RTN, "--format", "awq"],
    "awq 4 bits, AWQ": [*AWQ, "--format", "awq", "--group-size", "64"],
}


def kintsugi(*arguments):
    command = ["node", ROOT / "dist/cli/main.js", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def fields(words, bits, count):
    """The numbers of `bits` bits that lie behind each other in the rows of `words`, lowest bits first."""
    low_first = numpy.unpackbits(numpy.ascontiguousarray(words).view(numpy.uint8), axis=1, bitorder="little")
    codes = low_first[:, : count * bits].reshape(len(words), count, bits)
    return (codes.astype(numpy.int64) << numpy.arange(bits)).sum(-1)


def gptq(tensors, name, bits, version):
    """GPTQ: words of `qweight` hold a column, those of `qzeros` a row; version 1 stores zero points minus one."""
    words, zeros, scales, index = (tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(index), words.shape[1]
    codes = fields(words.T, bits, inputs)
    zeros = fields(zeros, bits, outputs) + (version == "gptq")
    return (codes - zeros.T[:, index]).astype(numpy.float32) * scales.T[:, index].astype(numpy.float32)


def awq(tensors, name, group):
    """AWQ: a word holds eight neighbouring outputs, the lowest nibble first: 0 2 4 6 1 3 5 7."""
    words, zeros, scales = (tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    order = numpy.array([0, 2, 4, 6, 1, 3, 5, 7])
    outputs = words.shape[1] * 8

    def natural(packed):
        nibbles = fields(packed, 4, outputs).reshape(len(packed), -1, 8)
        found = numpy.empty_like(nibbles)
        found[:, :, order] = nibbles
        return found.reshape(len(packed), outputs)

    index = numpy.arange(len(words)) // (len(words) if group == -1 else group)
    return ((natural(words) - natural(zeros)[index]).astype(numpy.float32) * scales[index].astype(numpy.float32)).T


def bits_of(config, name):
    """The bits that the rules of `dynamic` say; the first that matches counts."""
    for rule, changes in config.get("dynamic", {}).items():
        if rule.startswith("+:") and re.match(rule[2:], name):
            return changes["bits"]
    return config["bits"]


def unpacked(folder):
    """The plain model with the weights that numpy finds in a folder of GPTQ or AWQ."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in load_file(folder / "model.safetensors").items()}
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
    linears = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    with torch.no_grad():
        for name in linears:
            if config["quant_method"] == "awq":
                weight = awq(tensors, name, config["group_size"])
            else:
                weight = gptq(tensors, name, bits_of(config, name), config["checkpoint_format"])
            model.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        for name, parameter in model.named_parameters():
            # AWQ has changed the weights of norms.
            if name in tensors:
                parameter.copy_(tensors[name])
    return model


def opened(folder):
    """By transformers alone. With zero points it must be told to dequantize: compressed-tensors 0.20.0 makes room for them
    as if they were not packed (`compress` of a weight on the device `meta`), so that no file with zero points opens."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    schemes = [group["weights"] for group in config["config_groups"].values()]
    how = {} if all(scheme["symmetric"] for scheme in schemes) else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def measured(model):
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    ids = tokenizer.encode(text(), add_special_tokens=False).ids
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
        given, tokens, past = torch.tensor([tokenizer.encode(PROMPT).ids]), [], None
        while len(tokens) < TOKENS:
            output = model(given, past_key_values=past, use_cache=True)
            given, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            tokens.append(int(given))
    return math.exp(torch.cat(losses).mean()), tokenizer.decode(tokens, skip_special_tokens=True)


def text():
    return TEXT.read_text()[: WINDOWS * LENGTH * 4]


def main():
    chosen = sys.argv[1:]
    failed = False
    print("| written | perplexity here | there | difference | same greedy text |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        sample = scratch / "text.txt"
        sample.write_text(text())
        for case, options in CASES.items():
            if chosen and not any(word in case for word in chosen):
                continue
            out = scratch / re.sub(r"\W+", "-", case)
            kintsugi("compress", SOURCE, "-o", out, *map(str, options))
            ours = kintsugi("eval", out, "--text", sample, "--length", str(LENGTH), "--precision", "f32")["perplexity"]
            said = kintsugi("generate", out, "--prompt", PROMPT, "--max-tokens", str(TOKENS), "--temperature", "0", "--precision", "f32")
            model = opened(out) if case.startswith("ct") else unpacked(out)
            theirs, words = measured(model)
            difference = theirs / ours - 1
            same = said["text"] == words
            failed |= abs(difference) > TOLERANCE or not same
            print(f"| {case} | {ours:.5f} | {theirs:.5f} | {100 * difference:+.5f} % | {'yes' if same else 'no'} |", flush=True)
            if not same:
                print(f"  here: {said['text']!r}\n  there: {words!r}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
