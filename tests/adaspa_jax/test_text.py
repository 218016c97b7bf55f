"""Text rows attend to everything, on a GPU in parts of the keys that are merged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaspa_jax import SparseConfig
from adaspa_jax.call import Call


def call_of(block: int, text: int, heads: int = 3, implementation: Any = None) -> Call:
    """Of a layout of 13 or 7 blocks, primes, some of whose keys are not valid."""
    config = SparseConfig(block_size=block, compensation="none")
    layout = config.layout((4, 10, 16), text)
    valid = layout.block_valid(jnp.array([text - 5, text]), 2)
    keys = jax.random.split(jax.random.key(block), 3)
    q, k, v = (jax.random.normal(key, (2, heads, layout.length, 64)) for key in keys)
    rows = layout.video_length
    blocks = valid[:, : layout.video_blocks]
    return Call(q, k, v, rows, valid, blocks, layout, config, implementation)


@pytest.mark.parametrize(("block", "text"), [(64, 190), (128, 200)])
def test_in_parts_it_is_the_same(block: int, text: int) -> None:
    call = call_of(block, text)
    assert call.layout.num_blocks in (13, 7)
    expected = call.text(0)
    assert expected.shape[2] == call.layout.text_length
    for parts in (1, 2, 3, call.layout.num_blocks):
        found = jax.jit(lambda parts=parts: call.text(parts))()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "name", "parts"), [(3, "xla", 0), (3, "mosaic_gpu", 13), (24, "mosaic_gpu", 3)])
def test_few_heads_get_more_parts_on_a_gpu(heads: int, name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(64, 190, heads)
    monkeypatch.setattr("adaspa_jax.call.resolve_implementation", lambda *given, **options: name)
    assert call.text_parts == parts


def test_without_text_there_is_nothing() -> None:
    assert call_of(64, 0).text().shape[2] == 0
