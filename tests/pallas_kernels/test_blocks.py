"""Orders and lookups of block lists, against numpy."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import ascending, lookup, partial_first
from pallas_kernels.mosaic_tpu.attention import DROPPED, HEADER
from pallas_kernels.mosaic_tpu.lists import tile_lists
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
@given(seeds, st.sampled_from([1, 8, 9, 60]), st.booleans())
def test_lists_hold_every_tile_once_and_whole_ones_alone_in_turns(seed: int, tiles: int, resident: bool) -> None:
    rng = np.random.default_rng(seed)
    starts = 64 * rng.permutation(100)[:tiles].astype(np.int32)
    used, whole = rng.random(tiles) < 0.9, rng.random(tiles) < rng.choice([0.5, 0.95, 1.0])
    tuning = TpuAttentionTuning(group=2, unroll=4)
    table = np.asarray(tile_lists(*map(jnp.asarray, (starts, used, whole)), tuning, resident))
    (first, pairs, turns), entries = table[:HEADER], table[HEADER:]
    length = pairs * 2 * tuning.group + turns * tuning.group * tuning.unroll
    taken, rest = entries[first : first + length], np.delete(entries, slice(first, first + length))
    assert sorted(taken[taken < DROPPED]) == sorted(starts[used])
    assert (rest >= DROPPED).all()
    assert set(entries[entries >= DROPPED] - DROPPED) <= (set(starts[used]) or {0})
    assert len(entries) - first - length >= tuning.slack
    in_turns = taken[pairs * 2 * tuning.group :]
    assert set(in_turns) <= set(starts[used & whole])
    assert resident or turns == 0
    if resident and used.all() and whole.all():
        assert turns == tiles // (tuning.group * tuning.unroll)
