"""Whether modules that peft saves whole (modules_to_save) survive a merge: peft writes two adapters with a head of their
own, `kintsugi merge` carries over or averages the head, peft reads the result.

    pip install torch peft transformers
    python bench/peers/whole_modules_in_peft.py 'node dist/cli/main.js'
"""

import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base():
    torch.manual_seed(1)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def train(folder, seed):
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.base_model.model.lm_head.modules_to_save["default"].weight.detach()


def main():
    command = sys.argv[1].split()
    folder = pathlib.Path(tempfile.mkdtemp())
    heads = [train(folder / name, seed) for seed, name in enumerate(["a", "b"])]

    def merge(out, *arguments):
        run = subprocess.run([*command, "merge", *arguments, "-o", str(folder / out), "--method", "svd"], text=True,
                             capture_output=True)
        return run.returncode, run.stderr

    a, b = str(folder / "a"), str(folder / "b")
    code, message = merge("refused", a, b)
    assert code == 1 and "ERR_ADAPTER_INVALID" in message and "lm_head.weight" in message, message
    print("two heads that differ:", message.splitlines()[0])
    for out, arguments, expected in [
        ("one", [a], heads[0]),
        ("mean", [a, b, "--weights", "0.25,0.75", "--modules-to-save", "mean"], 0.25 * heads[0] + 0.75 * heads[1]),
    ]:
        code, message = merge(out, *arguments)
        assert code == 0, message
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*")  # peft only warns of such keys
            model = PeftModel.from_pretrained(base(), folder / out)
        found = model.base_model.model.lm_head.modules_to_save["default"].weight
        error = ((found - expected).norm() / expected.norm()).item()
        assert error < 1e-6, error
        with torch.no_grad():
            assert torch.isfinite(model(torch.arange(1, 9).reshape(1, -1)).logits).all()
        print(f"{out}: opens in peft without a missing or unexpected key, head within {error:.1e}")


main()
