"""How fast are the GPU kernels, against the best dense attention there is?

    python -m benchmarks.gpu [--json FILE]       time on a GPU
    python -m benchmarks.gpu --tune              choose tile sizes on a GPU
    python -m benchmarks.gpu --compile-only      registers, spills and instructions; needs no GPU

`benchmarks.measure` says on what and how it is timed.
"""

import json as json_format
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax import Array

from benchmarks.gpu.tune import tune_all
from benchmarks.measure import (
    DENSITIES,
    HEAD_DIM,
    HEADS,
    STEPS,
    add_ratios,
    ceilings,
    device,
    figures,
    gain_rows,
    in_8_bits,
    inputs,
    ours,
    selection,
)
from benchmarks.table import rows_of, show, write_json
from models.commands.cli import run_cli
from pallas_kernels.calls import Request
from pallas_kernels.dispatch import choose

SIZES = (16384, 32768, 65536, 119056)
OURS = ("mosaic_gpu", "triton", "jax_triton")


def peers(tokens: int, sets: list[tuple[Array, Array, Array]]) -> Iterator[dict[str, Any]]:
    """Other people's dense attention."""
    work = 4e-12 * HEADS * tokens**2 * HEAD_DIM
    turned = [tuple(x.swapaxes(1, 2) for x in s) for s in sets]
    runs: dict[str, Callable[..., Any]] = {
        "cudnn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    }
    try:
        from tokamax import dot_product_attention

        runs["tokamax"] = lambda q, k, v: dot_product_attention(q, k, v, implementation="mosaic")
    except ImportError:
        pass
    for name, run in runs.items():
        yield {"tokens": tokens, "implementation": name, "kernel": "dense"} | figures(run, turned, work)


def torch_rows(sizes: list[int]) -> list[dict[str, Any]]:
    """The contenders of `benchmarks.gpu.torch_peers`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.gpu.torch_peers", file.name, *map(str, sizes)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            print(f"torch was not timed: {ended.stderr.strip().splitlines()[-1:]}")
            return []
        return json_format.loads(Path(file.name).read_text(encoding="utf-8"))


def compile_only(json: Path | None) -> None:
    """Compiles for each architecture in a process of its own and prints one table."""
    rows = []
    for arch in ("8.0", "9.0"):
        rows += rows_of("benchmarks.gpu.compiled", "--arch", arch)
        print(f"compiled for {arch}", flush=True)
    show("compiled without a GPU; nothing was run", rows)
    write_json(json, rows)


def available(implementation: Any) -> bool:
    """Whether the implementation runs here; says why not."""
    try:
        choose(implementation, Request("block_sparse_attention", jnp.bfloat16, HEAD_DIM, 64, 64))
    except NotImplementedError as reason:
        print(reason, flush=True)
        return False
    return True


def measure(sizes: list[int], implementations: list[str], densities: list[float]) -> Iterator[dict[str, Any]]:
    """The rows of all sizes, as they are measured."""
    for tokens in sizes:
        sets = inputs(tokens)
        yield from peers(tokens, sets)
        for implementation in implementations:
            yield from ours(tokens, sets, implementation, densities)
            if implementation == "mosaic_gpu":
                yield from in_8_bits(tokens, sets, implementation)
        yield from selection(tokens)


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="sequence lengths; repeatable")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="of ours, to time; repeatable")] = None,
    density: Annotated[list[float] | None, typer.Option(help="of the block lists; repeatable")] = None,
    torch: Annotated[bool, typer.Option(help="time the contenders of benchmarks.gpu.torch_peers too")] = True,
    compile_only_: Annotated[bool, typer.Option("--compile-only", help="compile without a GPU")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="time tile sizes and print a tuning table")] = False,
) -> None:
    """Times our kernels against the best dense attention and prints what a 50-step run gains."""
    if compile_only_:
        return compile_only(json)
    if jax.default_backend() != "gpu":
        raise ValueError("no GPU here: run on a GPU machine, or pass --compile-only")
    if tune:
        return tune_all(json)
    sizes, names = tokens or list(SIZES), [name for name in implementation or OURS if available(name)]
    rows = []
    for row in measure(sizes, names, density or list(DENSITIES)):
        rows.append(row)
        print({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items() if x != ""}, flush=True)
    if torch:
        rows += torch_rows(sizes)
    add_ratios(rows)
    keys = ("tokens", "implementation", "kernel", "block", "density", "ms", "tflops", "percent_of_peak")
    keys += ("speedup_over_best_dense", "note")  # type: ignore[assignment]
    facts, peak = device(), ceilings()
    title = f"bf16, {HEADS} heads, D = {HEAD_DIM}; {facts}; {peak['matrix_tflops']:.0f} TFLOP/s in a matrix product"
    show(title, [{key: row.get(key, "") for key in keys} for row in rows])
    gains = gain_rows(rows, sizes, names)
    if gains:
        show(f"attention of {STEPS} steps at sparsity 0.8, default schedule, over the best dense", gains)
    write_json(json, [facts | peak, *rows, *gains])
    return None


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    run_cli(main)
