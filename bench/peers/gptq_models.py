"""GPTQ of every Linear of a model: the errors of `kintsugi compress --method gptq` over those of the torch implementation
in gptq_torch.py, which gets the same weights and the same statistics.

Usage: python bench/peers/gptq_models.py 'node dist/cli/main.js' MODEL TEXT [BITS [GROUP_SIZE]]
"""

import os
import shlex
import subprocess
import sys
import tempfile

import torch
from safetensors import safe_open

import gptq_torch

POINTS = {
    "q_proj": "attention_input", "k_proj": "attention_input", "v_proj": "attention_input", "o_proj": "attention_output",
    "gate_proj": "mlp_input", "up_proj": "mlp_input", "down_proj": "mlp_activation",
}


def tensors(folder):
    with safe_open(os.path.join(folder, "model.safetensors"), "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}


def symmetric(packed):
    """A matrix from its upper triangle, row after row."""
    side = int(((8 * packed.numel() + 1) ** 0.5 - 1) / 2)
    full = torch.zeros(side, side, dtype=torch.float64)
    rows, columns = torch.triu_indices(side, side)
    full[rows, columns] = packed.double()
    full[columns, rows] = packed.double()
    return full


def error(w, out, s):
    d = (w - out).double()
    return float((((d @ s) * d).sum() / (((w.double() @ s) * w.double()).sum())).sqrt())


def main():
    program, model, text = shlex.split(sys.argv[1]), sys.argv[2], sys.argv[3]
    gptq_torch.BITS = int(sys.argv[4]) if len(sys.argv) > 4 else 4
    gptq_torch.GROUP = int(sys.argv[5]) if len(sys.argv) > 5 else 64
    with tempfile.TemporaryDirectory() as folder:
        out, dense, statistics = (os.path.join(folder, name) for name in ("out", "dense", "statistics.safetensors"))
        compress = ["compress", model, "-o", out, "--method", "gptq", "--bits", str(gptq_torch.BITS)]
        compress += ["--group-size", str(gptq_torch.GROUP), "--scale-type", "f32", "--format", "kintsugi"]
        compress += ["--calibration", text, "--sequences", "64", "--length", "256", "--save-calibration", statistics]
        subprocess.run(program + compress, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        subprocess.run(program + ["convert", out, "-o", dense, "--format", "f32"], check=True, stdout=subprocess.DEVNULL)
        before, after = tensors(model), tensors(dense)
        ratios = []
        with safe_open(statistics, "pt") as file:
            for name in sorted(before):
                block, _, linear = name.removesuffix(".weight").rpartition(".")
                if linear not in POINTS:
                    continue
                point = f"{block.rpartition('.')[0]}.{POINTS[linear]}"
                s = symmetric(file.get_tensor(f"{point}.second_moment"))
                w = before[name]
                ours = error(w, after[name], s)
                theirs = error(w, gptq_torch.gptq(w, s.float(), {}), s)
                ratios.append(ours / theirs)
                print(f"{name} {ours:.6f} {theirs:.6f} {ours / theirs:.5f}", flush=True)
        print(f"{len(ratios)} Linears: ratio at most {max(ratios):.5f}, mean {sum(ratios) / len(ratios):.5f}")


main()
