"""What SparseConfig refuses, and how reports spell what JSON has no number for."""

import json
from typing import Any

import numpy as np
import pytest

from adaspa_jax import History, SparseConfig, SparseState, json_values, summarize

BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": float("nan")}, "sparsity=nan must be a finite number"),
    ({"sparsity": "0.5"}, "sparsity='0.5' must be a finite number"),
    ({"sparsity": True}, "sparsity=True"),
    ({"recall_threshold": float("nan")}, "recall_threshold=nan"),
    ({"steps": 50.0}, "steps: 50.0 must be a whole number"),
    ({"steps": True}, "steps: True"),
    ({"block_size": 64.0}, "block_size: 64.0"),
    ({"dense_last_steps": 1.5}, "dense_last_steps: 1.5"),
    ({"search_steps": (1.0, 2)}, "search_steps: 1.0"),
    ({"search_steps": 3}, "search_steps=3 must be a tuple"),
    ({"dense_layers": (True,)}, "dense_layers: True"),
    ({"lse_cache": "no"}, "lse_cache='no' must be True or False"),
    ({"head_adaptive": 1}, "head_adaptive=1"),
    ({"search_steps": (10, 49), "dense_last_steps": 2}, "the last 2 of 50 steps are dense"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig(**options)


def test_numpy_values_are_plain_ones_and_hash_alike() -> None:
    plain = SparseConfig(0.5, 64, 50, (10, 30), dense_layers=(1,))
    numpy = SparseConfig(
        np.float64(0.5),
        np.int64(64),
        np.int32(50),
        np.array([10, 30]),
        dense_layers=[np.int64(1)],  # type: ignore[arg-type]
    )
    assert numpy == plain
    assert hash(numpy) == hash(plain)
    assert type(numpy.steps) is int


def test_reports_are_json_whatever_the_figures() -> None:
    figures = {
        "inf": np.inf,
        "-inf": np.float32(-np.inf),
        "nan": float("nan"),
        "array": np.array([[1.0, np.nan]]),
        "tuple": (1, np.int64(2), True, None, "x"),
    }
    text = json.dumps(json_values(figures), allow_nan=False)
    assert json.loads(text) == {
        "inf": "Infinity",
        "-inf": "-Infinity",
        "nan": None,
        "array": [[1.0, None]],
        "tuple": [1, 2, True, None, "x"],
    }


@pytest.mark.parametrize(
    "options", [{"dense_layers": (0, 1)}, {"search_steps": ()}, {"search_steps": (), "dense_layers": (0, 1)}]
)
def test_a_run_with_nothing_to_measure_has_a_report(options: dict[str, Any]) -> None:
    config = SparseConfig(block_size=16, steps=3, **options)
    layout = config.layout((1, 4, 8))
    state = SparseState.create(layout, config, batch=1, heads=2, layers=2)
    nothing = np.zeros((3, 2, 1, 2), np.float32)
    report = summarize(state, History(nothing, nothing, nothing), layout, config)
    assert json_values(report)["recall"] is None
    json.dumps(json_values(report), allow_nan=False)
