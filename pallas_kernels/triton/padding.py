"""What both Triton implementations do around their kernels: tokens padded to whole tiles, validity made a bias."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import key_bias, pad_tokens
from pallas_kernels.tuning import TritonTuning, triton_tuning

Attention = Callable[..., tuple[Array, Array]]
"""(q, k, v, bias or None, (indices, counts) or None, *, block_q, block_k, scale, tuning, interpret) -> (out, lse)."""


def padded_dense(
    attention: Attention,
    q: Array,
    k: Array,
    v: Array,
    *,
    block_valid: Array | None,
    block_k: int,
    scale: float,
    interpret: bool = False,
    tuning: TritonTuning | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    rows, keys = q.shape[2], k.shape[2]
    tuning = tuning or triton_tuning("dense", q.dtype, q.shape[3])
    q, k, v = pad_tokens(q, tuning.tile_q), pad_tokens(k, tuning.tile_k), pad_tokens(v, tuning.tile_k)
    bias = key_bias(block_valid, q.shape[0], block_k, keys, k.shape[2])
    blocks = {"block_q": tuning.tile_q, "block_k": tuning.tile_k}
    out, lse = attention(q, k, v, bias, None, **blocks, scale=scale, tuning=tuning, interpret=interpret, **options)
    return out[:, :, :rows], lse[:, :, :rows]


def padded_sparse(
    attention: Attention,
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    counts: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None,
    scale: float,
    interpret: bool = False,
    tuning: TritonTuning | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Attention over selected key blocks; see `pallas_kernels.block_sparse_attention`."""
    rows, keys = q.shape[2], k.shape[2]
    tuning = tuning or triton_tuning("block_sparse", q.dtype, q.shape[3])
    q, k, v = pad_tokens(q, block_q), pad_tokens(k, block_k), pad_tokens(v, block_k)
    bias = key_bias(block_valid, q.shape[0], block_k, keys, k.shape[2])
    table = indices, jnp.clip(counts, 0, indices.shape[3])
    blocks = {"block_q": block_q, "block_k": block_k}
    out, lse = attention(q, k, v, bias, table, **blocks, scale=scale, tuning=tuning, interpret=interpret, **options)
    return out[:, :, :rows], lse[:, :, :rows]
