"""Times tile sizes on the GPU at hand and prints a table to paste into pallas_kernels/tuning.py."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks.gpu.__main__ import BLOCKS, HEAD_DIM, HEADS, inputs, random_lists, seconds
from benchmarks.table import show, write_json
from pallas_kernels.dispatch import Request, backend
from pallas_kernels.tuning import MosaicGpuTuning, TritonTuning

TOKENS, DENSITY = 16384, 0.2
TRITON = [TritonTuning(*t) for t in ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2))]


def mosaic(kernel: str, block: int) -> list[MosaicGpuTuning]:
    """Candidates of one Hopper kernel."""
    if kernel == "block_mass":
        # Three consumer warpgroups are 9% faster at block 128, but the kernels that run after them may fail
        # (benchmarks/GPU_NOTES.md).
        return [MosaicGpuTuning(t, s) for t in sorted({64, block}) for s in (2, 3, 4)]
    return [MosaicGpuTuning(t, s) for t in sorted({64, block}) for s in (1, 2, 3, 4)]


def cases() -> Iterator[tuple[str, str, int, Any, Any, float]]:
    """(implementation, kernel, block, tuning, call, TFLOPs)."""
    sets, scale = inputs(TOKENS), HEAD_DIM**-0.5
    work = 4e-12 * HEADS * TOKENS**2 * HEAD_DIM
    lse = jnp.full((1, HEADS, TOKENS), math.log(TOKENS) + 0.5)
    for name in ("mosaic_gpu", "triton"):
        module = backend(name)
        if module.unsupported(Request("block_sparse_attention", jnp.bfloat16, HEAD_DIM, 64, 64)):
            continue
        for tuning in mosaic("dense", 128) if name == "mosaic_gpu" else TRITON:
            options = {"block_valid": None, "block_k": TOKENS, "scale": scale, "tuning": tuning}
            run = lambda q, k, v, options=options, module=module: module.flash_attention(q, k, v, **options)
            yield name, "dense", 0, tuning, (run, sets), work
        for block in BLOCKS:
            indices, counts = random_lists(TOKENS, block, DENSITY)
            lists = [(*s, indices, counts) for s in sets]
            common = {"block_q": block, "block_k": block, "block_valid": None, "scale": scale}
            for tuning in mosaic("block_mass", block) if name == "mosaic_gpu" else TRITON:
                options = common | {"query_valid": None, "tuning": tuning}
                run = lambda q, k, v, options=options, module=module: module.block_mass(q, k, lse, **options)
                yield name, "block_mass", block, tuning, (run, sets), work / 2
            for tuning in mosaic("block_sparse", block) if name == "mosaic_gpu" else TRITON:
                options = common | {"tuning": tuning}
                run = lambda *x, options=options, module=module: module.block_sparse_attention(*x, **options)
                yield name, "block_sparse", block, tuning, (run, lists), work * DENSITY


def tune_all(json: Path | None) -> None:
    """Times every candidate; those that do not compile, for want of shared memory, are left out."""
    rows: list[dict[str, Any]] = []
    for name, kernel, block, tuning, (run, sets), work in cases():
        try:
            took = seconds(run, *sets, rounds=3)
        except Exception as error:
            print(f"{name} {kernel} {block} {tuning}: {str(error)[:100]}", flush=True)
            continue
        rows.append(
            {"implementation": name, "kernel": kernel, "block": block, "tuning": str(tuning)}
            | {"ms": 1e3 * took, "tflops": work / took}
        )
        print(*rows[-1].values(), flush=True)
    show(f"{TOKENS} tokens, {HEADS} heads, D = {HEAD_DIM}, density {DENSITY}", rows)
    for key in dict.fromkeys((r["implementation"], r["kernel"], r["block"]) for r in rows):
        best = min((r for r in rows if (r["implementation"], r["kernel"], r["block"]) == key), key=lambda r: r["ms"])
        print(f"{key}: {best['tuning']},")
    write_json(json, rows)
