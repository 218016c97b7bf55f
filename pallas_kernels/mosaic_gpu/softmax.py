"""The online softmax of one warpgroup's 64 rows."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import LOG2E
from pallas_kernels.mosaic_gpu.shape import over_columns


def softmax(s: Array, m: Array, total: Array, acc: Array, scale: float) -> tuple[Array, Array, Array, Array]:
    """(p, m, total, acc) of one online-softmax step; m in base 2."""
    m_new = jnp.maximum(m, s.max(axis=1) * scale)
    shrink = jnp.exp2(m - m_new)
    p = jnp.exp2(s * scale - over_columns(m_new, s.shape[1]))
    return p, m_new, total * shrink, acc * over_columns(shrink, acc.shape[1])


def finish(gpu: Any, acc: Array, m: Array, total: Array, out: Any, lse: Any, dtype: Any) -> None:
    """Writes out and LSE of one warpgroup to shared memory."""
    safe = jnp.where(total > 0, total, 1.0)
    out[...] = (acc / over_columns(safe, acc.shape[1])).astype(dtype)
    lse[...] = jnp.where(total > 0, m * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
    gpu.commit_smem()
