"""Merging one Linear at Llama-3-8B shapes, ours against peft and scikit-learn, in turns on the same cores.

    cargo build --release -p kintsugi-merge --bench llama
    pip install torch peft transformers scikit-learn
    python bench/peers/merge_compare.py PATH_OF_THE_BENCH_BINARY svd|lego|cat OUTxIN [ROUNDS]

16 adapters of rank 64, synthetic. Ours runs before and after each run of the peer; a row is printed per round, with
wall time and with processor time, which other work on the machine changes less. The peers:
svd and cat are `add_weighted_adapter` of peft on a model that is one Linear; lego is scikit-learn's KMeans on the units
[b, a] (k = 64, 10 starts, the same algorithm), centres and reweightings included.
"""

import json
import resource
import subprocess
import sys
import time

import torch

ADAPTERS, RANK = 16, 64


def ours(binary, method, shape):
    out = subprocess.run([binary, "--bench", method, shape, "1"], capture_output=True, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def factors(out, inputs):
    torch.manual_seed(0)
    return [(torch.randn(out, RANK) * 0.01, torch.randn(RANK, inputs) * 0.02) for _ in range(ADAPTERS)]


def peft_runner(kind, out, inputs):
    from peft import LoraConfig, get_peft_model

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(inputs, out, bias=False)

        def forward(self, x):
            return self.linear(x)

    names = [f"a{i}" for i in range(ADAPTERS)]
    config = lambda: LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["linear"])
    model = get_peft_model(One(), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    for name, (b, a) in zip(names, factors(out, inputs)):
        model.base_model.model.linear.lora_A[name].weight.data = a
        model.base_model.model.linear.lora_B[name].weight.data = b
    state = {"count": 0}

    def run():
        state["count"] += 1
        model.add_weighted_adapter(
            names, [1 / ADAPTERS] * ADAPTERS, f"m{state['count']}", combination_type=kind, svd_rank=RANK,
            svd_full_matrices=False,
        )
        model.delete_adapter(f"m{state['count']}")

    return run


def sklearn_runner(out, inputs):
    import numpy
    from sklearn.cluster import KMeans

    units = numpy.concatenate([torch.cat([b.T, a], 1).numpy() * 2**0.5 / 4 for b, a in factors(out, inputs)])

    def run():
        means = KMeans(RANK, init="k-means++", n_init=10, max_iter=300, random_state=0).fit(units)
        centres = means.cluster_centers_
        for cluster in range(RANK):
            members = units[means.labels_ == cluster]
            centres[cluster] *= abs(members).max(1).mean() / abs(centres[cluster]).max()
        return centres[:, :out].T * (RANK / RANK) ** 0.5, centres[:, out:]

    return run


def main():
    binary, method, shape = sys.argv[1:4]
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    out, inputs = map(int, shape.split("x"))
    run = sklearn_runner(out, inputs) if method == "lego" else peft_runner(method, out, inputs)
    for _ in range(rounds):
        before = ours(binary, method, shape)
        start, used = time.time(), time.process_time()
        run()
        peer = dict(seconds=round(time.time() - start, 2), cpuSeconds=round(time.process_time() - used, 2))
        after = ours(binary, method, shape)
        row = dict(method=method, shape=shape, peer=peer)
        for key in ["seconds", "cpuSeconds"]:
            row[f"ours.{key}"] = [before[key], after[key]]
            row[f"ratio.{key}"] = round(peer[key] / max((before[key] + after[key]) / 2, 1e-9), 1)
        row["peakMegabytes"] = dict(ours=after["peakMegabytes"])
        row["peakMegabytes"]["peer"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        print(json.dumps(row), flush=True)


main()
