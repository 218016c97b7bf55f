"""Inputs, timing and the rows that the GPU and the TPU benchmark share.

bfloat16, 24 heads, D = 128, normal random inputs larger than the L2 cache, two sets in turn. A time is the median of
several rounds, each of as many calls as make it longer than 30 ms, queued without waiting. Block lists are random,
which is the worst case for the cache.
"""

import functools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adaspa_jax import SparseConfig
from adaspa_jax.compensation import pool, towards
from adaspa_jax.schedule import StepKind, default_search_steps, step_kinds
from adaspa_jax.search import select_blocks
from pallas_kernels import (
    block_mass,
    block_sparse_attention,
    flash_attention,
    merge_attention,
    pack_bits,
    pooled_attention,
    resolve_score_precision,
)

HEADS, HEAD_DIM = 24, 128
DENSITIES = (0.1, 0.2, 0.3, 0.5)
BLOCKS = (64, 128)
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


def random_lists(
    tokens: int, block: int, density: float, block_q: int | None = None, clustered: bool = False
) -> tuple[Array, Array]:
    """(indices, counts): for each query block a random set of key blocks, ascending as in a sampler on a GPU.

    `clustered`: nearly the same set for 16 query blocks in a row, in runs of 4 key blocks.
    """
    rows, blocks = math.ceil(tokens / (block_q or block)), math.ceil(tokens / block)
    kept = math.ceil(round(density * blocks, 6))
    order = jax.random.uniform(jax.random.key(block), (1, HEADS, rows, blocks))
    if clustered:
        shared = jax.random.uniform(jax.random.key(1), (1, HEADS, math.ceil(rows / 16), math.ceil(blocks / 4)))
        order = 0.1 * order + shared.repeat(16, 2)[:, :, :rows].repeat(4, 3)[..., :blocks]
    indices = jnp.sort(jax.lax.top_k(order, kept)[1]).astype(jnp.uint16)
    return indices, jnp.full((1, HEADS, rows), kept, jnp.int32)


def figures(run: Callable[..., Any], sets: list[Any], work: float) -> dict[str, Any]:
    """ms and TFLOP/s of a run that does `work` TFLOPs, or the reason why it did not run."""
    try:
        took = seconds(run, *sets)
    except Exception as error:  # a peer that is missing or refuses must not end the benchmark
        return {"ms": math.nan, "tflops": math.nan, "note": f"{type(error).__name__}: {str(error)[:80]}"}
    return {"ms": 1e3 * took, "tflops": work / took, "note": ""}


def compensated(blocks: dict[str, Any]) -> Callable[..., Any]:
    """A sparse step with stand-ins, as the sampler does it on whole blocks: pooled, two kernels, merged by strength."""

    def run(q: Array, k: Array, v: Array, indices: Array, counts: Array, kept: Array, valid: Array) -> Any:
        means = pool(k, v, valid)
        bias = jnp.broadcast_to(means.log_count[:, None], means.k.shape[:3])
        own = {name: x for name, x in blocks.items() if name != "block_k"}
        stand_ins = pooled_attention(q, means.k, means.v, bias, kept, return_lse=True, **own)
        found = block_sparse_attention(q, k, v, indices, counts, block_valid=valid, return_lse=True, **blocks)
        both, _ = merge_attention(found, stand_ins)
        return towards(found[0], both, jnp.full(q.shape[:2], 0.5))

    return run


def whole_blocks(tokens: int, block: int, arrays: tuple[Array, ...]) -> tuple[list[Array], Array]:
    """(q, k, v padded to whole blocks, as a sampler's layout has them; the valid tokens of each block [1, nk])."""
    short = -tokens % block
    valid = jnp.clip(tokens - block * jnp.arange((tokens + short) // block), 0, block)[None]
    return [jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) for x in arrays], valid


def ours(
    tokens: int, sets: list[tuple[Array, Array, Array]], implementation: Any, densities: list[float]
) -> Iterator[dict[str, Any]]:
    """Dense with LSE, block mass, and at each density block-sparse, without and with stand-ins."""
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
            case = {"block": block, "density": density}
            yield head | {"kernel": "block_sparse"} | case | found
            none = jnp.zeros((*counts.shape, counts.shape[-1]), bool)
            bits = pack_bits(jnp.put_along_axis(none, indices.astype(jnp.int32), True, axis=-1, inplace=False))
            padded = [whole_blocks(tokens, block, s) for s in sets]
            standing = [(*s, indices, counts, bits, valid) for s, valid in padded]
            stood = figures(compensated(blocks), standing, work * (kept + (1 - kept) / block))
            ratio = {"over_plain": stood["ms"] / found["ms"]}
            yield head | {"kernel": "compensated"} | case | stood | ratio
    yield from other_lists(tokens, sets, implementation)


def over_lists(
    tokens: int,
    sets: list[tuple[Array, Array, Array]],
    block_q: int,
    block: int,
    clustered: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Figures of block-sparse attention at density 0.2; `how`: other options of the kernel."""
    indices, counts = random_lists(tokens, block, 0.2, block_q, clustered)
    how |= {"block_q": block_q, "block_k": block, "return_lse": True}
    work = 4e-12 * HEADS * tokens**2 * HEAD_DIM * indices.shape[3] / math.ceil(tokens / block)
    return figures(lambda *x: block_sparse_attention(*x, **how), [(*s, indices, counts) for s in sets], work)


def in_8_bits(tokens: int, sets: list[tuple[Array, Array, Array]], implementation: Any) -> Iterator[dict[str, Any]]:
    """Attention with scores in the device's 8 bits, quantisation included: dense, and block-sparse at density 0.2."""
    precision = resolve_score_precision("auto", implementation)
    how: dict[str, Any] = {"score_precision": precision, "implementation": implementation}
    case: dict[str, Any] = {"tokens": tokens, "implementation": implementation}
    dense = lambda q, k, v: flash_attention(q, k, v, return_lse=True, **how)
    yield case | {"kernel": f"dense, {precision} scores"} | figures(dense, sets, 4e-12 * HEADS * tokens**2 * HEAD_DIM)
    case |= {"kernel": f"block_sparse, {precision} scores", "density": 0.2}
    for name, block_q, block in ((128, 128, 128), ("128 x 64", 128, 64), (64, 64, 64)):
        yield case | {"block": name} | over_lists(tokens, sets, block_q, block, **how)


def other_lists(tokens: int, sets: list[tuple[Array, Array, Array]], implementation: Any) -> Iterator[dict[str, Any]]:
    """Block-sparse at density 0.2: query blocks of 128 rows over key blocks of 64; lists that neighbours share."""
    case = {"tokens": tokens, "implementation": implementation, "kernel": "block_sparse", "density": 0.2}
    for name, block_q, clustered in (("128 x 64", 128, False), ("64, clustered", 64, True)):
        yield case | {"block": name} | over_lists(tokens, sets, block_q, 64, clustered, implementation=implementation)


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
    """Attention speed-up of 50 steps at sparsity 0.8, default schedule, no stand-ins, against the best dense."""
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


def device() -> dict[str, str]:
    """What the figures were read on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return {"device": name, "driver": driver, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
