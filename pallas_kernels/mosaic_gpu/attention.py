"""Attention on Hopper, dense, over lists of key blocks, over pooled keys: padding, lists, and the choice of kernel."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import block_count, merge_heads, numbers, pad_tokens
from pallas_kernels.calls import DenseCall, PooledCall, SparseCall
from pallas_kernels.mosaic_gpu import pair, single
from pallas_kernels.mosaic_gpu.machine import launch
from pallas_kernels.mosaic_gpu.shape import ROWS, Shape, every_tile, tile_bias
from pallas_kernels.tuning import MosaicGpuTuning, mosaic_gpu_tuning


def _attention(
    q: Array, k: Array, v: Array, shape: Shape, lists: dict[str, Array], bias: Array | None, interpret: bool, rows: int
) -> tuple[Array, Array]:
    """Runs the kernel that serves `shape` on padded arrays; `lists` holds entries and, if sparse, counts.

    The first `rows` rows of q attend, a multiple of those of a program.
    """
    inputs = {"q": merge_heads(q), "k": merge_heads(k), "v": merge_heads(v)} | lists
    inputs |= {} if bias is None else {"bias": bias}
    batch, heads, _, dim = q.shape
    module, groups = (pair, 3) if shape.rows == 2 * ROWS else (single, 1)
    outputs = {"out": ((batch * heads, rows, dim), q.dtype), "lse": ((batch * heads, rows), jnp.float32)}
    grid = batch * heads, rows // shape.rows
    made = launch(module.kernel, shape, module.memory(shape), groups, inputs, outputs, grid, interpret)
    return made["out"].reshape(batch, heads, rows, dim), made["lse"].reshape(batch, heads, rows)


def _whole(q: Array, rows: int | None, multiple: int) -> tuple[Array, int, int]:
    """(q with at least the third number of rows, rows that attend, the same up to a multiple): padded if it must be."""
    rows = q.shape[2] if rows is None else rows
    padded = block_count(rows, multiple) * multiple
    return q if q.shape[2] >= padded else pad_tokens(q, multiple), rows, padded


def flash_attention(call: DenseCall, tuning: MosaicGpuTuning | None = None) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    (batch, _, rows, dim), keys = call.q.shape, call.k.shape[2]
    tuning = tuning or mosaic_gpu_tuning("dense", dim)
    tile = tuning.tile_k
    q, k, v = pad_tokens(call.q, 2 * ROWS), pad_tokens(call.k, tile), pad_tokens(call.v, tile)
    lists, bias = every_tile(call.block_valid, batch, call.block_k, keys, k.shape[2], tile)
    options = {"rows": 2 * ROWS, "stages": tuning.stages, "masked": bias is not None}
    shape = Shape.of(q, tile, k.shape[2] // tile, call.scale, **options)
    out, lse = _attention(q, k, v, shape, lists, bias, call.interpret, q.shape[2])
    return out[:, :, :rows], lse[:, :, :rows]


def block_sparse_attention(call: SparseCall, tuning: MosaicGpuTuning | None = None) -> tuple[Array, Array]:
    """Attention over selected key blocks; see `pallas_kernels.block_sparse_attention`."""
    (batch, _, _, dim), keys, kmax = call.q.shape, call.k.shape[2], call.indices.shape[3]
    block_q, block_k = call.block_q, call.block_k
    tuning = tuning or mosaic_gpu_tuning("block_sparse", dim, block_q, block_k)
    (q, rows, padded), k, v = _whole(call.q, call.rows, block_q), *(pad_tokens(x, block_k) for x in (call.k, call.v))
    tile, tile_q = min(block_k, tuning.tile_k), min(block_q, 2 * ROWS)
    tiles, parts = k.shape[2] // tile, block_k // tile
    bias, partial = tile_bias(call.block_valid, batch, block_k, keys, k.shape[2], tile)
    indices = call.indices.astype(jnp.int32)
    first = jnp.where((indices >= 0) & (indices < k.shape[2] // block_k), indices * parts, tiles)
    tile_of = jnp.minimum(first[..., None] + numbers(parts, 5), tiles).reshape(*first.shape[:3], -1)
    entries = 2 * tile_of + jnp.take_along_axis(partial[:, None, None], tile_of, axis=-1, mode="clip")
    counts = jnp.clip(call.counts, 0, kmax).astype(jnp.int32) * parts
    options = {"rows": tile_q, "split": block_q // tile_q, "stages": tuning.stages, "sparse": True, "masked": True}
    shape = Shape.of(q, tile, tiles, call.scale, **options)
    lists = {"entries": merge_heads(entries), "counts": merge_heads(counts)}
    out, lse = _attention(q, k, v, shape, lists, bias, call.interpret, padded)
    return out[:, :, :rows], lse[:, :, :rows]


def pooled_attention(call: PooledCall, tuning: MosaicGpuTuning | None = None) -> tuple[Array, Array]:
    """Attention over pooled keys; see `pallas_kernels.pooled_attention`."""
    dim = call.q.shape[3]
    tuning = tuning or mosaic_gpu_tuning("dense", dim)
    tile, block = tuning.tile_k, call.block_q
    q, rows, padded = _whole(call.q, call.rows, max(block, 2 * ROWS))
    k, v = pad_tokens(call.k, tile), pad_tokens(call.v, tile)
    # The kernel adds the bias to scores that it then scales.
    bias = merge_heads(call.pair_bias(padded // block, k.shape[2], 1 / call.scale))
    options = {"rows": 2 * ROWS, "stages": tuning.stages, "masked": False, "bias_rows": block}
    shape = Shape.of(q, tile, k.shape[2] // tile, call.scale, **options)
    out, lse = _attention(q, k, v, shape, {}, bias, call.interpret, padded)
    return out[:, :, :rows], lse[:, :, :rows]
