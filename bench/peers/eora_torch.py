# The published recipe of EoRA (arXiv 2410.21271, algorithm 1) in torch: eigh of S in f64, roots, full SVD in f32. Seconds
# and error on the matrices that `cargo bench -p kintsugi-compensate --bench solve -- 2048x2048 4096x4096 --write DIR` leaves.
#
#   THREADS=2 python bench/peers/eora_torch.py DIR 2048x2048 4096x4096
import os
import sys
import time

import numpy as np
import torch

threads = int(os.environ.get("THREADS", os.cpu_count()))
torch.set_num_threads(threads)
RANK = int(os.environ.get("RANK", 128))
folder, shapes = sys.argv[1], sys.argv[2:]
print(f"torch {torch.__version__}, {threads} threads, rank {RANK}")
print("| shape | eigh f64 | SVD f32 | all | error after / before |")
print("|---|---|---|---|---|")
for shape in shapes:
    rows, columns = map(int, shape.split("x"))
    delta = torch.from_numpy(np.fromfile(f"{folder}/delta-{shape}.f32", np.float32).reshape(rows, columns))
    moments = torch.from_numpy(np.fromfile(f"{folder}/s-{columns}.f64", np.float64).reshape(columns, columns))
    started = time.perf_counter()
    values, vectors = torch.linalg.eigh(moments)
    # Zeros would become infinite roots; the published code replaces what is below zero.
    values = torch.where(values <= 0, values[values > 0].min(), values)
    eigen_seconds = time.perf_counter() - started
    root = (vectors @ torch.diag(values.sqrt())).float()
    inverse = (torch.diag(values.rsqrt()) @ vectors.T).float()
    svd_started = time.perf_counter()
    u, s, vt = torch.linalg.svd(delta @ root, full_matrices=False)
    svd_seconds = time.perf_counter() - svd_started
    b = u[:, :RANK] * s[:RANK].sqrt()
    a = (s[:RANK].sqrt()[:, None] * vt[:RANK]) @ inverse
    seconds = time.perf_counter() - started
    rest = (delta - b @ a).double()
    energy = lambda matrix: torch.einsum("ij,ij->", matrix @ moments, matrix).item()
    ratio = (energy(rest) / energy(delta.double())) ** 0.5
    print(f"| {rows}×{columns} | {eigen_seconds:.1f} s | {svd_seconds:.1f} s | {seconds:.1f} s | {ratio:.6f} |", flush=True)
