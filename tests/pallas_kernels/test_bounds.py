"""Scores that are bounded, so that a Hopper kernel seeks no maximum, and scores that are not, side by side."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import block_sparse_attention, flash_attention, pooled_attention
from pallas_kernels.blocks import merge_heads
from pallas_kernels.mosaic_gpu.softmax import LIMIT, bounded
from tests.kernel_cases import FULL, Case, Operands, assert_attention, operands, pooled_operands

KERNELS = ["flash_attention", "block_sparse_attention", "pooled_attention"]


def mixed(block: int) -> tuple[Case, Operands]:
    """512 rows, of which every second 128 have scores past LIMIT."""
    case = dataclasses.replace(FULL, rows=512, keys=384, head_dim=64, block_q=block, block_k=block)
    case = dataclasses.replace(case, dtype="bfloat16", batch=1)
    x = operands(case)
    size = jnp.where(jnp.arange(512) // 128 % 2, 24, 1).astype(x.q.dtype)
    return case, dataclasses.replace(x, q=x.q * size[None, None, :, None])


def check(kernel: str, block: int, **options: Any) -> None:
    """A kernel on `mixed` rows against the oracle."""
    case, x = mixed(block)
    options |= {"return_lse": True}
    if kernel == "flash_attention":
        return assert_attention(case, x, flash_attention(x.q, x.k, x.v, **options), selected=False)
    if kernel == "block_sparse_attention":
        lists = {"block_q": block, "block_k": block} | options
        found = block_sparse_attention(x.q, x.k, x.v, x.indices, x.counts, **lists)
        return assert_attention(case, x, found, selected=True)
    pooled = pooled_operands(case)
    found = pooled_attention(x.q, x.k, x.v, pooled.bias, pooled.kept, block_q=block, **options)
    return assert_attention(case, x, found, selected=False, pooled=pooled)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_programs_of_both_kinds(kernel: str, block: int) -> None:
    check(kernel, block, implementation="mosaic_gpu", interpret=True)


@pytest.mark.parametrize("rows", [64, 128])
def test_which_programs_are_bounded(rows: int) -> None:
    _, x = mixed(128)
    found = bounded(*map(merge_heads, (x.q, x.k, x.v)), 64**-0.5, rows)
    expected = np.arange(512 // rows) * rows // 128 % 2 == 0
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 40.0), st.sampled_from([0.0, 7.5]))
def test_no_bounded_score_passes_the_limit(seed: int, size: float, bias: float) -> None:
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(size * rng.standard_normal((2, 128, 16)), jnp.bfloat16) for _ in range(2))
    k = k.at[:, :64].set(q[:, :64] * rng.choice([-1, 1]))  # the bound is reached: a key along every query
    largest = np.abs(np.einsum("hqd,hkd->hqk", *(np.asarray(x, np.float64) for x in (q, k)))).reshape(2, 2, -1).max(-1)
    ok = np.asarray(bounded(q, k, k, 0.25, 64, bias), bool)
    assert (0.25 * largest + bias <= LIMIT * (1 + 1e-5))[ok].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_has_no_bound(where: str, bad: float) -> None:
    q, k = jnp.ones((1, 256, 16), jnp.bfloat16), jnp.ones((1, 64, 16), jnp.bfloat16)
    q, k, v = (x.at[0, 3, 3].set(bad) if name == where else x for name, x in (("q", q), ("k", k), ("v", k)))
    np.testing.assert_array_equal(bounded(q, k, v, 1.0, 128), [[0, 1]] if where == "q" else [[0, 0]])


@pytest.mark.parametrize("block", [64, 128])
def test_the_largest_scores_that_need_no_maximum(block: int) -> None:
    """Rows whose every score is -59, 0 or 59: weights of exp(59) and of exp(-59) in one program."""
    sign = jnp.asarray(np.arange(128) % 3 - 1)
    q = jnp.zeros((1, 1, 128, 64)).at[..., 0].set(sign).astype(jnp.bfloat16)
    k = jnp.zeros((1, 1, 256, 64)).at[..., 0].set(59.0).astype(jnp.bfloat16)
    v = jax.random.normal(jax.random.key(0), k.shape, jnp.bfloat16)
    assert bool(bounded(q[0], k[0], v[0], 1.0, block).all())
    assert not bool(bounded(q[0], k[0], v[0], (LIMIT + 1) / 59, block).any())
    blocks = 128 // block, 256 // block
    lists = jnp.broadcast_to(jnp.arange(blocks[1]), (1, 1, *blocks)), jnp.full((1, 1, blocks[0]), blocks[1])
    options = {"block_q": block, "block_k": block, "scale": 1.0, "implementation": "mosaic_gpu", "interpret": True}
    out, lse = block_sparse_attention(q, k, v, *lists, return_lse=True, **options)
    np.testing.assert_allclose(lse[0, 0], 59.0 * sign + np.log(256), rtol=1e-6)
    mean = np.asarray(v, np.float32).mean(2, keepdims=True)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.broadcast_to(mean, out.shape), atol=2e-3)


def test_large_values_need_a_maximum() -> None:
    q = jnp.full((1, 1, 128, 64), 59**0.5 / 8, jnp.bfloat16)
    v = jnp.full((1, 1, 256, 64), 1e30, jnp.bfloat16)
    keys = jnp.full(v.shape, 59**0.5 / 8, jnp.bfloat16)
    assert bool(bounded(q[0], keys[0], keys[0], 1.0, 128).all())
    out = flash_attention(q, keys, v, scale=1.0, implementation="mosaic_gpu", interpret=True)
    np.testing.assert_allclose(out.astype(jnp.float32), float(v[0, 0, 0, 0]), rtol=1e-2)
