"""The softmax of one warpgroup's 64 rows, a key tile a step.

With a running maximum a step waits for the maximum of its scores and rescales what is summed so far. Where no score of
a program can be large, `bounded`, exp2 needs neither: float32 and bfloat16 hold every value, and the sums of them.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import FLOOR
from pallas_kernels.mosaic_gpu.shape import over_columns, row_vector

LIMIT, LARGEST_VALUE, MOST_KEYS = 60.0, 1e6, 1 << 20
"""Scores up to LIMIT in size, natural log, need no maximum: a row's largest weight is at least exp(-60), so that what
float32 loses is below exp(-27) of it, and the sum of all weights times values is below 2e38."""
PART = 8
"""Columns of the partial sums: those that each thread holds two of."""


def bounded(
    q: Array, k: Array, v: Array, scale: float, rows: int, bias: float | Array = 0.0, row_scale: Array | None = None
) -> Array:
    """int32 [B * H, programs]: whether `rows` query rows need no maximum, by the norms of q and k and the values.

    q, k, v: [B * H, N, D]; q, whole programs, is times `row_scale` [B * H, N]. `bias`: what is added to scores at most,
    in absolute value. NaN and infinities bound nothing.
    """
    norm = lambda x: jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1))
    longest = norm(q) if row_scale is None else norm(q) * row_scale
    longest = longest.reshape(q.shape[0], -1, rows).max(-1)
    small = (jnp.abs(v).max((1, 2)) <= LARGEST_VALUE)[:, None] & (k.shape[1] <= MOST_KEYS)
    return (small & (longest * norm(k).max(-1, keepdims=True) * scale + bias <= LIMIT)).astype(jnp.int32)


def partial_sums(p: Array) -> Array:
    """[64, 8] sums of every eighth column, which need no other thread's numbers."""
    parts = [p[:, i : i + PART] for i in range(0, p.shape[1], PART)]
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0]


class Softmax:
    """Steps of one softmax of scores times `scale`, base 2, of all rows or [64] of each.

    Its state is the sums [64, 8] and, unless bounded, the running maximum [64], base 2, and by what the last step
    shrank what was summed before.
    """

    def __init__(self, gpu: Any, scale: float | Array, bounded: bool):
        self.gpu, self.scale, self.bounded = gpu, scale, bounded

    def start(self) -> tuple[Array, ...]:
        """Before the first tile."""
        sums = over_columns(row_vector(self.gpu, 0.0), PART)
        return (sums,) if self.bounded else (sums, row_vector(self.gpu, FLOOR), row_vector(self.gpu, 1.0))

    def _scaled(self, s: Array) -> Array:
        return s * (over_columns(self.scale, s.shape[1]) if isinstance(self.scale, Array) else self.scale)

    def step(self, s: Array, state: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """(weights of the scores s, state)."""
        if self.bounded:
            p = jnp.exp2(self._scaled(s))
            return p, (state[0] + partial_sums(p),)
        sums, m, _ = state
        m_new = jnp.maximum(m, s.max(axis=1) * self.scale)
        p, shrink = jnp.exp2(self._scaled(s) - over_columns(m_new, s.shape[1])), jnp.exp2(m - m_new)
        return p, (sums * over_columns(shrink, PART) + partial_sums(p), m_new, shrink)

    def rescaled(self, acc: Array, state: tuple[Array, ...]) -> Array:
        """What was summed before the last step, for the maximum since."""
        return acc if self.bounded else acc * over_columns(state[2], acc.shape[1])

    def end(self, state: tuple[Array, ...]) -> tuple[Array, Array]:
        """(sum of the weights [64], maximum [64])."""
        return state[0].sum(axis=1), row_vector(self.gpu, 0.0) if self.bounded else state[1]
