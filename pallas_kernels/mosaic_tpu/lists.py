"""Lists of key tiles for the TPU attention kernels, and what masks the keys of a tile."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import bias_of, block_count, expand_valid, numbers
from pallas_kernels.mosaic_tpu.attention import DROPPED, ENTRY_BITS, HEADER
from pallas_kernels.tuning import TpuAttentionTuning


def tables(
    starts: Array, used: Array, whole: Array, together: int, shared: bool, tuning: TpuAttentionTuning, resident: bool
) -> Array:
    """Tables int32 [..., programs, L] for the attention kernel, of lists [..., query blocks, tiles].

    Partial tiles come first in a list. `together` lists are a program; where all query blocks share one list,
    [..., 1, tiles] with `shared`, their one program has it so many times. A table has the number of pairs of groups
    that need bias, the number of turns of `unroll` groups that do not, for the resident kernel alone, a slot a group,
    and the entries of the lists: the first key of a tile, plus DROPPED if it does not count. A list's first group has
    what its length is rounded up by.
    """
    group = tuning.group
    if not shared:
        ends = ((0, 0),) * (starts.ndim - 2) + ((0, -starts.shape[-2] % together), (0, 0))
        starts, used, whole = (jnp.pad(x, ends) for x in (starts, used, whole))
    place = 1 + numbers(starts.shape[-1], starts.ndim)
    length = jnp.where(used, place, 0).max(-1)
    partial = jnp.where(used & whole | (place > length[..., None]), 0, place).max(-1)
    groups = -(-length // group)
    dropped = groups * group - length
    masked = -(-(dropped + partial) // group) if resident else groups
    # What is dropped reads a tile of the list all the same: one that is not in use may hold NaN.
    ends = ((0, 0),) * (starts.ndim - 1) + ((group, group),)
    instead = DROPPED + jnp.where(used, starts, 0).max(-1, keepdims=True)
    entries = jnp.where(jnp.pad(used, ends), jnp.pad(starts, ends), instead)
    size = entries.shape[-1]
    if shared:
        by_program = lambda x: jnp.broadcast_to(x[..., None], (*x.shape, together))
    else:
        by_program = lambda x: x.reshape(*x.shape[:-1], -1, together)
        entries = entries.reshape(*entries.shape[:-2], -1, together * size)
    count = together * block_count(starts.shape[-1], group)
    slots = count + count % 2 + 2  # one that makes the number even, and those that are read ahead
    lists = HEADER + slots + (0 if shared else size) * numbers(together, starts.ndim)
    groups, masked, dropped = (by_program(x) for x in (groups, masked, dropped))
    header, steps = _steps(groups, masked, dropped, lists, size, slots, tuning)
    return jnp.concatenate([header, steps, entries], -1, dtype=jnp.int32)


def _steps(
    groups: Array,
    masked: Array,
    dropped: Array,
    lists: Array,
    size: int,
    slots: int,
    tuning: TpuAttentionTuning,
) -> tuple[Array, Array]:
    """(header [..., HEADER], slots [..., slots]): the masked groups of all lists of a program, then the whole ones.

    `groups`, of those `masked`, and `dropped` are by list, [..., together], and `lists` says where their entries begin,
    `size` of each, the first and the last `group` of them dropped.
    """
    group, unroll = tuning.group, tuning.unroll
    total = lambda x: x.sum(-1, keepdims=True, dtype=jnp.int32)
    turns = total(groups - masked) // unroll
    head = total(groups) - turns * unroll
    number = numbers(groups.shape[-1], groups.ndim) << ENTRY_BITS
    begin = number + lists + group - dropped
    count = jnp.concatenate([masked, groups - masked], -1)
    base = jnp.concatenate([begin, begin + masked * group], -1)
    start = jnp.cumsum(count, -1, dtype=jnp.int32) - count
    place = (numbers(slots, groups.ndim) - head % 2)[..., None]
    here = (place >= start[..., None, :]) & (place < (start + count)[..., None, :])
    found = jnp.where(here, base[..., None, :] + (place - start[..., None, :]) * group, 0).sum(-1, dtype=jnp.int32)
    # Groups of dropped entries, of a list that is not empty: they read a tile of it.
    fill = number + lists + size - group
    fill = jnp.where(groups > 0, fill, fill[..., -1:]).min(-1, keepdims=True)
    header = jnp.concatenate([(head + head % 2) // 2, turns], -1)
    return header, jnp.where(here.any(-1), found, fill)


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
