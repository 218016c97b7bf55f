"""Selection against plain loops, and what must hold for any mass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaspa_jax import Budget, SparseConfig, TokenLayout, head_tiers, select_blocks

BLOCK = 8


def make(video: int, sinks: int, **changes) -> tuple[TokenLayout, SparseConfig]:
    config = SparseConfig(block_size=BLOCK, token_order="raster", **changes)
    return config.layout((1, 1, BLOCK * video - 3), BLOCK * sinks), config


def random_mass(seed: int, batch: int, heads: int, layout: TokenLayout, levels: int = 40) -> np.ndarray:
    """Integers, so that sums are exact and ties are many; heads differ in how concentrated they are."""
    rng = np.random.default_rng(seed)
    peaks = rng.integers(0, levels, (batch, heads, layout.video_blocks, layout.num_blocks))
    power = rng.integers(1, 4, (batch, heads, 1, 1))
    return (peaks**power).astype(np.float32)


def tiers_by_loops(recall: list[float], budget: Budget, threshold: float) -> list[int]:
    heads = len(recall)
    easy = min(sum(r > threshold for r in recall), heads // 2)
    best_first = sorted(range(heads), key=lambda h: (-recall[h], h))
    tiers = [budget.base] * heads
    for h in best_first[:easy]:
        tiers[h] = budget.low
    for h in best_first[heads - easy :]:
        tiers[h] = budget.high
    return tiers


def rows_by_loops(mass: np.ndarray, sinks: int, mean: int, row_wise: bool) -> list[list[int]]:
    """Kept key blocks of each row of one head, sinks first, then heaviest first."""
    nq, nk = mass.shape
    video = nk - sinks
    order = [list(range(video, nk)) + sorted(range(video), key=lambda j: (-mass[p, j], j)) for p in range(nq)]
    if row_wise:
        return [row[:mean] for row in order]
    sizes = [sinks + 1] * nq
    pool = sorted((-mass[p, j], p, j) for p in range(nq) for j in order[p][sinks + 1 :])
    for _, p, _ in pool[: nq * mean - sum(sizes)]:
        sizes[p] += 1
    return [row[:n] for row, n in zip(order, sizes, strict=True)]


def select_by_loops(mass: np.ndarray, layout: TokenLayout, config: SparseConfig) -> tuple[list, list[float]]:
    """(kept blocks [H][nq][...], recall [H]) of one sample."""
    budget, sinks = config.budget(layout), layout.text_blocks
    recall = []
    for head in mass:
        kept = rows_by_loops(head, sinks, budget.base, config.row_wise)
        recall.append(float(np.float32(sum(head[p, j] for p, row in enumerate(kept) for j in row) / head.sum())))
    tiers = [budget.base] * len(mass)
    if config.head_adaptive:
        tiers = tiers_by_loops(recall, budget, config.recall_threshold)
    return [rows_by_loops(h, sinks, t, config.row_wise) for h, t in zip(mass, tiers, strict=True)], recall


@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize(
    ("heads", "video", "sinks", "changes"),
    [
        (5, 9, 2, {"sparsity": 0.5, "recall_threshold": 0.55}),
        (4, 12, 0, {"sparsity": 0.7, "recall_threshold": 0.4}),
        (4, 12, 1, {"sparsity": 0.7, "head_adaptive": False}),
        (1, 7, 1, {"sparsity": 0.9}),
        (3, 6, 1, {"sparsity": 0.0}),
        (3, 1, 2, {"sparsity": 0.99}),
    ],
)
def test_selection_is_that_of_plain_loops(heads: int, video: int, sinks: int, changes: dict, row_wise: bool) -> None:
    layout, config = make(video, sinks, row_wise=row_wise, **changes)
    run = jax.jit(lambda m: select_blocks(m, layout, config))
    for seed in range(5):
        # The last seeds have few levels: almost everything is a tie.
        mass = random_mass(seed, 2, heads, layout, levels=40 if seed < 3 else 3) + 1
        indices, counts, recall = (np.asarray(x) for x in run(mass))
        for b in range(2):
            kept, expected_recall = select_by_loops(mass[b], layout, config)
            np.testing.assert_allclose(recall[b], expected_recall, rtol=1e-6)
            for h in range(heads):
                for p in range(layout.video_blocks):
                    assert indices[b, h, p, : counts[b, h, p]].tolist() == kept[h][p]
        # What the configuration promises: the kept blocks are a constant of it.
        budget = config.budget(layout)
        np.testing.assert_array_equal(counts.sum((1, 2)), heads * layout.video_blocks * budget.base)
        assert config.sparsity or counts.min() == layout.num_blocks


@given(
    recall=st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.79, 0.8, 0.81, 0.9, 1.0]), min_size=1, max_size=12),
    base=st.integers(2, 90),
    spread=st.integers(0, 40),
    threshold=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
@settings(max_examples=80)
def test_tiers_conserve_the_budget_and_help_the_heads_with_low_recall(
    recall: list[float], base: int, spread: int, threshold: float
) -> None:
    budget = Budget(base - min(spread, base - 1), base, base + min(spread, base - 1))
    tiers = head_tiers(jnp.asarray(recall, jnp.float32), budget, threshold).tolist()
    assert sum(tiers) == len(recall) * base
    exact = [float(np.float32(r)) for r in recall]
    assert tiers == tiers_by_loops(exact, budget, float(np.float32(threshold)))


def test_permuting_the_heads_permutes_the_selection() -> None:
    layout, config = make(11, 1, sparsity=0.6, recall_threshold=0.5)
    mass = random_mass(0, 1, 6, layout) + 1
    order = np.array([3, 0, 5, 1, 4, 2])
    whole, permuted = select_blocks(mass, layout, config), select_blocks(mass[:, order], layout, config)
    assert len(set(np.asarray(whole.recall)[0].tolist())) == 6  # no tie that the order of heads would break
    assert len(np.unique(whole.counts)) == 3  # all tiers occur
    for a, b in zip(whole, permuted, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, order], b)


@pytest.mark.parametrize("row_wise", [True, False])
def test_selection_is_the_same_in_every_run_jitted_or_not(row_wise: bool) -> None:
    layout, config = make(10, 1, sparsity=0.6, row_wise=row_wise)
    mass = jnp.asarray(np.random.default_rng(0).random((1, 4, 10, 11)), jnp.float32)
    eager = select_blocks(mass, layout, config)
    for other in (select_blocks(mass, layout, config), jax.jit(lambda m: select_blocks(m, layout, config))(mass)):
        np.testing.assert_array_equal(eager.indices, other.indices)
        np.testing.assert_array_equal(eager.counts, other.counts)


def test_a_head_without_any_mass_still_gets_its_sinks_and_its_count() -> None:
    layout, config = make(6, 2, sparsity=0.5)
    found = select_blocks(jnp.zeros((1, 2, 6, 8)), layout, config)
    assert found.recall.tolist() == [[0.0, 0.0]]
    np.testing.assert_array_equal(found.indices[0, 0, 3, :4], [6, 7, 0, 1])
    np.testing.assert_array_equal(found.counts, 4)
