"""GPTQ of one Linear in torch, float32, as published (arXiv 2210.17323): the peer of crates/compress/benches/gptq.rs.

Written from the paper. Usage: python bench/peers/gptq_torch.py [SIZE [TOKENS]], with THREADS=2 for the threads.
"""

import os
import sys
import time

import numpy as np
import torch

GROUP, BITS, DAMPING, BLOCK, ROUNDS = 128, 4, 0.01, 128, 3
FACTORS = 32


class Random:
    """SplitMix64 and Box-Muller, the same numbers as testkit's Random."""

    def __init__(self, seed):
        self.state = np.uint64(seed)

    def uniform(self, count):
        gamma = np.uint64(0x9E3779B97F4A7C15)
        with np.errstate(over="ignore"):
            z = self.state + gamma * np.arange(1, count + 1, dtype=np.uint64)
            self.state = z[-1]
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        return (z >> np.uint64(11)).astype(np.float64) / 2.0**53

    def normal(self, count):
        u = self.uniform(2 * count)
        return np.sqrt(-2.0 * np.log(1.0 - u[0::2])) * np.cos(2.0 * np.pi * u[1::2])


def weight(size):
    random = Random(1)
    rows = [(random.normal(size) * 0.02).astype(np.float32) for _ in range(size)]
    return torch.from_numpy(np.stack(rows))


def second_moment(size, tokens):
    random = Random(2)
    j = np.arange(size)
    sizes = np.where(j % 37 == 36, 30.0, 1.0) / (1.0 + j) ** 0.3
    total = torch.zeros(size, size, dtype=torch.float64)
    for start in range(0, tokens, 512):
        count = min(512, tokens - start)
        z = random.normal(count * (FACTORS + size)).reshape(count, FACTORS + size)
        x = (sizes * (z[:, FACTORS:] + 2.0 * z[:, j % FACTORS])).astype(np.float32)
        x = torch.from_numpy(x).double()
        total += x.T @ x
    return total


def grids(w):
    """Scale and zero of every group, zero always inside the range."""
    groups = w.reshape(w.shape[0], -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / (2**BITS - 1)
    return scale, torch.round(-low / scale)


def quantize(w, scale, zero):
    return scale * (torch.clamp(torch.round(w / scale) + zero, 0, 2**BITS - 1) - zero)


def gptq(w, h, seconds):
    """Static groups and act-order; `h` may have any constant before it."""
    started = time.perf_counter()
    w, h, n = w.clone(), h.clone(), w.shape[1]
    scale, zero = grids(w)
    order = torch.argsort(torch.diag(h), descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(DAMPING * torch.diag(h).mean())
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    u = torch.linalg.cholesky(h, upper=True)
    seconds["factor"] = time.perf_counter() - started
    out = torch.zeros_like(w)
    groups = (order // GROUP).tolist()
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        block, errors = w[:, start:end].clone(), torch.zeros(w.shape[0], end - start)
        inside = u[start:end, start:end]
        for i in range(end - start):
            column, group = block[:, i], groups[start + i]
            q = quantize(column, scale[:, group], zero[:, group])
            out[:, start + i] = q
            error = (column - q) / inside[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(inside[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, end:] -= errors.matmul(u[start:end, end:])
    out = out[:, torch.argsort(order)]
    seconds["whole"] = time.perf_counter() - started
    return out


def main():
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 2 * size
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    w, s = weight(size), second_moment(size, tokens)
    energy = ((w.double() @ s) * w.double()).sum()
    print(f"{size}×{size}, {tokens} tokens, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for _ in range(ROUNDS):
        seconds = {}
        with torch.no_grad():
            out = gptq(w, s.float(), seconds)
        d = (w - out).double()
        error = (((d @ s) * d).sum() / energy).sqrt()
        sweep = seconds["whole"] - seconds["factor"]
        print(f"factor {seconds['factor']:.3f} s, sweep {sweep:.3f} s, whole {seconds['whole']:.3f} s, error {error:.6f}", flush=True)
    scale, zero = grids(w)
    out = quantize(w, scale.repeat_interleave(GROUP, 1), zero.repeat_interleave(GROUP, 1))
    d = (w - out).double()
    print(f"rtn error {(((d @ s) * d).sum() / energy).sqrt():.6f}")


if __name__ == "__main__":
    main()
