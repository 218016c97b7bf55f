"""Scales of 0, near it and below: the same in every implementation, masked keys and blocks included."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_mass, block_sparse_attention, flash_attention
from tests.kernel_cases import IMPLEMENTATIONS, Case, how, operands

CASE = Case("ragged", rows=128, keys=200, ragged=True)


def results(implementation: str, scale: float) -> list[np.ndarray]:
    """Of three kernels."""
    x = operands(dataclasses.replace(CASE, dtype="float16" if implementation == "mosaic_gpu" else "float32"))
    lists = {"indices": jnp.broadcast_to(jnp.array([[1, 0], [1, 1]]), (1, 2, 2, 2)), "counts": jnp.full((1, 2, 2), 2)}
    x = dataclasses.replace(x, block_valid=jnp.array([[64, 0, 50, 8]]), **lists)
    options: dict[str, Any] = {"scale": scale} | how(implementation)
    blocks = {"block_q": 64, "block_k": 64, "block_valid": x.block_valid} | options
    with jax.disable_jit(implementation == "mosaic_gpu"):
        dense = flash_attention(x.q, x.k, x.v, return_lse=True, **options)
        sparse = block_sparse_attention(x.q, x.k, x.v, x.indices, x.counts, return_lse=True, **blocks)
        mass = block_mass(x.q, x.k, jnp.full(x.q.shape[:3], 5.0), **blocks)
    return [np.asarray(array, np.float32) for array in (*dense, *sparse, mass)]


@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-12])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", *(n for n in IMPLEMENTATIONS if n != "mosaic_gpu")])
def test_scales_that_are_not_like_others(implementation: str, scale: float) -> None:
    for found, expected in zip(results(implementation, scale), results("reference", scale), strict=True):
        tolerance = 2e-2 if implementation == "mosaic_gpu" else 1e-5
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_must_be_finite(scale: float) -> None:
    x = operands(CASE)
    with pytest.raises(ValueError, match=f"scale={scale} must be finite"):
        flash_attention(x.q, x.k, x.v, scale=scale, implementation="xla")
