"""TPU block mass: one pass over Q and K in tiles of 1024 rows by 2048 keys, scores with keys down and queries across.

Keys down the sublanes, so that a block's sum over keys needs no cross-lane work: each key block adds a row of per-query
sums to VMEM, and queries are summed once, after the last key tile.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import block_count
from pallas_kernels.mosaic_tpu.attention import contract

_LANES = 128
_LOG2E = math.log2(math.e)


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
    batch, j = lax.div(pl.program_id(0), heads), pl.program_id(2)
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

        def strip(i: Array, total: Array) -> Array:
            # Strip by strip: all at once the compiler spills more than VMEM holds of a long video.
            keys = pl.ds(pl.multiple_of(i * _LANES, _LANES), _LANES)
            weighted = (sums[keys, :] * weight[...]).T
            mass[:, keys] = weighted.reshape(queries // block_q, block_q, _LANES).sum(1)
            return total + sums[keys, :].sum(0, keepdims=True)

        row_sum[...] = lax.fori_loop(0, sums.shape[0] // _LANES, strip, jnp.zeros_like(row_sum))


def mass_tile(block_q: int, block_k: int) -> tuple[int, int]:
    """Rows and keys of a tile: eight blocks each way, or more."""
    return max(1024, 8 * block_q), max(2048, 8 * block_k)


def block_mass(
    q: Array,
    k: Array,
    shift: Array,
    weight: Array,
    valid: Array,
    *,
    block_q: int,
    block_k: int,
    heads: int,
    scale: float,
    vmem_bytes: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """Mass of block pairs and sums of rows.

    Args:
      q: [B*H, Nq, D], Nq a multiple of the rows of `mass_tile`.
      k: [B*H, Nk, D], Nk a multiple of its keys.
      shift: float32 [B*H, Nq], LSE in base 2; inf for a row without mass.
      weight: float32 [B, Nq], of a row in the mass of its block.
      valid: int32 [B, Nk / block_k], valid keys of each block.
      block_q: rows of a query block.
      block_k: keys of a key block.
      heads: H.
      scale: of the scores, for exp.
      vmem_bytes: limit for the compiler.
      interpret: passed to pallas_call.

    Returns:
      mass float32 [B*H, Nq / block_q, Nk / block_k or more], numbers that nobody should read past the last block;
      row_sum float32 [B*H, Nq].
    """
    (programs, queries, dim), keys = q.shape, k.shape[1]
    tile_q, tile_k = mass_tile(block_q, block_k)
    used = keys // block_k
    blocks = _LANES * block_count(used, _LANES)
    partial = (valid.reshape(valid.shape[0], keys // tile_k, -1) < block_k).any(-1)
    row = lambda index: pl.BlockSpec((None, 1, tile_q), index)
    mass, row_sum = pl.pallas_call(
        functools.partial(_kernel, block_q=block_q, block_k=block_k, used=used, heads=heads, scale=scale * _LOG2E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(programs, queries // tile_q, keys // tile_k),
            in_specs=[
                pl.BlockSpec((None, tile_q, dim), lambda h, i, j, *_: (h, i, 0)),
                pl.BlockSpec((None, tile_k, dim), lambda h, i, j, *_: (h, j, 0)),
                row(lambda h, i, j, *_: (h, 0, i)),
                row(lambda h, i, j, *_: (lax.div(h, heads), 0, i)),
            ],
            out_specs=[
                pl.BlockSpec((None, tile_q // block_q, blocks), lambda h, i, j, *_: (h, i, 0)),
                row(lambda h, i, j, *_: (h, 0, i)),
            ],
            scratch_shapes=[pltpu.VMEM((blocks, tile_q), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((programs, queries // block_q, blocks), jnp.float32),
            jax.ShapeDtypeStruct((programs, 1, queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_bytes, dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="adaspa_block_mass",
    )(valid.reshape(-1), partial.reshape(-1).astype(jnp.int32), q, k, shift[:, None], weight[:, None])
    return mass, row_sum[:, 0]
