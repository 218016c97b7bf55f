"""Peers are checked before they are timed: right ones get a time, wrong, absent and refusing ones a reason."""

import math
from typing import Any

import pytest
import torch

from benchmarks.gpu import torch_peers as peers
from benchmarks.measure import add_ratios, ceilings


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HEADS", 2)
    monkeypatch.setattr(peers, "ROUNDS", 2)


def exact(inputs: peers.Inputs, lists: peers.Lists | None = None) -> peers.Run:
    """Attention in float32, over the lists if there are some."""
    mask = None
    if lists is not None:
        blocks = torch.zeros(1, peers.HEADS, lists.blocks, lists.blocks, dtype=torch.bool)
        blocks.scatter_(-1, lists.indices.long(), True)
        mask = blocks.repeat_interleave(lists.block, 2).repeat_interleave(lists.block, 3)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda i: attend(*(x.float() for x in inputs[i % len(inputs)]), attn_mask=mask)


def absent(*given: Any) -> peers.Run:
    import no_such_peer  # noqa: F401

    raise AssertionError


def refusing(*given: Any) -> peers.Run:
    raise RuntimeError("Hopper only")


def wrong(inputs: peers.Inputs, lists: peers.Lists | None = None) -> peers.Run:
    return lambda i: 1.1 * exact(inputs, lists)(i)


@pytest.mark.parametrize("tokens", [256, 200])
def test_only_who_is_right_is_timed(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = {"exact": exact, "absent": absent, "refusing": refusing, "wrong": wrong}
    monkeypatch.setattr(peers, "DENSE", contenders)
    monkeypatch.setattr(peers, "SPARSE", contenders)
    rows = peers.rows(tokens, "cpu", (64, 128))
    kinds = [("dense", None)] + ([("block_sparse", 64), ("block_sparse", 128)] if tokens == 256 else [])
    assert [(row["kernel"], row.get("block")) for row in rows[::4]] == kinds
    for row in rows:
        assert row["tokens"] == tokens
        assert math.isnan(row["ms"]) == (row["implementation"] != "exact")
    notes = {row["implementation"]: row["note"] for row in rows[-4:]}
    assert notes["exact"] == ""
    assert "no_such_peer is not installed: pip install 'adaspa_jax[peers]'" in notes["absent"]
    assert notes["refusing"] == "RuntimeError: Hopper only"
    assert notes["wrong"].startswith("WRONG by 0.1")


def test_lists_that_are_not_the_asked_ones_are_wrong() -> None:
    draw = lambda: torch.randn(1, 2, 512, 128)
    inputs = [(draw(), draw(), draw())]
    lists, other = (peers.Lists.draw(512, 64, "cpu") for _ in range(2))
    assert peers.distance(exact(inputs, lists), inputs, lists) < 1e-5
    assert peers.distance(exact(inputs, other), inputs, lists) > peers.LIMIT


@pytest.mark.parametrize("name", ["FlashAttention-3", "flash-attn 4", "FlashInfer"])
def test_a_peer_that_is_not_installed_says_how_to_install_it(name: str) -> None:
    draw = lambda: torch.randn(1, 2, 128, 128)
    run, note = peers.checked(lambda: peers.DENSE[name]([(draw(), draw(), draw())]), [], None)
    assert run is None
    assert "pip install 'adaspa_jax[peers]'" in note


def test_the_best_dense_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"tokens": 8, "implementation": "mosaic_gpu", "kernel": "dense", "ms": 3.0},
        {"tokens": 8, "implementation": "FlashAttention-3", "kernel": "dense", "ms": 2.0},
        {"tokens": 8, "implementation": "flash-attn 4", "kernel": "dense", "ms": math.nan},
        {"tokens": 8, "implementation": "mosaic_gpu", "kernel": "block_sparse", "ms": 1.0},
    ]
    ceilings.cache_clear()
    monkeypatch.setattr("benchmarks.measure.ceilings", lambda: {"matrix_tflops": 1.0})
    add_ratios(rows)
    assert [row["speedup_over_best_dense"] for row in rows[:2]] == [pytest.approx(2 / 3), 1.0]
    assert rows[3]["speedup_over_best_dense"] == 2.0
