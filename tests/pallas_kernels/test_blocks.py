"""Orders and lookups of block lists, against numpy."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import ascending, lookup, partial_first
from pallas_kernels.mosaic_tpu.attention import DROPPED, ENTRY_BITS, HEADER
from pallas_kernels.mosaic_tpu.lists import tables
from pallas_kernels.tuning import TpuAttentionTuning

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=30)  # each new shape compiles


@few
@given(seeds, st.sampled_from([1, 32, 33, 70]), st.sampled_from([1, 9]))
def test_lookup(seed: int, flags: int, entries: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random((2, 1, flags)) < 0.5
    indices = rng.integers(0, flags, (2, 3, entries)).astype(np.uint16)
    right = np.take_along_axis(np.broadcast_to(table, (2, 3, flags)), indices.astype(int), -1)
    np.testing.assert_array_equal(lookup(jnp.asarray(table), jnp.asarray(indices)), right)


@few
@given(seeds, st.sampled_from([1, 5, 12]))
def test_partial_first_keeps_what_is_in_use_and_its_order(seed: int, entries: int) -> None:
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(40)[:entries] for _ in range(6)]).astype(np.uint16)
    counts, partial = rng.integers(0, entries + 1, 6), rng.random(indices.shape) < 0.4
    got = np.asarray(partial_first(jnp.asarray(indices), jnp.asarray(counts), jnp.asarray(partial)))
    assert got.dtype == np.uint16
    for row, count, odd, out in zip(indices, counts, partial, got, strict=True):
        used, late = row[:count], ~odd[:count]
        right = np.concatenate([used[~late], used[late], row[count:]])
        np.testing.assert_array_equal(out, right)


@few
@given(seeds, st.sampled_from([1, 5, 12]))
def test_ascending_sorts_what_is_in_use_and_keeps_the_rest_behind(seed: int, entries: int) -> None:
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(12)[:entries] for _ in range(6)]).astype(np.int32)
    counts = rng.integers(0, entries + 1, 6).astype(np.int32)
    got = np.asarray(ascending(jnp.asarray(indices), jnp.asarray(counts), 12))
    for row, count, out in zip(indices, counts, got, strict=True):
        np.testing.assert_array_equal(out[:count], sorted(row[:count]))
        np.testing.assert_array_equal(out[count:], sorted(row[count:]))


@few
@given(seeds, st.sampled_from([1, 8, 9, 60]), st.booleans(), st.booleans())
def test_programs_take_every_tile_of_their_lists_once_and_whole_ones_alone_in_turns(
    seed: int, tiles: int, shared: bool, resident: bool
) -> None:
    rng, group, together, lists = np.random.default_rng(seed), 2, 3, 1 if shared else 4
    starts = 64 * np.stack([rng.permutation(100)[:tiles] for _ in range(lists)]).astype(np.int32)
    used = (rng.random((lists, tiles)) < 0.9) & (rng.random((lists, 1)) < 0.8)
    whole = rng.random((lists, tiles)) < rng.choice([0.5, 0.95, 1.0])
    tuning = TpuAttentionTuning(group=group, unroll=4)
    made = tables(*map(jnp.asarray, (starts, used, whole)), together, shared, tuning, resident)
    assert made.shape[0] == (1 if shared else 2)  # the second program has one list
    for program, table in enumerate(np.asarray(made)):
        pairs, turns = table[:HEADER]
        masked, steps = 2 * pairs, 2 * pairs + 4 * turns
        slots = table[HEADER : HEADER + steps + 2]  # and what is read ahead
        blocks, places = slots >> ENTRY_BITS, slots & ((1 << ENTRY_BITS) - 1)
        groups = table[places[:, None] + np.arange(group)]
        for block in range(together):
            row = 0 if shared else program * together + block
            mine = used[row] if row < lists else np.zeros(tiles, bool)
            of_block = groups[:steps][blocks[:steps] == block].reshape(-1)
            kept = starts[row][mine] if mine.any() else []
            assert sorted(of_block[of_block < DROPPED]) == sorted(kept)
            assert set(of_block[of_block >= DROPPED] - DROPPED) <= set(kept)
            in_turns = groups[masked:steps][blocks[masked:steps] == block].reshape(-1)
            assert set(in_turns) <= set(starts[row][mine & whole[row]] if mine.any() else [])
        assert (groups >= 0).all()
        mine = [0] * together if shared else range(program * together, min(lists, (program + 1) * together))
        lengths = [np.flatnonzero(used[row])[-1:].sum() + used[row].any() for row in mine]
        needed = [-(-length // group) for length in lengths]
        partial = [np.flatnonzero(~(used[row] & whole[row])[:n])[-1:] + 1 for row, n in zip(mine, lengths, strict=True)]
        masked = [
            -(-(n * group - length + part.sum()) // group)
            for n, length, part in zip(needed, lengths, partial, strict=True)
        ]
        assert turns == (resident and (sum(needed) - sum(masked)) // 4)
