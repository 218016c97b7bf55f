"""Layers that the ports share, with the rounding points of diffusers' PyTorch modules."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


def channels(x: Any, like: Array) -> Any:
    """x [C] as [1, ..., 1, C], with the axes of `like` [..., C]."""
    return x.reshape(*[1] * (like.ndim - 1), -1)


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, eps: float = 1e-6) -> Array:
    """LayerNorm over the last axis, in float32, returned in x's dtype (`torch.nn.LayerNorm`)."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
    if scale is not None and bias is not None:
        y = y * channels(scale.astype(jnp.float32), y) + channels(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.bias = nnx.Param(jnp.zeros(dim, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[..., dim] to [..., dim]."""
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis; rounds to the weights' dtype before scaling (diffusers `RMSNorm`)."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[..., dim] to [..., dim]."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * channels(self.scale[...], x)


class Linear(nnx.Module):
    """x @ kernel + bias in the dtype of the parameters; kernel [in, out]."""

    def __init__(self, in_dim: int, out_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(in_dim)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (in_dim, out_dim), dtype, -bound, bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (out_dim,), dtype, -bound, bound))

    def __call__(self, x: Array) -> Array:
        """[..., in] to [..., out]."""
        return x @ self.kernel[...] + channels(self.bias[...], x)


def gelu_tanh(x: Array) -> Array:
    """GELU, tanh approximation, computed in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def gelu(x: Array) -> Array:
    """GELU computed in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def silu(x: Array) -> Array:
    """SiLU computed in float32."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


class EmbedMLP(nnx.Module):
    """linear_1, an activation, linear_2: diffusers' `TimestepEmbedding` and `PixArtAlphaTextProjection`."""

    def __init__(self, in_dim: int, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_dim, dim, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, activation: Callable[[Array], Array] = silu) -> Array:
        """[..., in] to [..., dim]."""
        return self.linear_2(activation(self.linear_1(x)))


class FeedForward(nnx.Module):
    """proj_in, an activation, proj_out."""

    def __init__(self, dim: int, hidden: int, out_dim: int | None = None, *, dtype: Any, rngs: nnx.Rngs):
        self.proj_in = Linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(hidden, out_dim or dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, activation: Callable[[Array], Array]) -> Array:
        """[..., dim] to [..., out_dim], by default dim."""
        return self.proj_out(activation(self.proj_in(x)))


def timestep_embedding(t: Array, dim: int) -> Array:
    """float32 [..., dim] sinusoids of t [...], cosines first (diffusers `get_timestep_embedding`, flip_sin_to_cos)."""
    half = dim // 2
    exponents = -np.float32(math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    # Rounded from float64, as torch's are to the last bit: a guidance of 6000 multiplies what a bit is worth.
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[..., None]
    angles = angles * channels(frequencies, angles)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x [B, N, C] * (1 + scale) + shift, both [B, 1, C] or [B, N, C]."""
    return x * (1 + scale) + shift


def split_heads(x: Array, heads: int) -> Array:
    """[B, N, H * D] to [B, N, H, D]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: Array) -> Array:
    """[B, N, H, D] to [B, N, H * D]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
