"""How fast is the portable XLA path on this CPU, against torch's scaled_dot_product_attention?

    python -m benchmarks.cpu [--json FILE]

float32, 4 heads, D = 64, block 64, density 0.2. The runs of one size are interleaved and the best of each is kept, so
that the ratios hold on a machine whose cores are shared; the seconds mean little.
"""

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import torch
import typer

from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from pallas_kernels import block_mass, block_sparse_attention, flash_attention

HEADS, HEAD_DIM, BLOCK, DENSITY = 4, 64, 64, 0.2
SIZES = (2048, 4096, 8192, 16384, 32768)


def best_times(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Best seconds of each run over `repeats` interleaved rounds, after one round of warm-up."""
    best = dict.fromkeys(runs, math.inf)
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            if round_:
                best[name] = min(best[name], time.perf_counter() - begun)
    return best


def measure(tokens: int, repeats: int) -> dict[str, Any]:
    """One row: seconds and ratios at `tokens` tokens."""
    rng = np.random.default_rng(tokens)
    q, k, v = (rng.standard_normal((1, HEADS, tokens, HEAD_DIM), np.float32) for _ in range(3))
    blocks = tokens // BLOCK
    kept = math.ceil(round(DENSITY * blocks, 6))
    choice = np.argsort(rng.random((1, HEADS, blocks, blocks)), axis=-1)[..., :kept].astype(np.uint16)
    counts = np.full((1, HEADS, blocks), kept, np.int32)
    tq, tk, tv = (torch.from_numpy(x) for x in (q, k, v))
    jq, jk, jv, indices, counts_ = jax.device_put((q, k, v, choice, counts))
    dense = jax.jit(lambda q, k, v: flash_attention(q, k, v, return_lse=True, implementation="xla"))
    sparse = jax.jit(
        lambda *x: block_sparse_attention(*x, block_q=BLOCK, block_k=BLOCK, return_lse=True, implementation="xla")
    )
    mass = jax.jit(lambda q, k, lse: block_mass(q, k, lse, block_q=BLOCK, block_k=BLOCK, implementation="xla"))
    lse = dense(jq, jk, jv)[1]
    seconds = best_times(
        {
            "torch": lambda: torch.nn.functional.scaled_dot_product_attention(tq, tk, tv),
            "dense": lambda: dense(jq, jk, jv),
            "sparse": lambda: sparse(jq, jk, jv, indices, counts_),
            "mass": lambda: mass(jq, jk, lse),
        },
        repeats,
    )
    work = 4e-9 * HEADS * tokens**2 * HEAD_DIM
    return {
        "tokens": tokens,
        "density": kept / blocks,
        "torch_seconds": seconds["torch"],
        "torch_gflops": work / seconds["torch"],
        "dense_gflops": work / seconds["dense"],
        "sparse_gflops": work * kept / blocks / seconds["sparse"],
        "sparse_over_torch": seconds["torch"] / seconds["sparse"],
        "sparse_over_dense": seconds["dense"] / seconds["sparse"],
        "dense_over_torch": seconds["torch"] / seconds["dense"],
        "mass_of_dense": seconds["mass"] / seconds["dense"],
        "dense_seconds": seconds["dense"],
        "sparse_seconds": seconds["sparse"],
    }


def main(
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="sequence lengths; repeatable")] = None,
    repeats: Annotated[int, typer.Option(help="timed rounds; long sequences get fewer")] = 6,
) -> None:
    """Prints the ratios of torch dense, our dense and our sparse attention, and how time grows with N."""
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for n in tokens or SIZES:
        rows.append(measure(n, max(2, round(repeats * min(1, 16384 / n)))))
        print(f"{n} tokens done", flush=True)
    columns = ("dense_seconds", "sparse_seconds", "torch_seconds")
    show(
        f"float32, {HEADS} heads, D = {HEAD_DIM}, block {BLOCK}, {os.cpu_count()} cores, torch {torch.__version__}",
        [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows],
    )
    for before, after in itertools.pairwise(rows):
        growth = {c.removesuffix("_seconds"): math.log2(after[c] / before[c]) for c in columns}
        step = math.log2(after["tokens"] / before["tokens"])
        text = ", ".join(f"{name} N^{g / step:.2f}" for name, g in growth.items())
        print(f"{before['tokens']} -> {after['tokens']} tokens: {text}")
    write_json(json, rows)


if __name__ == "__main__":
    run_cli(main)
