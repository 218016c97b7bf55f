"""Block arithmetic shared by the implementations."""

from typing import Any

import jax.numpy as jnp
from jax import Array


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
