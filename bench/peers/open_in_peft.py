"""Whether an adapter that `kintsugi merge` wrote opens in peft, without a missing or unexpected key, and what it computes.

    pip install torch peft transformers
    python bench/peers/open_in_peft.py CHECKPOINT MERGED [SOURCE=WEIGHT ...]

With sources, logits of the merged adapter are compared with those of the exact weighted sum of the sources' updates,
which is added to the weights of the base here.
"""

import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def main():
    checkpoint, merged, *sources = sys.argv[1:]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")  # peft only warns of such keys
        model = PeftModel.from_pretrained(load(checkpoint), merged)
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    scalings = {scaling for module in adapted for scaling in module.scaling.values()}
    print(f"opened: {len(adapted)} modules, scalings {scalings}")
    tokens = torch.arange(1, 65).reshape(1, -1)
    with torch.no_grad():
        found = model(tokens).logits
        if not sources:
            return
        exact = load(checkpoint)
        weights = dict(exact.named_parameters())
        for source in sources:
            folder, weight = source.rsplit("=", 1)
            source_model = PeftModel.from_pretrained(load(checkpoint), folder)
            for name, module in source_model.base_model.model.named_modules():
                if hasattr(module, "lora_A"):
                    weights[f"{name}.weight"].add_(module.get_delta_weight("default"), alpha=float(weight))
        expected = exact(tokens).logits
    error = (found - expected).norm() / expected.norm()
    print(f"logits against the exact weighted sum: relative error {error:.2e}, same likeliest token for "
          f"{(found.argmax(-1) == expected.argmax(-1)).float().mean():.1%}")


main()
