"""Makes merge/: small LoRA adapters on one base, and what peft makes of them with `add_weighted_adapter`.

    pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0 safetensors
    python make_merge.py

Recorded with these versions on 2026-11-26. `merge/NAME/` are adapters as peft saves them, `merge/expected/` the factors
of the merges as peft keeps them (scaling 1), as folders, `merge/cases.json` says how each was made. `binary` is an adapter in the
older `adapter_model.bin`.
"""

import json
import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent / "merge"
ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "first": dict(r=4, lora_alpha=8, target_modules=ALL),
    "second": dict(r=4, lora_alpha=3, target_modules=ALL),
    "third": dict(r=4, lora_alpha=4, target_modules=ALL),
    "small": dict(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    "stable": dict(r=3, lora_alpha=6, target_modules=ALL, use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 3},
    ),
    "embedding": dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
    "words": dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "v_proj"]),
    "binary": dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
}
EQUAL = ["first", "second", "third"]
CASES = []
for kind in ["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]:
    for weights in [[1.0, 0.5, 0.7], [1.0, -0.5, 0.25]]:
        CASES.append(dict(adapters=EQUAL, weights=weights, kind=kind))
CASES.append(dict(adapters=EQUAL, weights=[0.3, 0.3, 0.3], kind="ties", election="frequency"))
CASES.append(dict(adapters=EQUAL, weights=[0.3, 0.3, 0.3], kind="ties_svd", election="frequency"))
for kind in ["cat", "svd", "ties_svd"]:
    CASES.append(dict(adapters=["first", "small", "binary"], weights=[1.0, 0.5, 2.0], kind=kind))
    CASES.append(dict(adapters=["first", "patterns"], weights=[0.5, 0.5], kind=kind))
CASES.append(dict(adapters=["embedding", "words"], weights=[0.5, 1.5], kind="cat"))
CASES.append(dict(adapters=["embedding", "words"], weights=[0.5, 1.5], kind="svd"))
RANK = 5


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=12, intermediate_size=18, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def factors(model, name):
    found = {}
    for path, module in model.base_model.model.named_modules():
        for a, b, suffix in [("lora_A", "lora_B", ".weight"), ("lora_embedding_A", "lora_embedding_B", "")]:
            if hasattr(module, a) and name in getattr(module, a):
                for key in [a, b]:
                    value = getattr(module, key)[name]
                    value = value.weight if suffix else value
                    found[f"base_model.model.{path}.{key}{suffix}"] = value.detach().contiguous().clone()
                assert module.scaling[name] == 1.0, (path, module.scaling[name])
    return found


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    (HERE / "expected").mkdir(parents=True)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
        torch.manual_seed(100 + seed)
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.data = torch.randn_like(value) * (0.3 if "_A" in key else 0.05)
        model.peft_config["default"].base_model_name_or_path = "tiny-llama"
        # An adapter of embeddings normally carries the whole table of the base along; one of the two does.
        tables = {"save_embedding_layers": False} if name == "words" else {}
        model.save_pretrained(HERE / name, safe_serialization=name != "binary", **tables)
        (HERE / name / "README.md").unlink(missing_ok=True)
    for index, case in enumerate(CASES):
        names = case["adapters"]
        model = PeftModel.from_pretrained(base(), HERE / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(HERE / name, adapter_name=name)
        model.add_weighted_adapter(
            names, case["weights"], "merged", combination_type=case["kind"], svd_rank=RANK, density=0.4,
            majority_sign_method=case.get("election", "total"), svd_full_matrices=False,
        )
        case["expected"] = f"{index:02}-{case['kind']}"
        folder = HERE / "expected" / case["expected"]
        folder.mkdir()
        save_file(factors(model, "merged"), folder / "adapter_model.safetensors")
        rank = model.peft_config["merged"].r
        config = dict(peft_type="LORA", r=rank, lora_alpha=rank, target_modules=[], base_model_name_or_path="tiny-llama")
        (folder / "adapter_config.json").write_text(json.dumps(config) + "\n")
    (HERE / "cases.json").write_text(json.dumps(dict(rank=RANK, density=0.4, cases=CASES), indent=1) + "\n")


main()
