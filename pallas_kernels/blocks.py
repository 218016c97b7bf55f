"""Block arithmetic shared by the implementations."""

from typing import Any

import jax.numpy as jnp
from jax import Array

MASKED = -3e38
"""Added to the scores of keys that are not valid."""


def block_count(length: Any, block: int) -> Any:
    """Number of blocks of `block` tokens that cover `length` tokens (int or array), the last perhaps partial."""
    return -(-length // block)


def expand_blocks(x: Array, block: int, length: int, axis: int) -> Array:
    """Repeats each entry of a per-block axis `block` times, cut to `length` tokens."""
    return jnp.repeat(x, block, axis=axis)[(slice(None),) * axis + (slice(0, length),)]


def valid_counts(block_valid: Array | None, batch: int, block: int, length: int) -> Array:
    """int32 [B, blocks]: valid tokens per block, never past the end of the sequence."""
    inside = jnp.clip(length - block * jnp.arange(block_count(length, block)), 0, block).astype(jnp.int32)
    if block_valid is None:
        return jnp.broadcast_to(inside, (batch, len(inside)))
    return jnp.clip(block_valid.astype(jnp.int32), 0, inside)


def expand_valid(block_valid: Array | None, batch: int, block: int, length: int) -> Array:
    """bool [B, length]: which tokens are valid. In each block the valid ones come first."""
    counts = valid_counts(block_valid, batch, block, length)
    inside = jnp.arange(block) < counts[..., None]
    return inside.reshape(batch, -1)[:, :length]


def pad_tokens(x: Array, multiple: int) -> Array:
    """Pads axis 2 of [B, H, N, ...] with zeros to a multiple."""
    extra = -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3)) if extra else x


def key_bias(block_valid: Array | None, batch: int, block: int, length: int, padded: int) -> Array | None:
    """float32 [B, padded], 0 for valid keys and MASKED for others; None if every key is valid."""
    if block_valid is None and length == padded:
        return None
    valid = expand_valid(block_valid, batch, block, length)
    return jnp.where(jnp.pad(valid, ((0, 0), (0, padded - length))), 0.0, MASKED)
