"""`rows`: the first rows of a longer q attend as if they were all, and the others are neither read nor written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, pack_bits, pooled_attention
from tests.kernel_cases import IMPLEMENTATIONS, how

LONG, ROWS, KEYS, DIM, KEPT = 320, 200, 448, 64, 3
EVERY = ["reference", "mosaic_gpu", *(name for name in IMPLEMENTATIONS if name != "mosaic_gpu")]


def arrays(dtype: Any) -> tuple[jax.Array, ...]:
    """q, whose rows that must not be read are NaN in the last block, k and v."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 2, n, DIM), dtype) for key, n in zip(keys, (LONG, KEYS, KEYS), strict=True))
    return q.at[:, :, -64:].set(jnp.nan), k, v


def check(block_q: int, dtype: Any, **options: Any) -> None:
    """Both kernels, with more rows and with those alone."""
    options |= {"block_q": block_q, "return_lse": True}
    q, k, v = arrays(dtype)
    nq, nk = -(-ROWS // block_q), KEYS // 64
    order = jax.random.uniform(jax.random.key(1), (1, 2, nq, nk)).argsort(-1)[..., :KEPT]
    indices, counts = jnp.sort(order).astype(jnp.uint16), jnp.full((1, 2, nq), KEPT, jnp.int32)
    lists = {"block_k": 64} | options
    found = block_sparse_attention(q, k, v, indices, counts, rows=ROWS, **lists)
    expected = block_sparse_attention(q[:, :, :ROWS], k, v, indices, counts, **lists)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    kept = pack_bits(jax.random.bernoulli(jax.random.key(2), 0.3, (1, 2, nq, KEYS)))
    bias = jax.random.normal(jax.random.key(3), (1, 2, KEYS))
    found = pooled_attention(q, k, v, bias, kept, rows=ROWS, **options)
    expected = pooled_attention(q[:, :, :ROWS], k, v, bias, kept, **options)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("implementation", EVERY)
def test_only_the_first_rows_attend(implementation: str, block_q: int) -> None:
    dtype = jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32
    check(block_q, dtype, **{"interpret": True} | how(implementation))


@pytest.mark.parametrize("rows", [0, -1, LONG + 1])
def test_rows_that_are_not_there(rows: int) -> None:
    q, k, v = arrays(jnp.float32)
    lists = jnp.zeros((1, 2, 5, 1), jnp.int32), jnp.ones((1, 2, 5), jnp.int32)
    with pytest.raises(ValueError, match=rf"rows={rows} must be from 1 to Nq={LONG}"):
        block_sparse_attention(q, k, v, *lists, block_q=64, block_k=64, rows=rows)
    kept = jnp.zeros((1, 2, 5, KEYS // 32), jnp.uint32)
    with pytest.raises(ValueError, match=rf"rows={rows} must be from 1 to Nq={LONG}"):
        pooled_attention(q, k, v, jnp.zeros((1, 2, KEYS)), kept, block_q=64, rows=rows)
