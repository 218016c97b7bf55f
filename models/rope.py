"""Rotary position embeddings over frames, rows and columns: interleaved pairs, tables in float64."""

import numpy as np
from jax import Array
from jax import numpy as jnp


def rope_tables(grid: tuple[int, int, int], axes_dim: tuple[int, ...], theta: float) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), float32 [f * h * w, sum(axes_dim) / 2] in raster order; each axis rotates its own share of pairs."""
    angles = []
    for position, dim in zip(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axes_dim, strict=True):
        frequencies = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(position.reshape(-1, 1) * frequencies)
    joined = np.concatenate(angles, axis=1)
    return np.cos(joined).astype(np.float32), np.sin(joined).astype(np.float32)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (x[2i], x[2i + 1]) of x [B, N, H, D]; cos and sin float32 [1, N, D / 2]. Keeps x's dtype."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    c, s = cos[:, :, None], sin[:, :, None]  # [1, N, 1, D / 2]
    return jnp.stack([even * c - odd * s, odd * c + even * s], axis=-1).reshape(x.shape).astype(x.dtype)
