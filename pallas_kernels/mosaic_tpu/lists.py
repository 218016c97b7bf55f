"""Lists of key tiles for the TPU attention kernels, and what masks the keys of a tile."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import bias_of, expand_valid, numbers
from pallas_kernels.mosaic_tpu.attention import DROPPED
from pallas_kernels.tuning import TpuAttentionTuning


def tile_lists(starts: Array, used: Array, whole: Array, tuning: TpuAttentionTuning, resident: bool) -> Array:
    """Lists int32 [..., L] for the attention kernel from first keys [..., tiles]; unused tiles are dropped."""
    pair, turn = 2 * tuning.group, tuning.group * tuning.unroll
    place = 1 + numbers(starts.shape[-1], starts.ndim)
    length = jnp.where(used, place, 0).max(-1, keepdims=True)
    partial = jnp.where(used & whole | (place > length), 0, place).max(-1, keepdims=True)
    turns = (length - partial) // turn if resident else jnp.zeros_like(length)
    head = length - turns * turn
    pairs = -(-head // pair)
    # What is dropped reads a tile of the list all the same: one that is not in use may hold NaN.
    dropped = DROPPED + jnp.where(used, starts, 0).max(-1, keepdims=True)
    ends = ((0, 0),) * (starts.ndim - 1) + ((pair, tuning.slack),)
    entries = jnp.where(jnp.pad(used, ends), jnp.pad(starts, ends), dropped)
    return jnp.concatenate([pair + head - pairs * pair, pairs, turns, entries], -1, dtype=jnp.int32)


def tile_bias(
    block_valid: Array | None, batch: int, block: int, keys: int, padded: int, tile: int
) -> tuple[Array, Array]:
    """(bias float32 [B, tiles + 1, max(tile, 128)], whole bool [B, tiles]).

    Tiles of 64 keys have theirs twice over; the last row masks all.
    """
    valid = jnp.pad(expand_valid(block_valid, batch, block, keys), ((0, 0), (0, padded - keys + tile)))
    valid = valid.reshape(batch, -1, tile)
    bias = bias_of(valid)
    return (jnp.concatenate([bias, bias], -1) if tile == 64 else bias), valid[:, :-1].all(-1)
