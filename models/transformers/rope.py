"""Rotary position embeddings over frames, rows and columns: interleaved pairs, tables in float64."""

from collections.abc import Sequence

import numpy as np
from jax import Array
from jax import numpy as jnp


def rope_tables(grid: Sequence[int | np.ndarray], axes_dim: tuple[int, ...], theta: float) -> tuple[Array, Array]:
    """(cos, sin) of every token, float32 [f * h * w, sum(axes_dim) / 2] in raster order.

    `grid` has the number of positions along each axis, or an array of them if they are not 0, 1, 2 and so on.
    Each axis rotates its own share of pairs. Only one small table an axis becomes a constant of a traced program;
    the product of the axes, 30 MB for a 720p video, is made when it runs.
    Source: diffusers `HunyuanVideoRotaryPosEmbed`.
    """
    positions = [np.arange(axis) if isinstance(axis, int) else axis for axis in grid]
    size = tuple(len(axis) for axis in positions)
    cos: list[Array] = []
    sin: list[Array] = []
    for axis, dim in enumerate(axes_dim):
        frequencies = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = positions[axis][:, None] * frequencies  # [n, dim / 2]
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size[axis]
        for tables, values in ((cos, np.cos(angles)), (sin, np.sin(angles))):
            table = jnp.asarray(values.reshape(shape), jnp.float32)
            tables.append(jnp.broadcast_to(table, (*size, dim // 2)))
    pairs = sum(axes_dim) // 2
    return jnp.concatenate(cos, -1).reshape(-1, pairs), jnp.concatenate(sin, -1).reshape(-1, pairs)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (x[2i], x[2i + 1]) of x [B, N, H, D]; cos and sin float32 [1, N, D / 2]. Keeps x's dtype."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    c, s = cos[:, :, None], sin[:, :, None]  # [1, N, 1, D / 2]
    return jnp.stack([even * c - odd * s, odd * c + even * s], axis=-1).reshape(x.shape).astype(x.dtype)
