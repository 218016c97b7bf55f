"""What both Triton implementations serve, and do around their kernels: tokens padded to tiles, validity made a bias.

It imports neither: jax_triton serves Ampere when JAX has no Pallas Triton backend any more.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import LOG2E, key_bias, pad_tokens
from pallas_kernels.calls import DenseCall, MassCall, PooledCall, Request, SparseCall
from pallas_kernels.dispatch import gpu_capability
from pallas_kernels.tuning import TritonTuning, triton_tuning

Kernel = Callable[..., tuple[Array, Array]]


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if request.score_precision != "input":
        return f"score_precision={request.score_precision!r} is for TPUs and Hopper GPUs"
    if request.head_dim < 16 or request.head_dim > 128 or request.head_dim & (request.head_dim - 1):
        return f"head_dim={request.head_dim} must be a power of two from 16 to 128"
    if any(block is not None and block < 16 for block in (request.block_q, request.block_k)):
        return f"block_q={request.block_q}, block_k={request.block_k} must be at least 16"
    capability = gpu_capability()
    if capability is not None and not request.interpret and float(capability) < 8.0:
        return f"compute capability {capability} is below 8.0 (Ampere)"
    return None


def padded_dense(attention: Kernel, call: DenseCall, tuning: TritonTuning | None = None, **options: Any) -> Any:
    """Dense attention by `attention(q, k, v, bias or None, None, *, block_q, block_k, scale, tuning, interpret)`."""
    rows, keys = call.q.shape[2], call.k.shape[2]
    tuning = tuning or triton_tuning("dense", call.q.dtype, call.q.shape[3])
    q, k, v = (pad_tokens(x, tile) for x, tile in zip((call.q, call.k, call.v), _tiles(tuning), strict=True))
    bias = key_bias(call.block_valid, q.shape[0], call.block_k, keys, k.shape[2])
    options |= {"block_q": tuning.tile_q, "block_k": tuning.tile_k, "scale": call.scale, "interpret": call.interpret}
    out, lse = attention(q, k, v, bias, None, tuning=tuning, **options)
    return out[:, :, :rows], lse[:, :, :rows]


def _tiles(tuning: TritonTuning) -> tuple[int, int, int]:
    return tuning.tile_q, tuning.tile_k, tuning.tile_k


def padded_sparse(attention: Kernel, call: SparseCall, tuning: TritonTuning | None = None, **options: Any) -> Any:
    """Attention over blocks by `attention` as above, with a table (indices, counts int32) in place of None."""
    rows, keys = call.q.shape[2], call.k.shape[2]
    tuning = tuning or triton_tuning("block_sparse", call.q.dtype, call.q.shape[3])
    q, k, v = pad_tokens(call.q, call.block_q), pad_tokens(call.k, call.block_k), pad_tokens(call.v, call.block_k)
    bias = key_bias(call.block_valid, q.shape[0], call.block_k, keys, k.shape[2])
    table = call.indices, jnp.clip(call.counts, 0, call.indices.shape[3]).astype(jnp.int32)
    options |= {"block_q": call.block_q, "block_k": call.block_k, "scale": call.scale, "interpret": call.interpret}
    out, lse = attention(q, k, v, bias, table, tuning=tuning, **options)
    return out[:, :, :rows], lse[:, :, :rows]


def padded_pooled(attention: Kernel, call: PooledCall, tuning: TritonTuning | None = None, **options: Any) -> Any:
    """Attention over pooled keys by `attention` as above: dense, with a bias [B, H, nq, Nk] of query blocks."""
    rows, block = call.q.shape[2], call.block_q
    tuning = tuning or triton_tuning("dense", call.q.dtype, call.q.shape[3])
    q, k, v = pad_tokens(call.q, block), pad_tokens(call.k, tuning.tile_k), pad_tokens(call.v, tuning.tile_k)
    bias = call.pair_bias(q.shape[2] // block, k.shape[2], LOG2E)
    options |= {"block_q": block, "block_k": tuning.tile_k, "scale": call.scale, "interpret": call.interpret}
    out, lse = attention(q, k, v, bias, None, tuning=tuning, **options)
    return out[:, :, :rows], lse[:, :, :rows]


def padded_mass(mass: Kernel, call: MassCall, tuning: TritonTuning, tile_q: int, **options: Any) -> Any:
    """Block mass by `mass(q, k, shift, weight, bias or None, *, tile_q, tile_k, block_q, scale, tuning, interpret)`.

    A tile of `tile_q` rows holds whole blocks, or a block whole tiles. `mass` gives float32 [B * H, rows of blocks or
    tiles, key tiles] and row sums [B, H, Nq]; its shift is in base 2.
    """
    rows, keys, tile_k = call.q.shape[2], call.k.shape[2], min(call.block_k, tuning.tile_k)
    q, k = pad_tokens(call.q, max(call.block_q, tile_q)), pad_tokens(call.k, call.block_k)
    bias = key_bias(call.block_valid, q.shape[0], call.block_k, keys, k.shape[2])
    shift, weight = call.shift(q.shape[2]) * LOG2E, call.weight(q.shape[2])
    options |= {"block_q": call.block_q, "scale": call.scale, "interpret": call.interpret}
    found, row_sum = mass(q, k, shift, weight, bias, tile_q=tile_q, tile_k=tile_k, tuning=tuning, **options)
    return call.of_blocks(found, max(1, call.block_q // tile_q)), row_sum[:, :, :rows]
