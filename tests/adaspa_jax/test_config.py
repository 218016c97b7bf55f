"""SparseConfig, the schedule, the budget and the shapes of the state."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaspa_jax import SparseConfig, SparseState, StepKind, TokenLayout, default_search_steps


def test_fifty_steps_are_ten_dense_one_cached_search_and_the_rest_sparse() -> None:
    kinds = SparseConfig().step_kinds()
    assert kinds.dtype == np.int32
    expected = [StepKind.DENSE] * 9 + [StepKind.FUSED_SEARCH] + [StepKind.SPARSE] * 19
    expected += [StepKind.CACHED_SEARCH] + [StepKind.SPARSE] * 20
    assert kinds.tolist() == expected


@pytest.mark.parametrize(
    ("steps", "search"), [(50, (10, 30)), (40, (8, 24)), (28, (6, 17)), (4, (1, 2)), (2, (1,)), (1, (1,))]
)
def test_the_default_searches_scale_with_the_steps(steps: int, search: tuple[int, ...]) -> None:
    assert default_search_steps(steps) == search
    assert SparseConfig(steps=steps).search == search


def test_last_steps_are_dense_again_and_no_search_means_always_dense() -> None:
    kinds = SparseConfig(steps=10, search_steps=(2, 5), dense_last_steps=3).step_kinds()
    assert kinds.tolist() == [0, 1, 3, 3, 2, 3, 3, 0, 0, 0]
    assert SparseConfig(steps=4, search_steps=()).step_kinds().tolist() == [0] * 4
    # The dense tail wins over a search that falls into it.
    assert SparseConfig(steps=4, search_steps=(1, 3), dense_last_steps=2).step_kinds().tolist() == [1, 3, 0, 0]


@pytest.mark.parametrize("kind", list(StepKind))
def test_dense_layers_are_dense_whatever_the_step(kind: StepKind) -> None:
    config = SparseConfig(dense_layers=(0, 3))
    expected = [StepKind.DENSE, kind, kind, StepKind.DENSE, kind]
    assert config.layer_kinds(jnp.int32(kind), 5).tolist() == expected
    with pytest.raises(ValueError, match=r"dense_layers=\(0, 3\) must be below the model's 3 layers"):
        config.layer_kinds(kind, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"block_size": 96}, "block_size=96"),
        ({"block_size": 0}, "block_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"search_steps": (30, 10)}, r"search_steps=\(30, 10\) must be increasing"),
        ({"search_steps": (10, 10)}, r"search_steps=\(10, 10\) must be increasing"),
        ({"search_steps": (0, 10)}, r"search_steps=\(0, 10\) must be in 1 .. steps=50"),
        ({"search_steps": (10, 51)}, r"search_steps=\(10, 51\) must be in 1 .. steps=50"),
        ({"token_order": "hilbert"}, "token_order='hilbert' must be one of raster, cube"),
        ({"dense_layers": (-1,)}, r"dense_layers=\(-1,\)"),
        ({"dense_last_steps": 51}, "dense_last_steps=51 must be in 0 .. steps=50"),
    ],
)
def test_a_config_that_cannot_work_is_a_value_error_with_the_value(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig(**changes)


def test_presets_take_changes_and_unknown_names_are_refused() -> None:
    assert SparseConfig.preset("fast", steps=20) == SparseConfig(sparsity=0.9, steps=20)
    with pytest.raises(ValueError, match="preset 'turbo' is unknown; choose one of quality, balanced, fast"):
        SparseConfig.preset("turbo")


def test_a_config_is_hashable_so_that_it_can_be_a_static_argument() -> None:
    lists = SparseConfig(search_steps=[3, 5], dense_layers=[0])  # type: ignore[arg-type]
    assert hash(lists) == hash(SparseConfig(search_steps=(3, 5), dense_layers=(0,)))


@given(st.integers(0, 99), st.integers(1, 400), st.integers(0, 5), st.booleans())
def test_the_budget_is_the_typed_sparsity_in_exact_arithmetic(
    percent: int, video: int, sinks: int, tiers: bool
) -> None:
    layout = TokenLayout.create((1, 1, 8 * video), 8 * sinks, 8)
    budget = SparseConfig(sparsity=percent / 100, block_size=8, head_adaptive=tiers).budget(layout)
    kept = Fraction(100 - percent, 100) * (video + sinks)
    least = sinks + 1
    base = max(math.ceil(kept), least)
    spread = min(round(kept / 2), base - least, video + sinks - base) if tiers else 0
    assert (budget.low, budget.base, budget.high) == (base - spread, base, base + spread)


def shapes(*args, **kwargs) -> SparseState:
    return jax.eval_shape(lambda: SparseState.create(*args, **kwargs))


def gigabytes(x: jax.ShapeDtypeStruct) -> float:
    return x.size * x.dtype.itemsize / 1e9


def test_the_state_of_hunyuan_video_at_720p_is_as_large_as_stated() -> None:
    config = SparseConfig(sparsity=0.8, block_size=128, token_order="raster")
    layout = config.layout((33, 45, 80), text=256)
    assert layout.video_tokens == 118_800
    state = shapes(layout, config, batch=1, heads=24, layers=60)
    assert state.indices.shape == (60, 1, 24, 929, 187 + 93)
    assert state.indices.dtype == jnp.uint16
    assert state.counts.shape == (60, 1, 24, 929)
    assert state.counts.dtype == jnp.int32
    assert state.lse.shape == (60, 1, 24, (929 + 2) * 128)
    assert state.lse.dtype == jnp.float32
    assert gigabytes(state.indices) == pytest.approx(0.75, abs=0.005)
    assert gigabytes(state.lse) == pytest.approx(0.69, abs=0.005)
    assert sum(gigabytes(x) for x in state) < gigabytes(state.indices) + gigabytes(state.lse) + 0.01
    finer = SparseConfig(sparsity=0.8, block_size=64, token_order="raster")
    small = shapes(finer.layout((33, 45, 80), text=256), finer, batch=1, heads=24, layers=60)
    assert gigabytes(small.indices) == pytest.approx(4 * gigabytes(state.indices), rel=0.01)


@pytest.mark.parametrize(("blocks", "dtype"), [(65_535, jnp.uint16), (65_536, jnp.uint32)])
def test_indices_widen_past_65535_blocks(blocks: int, dtype) -> None:
    config = SparseConfig(sparsity=0.9, block_size=1)
    layout = config.layout((1, 1, blocks))
    assert shapes(layout, config, batch=1, heads=1).indices.dtype == dtype


@pytest.mark.parametrize("row_wise", [True, False])
def test_mass_is_stored_only_when_asked_for(row_wise: bool) -> None:
    config = SparseConfig(sparsity=0.5, block_size=8, row_wise=row_wise)
    layout = config.layout((2, 4, 8), text=8)  # 8 video blocks and 1 of text
    assert shapes(layout, config, 2, 3).mass.shape == (2, 3, 0, 0)
    assert shapes(layout, config, 2, 3, keep_mass=True).mass.shape == (2, 3, 8, 9)
    assert shapes(layout, config, 2, 3, layers=4, keep_mass=True).mass.shape == (4, 2, 3, 8, 9)
    # A global budget may spend a whole row on one query block.
    assert shapes(layout, config, 2, 3).indices.shape == (2, 3, 8, 7 if row_wise else 9)
