"""Attention on a TPU, dense, over lists of key blocks, over pooled keys: where K and V go, their lists, the kernel."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.blocks import block_count, expand_blocks, lookup, merge_heads, numbers, pad_tokens, partial_first
from pallas_kernels.calls import DenseCall, PooledCall, SparseCall
from pallas_kernels.mosaic_tpu.attention import attention, packed, resident_bytes
from pallas_kernels.mosaic_tpu.chip import chip
from pallas_kernels.mosaic_tpu.lists import tables, tile_bias
from pallas_kernels.quantized import in_precision
from pallas_kernels.tuning import TpuAttentionTuning, tpu_attention_tuning, tpu_pooled_tuning

PROGRAM_ROWS = 1024
"""Of query blocks that share a program: the groups of one are multiplied while another's last are summed."""
POOLED_ROWS = 2048
"""Of a step over pooled keys, several query blocks: for so few keys a step's beginning and end would cost the most."""
MOST_SHIFT = 40.0
"""Nats: dense attention takes a bound on its scores as their shift up to this. A row's largest score is rarely below 0,
and down to 4 nats below, 44 off, its sum stays within the range of the kernel."""
GATHERED_ROWS = 512
"""Of a dense query block where K and V come from HBM: fewer would wait for them."""


def query_blocks(
    k: Array | jax.ShapeDtypeStruct,
    rows: int,
    blocks: int,
    tile: int,
    tuning: TpuAttentionTuning,
    values: int | None = None,
) -> int:
    """Query blocks of a program that keeps K and V of a head in VMEM; 0 if they do not fit.

    As many as PROGRAM_ROWS asks for and a chip has room for besides. k: [B, H, N, D], padded to tiles;
    `values`: bytes of a number of V, if not as many as of K.
    """
    most = chip().vmem_bytes if tuning.resident is None else math.inf if tuning.resident else -1
    together, itemsizes = min(max(1, PROGRAM_ROWS // rows), blocks), (k.dtype.itemsize, values or k.dtype.itemsize)
    while together:
        if resident_bytes(k.shape[2], rows, together, k.shape[3], itemsizes, tile, tuning) <= most:
            return block_count(blocks, block_count(blocks, together))  # as many in each program
        together //= 2
    return 0


def multiplies(dtype: Any) -> bool:
    """Whether the chip's matrix unit has a product of `dtype`: int8 up to v6e, fp8 from v7x on, the wider ones ever."""
    eight = {jnp.dtype(jnp.int8): chip().generation < 7, jnp.dtype(jnp.float8_e4m3fn): chip().generation >= 7}
    return eight.get(jnp.dtype(dtype), True)


def _kernel(
    call: DenseCall | SparseCall | PooledCall,
    k: Array,
    v: Array,
    tiles: tuple[Array, Array, Array],
    bias: Array,
    together: int,
    shared: bool = False,
    row_scale: Array | None = None,
    **options: Any,
) -> Callable[..., tuple[Array, Array]]:
    """The kernel of a call, K and V padded to tiles: a function of the shift [B, H, Nq], or of nothing.

    `tiles`, each [B, H or 1, Nq / rows or, `shared`, 1, tiles]: first keys, whether a list has the tile, whether it is
    whole. `together`: query blocks of a program, 0 for those whose keys are gathered. `row_scale`: float32 [B, H, Nq].
    """
    q, resident, together = call.q, together > 0, max(together, 1)
    table = merge_heads(tables(*tiles, together, shared, options["tuning"], resident))
    options |= {"heads": q.shape[1], "together": together, "scale": call.scale, "interpret": call.interpret}
    keys, values = merge_heads(k), merge_heads(v)
    kv = (keys, values) if resident else (packed(keys, values, options["tile"]),)
    scales = None if row_scale is None else merge_heads(row_scale)

    def run(shift: Array | None = None) -> tuple[Array, Array]:
        near = None if shift is None else merge_heads(shift)
        out, lse = attention(merge_heads(q), kv, table, bias, near, scales, vmem_bytes=chip().vmem_bytes, **options)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])

    return run


def _shifted(run: Callable[..., tuple[Array, Array]], shift: Array, seen: Array) -> tuple[Array, Array]:
    """`run` with a shift, and once more without where that is too far off for a row that has keys, bool `seen`."""
    out, lse = run(shift)
    lost = (jnp.isnan(lse) & seen).any()
    # A loop of no turn or one: its carry stays where it is, what a cond returns would be copied.
    out, lse = lax.fori_loop(jnp.int32(0), lost.astype(jnp.int32), lambda *_: run(), (out, lse))
    return out, jnp.where(seen, lse, -jnp.inf)


def _bounded(run: Callable[..., tuple[Array, Array]], bound: Array, seen: Array) -> tuple[Array, Array]:
    """`run` with the bound on its scores as their shift, if that is near enough for most of what they can be."""
    return lax.cond(bound.max() <= MOST_SHIFT, lambda: _shifted(run, bound, seen), run)


def _bound(q: Array, k: Array, scale: float) -> Array:
    """float32 [B, H, Nq]: no score of a row is larger (Cauchy-Schwarz)."""
    norm = lambda x: jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1))
    return norm(q) * norm(k).max(-1, keepdims=True) * jnp.float32(abs(scale))


def flash_attention(call: DenseCall, tuning: TpuAttentionTuning | None = None) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    q, batch, keys, tile = call.q, call.q.shape[0], call.k.shape[2], 128
    tuning = tuning or tpu_attention_tuning(tile, block_count(keys, tile), q.dtype, chip().generation)
    k, v = pad_tokens(call.k, tile), pad_tokens(call.v, tile)
    together = query_blocks(k, tile, block_count(q.shape[2], tile), tile, tuning)
    bias, whole = tile_bias(call.block_valid, batch, call.block_k, keys, k.shape[2], tile)
    tiles = k.shape[2] // tile
    indices = jnp.broadcast_to(numbers(tiles, 2), (batch, tiles))
    order = partial_first(indices, jnp.full(batch, tiles, jnp.int32), ~whole)[:, None, None]
    lists = tile * order, jnp.full(order.shape, True), lookup(whole[:, None, None], order)
    rows = tile if together else GATHERED_ROWS
    run = _kernel(call, k, v, lists, bias, together, shared=True, rows=rows, tile=tile, tuning=tuning)
    some = jnp.full(batch, True) if call.block_valid is None else (call.block_valid > 0).any(1)
    seen = jnp.broadcast_to(some[:, None, None], q.shape[:3])
    if call.shift is not None:
        return _shifted(run, call.shift, seen)
    return _bounded(run, _bound(q, call.k, call.scale), seen)


def block_sparse_attention(call: SparseCall, tuning: TpuAttentionTuning | None = None) -> tuple[Array, Array]:
    """Attention over selected key blocks; see `pallas_kernels.block_sparse_attention`."""
    return in_precision(call, lambda call, row_scale: _over_lists(call, tuning, row_scale))


def _over_lists(call: SparseCall, tuning: TpuAttentionTuning | None, row_scale: Array | None) -> tuple[Array, Array]:
    """Of q and k as they are, or in 8 bits with `row_scale`."""
    batch, keys, kmax, tile = call.q.shape[0], call.k.shape[2], call.indices.shape[3], call.block_k
    tuning = tuning or tpu_attention_tuning(tile, kmax, call.v.dtype, chip().generation)
    k, v = pad_tokens(call.k, tile), pad_tokens(call.v, tile)
    bias, whole = tile_bias(call.block_valid, batch, tile, keys, k.shape[2], tile)
    indices, counts = call.indices.astype(jnp.int32), call.counts.astype(jnp.int32)
    used = (indices >= 0) & (indices < k.shape[2] // tile) & (numbers(kmax, 4) < counts[..., None])
    lists = indices * tile, used, lookup(whole[:, None, None], jnp.where(used, indices, 0))
    fits = lambda k: query_blocks(k, call.block_q, indices.shape[2], tile, tuning, v.dtype.itemsize)
    if not multiplies(k.dtype) or not fits(k):  # gathered keys and values are of one dtype
        # The same numbers, no faster: bfloat16 holds int8 and e4m3.
        call, k = dataclasses.replace(call, q=call.q.astype(v.dtype)), k.astype(v.dtype)
    together = fits(k)
    run = _kernel(call, k, v, lists, bias, together, row_scale=row_scale, rows=call.block_q, tile=tile, tuning=tuning)
    if call.shift is None:
        return run()
    some = used
    if call.block_valid is not None:
        some &= lookup((call.block_valid > 0)[:, None, None], jnp.where(used, indices, 0))
    seen = expand_blocks(some.any(-1), call.block_q, call.q.shape[2], 2)
    return _shifted(run, call.shift, seen)


def pooled_attention(call: PooledCall, tuning: TpuAttentionTuning | None = None) -> tuple[Array, Array]:
    """Attention over pooled keys; see `pallas_kernels.pooled_attention`."""
    q, nk, tile = call.q, call.k.shape[2], 128
    tuning = tuning or tpu_pooled_tuning(tile, block_count(nk, tile), q.dtype, chip().generation)
    k, v = pad_tokens(call.k, tile), pad_tokens(call.v, tile)
    tiles = k.shape[2] // tile
    # The kernel adds the bias to scores that it then scales.
    wide = min(POOLED_ROWS // call.block_q, call.kept.shape[2])
    rows, count = wide * call.block_q, wide * block_count(call.kept.shape[2], wide)
    bias = call.pair_bias(count, (tiles + 1) * tile, 1 / call.scale)
    bias = merge_heads(bias).reshape(-1, bias.shape[2], tiles + 1, tile)
    order = jnp.broadcast_to(tile * numbers(tiles, 4), (q.shape[0], 1, 1, tiles))
    lists = order, jnp.full(order.shape, True), jnp.full(order.shape, False)
    fits = query_blocks(k, rows, 1, tile, tuning)
    run = _kernel(call, k, v, lists, bias, fits, shared=True, rows=rows, tile=tile, tuning=tuning)
    largest = call.bias.max(-1, keepdims=True)
    bound = _bound(q, call.k, call.scale) + jnp.maximum(largest, 0)
    return _bounded(run, bound, expand_blocks(~call.hidden.all(-1), call.block_q, q.shape[2], 2))
