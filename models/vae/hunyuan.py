"""HunyuanVideo's VAE decoder (diffusers `AutoencoderKLHunyuanVideo`)."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.transformers.layers import Linear, channels, silu
from models.vae.base import Conv, VAEConfig, VideoVAE, upsample
from models.vae.tiling import Tiling, Window, time_windows


@dataclass(frozen=True)
class HunyuanVAEConfig(VAEConfig):
    """diffusers' config.json; fields of the encoder are read and not used."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    down_block_types: Any = None
    up_block_types: Any = None
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        self._freeze()
        self._check_counts("latent_channels", "layers_per_block", "norm_num_groups", "spatial_compression_ratio")
        for name, ported in (("act_fn", "silu"), ("temporal_compression_ratio", 4), ("out_channels", 3)):
            if getattr(self, name) != ported:
                raise NotImplementedError(f"{name}={getattr(self, name)!r} is not ported, only {ported!r} is")
        blocks = self.block_out_channels
        if set(self.up_block_types or ()) - {"HunyuanVideoUpBlock3D"}:
            raise NotImplementedError(f"up_block_types={self.up_block_types} has blocks that are not ported")
        if self.up_block_types is not None and len(self.up_block_types) != len(blocks):
            raise ValueError(f"up_block_types={self.up_block_types} must be as many as block_out_channels={blocks}")
        if not blocks or any(type(n) is not int or n < 1 or n % self.norm_num_groups for n in blocks):
            raise ValueError(f"block_out_channels={blocks} must be multiples of {self.norm_num_groups} groups")
        ratio, doublings = self.spatial_compression_ratio, len(blocks) - 1
        if ratio & (ratio - 1) or doublings < 2 or ratio > 2 ** len(blocks):
            raise ValueError(f"spatial_compression_ratio={ratio} does not fit {len(blocks)} blocks")
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"scaling_factor={self.scaling_factor} must be positive")

    @property
    def upsampling(self) -> list[tuple[int, int]]:
        """(times in time, times in space) after each block."""
        last = len(self.block_out_channels) - 1
        space, time = round(math.log2(self.spatial_compression_ratio)), 2
        return [(2 if last - time <= i < last else 1, 2 if i < space else 1) for i in range(last + 1)]


class CausalConv(nnx.Module):
    """Convolution that sees no later frame; edges repeat, in time the first frame does."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int = 3, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv(in_dim, out_dim, (kernel, kernel, kernel), dtype=dtype, rngs=rngs)
        self.pad = kernel - 1

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, in] to [B, T, H, W, out]."""
        sides = (self.pad // 2, self.pad // 2)
        return self.conv(jnp.pad(x, ((0, 0), (self.pad, 0), sides, sides, (0, 0)), mode="edge"))


class GroupNorm(nnx.Module):
    """GroupNorm over frames, rows and columns of a piece at once, in float32 (`torch.nn.GroupNorm`)."""

    def __init__(self, dim: int, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.bias = nnx.Param(jnp.zeros(dim, dtype))
        self.groups = groups

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, dim] to the same."""
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean((1, 3), keepdims=True) + 1e-6)
        scale, bias = (channels(p[...].astype(jnp.float32), x) for p in (self.scale, self.bias))
        y = y.reshape(x.shape) * scale + bias
        return y.astype(x.dtype)


class Resnet(nnx.Module):
    """Two normed convolutions and a shortcut."""

    def __init__(self, in_dim: int, out_dim: int, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.norm1 = GroupNorm(in_dim, groups, **kw)
        self.conv1 = CausalConv(in_dim, out_dim, **kw)
        self.norm2 = GroupNorm(out_dim, groups, **kw)
        self.conv2 = CausalConv(out_dim, out_dim, **kw)
        self.conv_shortcut = CausalConv(in_dim, out_dim, 1, **kw) if in_dim != out_dim else None

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, in] to [B, T, H, W, out]."""
        y = self.conv1(silu(self.norm1(x)))
        y = self.conv2(silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameAttention(nnx.Module):
    """One head; a frame attends to itself and all frames before it."""

    def __init__(self, dim: int, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.group_norm = GroupNorm(dim, groups, **kw)
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim, **kw) for _ in range(3))
        self.to_out = Linear(dim, dim, **kw)

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, dim] to the same, x added."""
        batch, frames, _, _, dim = x.shape
        y = self.group_norm(x).reshape(batch, frames, -1, dim)
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)
        outs = []
        for last in range(frames):  # a loop of frames rather than a mask: the scores of one frame at a time
            keys, values = (t[:, : last + 1].reshape(batch, -1, dim) for t in (k, v))
            scores = jnp.einsum("bqc,bkc->bqk", q[:, last], keys, preferred_element_type=jnp.float32) * dim**-0.5
            outs.append(jax.nn.softmax(scores, -1).astype(x.dtype) @ values)
        return x + self.to_out(jnp.stack(outs, 1)).reshape(x.shape)


class MidBlock(nnx.Module):
    """Resnet, attention, resnet."""

    def __init__(self, dim: int, groups: int, attention: bool, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.resnets = nnx.List([Resnet(dim, dim, groups, **kw) for _ in range(2)])
        self.attentions = nnx.List([FrameAttention(dim, groups, **kw)] if attention else [])

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, dim] to the same."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Upsampler(nnx.Module):
    """Repeats pixels and all frames but the first, then convolves."""

    def __init__(self, dim: int, times: tuple[int, int], *, dtype: Any, rngs: nnx.Rngs):
        self.conv = CausalConv(dim, dim, dtype=dtype, rngs=rngs)
        self.times = times

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, dim] to [B, 1 + time * (T - 1), space * H, space * W, dim]."""
        time, space = self.times
        return self.conv(jnp.concatenate([upsample(x[:, :1], 1, space), upsample(x[:, 1:], time, space)], axis=1))


class UpBlock(nnx.Module):
    """Resnets, then an upsampler unless there is nothing to do for one."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        layers: int,
        groups: int,
        times: tuple[int, int],
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.resnets = nnx.List([Resnet(out_dim if i else in_dim, out_dim, groups, **kw) for i in range(layers)])
        self.upsamplers = nnx.List([Upsampler(out_dim, times, **kw)] if times != (1, 1) else [])

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, in] to [B, T', H', W', out]."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Decoder(nnx.Module):
    """Latents to pixels, channels last."""

    def __init__(self, config: HunyuanVAEConfig, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        dims, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv(config.latent_channels, dims[0], **kw)
        self.mid_block = MidBlock(dims[0], groups, config.mid_block_add_attention, **kw)
        self.up_blocks = nnx.List(
            [
                UpBlock(in_dim, out_dim, config.layers_per_block + 1, groups, times, **kw)
                for in_dim, out_dim, times in zip((dims[0], *dims), dims, config.upsampling, strict=False)
            ]
        )
        self.conv_norm_out = GroupNorm(dims[-1], groups, **kw)
        self.conv_out = CausalConv(dims[-1], config.out_channels, **kw)

    def __call__(self, x: Array) -> Array:
        """[B, F, H, W, C] to [B, frames, height, width, 3]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class HunyuanVideoVAE(VideoVAE):
    """The decoder; attributes are named as diffusers' keys are.

    Its group norms take mean and variance over a whole piece, and its attention spans one. So a tiled video is another
    one everywhere, not at seams alone: brightness and contrast of a tile follow its own statistics, and blending hides
    the steps between tiles. Pieces in time overlap and are blended too. diffusers decodes in the same pieces; its last
    one along an axis is short where ours starts earlier.
    """

    def __init__(self, config: HunyuanVAEConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype, self.channels = config, jnp.dtype(dtype), config.latent_channels
        self.space_ratio, self.time_ratio = config.spatial_compression_ratio, config.temporal_compression_ratio
        self.post_quant_conv = Conv(self.channels, self.channels, (1, 1, 1), dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Array, cache: None = None) -> tuple[Array, None]:
        """Unscaled [B, C, F, H, W] to [B, 3, 4 * (F - 1) + 1, height, width], at once and not clipped; no cache."""
        x = self.decoder(self.post_quant_conv(jnp.moveaxis(latents, 1, -1)))
        return jnp.moveaxis(x, -1, 1), None

    def unscale(self, latents: Array) -> Array:
        """latents / scaling_factor."""
        return latents.astype(jnp.float32) / self.config.scaling_factor

    def _windows(self, frames: int, tiling: Tiling) -> list[Window]:
        return time_windows(frames, self.time_ratio, tiling)
