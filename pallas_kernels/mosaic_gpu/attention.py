"""Attention on Hopper, dense, over lists of key blocks, over pooled keys: padding, lists, and the choice of kernel."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import LOG2E, block_count, merge_heads, numbers, pad_tokens
from pallas_kernels.calls import DenseCall, PooledCall, SparseCall
from pallas_kernels.mosaic_gpu import pair, single
from pallas_kernels.mosaic_gpu.machine import launch
from pallas_kernels.mosaic_gpu.shape import ROWS, Shape, every_tile, tile_bias
from pallas_kernels.mosaic_gpu.softmax import bounded
from pallas_kernels.quantized import in_precision
from pallas_kernels.tuning import MosaicGpuTuning, mosaic_gpu_tuning


def _attention(
    arrays: tuple[Array, ...],
    shape: Shape,
    lists: dict[str, Array],
    interpret: bool,
    rows: int,
    most: Any = 0.0,
) -> tuple[Array, Array]:
    """Runs the kernel that serves `shape` on padded q, k, v.

    `lists` holds entries, counts if sparse, and the bias and the scales of q's rows if there are any. The first `rows`
    rows of q attend, a multiple of those of a program. `most`: of a bias of pairs, in absolute value.
    """
    inputs = {name: merge_heads(x) for name, x in zip("qkv", arrays, strict=True)} | lists
    batch, heads, _, dim = arrays[0].shape
    if shape.dtype == jnp.bfloat16:  # float16 does not hold what it takes
        q, scale = inputs["q"][:, :rows], shape.scale / LOG2E
        limits = scale, shape.rows, most, lists.get("row_scale")
        inputs["bounded"] = bounded(q, inputs["k"], inputs["v"], *limits)
    module, groups = (pair, 3) if shape.rows == 2 * ROWS else (single, 1)
    outputs = {"out": ((batch * heads, rows, dim), shape.dtype), "lse": ((batch * heads, rows), jnp.float32)}
    grid = batch * heads, rows // shape.rows
    made = launch(module.kernel, shape, module.memory(shape), groups, inputs, outputs, grid, interpret)
    return made["out"].reshape(batch, heads, rows, dim), made["lse"].reshape(batch, heads, rows)


def _keys(*arrays: Array) -> tuple[Array, ...]:
    """As TMA takes them: it fills with zeros what a last tile lacks, but in groups of 8 keys."""
    return tuple(pad_tokens(x, 8) for x in arrays)


def _whole(q: Array, rows: int | None, multiple: int) -> tuple[Array, int, int]:
    """(q with at least the third number of rows, rows that attend, the same up to a multiple): padded if it must be."""
    rows = q.shape[2] if rows is None else rows
    padded = block_count(rows, multiple) * multiple
    return q if q.shape[2] >= padded else pad_tokens(q, multiple), rows, padded


def flash_attention(call: DenseCall, tuning: MosaicGpuTuning | None = None) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    return in_precision(call, lambda call, row_scale: _dense(call, tuning, row_scale))


def _row_scale(row_scale: Array | None, multiple: int, rows: int) -> dict[str, Array]:
    """What the kernel takes of the scales of q's rows, if there are any."""
    return {} if row_scale is None else {"row_scale": merge_heads(pad_tokens(row_scale, multiple))[:, :rows]}


def _dense(call: DenseCall, tuning: MosaicGpuTuning | None, row_scale: Array | None) -> tuple[Array, Array]:
    """Of q and k as they are, or in 8 bits with `row_scale`."""
    (batch, _, rows, dim), keys = call.q.shape, call.k.shape[2]
    tuning = tuning or mosaic_gpu_tuning("dense", dim)
    tile = tuning.tile_k
    q, tiles = pad_tokens(call.q, 2 * ROWS), block_count(keys, tile)
    lists = every_tile(call.block_valid, batch, call.block_k, keys, tiles * tile, tile)
    options = {"dtype": call.v.dtype, "rows": 2 * ROWS, "stages": tuning.stages, "masked": "bias" in lists}
    shape = Shape.of(q, tile, tiles, call.scale, **options)
    lists |= _row_scale(row_scale, 2 * ROWS, q.shape[2])
    out, lse = _attention((q, *_keys(call.k, call.v)), shape, lists, call.interpret, q.shape[2])
    return out[:, :, :rows], lse[:, :, :rows]


def block_sparse_attention(call: SparseCall, tuning: MosaicGpuTuning | None = None) -> tuple[Array, Array]:
    """Attention over selected key blocks; see `pallas_kernels.block_sparse_attention`."""
    return in_precision(call, lambda call, row_scale: _over_lists(call, tuning, row_scale))


def _over_lists(call: SparseCall, tuning: MosaicGpuTuning | None, row_scale: Array | None) -> tuple[Array, Array]:
    """Of q and k as they are, or in 8 bits with `row_scale`."""
    (batch, _, _, dim), keys, kmax = call.q.shape, call.k.shape[2], call.indices.shape[3]
    block_q, block_k = call.block_q, call.block_k
    tuning = tuning or mosaic_gpu_tuning("block_sparse", dim, block_q, block_k)
    q, rows, padded = _whole(call.q, call.rows, block_q)
    tile, tile_q = min(block_k, tuning.tile_k), min(block_q, 2 * ROWS)
    blocks, parts = block_count(keys, block_k), block_k // tile
    tiles = blocks * parts
    bias, partial = tile_bias(call.block_valid, batch, block_k, keys, blocks * block_k, tile)
    indices = call.indices.astype(jnp.int32)
    first = jnp.where((indices >= 0) & (indices < blocks), indices * parts, tiles)
    tile_of = jnp.minimum(first[..., None] + numbers(parts, 5), tiles).reshape(*first.shape[:3], -1)
    entries = 2 * tile_of + jnp.take_along_axis(partial[:, None, None], tile_of, axis=-1, mode="clip")
    counts = jnp.clip(call.counts, 0, kmax).astype(jnp.int32) * parts
    options = {
        "dtype": call.v.dtype,
        "rows": tile_q,
        "split": block_q // tile_q,
        "stages": tuning.stages,
        "sparse": True,
        "masked": True,
    }
    shape = Shape.of(q, tile, tiles, call.scale, **options)
    lists = {"entries": merge_heads(entries), "counts": merge_heads(counts), "bias": bias}
    lists |= _row_scale(row_scale, block_q, padded)
    out, lse = _attention((q, *_keys(call.k, call.v)), shape, lists, call.interpret, padded)
    return out[:, :, :rows], lse[:, :, :rows]


def pooled_attention(call: PooledCall, tuning: MosaicGpuTuning | None = None) -> tuple[Array, Array]:
    """Attention over pooled keys; see `pallas_kernels.pooled_attention`."""
    dim = call.q.shape[3]
    tuning = tuning or mosaic_gpu_tuning("dense", dim)
    tile, block = tuning.tile_k, call.block_q
    q, rows, padded = _whole(call.q, call.rows, max(block, 2 * ROWS))
    tiles = block_count(call.k.shape[2], tile)
    # The kernel adds the bias to scores that it then scales.
    bias = merge_heads(call.pair_bias(padded // block, tiles * tile, 1 / call.scale))
    most = jnp.where(jnp.isfinite(call.bias), jnp.abs(call.bias), 0.0).max()
    options = {"rows": 2 * ROWS, "stages": tuning.stages, "masked": False, "bias_rows": block}
    shape = Shape.of(q, tile, tiles, call.scale, **options)
    out, lse = _attention((q, *_keys(call.k, call.v)), shape, {"bias": bias}, call.interpret, padded, most)
    return out[:, :, :rows], lse[:, :, :rows]
