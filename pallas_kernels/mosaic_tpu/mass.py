"""TPU block mass: one pass over Q and K in tiles of 1024 rows by 2048 keys or more, keys down and queries across.

Keys down the sublanes, so that a block's sum over keys needs no cross-lane work: each key block adds a row of per-query
sums to VMEM, and queries are summed once, after the last key tile.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import varying
from pallas_kernels.blocks import LOG2E, block_count, merge_heads, pad_tokens, valid_counts
from pallas_kernels.calls import MassCall
from pallas_kernels.mosaic_tpu.attention import contract
from pallas_kernels.mosaic_tpu.chip import chip

_LANES = 128
_PADDED = 20
"""A larger tile may pad one token in so many."""
_MOST_SUMS = 16 << 20
"""Bytes of VMEM, of a tile's sums by key block."""


def _kernel(
    valid: Any,
    partial: Any,
    q: Any,
    k: Any,
    shift: Any,
    weight: Any,
    mass: Any,
    row_sum: Any,
    sums: Any,
    *,
    block_q: int,
    block_k: int,
    used: int,
    heads: int,
    scale: float,
) -> None:
    batch, j = lax.div(pl.program_id(0), np.int32(heads)), pl.program_id(2)
    tile, queries = k.shape[0], q.shape[0]
    blocks = tile // block_k
    here = pl.ds(pl.multiple_of(j * blocks, blocks), blocks)
    tile_of_batch = batch * pl.num_programs(2) + j

    def probabilities() -> Array:
        scores = contract(k[...], q[...], 1, k.dtype)
        return jnp.exp2(scores * scale - shift[...]).reshape(blocks, block_k, queries)

    @pl.when(partial[tile_of_batch] == 0)
    def _whole() -> None:
        sums[here, :] = probabilities().sum(1)

    @pl.when(partial[tile_of_batch] != 0)
    def _partial() -> None:
        p, key = probabilities(), lax.broadcasted_iota(jnp.int32, (block_k, queries), 0)
        kept = [
            jnp.where(key < valid[tile_of_batch * blocks + c], p[c], 0).sum(0, keepdims=True) for c in range(blocks)
        ]
        sums[here, :] = jnp.concatenate(kept, 0)

    @pl.when(j == pl.num_programs(2) - 1)
    def _last() -> None:
        if used < sums.shape[0]:
            sums[used:, :] = jnp.zeros((sums.shape[0] - used, queries), jnp.float32)

        def strip(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            # Strip by strip: all at once the compiler spills more than VMEM holds of a long video. The counter is our
            # own: that of a loop between constants is 64 bits wide under jax_enable_x64.
            start, total = carry
            keys = pl.ds(pl.multiple_of(start, _LANES), _LANES)
            weighted = (sums[keys, :] * weight[...]).T
            mass[:, keys] = weighted.reshape(queries // block_q, block_q, _LANES).sum(1)
            return start + np.int32(_LANES), total + sums[keys, :].sum(0, keepdims=True)

        strips = sums.shape[0] // _LANES
        _, row_sum[...] = lax.fori_loop(0, strips, strip, (np.int32(0), jnp.zeros_like(row_sum)))


def mass_tile(block_q: int, block_k: int, rows: int, keys: int, dtype: Any) -> tuple[int, int]:
    """Rows and keys of a tile: eight blocks each way or more; twice and three times as many where little is padded.

    A tile begins and ends with 400 cycles that multiply little, as much as 25 blocks take. In float32, of six products
    for one, that is little, and a large tile compiles for minutes.
    """
    tile_q, tile_k = max(1024, 8 * block_q), max(2048, 8 * block_k)
    sums = 4 * block_count(keys, block_k) * 2 * tile_q
    narrow = jnp.dtype(dtype).itemsize == 2
    fits = lambda length, tile: narrow and -length % tile <= length // _PADDED
    wide_q, wide_k = fits(rows, 2 * tile_q) and sums <= _MOST_SUMS, fits(keys, 3 * tile_k)
    return 2 * tile_q if wide_q else tile_q, 3 * tile_k if wide_k else tile_k


def _mass(
    q: Array,
    k: Array,
    shift: Array,
    weight: Array,
    valid: Array,
    call: MassCall,
) -> tuple[Array, Array]:
    """Mass of block pairs and sums of rows; what is not named here is the call's.

    Args:
      q: [B*H, Nq, D], Nq a multiple of the rows of `mass_tile`.
      k: [B*H, Nk, D], Nk a multiple of its keys.
      shift: float32 [B*H, Nq], LSE in base 2; inf for a row without mass.
      weight: float32 [B, Nq], of a row in the mass of its block.
      valid: int32 [B, Nk / block_k], valid keys of each block.
      call: the blocks and the scale.

    Returns:
      mass float32 [B*H, Nq / block_q, Nk / block_k or more], numbers that nobody should read past the last block;
      row_sum float32 [B*H, Nq].
    """
    (programs, queries, dim), keys, heads = q.shape, k.shape[1], call.q.shape[1]
    block_q, block_k, scale = call.block_q, call.block_k, call.scale * LOG2E
    tile_q, tile_k = mass_tile(block_q, block_k, call.q.shape[2], call.k.shape[2], q.dtype)
    used = keys // block_k
    blocks = _LANES * block_count(used, _LANES)
    partial = (valid.reshape(valid.shape[0], keys // tile_k, -1) < block_k).any(-1)
    row = lambda index: pl.BlockSpec((None, 1, tile_q), index)
    mass, row_sum = pl.pallas_call(
        functools.partial(_kernel, block_q=block_q, block_k=block_k, used=used, heads=heads, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(programs, queries // tile_q, keys // tile_k),
            in_specs=[
                pl.BlockSpec((None, tile_q, dim), lambda h, i, j, *_: (h, i, 0)),
                pl.BlockSpec((None, tile_k, dim), lambda h, i, j, *_: (h, j, 0)),
                row(lambda h, i, j, *_: (h, 0, i)),
                row(lambda h, i, j, *_: (lax.div(h, np.int32(heads)), 0, i)),
            ],
            out_specs=[
                pl.BlockSpec((None, tile_q // block_q, blocks), lambda h, i, j, *_: (h, i, 0)),
                row(lambda h, i, j, *_: (h, 0, i)),
            ],
            scratch_shapes=[pltpu.VMEM((blocks, tile_q), jnp.float32)],
        ),
        out_shape=[
            varying.result((programs, queries // block_q, blocks), jnp.float32, q, k, shift, weight, valid),
            varying.result((programs, 1, queries), jnp.float32, q, k, shift, weight, valid),
        ],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=chip().vmem_bytes, dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=call.interpret,
        name="adaspa_block_mass",
    )(valid.reshape(-1), partial.reshape(-1).astype(jnp.int32), q, k, shift[:, None], weight[:, None])
    return mass, row_sum[:, 0]


def block_mass(call: MassCall) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    (batch, heads, rows, _), keys, (nq, nk) = call.q.shape, call.k.shape[2], call.blocks
    tile_q, tile_k = mass_tile(call.block_q, call.block_k, rows, keys, call.q.dtype)
    q, k = pad_tokens(call.q, tile_q), pad_tokens(call.k, tile_k)
    shift, weight = call.shift(q.shape[2]) * LOG2E, call.weight(q.shape[2])
    valid = valid_counts(call.block_valid, batch, call.block_k, keys)
    valid = jnp.pad(valid, ((0, 0), (0, k.shape[2] // call.block_k - nk)))
    mass, row_sum = _mass(merge_heads(q), merge_heads(k), merge_heads(shift), weight, valid, call)
    mass = mass.reshape(batch, heads, *mass.shape[1:])[:, :, :nq, :nk]
    return mass, row_sum.reshape(batch, heads, -1)[:, :, :rows]
