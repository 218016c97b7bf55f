"""Block arithmetic shared by the implementations."""

from typing import Any

import jax.numpy as jnp
from jax import Array

LOG2E = 1.4426950408889634
"""Scores are kept in base 2: exp2(s * log2(e)) is one multiply-add and one instruction."""
MASKED = -3e38
"""Added to the scores of keys that are not valid."""
FLOOR = -1e30
"""Of a running maximum m: exp(MASKED - m) is 0 for every m above it."""


def block_count(length: Any, block: int) -> Any:
    """Number of blocks of `block` tokens that cover `length` tokens (int or array), the last perhaps partial."""
    return -(-length // block)


def numbers(count: int, ndim: int = 1) -> Array:
    """int32 0, 1, ... `count` - 1 along the last of `ndim` axes: to compare with arrays of as many axes."""
    return jnp.arange(count, dtype=jnp.int32).reshape(*[1] * (ndim - 1), count)


def expand_blocks(x: Array, block: int, length: int, axis: int) -> Array:
    """Repeats each entry of a per-block axis `block` times, cut to `length` tokens."""
    return jnp.repeat(x, block, axis=axis)[(slice(None),) * axis + (slice(0, length),)]


def valid_counts(block_valid: Array | None, batch: int, block: int, length: int) -> Array:
    """int32 [B, blocks]: valid tokens per block, never past the end of the sequence."""
    inside = jnp.clip(length - block * numbers(block_count(length, block), 2), 0, block)
    if block_valid is None:
        return jnp.broadcast_to(inside, (batch, inside.shape[1]))
    return jnp.clip(block_valid.astype(jnp.int32), 0, inside)


def expand_valid(block_valid: Array | None, batch: int, block: int, length: int) -> Array:
    """bool [B, length]: which tokens are valid. In each block the valid ones come first."""
    counts = valid_counts(block_valid, batch, block, length)
    inside = numbers(block, 3) < counts[..., None]
    return inside.reshape(batch, -1)[:, :length]


def merge_heads(x: Array) -> Array:
    """[B * H, ...] of [B, H, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def pad_tokens(x: Array, multiple: int) -> Array:
    """Pads axis 2 of [B, H, N, ...] with zeros to a multiple."""
    extra = -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3)) if extra else x


def bias_of(valid: Array) -> Array:
    """float32, 0 where `valid` and MASKED elsewhere: to add to scores."""
    return jnp.where(valid, jnp.float32(0), jnp.float32(MASKED))


def key_bias(block_valid: Array | None, batch: int, block: int, length: int, padded: int) -> Array | None:
    """float32 [B, padded], 0 for valid keys and MASKED for others; None if every key is valid."""
    if block_valid is None and length == padded:
        return None
    valid = expand_valid(block_valid, batch, block, length)
    return bias_of(jnp.pad(valid, ((0, 0), (0, padded - length))))


def pack_bits(flags: Array) -> Array:
    """uint32 [..., ceil(n / 32)] of bool [..., n], the first flag in the lowest bit; bits past the last are 0."""
    bits = jnp.pad(flags, ((0, 0),) * (flags.ndim - 1) + ((0, -flags.shape[-1] % 32),))
    bits = bits.reshape(*flags.shape[:-1], -1, 32).astype(jnp.uint32)
    return (bits << numbers(32, bits.ndim).astype(jnp.uint32)).sum(-1, dtype=jnp.uint32)


def unpack_bits(words: Array, count: int) -> Array:
    """bool [..., count] of the words of `pack_bits`."""
    bits = words[..., None] >> numbers(32, words.ndim + 1).astype(jnp.uint32)
    return (bits & 1 != 0).reshape(*words.shape[:-1], -1)[..., :count]


def lookup(flags: Array, indices: Array) -> Array:
    """bool [..., K]: `flags` bool [n] or [..., n] at `indices` int [..., K] within [0, n).

    By packed words and comparisons: a TPU gathers single bits one after another.
    """
    words = pack_bits(flags)
    indices = indices.astype(jnp.uint32)
    here = (indices >> 5)[..., None] == numbers(words.shape[-1], indices.ndim + 1).astype(jnp.uint32)
    words = words.reshape(*[1] * (indices.ndim - words.ndim), *words.shape[:-1], 1, words.shape[-1])
    word = jnp.where(here, words, 0).sum(-1, dtype=jnp.uint32)
    return (word >> (indices & 31)) & 1 != 0


def ascending(indices: Array, counts: Array, num_blocks: int) -> Array:
    """Lists int32 [..., K] of blocks below `num_blocks`: the first `counts` [...] ascending, then the others."""
    unused = numbers(indices.shape[-1], indices.ndim) >= counts[..., None]
    keys = jnp.sort(jnp.where(unused, indices + num_blocks, indices), axis=-1)
    return jnp.where(keys < num_blocks, keys, keys - num_blocks)


def partial_first(indices: Array, counts: Array, partial: Array) -> Array:
    """Lists whose `partial` blocks come first, which the TPU kernel runs fastest; the order is kept otherwise.

    By comparing every place with every entry, one fusion: a sort takes the TPU compiler 20 s, and scatters are slow.

    Args:
      indices: [..., K], of which the first `counts` are in use.
      counts: int [...].
      partial: bool [..., K], whether the block of an entry has keys that are not valid.

    Returns:
      [..., K] in the dtype of `indices`; entries that are not in use stay where they are.
    """
    place = numbers(indices.shape[-1], indices.ndim)
    used = place < counts[..., None]
    first, second = used & partial, used & ~partial
    number = lambda x: jnp.cumsum(x, axis=-1, dtype=jnp.int32) - 1
    target = jnp.where(first, number(first), first.sum(-1, keepdims=True, dtype=jnp.int32) + number(second))
    target = jnp.where(used, target, place)
    here = target[..., None, :] == place[..., None]  # [..., place, entry]
    return jnp.where(here, indices[..., None, :], 0).sum(-1, dtype=indices.dtype)
