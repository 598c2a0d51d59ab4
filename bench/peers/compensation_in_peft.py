"""Whether the folder `eora/` that `kintsugi compress` writes is, for peft, the compensation that it is here.

    npm run build
    pip install torch transformers compressed-tensors peft safetensors tokenizers
    python bench/peers/compensation_in_peft.py

`assets/llama-7m` is compressed with factors; transformers (with compressed-tensors) opens the checkpoint, peft puts the
adapter on top, and perplexity and greedy text are compared with those of `kintsugi eval` and `kintsugi generate`. Then
ranks are mixed: the factors of every other Linear are cut to their first columns, which is a valid smaller compensation,
in both folders alike; an affine one gets the biases that its centres give for that rank. At last an adapter of modules whose names have capitals goes through `kintsugi merge` and back
into peft.

Exits with 1 when perplexities are more than 0.01 % apart, a greedy token differs, peft finds a key that is missing or
not expected, or the merged adapter is another function.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quantized_in_transformers import CALIBRATION, LENGTH, PROMPT, SOURCE, TOKENS, TOLERANCE, kintsugi, measured, text

COMPRESS = ["--calibration", str(CALIBRATION), "--sequences", "16", "--length", "256"]
PACKED = ["--format", "compressed-tensors/pack-quantized"]
CASES = {
    "3 bits, rank 8": ["--bits", "3", "--group-size", "64", "--eora-rank", "8", *PACKED],
    "4 bits, rank 32": ["--eora-rank", "32", *PACKED],
    "2 bits, rank 8, affine": ["--bits", "2", "--group-size", "64", "--eora-rank", "8", "--eora-affine", *PACKED],
    "2 bits, rank 8, one A per input": ["--bits", "2", "--group-size", "64", "--eora-rank", "8", "--eora-grouped", *PACKED],
}


def adapted(folder):
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")  # peft only warns of such keys
        return PeftModel.from_pretrained(base, folder / "eora").eval()


def mix_ranks(folder):
    """Cuts the factors of every other Linear to three columns."""
    eora = folder / "eora"
    config = json.loads((eora / "adapter_config.json").read_text())
    tensors = load_file(eora / "adapter_model.safetensors")
    centres = load_file(eora / "factor_centres.safetensors") if config.get("lora_bias") else {}
    for module in list(config["rank_pattern"])[::2]:
        config["rank_pattern"][module] = config["alpha_pattern"][module] = 3
        a, b = (f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB")
        if centres:
            bias, centre = f"base_model.model.{module}.lora_B.bias", f"{module}.lora_A.centre"
            tensors[bias] += tensors[b][:, 3:].float() @ centres[centre][3:]
            centres[centre] = centres[centre][:3].contiguous()
        tensors[a], tensors[b] = tensors[a][:3].contiguous(), tensors[b][:, :3].contiguous()
    (eora / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, eora / "adapter_model.safetensors")
    if centres:
        save_file(centres, eora / "factor_centres.safetensors")


def compare(case, folder, sample):
    ours = kintsugi("eval", folder, "--text", sample, "--length", str(LENGTH), "--precision", "f32")["perplexity"]
    said = kintsugi("generate", folder, "--prompt", PROMPT, "--max-tokens", str(TOKENS), "--temperature", "0", "--precision", "f32")
    model = adapted(folder)
    ranks = {rank for module in model.modules() if hasattr(module, "lora_A") for rank in module.r.values()}
    theirs, words = measured(model)
    difference = theirs / ours - 1
    same = said["text"] == words
    print(f"| {case} | {sorted(ranks)} | {ours:.5f} | {theirs:.5f} | {100 * difference:+.5f} % | {'yes' if same else 'no'} |", flush=True)
    return abs(difference) <= TOLERANCE and same


class Mixed(torch.nn.Module):
    """Modules with capitals in their names, and a name that is the end of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.Attn = torch.nn.ModuleDict({"Q_Proj": torch.nn.Linear(48, 64), "q_proj": torch.nn.Linear(64, 32)})
        self.attn = torch.nn.ModuleDict({"Q_Proj": torch.nn.Linear(32, 48)})

    def forward(self, x):
        return self.attn["Q_Proj"](self.Attn["q_proj"](self.Attn["Q_Proj"](x)))


def capitals(scratch):
    """The relative difference of a merge of one adapter, all of its terms kept, from the adapter."""
    ranks = {"Attn.Q_Proj": 5, "Attn.q_proj": 2, "attn.Q_Proj": 3}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(ranks), rank_pattern={f"^{name}": rank for name, rank in ranks.items()})
    model = get_peft_model(Mixed(), config)
    torch.manual_seed(2)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    model.save_pretrained(scratch / "source")
    kintsugi("merge", scratch / "source", "-o", scratch / "merged", "--method", "cat", "--padding", "none", "--factor-type", "f32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        merged = PeftModel.from_pretrained(Mixed(), scratch / "merged")
    x = torch.randn(7, 48)
    with torch.no_grad():
        expected, found = model(x), merged(x)
    return float((found - expected).norm() / expected.norm())


def main():
    sound = True
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        sample = scratch / "text.txt"
        sample.write_text(text())
        print("| written | ranks | perplexity here | in peft | difference | same greedy text |\n|---|---|---|---|---|---|")
        for case, options in CASES.items():
            folder = scratch / case.replace(", ", "-").replace(" ", "-")
            kintsugi("compress", SOURCE, "-o", folder, *COMPRESS, *options)
            sound &= compare(case, folder, sample)
            mixed = scratch / f"{folder.name}-mixed"
            shutil.copytree(folder, mixed)
            mix_ranks(mixed)
            sound &= compare(f"{case}, cut", mixed, sample)
        error = capitals(scratch)
        print(f"\nnames with capitals, through merge: relative difference {error:.1e}")
        sound &= error < 1e-5
    sys.exit(not sound)


main()
