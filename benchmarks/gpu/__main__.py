"""How fast are the GPU kernels, against the best dense attention there is?

    python -m benchmarks.gpu [--json FILE]       time on a GPU
    python -m benchmarks.gpu --tune              choose tile sizes on a GPU
    python -m benchmarks.gpu --compile-only      registers, spills and instructions; needs no GPU

bfloat16, 24 heads, D = 128, normal random inputs larger than the L2 cache, two sets in turn. A time is the median of
several rounds, each of as many calls as make it longer than 30 ms, queued without waiting. Block lists are random,
which is the worst case for the cache.
"""

import functools
import json as json_format
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax import Array

from adaspa_jax import SparseConfig
from adaspa_jax.schedule import StepKind, default_search_steps, step_kinds
from adaspa_jax.search import select_blocks
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from pallas_kernels import block_mass, block_sparse_attention, flash_attention
from pallas_kernels.dispatch import Request, choose

HEADS, HEAD_DIM = 24, 128
SIZES = (16384, 32768, 65536, 119056)
DENSITIES = (0.1, 0.2, 0.3, 0.5)
BLOCKS = (64, 128)
OURS = ("mosaic_gpu", "triton", "jax_triton")
STEPS = 50


def seconds(run: Callable[..., Any], *sets: tuple[Any, ...], rounds: int = 5) -> float:
    """Median seconds of one call of the jitted `run`, over rounds on the sets of arguments in turn."""
    run = jax.jit(run)
    begun = [_timed(run, sets, 1) for _ in range(2)][1]
    calls = max(1, math.ceil(0.03 / begun))
    return statistics.median(_timed(run, sets, calls) for _ in range(rounds))


def _timed(run: Callable[..., Any], sets: tuple[tuple[Any, ...], ...], calls: int) -> float:
    begun = time.perf_counter()
    for call in range(calls):
        last = run(*sets[call % len(sets)])
    jax.block_until_ready(last)
    return (time.perf_counter() - begun) / calls


@functools.cache
def ceilings() -> dict[str, float]:
    """This GPU's bfloat16 matrix rate [TFLOP/s] and copy bandwidth [TB/s, read and written], measured now."""
    side = 8192
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    big = jnp.ones(1 << 30, jnp.float32)
    return {
        "matrix_tflops": 2e-12 * side**3 / seconds(lambda a, b: a @ b, (a, b)),
        "copy_tbps": 2e-12 * big.nbytes / seconds(lambda x: x + 1, (big,)),
    }


def inputs(tokens: int) -> list[tuple[Array, Array, Array]]:
    """Two sets of q, k, v [1, 24, tokens, 128]."""
    keys = jax.random.split(jax.random.key(tokens), 6)
    draw = lambda key: jax.random.normal(key, (1, HEADS, tokens, HEAD_DIM), jnp.bfloat16)
    return [tuple(draw(keys[3 * i + j]) for j in range(3)) for i in range(2)]  # type: ignore[misc]


def random_lists(tokens: int, block: int, density: float) -> tuple[Array, Array]:
    """(indices, counts): for each query block a random set of key blocks."""
    blocks = math.ceil(tokens / block)
    kept = math.ceil(round(density * blocks, 6))
    order = jax.random.uniform(jax.random.key(block), (1, HEADS, blocks, blocks))
    indices = jax.lax.top_k(order, kept)[1].astype(jnp.uint16)
    return indices, jnp.full((1, HEADS, blocks), kept, jnp.int32)


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


def figures(run: Callable[..., Any], sets: list[Any], work: float) -> dict[str, Any]:
    """ms and TFLOP/s of a run that does `work` TFLOPs, or the reason why it did not run."""
    try:
        took = seconds(run, *sets)
    except Exception as error:  # a peer that is missing or refuses must not end the benchmark
        return {"ms": math.nan, "tflops": math.nan, "note": f"{type(error).__name__}: {str(error)[:80]}"}
    return {"ms": 1e3 * took, "tflops": work / took, "note": ""}


def ours(
    tokens: int, sets: list[tuple[Array, Array, Array]], implementation: Any, densities: list[float]
) -> Iterator[dict[str, Any]]:
    """Dense with LSE, block mass, and block-sparse at each density."""
    work = 4e-12 * HEADS * tokens**2 * HEAD_DIM
    head = {"tokens": tokens, "implementation": implementation}
    dense = lambda q, k, v: flash_attention(q, k, v, return_lse=True, implementation=implementation)
    yield head | {"kernel": "dense"} | figures(dense, sets, work)
    lse = jnp.full((1, HEADS, tokens), math.log(tokens) + 0.5)
    for block in BLOCKS:
        blocks = {"block_q": block, "block_k": block, "implementation": implementation}
        mass = lambda q, k, v, lse=lse, blocks=blocks: block_mass(q, k, lse, return_row_sum=True, **blocks)
        yield head | {"kernel": "block_mass", "block": block} | figures(mass, sets, work / 2)
        for density in densities:
            indices, counts = random_lists(tokens, block, density)
            kept = float(counts[0, 0, 0]) / counts.shape[-1]
            sparse = lambda *x, blocks=blocks: block_sparse_attention(*x, return_lse=True, **blocks)
            lists = [(*s, indices, counts) for s in sets]
            found = figures(sparse, lists, work * kept)
            yield head | {"kernel": "block_sparse", "block": block, "density": density} | found


def selection(tokens: int) -> Iterator[dict[str, Any]]:
    """Top-k selection from the mass, as the sampler does it."""
    for block in BLOCKS:
        config = SparseConfig(block_size=block, sparsity=0.8, token_order="raster")
        layout = config.layout((1, 1, tokens))
        mass = jax.random.uniform(jax.random.key(0), (1, HEADS, layout.video_blocks, layout.num_blocks))
        run = lambda mass, layout=layout, config=config: select_blocks(mass, layout, config)
        took = 1e3 * seconds(run, (mass,))
        yield {"tokens": tokens, "implementation": "xla", "kernel": "select", "block": block, "ms": took}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds each row's speed-up over the best dense of its size, and its share of the measured matrix peak."""
    for row in rows:
        dense = [r["ms"] for r in rows if r["tokens"] == row["tokens"] and r["kernel"] == "dense"]
        best = min(ms for ms in dense if not math.isnan(ms))
        row["speedup_over_best_dense"] = best / row["ms"]
        row["percent_of_peak"] = 100 * row.get("tflops", math.nan) / ceilings()["matrix_tflops"]


def gain(rows: list[dict[str, Any]], tokens: int, implementation: str, block: int) -> float | None:
    """Attention speed-up of a 50-step run at sparsity 0.8 with the default schedule, against the best dense."""
    at = {
        (r["kernel"], r["implementation"], r.get("density")): r["ms"]
        for r in rows
        if r["tokens"] == tokens and r.get("block", block) == block
    }
    best = min(ms for (kernel, _, _), ms in at.items() if kernel == "dense" and not math.isnan(ms))
    try:
        dense, mass = at["dense", implementation, None], at["block_mass", implementation, None]
        sparse, select = at["block_sparse", implementation, 0.2], at["select", "xla", None]
    except KeyError:
        return None
    cost = {
        StepKind.DENSE: dense,
        StepKind.FUSED_SEARCH: dense + mass + select,
        StepKind.CACHED_SEARCH: mass + select + sparse,
        StepKind.SPARSE: sparse,
    }
    return STEPS * best / sum(cost[StepKind(kind)] for kind in step_kinds(STEPS, default_search_steps(STEPS)))


def gain_rows(rows: list[dict[str, Any]], sizes: list[int], implementations: list[str]) -> list[dict[str, Any]]:
    """`gain` of every size, implementation and block that was measured."""
    found = []
    for tokens in sizes:
        for name in implementations:
            for block in BLOCKS:
                factor = gain(rows, tokens, name, block)
                case = {"tokens": tokens, "implementation": name, "block": block}
                found += [case | {"attention_gain_50_steps": factor}] if factor else []
    return found


def torch_rows(sizes: list[int]) -> list[dict[str, Any]]:
    """SDPA and FlexAttention, in a process of its own: torch and jax would share the memory."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.gpu_torch", file.name, *map(str, sizes)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            print(f"torch was not timed: {ended.stderr.strip().splitlines()[-1:]}")
            return []
        return json_format.loads(Path(file.name).read_text())


def compile_only(json: Path | None) -> None:
    """Compiles for each architecture in a process of its own and prints one table."""
    rows = []
    for arch in ("8.0", "9.0"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.gpu_compile", "--arch", arch, "--json", str(file)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rows += json_format.loads(file.read_text())
        print(f"compiled for {arch}", flush=True)
    show("compiled without a GPU; nothing was run", rows)
    write_json(json, rows)


def device() -> dict[str, str]:
    """What the figures were read on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return {"device": name, "driver": driver, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}


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
        yield from selection(tokens)


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="sequence lengths; repeatable")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="of ours, to time; repeatable")] = None,
    density: Annotated[list[float] | None, typer.Option(help="of the block lists; repeatable")] = None,
    torch: Annotated[bool, typer.Option(help="time torch's SDPA and FlexAttention too")] = True,
    compile_only_: Annotated[bool, typer.Option("--compile-only", help="compile without a GPU")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="time tile sizes and print a tuning table")] = False,
) -> None:
    """Times our kernels against the best dense attention and prints what a 50-step run gains."""
    if compile_only_:
        return compile_only(json)
    if jax.default_backend() != "gpu":
        raise ValueError("no GPU here: run on a GPU machine, or pass --compile-only")
    if tune:
        from benchmarks.gpu.tune import tune_all

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
