"""Stand-ins of dropped blocks: exact where they must be, calibrated to what was measured, better than nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaspa_jax import SparseConfig, SparseState, StepKind, TokenLayout, adaspa_attention
from adaspa_jax.compensation import StandIns, calibrate, fit, pool, pooled_mass, strength, towards
from pallas_kernels import (
    block_sparse_attention,
    flash_attention,
    merge_attention,
    pack_bits,
    pooled_attention,
    reference,
    unpack_bits,
)

CONFIG = SparseConfig(sparsity=0.7, block_size=16, compensation="pooled", search_steps=(6, 30))
LAYOUT = CONFIG.layout((5, 6, 9), 20)
VALID = LAYOUT.block_valid(jnp.array([20, 7]), 2)
REAL = np.concatenate(
    [(np.arange(16) < LAYOUT.video_valid[:, None]).reshape(-1), np.zeros(LAYOUT.text_length, bool)]
)  # video rows


def tokens(smooth: float) -> tuple[jax.Array, ...]:
    """q, k, v [2, L, 4, 32]; keys and values of a block share the part `smooth` of their variance."""
    rng = np.random.default_rng(0)
    made = [rng.standard_normal((2, LAYOUT.num_blocks, 16, 4, 32)) for _ in range(3)]
    shared = [0, *[rng.standard_normal((2, LAYOUT.num_blocks, 1, 4, 32)) for _ in range(2)]]
    mixed = [x if i == 0 else smooth**0.5 * shared[i] + (1 - smooth) ** 0.5 * x for i, x in enumerate(made)]
    return tuple(jnp.asarray(x.reshape(2, LAYOUT.length, 4, 32), jnp.float32) for x in mixed)


@functools.partial(jax.jit, static_argnums=1)
def step(qkv: tuple[jax.Array, ...], config: SparseConfig, kind: jax.Array, state: Any, valid: jax.Array) -> Any:
    return adaspa_attention(*qkv, state, kind, layout=LAYOUT, config=config, block_valid=valid)


def run(
    qkv: tuple[jax.Array, ...], config: SparseConfig, kind: StepKind, state: Any = None, valid: jax.Array = VALID
) -> Any:
    state = SparseState.create(LAYOUT, config, 2, 4) if state is None else state
    return step(qkv, config, jnp.int32(kind), state, valid)


def error(got: jax.Array, expected: jax.Array) -> float:
    return float(jnp.sqrt(jnp.square(got - expected)[:, REAL].mean()))


def test_sparsity_0_is_dense() -> None:
    qkv, config = tokens(0.5), dataclasses.replace(CONFIG, sparsity=0.0)
    dense, found = run(qkv, config, StepKind.FUSED_SEARCH)
    assert not found.row_bias.any()
    assert not found.col_bias.any()
    for kind in (StepKind.CACHED_SEARCH, StepKind.SPARSE):
        np.testing.assert_allclose(run(qkv, config, kind, found)[0], dense, atol=3e-6)


@pytest.mark.parametrize("smooth", [0.3, 0.9])
def test_calibrated_stand_ins_are_better_than_plain_ones_and_those_than_none(smooth: float) -> None:
    qkv, without = tokens(smooth), dataclasses.replace(CONFIG, compensation="none")
    dense, found = run(qkv, CONFIG, StepKind.FUSED_SEARCH)
    plain = found._replace(row_bias=jnp.zeros_like(found.row_bias), col_bias=jnp.zeros_like(found.col_bias))
    errors = [
        error(run(qkv, without, StepKind.SPARSE, run(qkv, without, StepKind.FUSED_SEARCH)[1])[0], dense),
        error(run(qkv, CONFIG, StepKind.SPARSE, plain)[0], dense),
        error(run(qkv, CONFIG, StepKind.SPARSE, found)[0], dense),
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * errors[0]
    # What is kept and what stands for the rest make up the whole.
    np.testing.assert_allclose(found.recall + found.stand_ins, 1, atol=0.02)
    cached, again = run(qkv, CONFIG, StepKind.CACHED_SEARCH, found)
    np.testing.assert_array_equal(again.kept, found.kept)
    np.testing.assert_allclose(again.row_bias, found.row_bias, atol=1e-4)
    np.testing.assert_allclose(again.col_bias, found.col_bias, atol=1e-4)
    assert error(cached, dense) == pytest.approx(errors[2], rel=1e-3)


def test_a_search_finds_how_far_to_go() -> None:
    """Between the kept blocks alone and with stand-ins, as near to dense attention as a number a head gets."""
    _, k, _ = tokens(0.3)
    qkv = 4 * k, k, k  # what a row looks for is what it finds, in the dropped blocks too
    dense, found = run(qkv, CONFIG, StepKind.FUSED_SEARCH)
    at = lambda share: run(qkv, CONFIG, StepKind.SPARSE, found._replace(strength=share))[0]
    ends = [at(jnp.full_like(found.strength, share)) for share in (0.0, 1.0)]
    assert error(at(found.strength), dense) < 0.95 * min(error(end, dense) for end in ends)
    kept, both = (np.asarray(end, np.float64)[:, REAL] for end in ends)
    change, missing = both - kept, np.asarray(dense, np.float64)[:, REAL] - kept
    best = (change * missing).sum((1, 3)) / np.square(change).sum((1, 3))
    np.testing.assert_allclose(found.strength, np.clip(best, 0, 1), atol=1e-4)
    # A cached search has dense attention of some rows only: every sixteenth of each block.
    sampled = run(qkv, CONFIG, StepKind.CACHED_SEARCH, found)[1].strength
    first = np.zeros(LAYOUT.length, bool)
    first[: LAYOUT.video_length : 16] = REAL[: LAYOUT.video_length : 16]
    some = first[REAL]
    best = (change * missing)[:, some].sum((1, 3)) / np.square(change)[:, some].sum((1, 3))
    np.testing.assert_allclose(sampled, np.clip(best, 0, 1), atol=1e-3)


def test_where_stand_ins_mislead_they_are_left_out() -> None:
    """The wrong way: 0. Too far: back. Rows that are not inside, which may hold NaN, say nothing."""
    exact, kept = jnp.ones((1, 2, 8, 4)), jnp.ones((1, 2, 8, 4))
    inside = jnp.ones((1, 8), bool).at[0, 6:].set(False)
    worse = kept.at[:, 0].set(0.5).at[:, :, 6:].set(jnp.nan)
    np.testing.assert_array_equal(strength(exact, kept, worse, inside), 0)
    np.testing.assert_allclose(strength(2 * exact, kept, kept.at[:, 0].set(4.0), inside), [[1 / 3, 0]], rtol=1e-6)
    np.testing.assert_allclose(towards(kept, jnp.full_like(kept, 3.0), jnp.array([[0.0, 0.5]]))[0, :, 0, 0], [1, 2])


def test_the_bits_are_those_of_the_lists() -> None:
    found = run(tokens(0.5), CONFIG, StepKind.FUSED_SEARCH)[1]
    kept = np.asarray(unpack_bits(found.kept, LAYOUT.num_blocks))
    for spot in np.ndindex(*found.counts.shape):
        assert set(np.flatnonzero(kept[spot])) == set(np.asarray(found.indices[spot])[: found.counts[spot]].tolist())


def test_the_conditional_branch_calibrates_for_both() -> None:
    qkv, shared = tokens(0.5), dataclasses.replace(CONFIG, share_cfg_indices=True)
    alike = tuple(jnp.concatenate([x[1:], x[1:]]) for x in qkv)
    both = jnp.concatenate([VALID[1:], VALID[1:]])
    outs = []
    for config in (CONFIG, shared):
        state = run(alike, config, StepKind.FUSED_SEARCH, valid=both)[1]
        outs.append(run(alike, config, StepKind.SPARSE, state, valid=both)[0])
    np.testing.assert_allclose(*outs, atol=2e-6)


def test_nothing_but_sinks_is_attention_over_pooled_keys() -> None:
    (q, k, v), video, nk = tokens(0.3), LAYOUT.video_blocks, LAYOUT.num_blocks
    state = SparseState.create(LAYOUT, CONFIG, 2, 4)
    sinks = jnp.arange(video, nk, dtype=state.indices.dtype)
    kept = pack_bits(jnp.broadcast_to(jnp.arange(nk) >= video, (2, 4, video, nk)))
    state = state._replace(
        indices=state.indices.at[..., : nk - video].set(sinks),
        counts=jnp.full_like(state.counts, nk - video),
        kept=kept,
        strength=jnp.ones_like(state.strength),
    )
    got = run((q, k, v), CONFIG, StepKind.SPARSE, state)[0]
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    pooled = pool(k, v, VALID)
    joined = lambda means, x: jnp.concatenate([means[:, :, :video], x[:, :, LAYOUT.video_length :]], axis=2)
    inside = jnp.arange(16)[None, None] < VALID[:, video:, None]
    bias = jnp.concatenate([pooled.log_count[:, :video], jnp.where(inside, 0, -jnp.inf).reshape(2, -1)], axis=1)
    scores = reference.scores(q.swapaxes(1, 2), joined(pooled.k, k), 32**-0.5) + bias[:, None, None]
    expected = jnp.einsum("bhqk,bhkd->bqhd", jax.nn.softmax(scores, -1), joined(pooled.v, v))
    np.testing.assert_allclose(got[:, REAL], expected[:, REAL], atol=3e-6)


@jax.jit
def kept_and_rest(q: Any, k: Any, v: Any, valid: Any, chosen: Any) -> Any:
    """(out, LSE) of kept blocks and stand-ins, and of dense attention; blocks of 4 by 4."""
    order, counts = jnp.argsort(~chosen, axis=-1), chosen.sum(-1, dtype=jnp.int32)
    how: dict[str, Any] = {"return_lse": True, "implementation": "reference"}
    kept = block_sparse_attention(q, k, v, order, counts, block_q=4, block_k=4, block_valid=valid, **how)
    pooled = pool(k, v, valid)
    bias = jnp.broadcast_to(pooled.log_count[:, None], pooled.k.shape[:3])
    rest = pooled_attention(q, pooled.k, pooled.v, bias, pack_bits(chosen), block_q=4, **how)
    return merge_attention(kept, rest), flash_attention(q, k, v, block_valid=valid, **how)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.booleans())
@settings(max_examples=25)
def test_blocks_of_equal_keys_lose_nothing(seed: int, density: float, ragged: bool) -> None:
    """Then out and LSE of kept blocks and stand-ins are those of dense attention, whatever is kept."""
    rng, nk, block = np.random.default_rng(seed), 40, 4
    q = jnp.asarray(rng.standard_normal((1, 2, 16, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((1, 2, nk, 8)).repeat(block, 2), jnp.float32) for _ in range(2))
    valid = jnp.asarray(rng.integers(0 if ragged else block, block + 1, (1, nk)), jnp.int32)
    (out, lse), (expected, exact) = kept_and_rest(q, k, v, valid, jnp.asarray(rng.random((1, 2, 4, nk)) < density))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, exact, atol=2e-6)


def test_rows_that_see_nothing_merge_to_nothing() -> None:
    out, lse = merge_attention(*[(jnp.zeros((3, 4)), jnp.full(3, -jnp.inf))] * 2)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@given(st.integers(0, 2**32 - 1), st.floats(0.6, 1))
@settings(max_examples=20)
def test_a_row_and_column_factor_is_recovered(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    row, col = (jnp.asarray(rng.normal(0, 0.7, n), jnp.float32) for n in (20, 30))
    pooled = jnp.asarray(rng.uniform(0.5, 2.0, (20, 30)), jnp.float32)
    dropped = np.asarray(rng.random((20, 30)) < share)
    dropped[0], dropped[:, 0] = False, False
    found = jax.jit(fit)(pooled * jnp.exp(row[:, None] + col[None]), pooled, jnp.asarray(dropped))
    assert float(found[0][0]) == float(found[1][0]) == 0  # nothing dropped
    total = np.asarray(found[0][:, None] + found[1][None])
    np.testing.assert_allclose(total[dropped], np.asarray(row[:, None] + col[None])[dropped], atol=0.02)


def test_stand_ins_without_mass_have_no_calibration() -> None:
    """Rows and keys that do not exist, a row of LSE -inf: zeros, never NaN."""
    q, k, v = (x.swapaxes(1, 2)[:, :, :64] for x in tokens(0.5))
    valid, lse = jnp.array([[16, 0, 3, 16], [0, 0, 0, 0]]), jnp.zeros((2, 4, 64)).at[0, :, 5].set(-jnp.inf)
    none = jnp.zeros((2, 4, 4, 1), jnp.uint32)
    mass = jnp.zeros((2, 4, 4, 4)).at[0, :, 0, 0].set(2.0)
    made, share = jax.jit(lambda *x: calibrate(x[0], pool(*x[1:4]), *x[4:]))(q, k, v, valid, lse, mass, none, valid)
    assert all(bool(jnp.isfinite(x).all()) for x in (made.row_bias, made.col_bias, share))
    assert float(made.row_bias[0, 0, 0]) != 0
    np.testing.assert_array_equal(made.row_bias[:, :, 1:], 0)


def test_pooled_mass_is_that_of_the_oracle() -> None:
    q, k, v = (x.swapaxes(1, 2) for x in tokens(0.5))
    video = q[:, :, : LAYOUT.video_length]
    lse, pooled = flash_attention(video, k, v, block_valid=VALID, return_lse=True)[1], pool(k, v, VALID)
    got = pooled_mass(video[1, 2], pooled.k[1, 2], pooled.log_count[1], lse[1, 2], VALID[1, : LAYOUT.video_blocks])
    scores = reference.scores(video, pooled.k, 32**-0.5)[1, 2] + pooled.log_count[1][None]
    p = jnp.where(REAL[: LAYOUT.video_length, None], jnp.exp(scores - lse[1, 2][:, None]), 0)
    np.testing.assert_allclose(got, p.reshape(LAYOUT.video_blocks, 16, -1).sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "mean"}, "compensation='mean' must be one of none, pooled"),
        ({"compensation": "pooled", "row_wise": False}, "set row_wise=True, or compensation='none'"),
        ({"compensation": "pooled", "block_size": 8}, "block_size=8 to be at least 16"),
    ],
)
def test_what_cannot_be_compensated_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig(**options)


def test_the_state_of_another_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state.row_bias must be float32\[2, 4, 0\]"):
        run(
            tokens(0.5),
            dataclasses.replace(CONFIG, compensation="none"),
            StepKind.SPARSE,
            SparseState.create(LAYOUT, CONFIG, 2, 4),
        )


def test_the_paper_to_the_letter() -> None:
    config = SparseConfig.paper()
    assert (config.token_order, config.block_size, config.search, config.steps) == ("raster", 64, (10, 30), 50)
    assert (config.head_adaptive, config.row_wise, config.lse_cache, config.compensation) == (True, True, True, "none")
    assert SparseConfig.paper(sparsity=0.9) == dataclasses.replace(config, sparsity=0.9)
    assert isinstance(SparseConfig.paper().layout((2, 3, 4)), TokenLayout)
    assert StandIns._fields == SparseState._fields[6:10]
