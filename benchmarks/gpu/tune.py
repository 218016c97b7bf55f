"""Times tile sizes on the GPU at hand and prints a table to paste into pallas_kernels/tuning.py."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks.measure import BLOCKS, HEAD_DIM, HEADS, inputs, random_lists, seconds
from benchmarks.table import show, write_json
from pallas_kernels.calls import DenseCall, MassCall, Request, SparseCall
from pallas_kernels.dispatch import Implementation, backend
from pallas_kernels.tuning import MosaicGpuTuning, TritonTuning

TOKENS, DENSITY = 16384, 0.2
TRITON = [TritonTuning(*t) for t in ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2))]


def mosaic(kernel: str, block: int) -> list[MosaicGpuTuning]:
    """Candidates of one Hopper kernel."""
    if kernel == "block_mass":
        # Those of two stages that are missing read registers that nothing has written: see benchmarks.gpu.stale.
        two = [MosaicGpuTuning(t, s) for t in sorted({64, block}) for s in (2, 3, 4) if (t, s) != (64, 2)]
        return [*two, *(MosaicGpuTuning(t, 3 if t == 128 else 4, groups=3) for t in sorted({64, block}))]
    return [MosaicGpuTuning(t, s) for t in sorted({64, block}) for s in (1, 2, 3, 4)]


def tuned(name: str, kernel: str, block: int, function: Any, call: Any) -> Iterator[tuple[Any, Any]]:
    """(tuning, run of `function` on the call that `call` makes of arrays) of every candidate."""
    for tuning in mosaic(kernel, block) if name == "mosaic_gpu" else TRITON:
        yield tuning, lambda *x, tuning=tuning: function(call(*x), tuning)


def cases() -> Iterator[tuple[str, str, int, Any, Any, float]]:
    """(implementation, kernel, block, tuning, (run, sets of arguments), TFLOPs)."""
    sets, scale = inputs(TOKENS), HEAD_DIM**-0.5
    work = 4e-12 * HEADS * TOKENS**2 * HEAD_DIM
    lse = jnp.full((1, HEADS, TOKENS), math.log(TOKENS) + 0.5)
    names: tuple[Implementation, ...] = ("mosaic_gpu", "triton")
    for name in names:
        module = backend(name)
        if module.unsupported(Request("block_sparse_attention", jnp.bfloat16, HEAD_DIM, 64, 64)):
            continue
        dense = lambda q, k, v: DenseCall(q, k, v, scale, TOKENS)
        for tuning, run in tuned(name, "dense", 128, module.flash_attention, dense):
            yield name, "dense", 0, tuning, (run, sets), work
        for block in BLOCKS:
            mass = lambda q, k, v, block=block: MassCall(q, k, lse, scale, block, block)
            for tuning, run in tuned(name, "block_mass", block, module.block_mass, mass):
                yield name, "block_mass", block, tuning, (run, sets), work / 2
            lists = [(*s, *random_lists(TOKENS, block, DENSITY)) for s in sets]
            sparse = lambda q, k, v, i, c, block=block: SparseCall(q, k, v, i, c, scale, block, block)
            for tuning, run in tuned(name, "block_sparse", block, module.block_sparse_attention, sparse):
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
