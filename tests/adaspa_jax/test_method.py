"""The method against adaspa.md: layout, selection, schedule, the attention call and the scan."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaspa_jax import (
    SparseConfig,
    SparseState,
    StepKind,
    TokenLayout,
    adaspa_attention,
    denoise,
    head_tiers,
    select_blocks,
)
from adaspa_jax.layout import best_cube
from tests.foreign_dit import HEADS, Euler, ForeignDit
from tests.matrix import in_matrix

SIDES = st.integers(1, 9)
LAYOUTS = st.builds(
    lambda grid, text, block, order, parts: TokenLayout.create(grid, text, block, order, block * parts),
    st.tuples(SIDES, SIDES, SIDES),
    st.integers(0, 40),
    st.sampled_from([1, 4, 16, 32]),
    st.sampled_from(["raster", "cube"]),
    st.sampled_from([1, 1, 2, 4]),
)


@given(LAYOUTS)
@settings(max_examples=60)
def test_packing_puts_every_token_in_one_place(layout: TokenLayout) -> None:
    tokens = np.arange(layout.video_tokens)[None, :, None]
    packed = np.asarray(layout.pack_video(jnp.asarray(tokens)))
    np.testing.assert_array_equal(layout.unpack_video(jnp.asarray(packed)), tokens)
    valid = (np.arange(layout.block) < layout.video_valid[:, None]).reshape(-1)
    assert sorted(packed[0, valid, 0]) == list(range(layout.video_tokens))
    by_query_block = valid.reshape(layout.query_blocks, layout.query_block)
    assert (np.diff(by_query_block.astype(int), axis=1) <= 0).all()  # what is real comes first
    assert by_query_block.any(1).all()


def test_the_blocks_of_a_query_block_are_cubes_side_by_side() -> None:
    layout = TokenLayout.create((8, 8, 8), 0, 64, "cube", 128)
    assert (layout.query_blocks, layout.video_blocks) == (4, 8)
    frames, rows, columns = np.unravel_index(np.asarray(layout.pack_video(jnp.arange(512)[None]))[0], layout.grid)
    for block in range(layout.video_blocks):
        inside = slice(64 * block, 64 * block + 64)
        assert [int(np.ptp(x[inside])) for x in (frames, rows, columns)] == [3, 3, 3]


def test_only_the_last_block_of_a_clip_is_padded() -> None:
    """720p x 129 frames: cubes of 4 x 4 x 4, the last frame's squares and the last row's, 16 tokens over."""
    layout = TokenLayout.create((33, 45, 80), 256, 64, "cube")
    assert layout.video_blocks == 1857
    assert layout.video_valid.tolist() == [64] * 1856 + [16]
    places = np.asarray(layout.pack_video(jnp.arange(layout.video_tokens)[None]))[0].reshape(-1, 64)
    extents = [tuple(int(np.ptp(x)) + 1 for x in np.unravel_index(block, layout.grid)) for block in places]
    shapes = {shape: extents.count(shape) for shape in set(extents)}
    assert shapes == {(4, 4, 4): 1760, (1, 8, 8): 50, (1, 4, 16): 5, (1, 1, 64): 1, (8, 1, 8): 40, (1, 1, 16): 1}


def test_what_no_cube_fits_in_is_cut_by_halves() -> None:
    layout = TokenLayout.create((3, 3, 3), 0, 16, "cube")
    places = np.asarray(layout.pack_video(jnp.arange(27)[None]))[0]
    assert best_cube((3, 3, 3), 16) is None
    frames, rows, columns = np.unravel_index(places[:8], (3, 3, 3))  # the first piece is a cube of half a block
    assert [int(np.ptp(x)) for x in (frames, rows, columns)] == [1, 1, 1]
    assert layout.video_valid.tolist() == [16, 11]


@pytest.mark.parametrize("changes", [{"query_block_size": 32}, {"query_block_size": 96}, {"query_block_size": 1.5}])
def test_query_blocks_are_whole_powers_of_two_of_blocks(changes: dict) -> None:
    with pytest.raises(ValueError, match="query_block_size"):
        SparseConfig(block_size=64, **changes)


@given(LAYOUTS, st.integers(0, 50))
@settings(max_examples=40)
def test_valid_counts_add_up_to_the_tokens(layout: TokenLayout, text: int) -> None:
    valid = layout.block_valid(jnp.array([text]), 1)
    assert valid.shape == (1, layout.num_blocks)
    assert int(valid.sum()) == layout.video_tokens + min(text, layout.text)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 0.99), st.integers(1, 400), st.integers(0, 300))
@settings(max_examples=100)
def test_the_budget_is_conserved_for_any_recalls(recalls: list, sparsity: float, tokens: int, text: int) -> None:
    config = SparseConfig.paper(sparsity=sparsity, block_size=16)
    layout = config.layout((1, 1, tokens), text)
    budget = config.budget(layout)
    tiers = head_tiers(jnp.array(recalls, jnp.float32), budget, config.recall_threshold)
    assert int(tiers.sum()) == len(recalls) * budget.base
    assert budget.low + budget.high == 2 * budget.base
    assert min(layout.text_blocks + 1, layout.num_blocks) <= budget.low <= budget.high <= layout.num_blocks


def mass_of(layout: TokenLayout, heads: int, seed: int = 0, sharpness: float = 3.0) -> jax.Array:
    """Random block mass, some heads much more concentrated than others."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((2, heads, layout.video_blocks, layout.num_blocks))
    weights = np.exp(logits * np.linspace(0.1, sharpness, heads)[:, None, None])
    return jnp.asarray(layout.block * weights / weights.sum(-1, keepdims=True), jnp.float32)


def numpy_selection(mass: np.ndarray, layout: TokenLayout, config: SparseConfig) -> list[list[list[set[int]]]]:
    """Selection as adaspa.md words it, in loops."""
    total, sinks = layout.num_blocks, list(range(layout.video_blocks, layout.num_blocks))
    k = max(int(np.ceil(round((1 - config.sparsity) * total, 6))), len(sinks) + 1)
    d = min(round((1 - config.sparsity) * total / 2), k - len(sinks) - 1, total - k)
    chosen = []
    for sample in mass:
        ranked = [
            [sinks + sorted(range(layout.video_blocks), key=lambda j: (-row[j], j)) for row in head] for head in sample
        ]
        recall = [
            sum(row[order[:k]].sum() for row, order in zip(head, orders, strict=True)) / head.sum()
            for head, orders in zip(sample, ranked, strict=True)
        ]
        easy = min(sum(r > config.recall_threshold for r in recall), len(recall) // 2)
        by_recall = sorted(range(len(recall)), key=lambda h: (-recall[h], h))
        counts = [k] * len(recall)
        for head in by_recall[:easy]:
            counts[head] = k - d
        for head in by_recall[len(recall) - easy :]:
            counts[head] = k + d
        chosen.append([[set(order[:c]) for order in orders] for orders, c in zip(ranked, counts, strict=True)])
    return chosen


@pytest.mark.parametrize("text", [0, 20])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_selection_is_that_of_the_paper(text: int, sparsity: float) -> None:
    config = SparseConfig.paper(sparsity=sparsity, block_size=16, token_order="cube")
    layout = config.layout((4, 8, 9), text)
    mass = mass_of(layout, 6, sharpness=6.0)
    found = select_blocks(mass, layout, config)
    expected = numpy_selection(np.asarray(mass, np.float64), layout, config)
    for spot in np.ndindex(*found.counts.shape):
        got = set(np.asarray(found.indices[spot])[: int(found.counts[spot])].tolist())
        assert got == expected[spot[0]][spot[1]][spot[2]]
    assert len(set(found.counts[:, :, 0].ravel().tolist())) >= 2  # heads differ
    assert float(found.counts.mean()) == config.budget(layout).base
    again = jax.jit(lambda m: select_blocks(m, layout, config))(mass)
    for a, b in zip(found[:2], again[:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_permuting_heads_permutes_the_selection() -> None:
    config = SparseConfig(block_size=16, head_adaptive=True)
    layout = config.layout((4, 8, 9), 20)
    mass, order = mass_of(layout, 6), jnp.array([3, 0, 5, 1, 4, 2])
    plain, moved = select_blocks(mass, layout, config), select_blocks(mass[:, order], layout, config)
    np.testing.assert_array_equal(plain.indices[:, order], moved.indices)
    np.testing.assert_array_equal(plain.counts[:, order], moved.counts)


def test_ties_go_to_the_lower_block_and_a_global_budget_keeps_its_total() -> None:
    config = SparseConfig.paper(block_size=16)
    layout = config.layout((4, 8, 9))
    flat = select_blocks(jnp.ones((1, 2, layout.video_blocks, layout.num_blocks)), layout, config)
    np.testing.assert_array_equal(flat.indices[0, 0, 3], np.arange(flat.indices.shape[-1]))
    spread = SparseConfig.paper(block_size=16, row_wise=False, head_adaptive=False)
    found = select_blocks(mass_of(layout, 3), layout, spread)
    np.testing.assert_array_equal(found.counts.sum(-1), spread.budget(layout).base * layout.video_blocks)
    assert found.counts.min() >= 1
    assert len(set(found.counts.ravel().tolist())) > 1


def test_fifty_steps_have_the_kinds_of_the_paper() -> None:
    kinds = SparseConfig.paper().step_kinds()
    assert set(np.flatnonzero(kinds == StepKind.DENSE) + 1) == set(range(1, 10))
    assert list(np.flatnonzero(kinds == StepKind.FUSED_SEARCH) + 1) == [10]
    assert list(np.flatnonzero(kinds == StepKind.CACHED_SEARCH) + 1) == [30]
    assert (kinds == StepKind.SPARSE).sum() == 39
    assert SparseConfig.paper(20).search == (4, 12)
    few = {1: (1,), 2: (2,), 4: (2,), 5: (2, 3), 6: (2, 4), 8: (2, 5)}
    assert {steps: SparseConfig.paper(steps).search for steps in few} == few


def test_one_early_search_is_the_default() -> None:
    searches = {1: (1,), 2: (2,), 8: (2,), 25: (3,), 40: (5,), 50: (6,)}
    assert {steps: SparseConfig(steps=steps).search for steps in searches} == searches
    kinds = SparseConfig().step_kinds().tolist()
    assert kinds == [StepKind.DENSE] * 5 + [StepKind.FUSED_SEARCH] + [StepKind.SPARSE] * 44
    assert list(SparseConfig(steps=6, dense_last_steps=2).step_kinds()[-2:]) == [StepKind.DENSE] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"block_size": 48}, "block_size=48"),
        ({"steps": 0}, "steps=0"),
        ({"search_steps": (10, 60)}, r"\(10, 60\) must be in 1 .. steps=50"),
        ({"search_steps": (30, 10)}, "increasing"),
        ({"token_order": "z"}, "token_order='z'"),
        ({"score_precision": "int4"}, "score_precision='int4' must be one of input, int8, fp8, auto"),
        ({"dense_layers": (-1,)}, "dense_layers"),
        ({"dense_last_steps": 51}, "dense_last_steps=51"),
    ],
)
def test_bad_configurations_name_the_value(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig(**options)


def test_full_scale_state_has_the_size_of_the_reference() -> None:
    config = SparseConfig(sparsity=0.8, block_size=128, token_order="raster")
    layout = config.layout((33, 45, 80), 256)
    state = jax.eval_shape(lambda: SparseState.create(layout, config, 1, 24, layers=60))
    size = lambda x: x.size * x.dtype.itemsize / 1e9
    assert state.indices.dtype == jnp.uint16
    assert size(state.indices) == pytest.approx(0.5, rel=0.02)
    tiers = dataclasses.replace(config, head_adaptive=True)
    wider = jax.eval_shape(lambda: SparseState.create(layout, tiers, 1, 24, layers=60))
    assert size(wider.indices) == pytest.approx(0.75, rel=0.02)
    assert size(state.lse) == pytest.approx(0.69, rel=0.02)
    huge = TokenLayout.create((64, 64, 64), 0, 1)
    assert (
        jax.eval_shape(lambda: SparseState.create(huge, SparseConfig.paper(block_size=1), 1, 1)).indices.dtype
        == jnp.uint32
    )


def call_of(order: str, text: int, sparsity: float = 0.7, heads: int = 4, rows: int = 16):
    """(config, layout, q, k, v, block_valid, state) of one call; query blocks of `rows`."""
    config = SparseConfig.paper(sparsity=sparsity, block_size=16, query_block_size=rows, token_order=order)
    layout = config.layout((5, 6, 9), text)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, layout.length, heads, 32)) * 1.5, jnp.float32) for _ in range(3))
    valid = layout.block_valid(jnp.array([text, text // 3]), 2)
    return config, layout, q, k, v, valid, SparseState.create(layout, config, 2, heads)


def test_one_search_compiles_no_later_one() -> None:
    _, layout, q, k, v, valid, _ = call_of("raster", 20)

    def run(config: SparseConfig) -> Any:
        state = SparseState.create(layout, config, 2, 4)
        return lambda kind: adaspa_attention(q, k, v, state, kind, layout=layout, config=config, block_valid=valid)[0]

    for searches, branches in (((2,), 3), ((2, 5), 4)):
        config = SparseConfig(block_size=layout.block, search_steps=searches, token_order="raster", steps=9)
        switch = [e for e in jax.make_jaxpr(run(config))(jnp.int32(0)).eqns if e.primitive.name == "cond"]
        assert [len(e.params["branches"]) for e in switch] == [branches]
    once = run(dataclasses.replace(config, search_steps=(2,)))
    np.testing.assert_array_equal(*(once(jnp.int32(kind)) for kind in (StepKind.CACHED_SEARCH, StepKind.FUSED_SEARCH)))


@pytest.mark.parametrize(("order", "text"), [("raster", 0), ("cube", 20), *in_matrix(("raster", 20), ("cube", 0))])
def test_paper_check_cached_search_selects_what_fused_search_selects(order: str, text: int) -> None:
    config, layout, q, k, v, valid, state = call_of(order, text)
    run = jax.jit(
        lambda q, state, kind: adaspa_attention(q, k, v, state, kind, layout=layout, config=config, block_valid=valid)
    )
    keep = state._replace(mass=jnp.zeros((2, 4, layout.video_blocks, layout.num_blocks)))
    dense, untouched = run(q, keep, jnp.int32(StepKind.DENSE))
    fused, found = run(q, keep, jnp.int32(StepKind.FUSED_SEARCH))
    cached, again = run(q, found, jnp.int32(StepKind.CACHED_SEARCH))
    sparse, same = run(q, found, jnp.int32(StepKind.SPARSE))
    np.testing.assert_array_equal(fused, dense)
    np.testing.assert_array_equal(found.indices, again.indices)
    np.testing.assert_array_equal(found.counts, again.counts)
    np.testing.assert_allclose(found.mass, again.mass, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sparse, cached)
    assert float(again.drift.max()) < 1e-5
    assert int(untouched.counts.sum()) == 0
    np.testing.assert_array_equal(same.lse, found.lse)
    static, _ = adaspa_attention(q, k, v, found, StepKind.SPARSE, layout=layout, config=config, block_valid=valid)
    np.testing.assert_allclose(static, sparse, atol=2e-6)
    # Only real text counts: another value in the padding changes nothing that is read.
    if text:
        other = v.at[1, layout.video_length + text // 3 :].set(100.0)
        changed, _ = adaspa_attention(
            q, k, other, found, StepKind.SPARSE, layout=layout, config=config, block_valid=valid
        )
        np.testing.assert_allclose(changed, static, atol=2e-6)


def test_cached_lse_plus_log_sum_is_the_exact_new_lse() -> None:
    config, layout, q, k, v, valid, state = call_of("cube", 20)
    call = lambda q, s, kind: adaspa_attention(q, k, v, s, kind, layout=layout, config=config, block_valid=valid)[1]
    old = call(q, state, StepKind.FUSED_SEARCH)
    moved = q + 0.1 * jnp.roll(q, 1, axis=1)
    new, exact = call(moved, old, StepKind.CACHED_SEARCH), call(moved, state, StepKind.FUSED_SEARCH)
    assert new is not None
    np.testing.assert_allclose(new.lse, exact.lse, atol=1e-5)
    real = (np.arange(layout.block) < layout.video_valid[:, None]).reshape(-1)
    change = jnp.abs(exact.lse - old.lse)[:, :, : layout.video_length][:, :, real].mean(-1)
    np.testing.assert_allclose(new.drift, change, rtol=1e-4)


@pytest.mark.parametrize("order", ["raster", "cube"])
def test_rows_of_a_query_block_share_a_list(order: str) -> None:
    config, layout, q, k, v, valid, state = call_of(order, 20, rows=64)
    call = lambda s, kind: adaspa_attention(q, k, v, s, kind, layout=layout, config=config, block_valid=valid)
    found = call(state, StepKind.FUSED_SEARCH)[1]
    assert found is not None
    assert found.indices.shape[2] == layout.query_blocks == layout.video_length // 64
    video, keys = layout.video_length, np.arange(layout.length)
    kept = np.zeros((2, 4, layout.query_blocks, layout.num_blocks), bool)
    for spot in np.ndindex(*found.counts.shape):
        kept[(*spot, np.asarray(found.indices[spot])[: int(found.counts[spot])])] = True
    real = keys % 16 < np.asarray(valid)[:, keys // 16]
    mask = kept.repeat(64, 2).repeat(16, 3) & real[:, None, None]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q[:, :video], k) * 32**-0.5
    p = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bhqk,bkhd->bqhd", p, v)
    got = call(found, StepKind.SPARSE)[0][:, :video]
    np.testing.assert_allclose(got[:, real[0, :video]], expected[:, real[0, :video]], atol=1e-5)


@pytest.mark.parametrize(("order", "rows"), [("raster", 16), ("cube", 16), ("cube", 32)])
def test_sparsity_0_is_dense_in_every_kind(order: str, rows: int) -> None:
    config, layout, q, k, v, valid, state = call_of(order, 20, sparsity=0.0, rows=rows)
    call = lambda s, kind: adaspa_attention(q, k, v, s, kind, layout=layout, config=config, block_valid=valid)
    dense, found = call(state, StepKind.FUSED_SEARCH)
    for kind in (StepKind.CACHED_SEARCH, StepKind.SPARSE):
        np.testing.assert_allclose(call(found, kind)[0], dense, atol=6e-6)


def test_misfits_are_value_errors() -> None:
    config, layout, q, k, v, valid, state = call_of("cube", 20)
    call = lambda q=q, state=state, kind=StepKind.DENSE, **kw: adaspa_attention(
        q, k, v, state, kind, **({"layout": layout, "config": config} | kw)
    )
    with pytest.raises(ValueError, match="L = "):
        call(q=q[:, :-1])
    with pytest.raises(ValueError, match="needs a state"):
        call(state=None, kind=StepKind.SPARSE)
    with pytest.raises(ValueError, match=r"state.indices must be uint16"):
        call(state=state._replace(indices=state.indices[..., :1]))
    with pytest.raises(ValueError, match="block_valid must be"):
        call(block_valid=valid[:, :-1])
    with pytest.raises(ValueError, match=r"^block_size=32 of the config"):
        call(config=SparseConfig(block_size=32))
    with pytest.raises(ValueError, match="query_block_size=64 of the config"):
        call(config=SparseConfig(block_size=16, query_block_size=64))


@pytest.mark.parametrize(("sparsity", "dense_layers"), [(0.6, ()), (0.0, ()), (0.6, (0, 1)), *in_matrix((0.0, (0, 1)))])
def test_a_foreign_dit_plugs_in(sparsity: float, dense_layers: tuple) -> None:
    """Two layers of a DiT of its own, scanned, the state through xs and ys; the sampler is traced once."""
    config = SparseConfig(sparsity=sparsity, block_size=16, steps=6, dense_layers=dense_layers)
    layout = config.layout((4, 6, 5))
    dit, steps = ForeignDit(config, layout), []
    sample = jax.jit(functools.partial(dit.sample, progress=lambda step: steps.append(int(step))))
    state = SparseState.create(layout, config, 1, HEADS, layers=2)
    latents, found, history = sample(dit.noise, state)
    sample(dit.noise + 1, state)[0].block_until_ready()
    jax.effects_barrier()
    assert dit.traces <= 2  # one trace of the scan body, and one to find its carry
    assert sorted(steps) == sorted([*range(1, 7)] * 2)
    assert history.recall.shape == (6, 2, 1, HEADS)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, state)
    dense = jax.jit(lambda x: dit.sample(x, None))(dit.noise)[0]
    if dense_layers or not sparsity:
        np.testing.assert_allclose(latents, dense, atol=1e-5)
    else:
        assert jnp.abs(latents - dense).max() > 1e-3
    with pytest.raises(ValueError, match="3 entries for steps=6"):
        denoise(dit.predict, Euler(), {"dt": np.zeros(3)}, dit.noise, state, config)
