"""Merges of trained adapters, ours against `add_weighted_adapter` of peft: the relative difference of all updates, for
every combination that is no matter of chance.

    pip install torch peft transformers
    python bench/peers/merge_deltas_in_peft.py 'node dist/cli/main.js' CHECKPOINT WEIGHT ADAPTER ADAPTER ...
"""

import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

# Ours, peft's name for it, options of ours.
CASES = [
    ("cat", "cat", []),
    ("linear", "linear", []),
    ("svd", "svd", ["--rank", "8"]),
    ("ties", "ties", ["--coordinates", "factors", "--density", "0.5"]),
    ("ties", "ties_svd", ["--rank", "8", "--density", "0.5"]),
    ("magnitude-prune", "magnitude_prune", ["--coordinates", "factors", "--density", "0.5"]),
    ("magnitude-prune", "magnitude_prune_svd", ["--rank", "8", "--density", "0.5"]),
]


def deltas(model, adapter):
    modules = model.base_model.model.named_modules()
    return {name: module.get_delta_weight(adapter) for name, module in modules if hasattr(module, "lora_A")}


def main():
    command, checkpoint, weight, *adapters = sys.argv[1:]
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    names = [f"a{index}" for index in range(len(adapters))]
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:]):
        model.load_adapter(folder, adapter_name=name)
    folder = pathlib.Path(tempfile.mkdtemp())
    weights = [float(weight)] * len(adapters)
    for method, kind, options in CASES:
        model.add_weighted_adapter(names, weights, kind, combination_type=kind, svd_rank=8, density=0.5)
        expected = deltas(model, kind)
        model.delete_adapter(kind)
        out = folder / kind
        arguments = ["merge", *adapters, "-o", str(out), "--method", method, "--no-report", *options]
        subprocess.run([*command.split(), *arguments, "--weights", ",".join(map(str, weights))], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        model.load_adapter(out, adapter_name="ours")
        found = deltas(model, "ours")
        model.delete_adapter("ours")
        assert found.keys() == expected.keys()
        wrong = sum(float((found[name] - expected[name]).norm() ** 2) for name in expected) ** 0.5
        total = sum(float(delta.norm() ** 2) for delta in expected.values()) ** 0.5
        print(f"{kind}: {len(expected)} updates, relative difference {wrong / total:.1e}", flush=True)


main()
