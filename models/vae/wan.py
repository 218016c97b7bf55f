"""Wan's VAE decoders (diffusers `AutoencoderKLWan`): Wan 2.1, and the one of Wan2.2-TI2V-5B."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from models.transformers.layers import Linear, channels, silu
from models.vae.base import Conv, Step, VAEConfig, VideoVAE, upsample
from models.vae.tiling import Tiling, Window

_MEAN: tuple[float, ...] = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD: tuple[float, ...] = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class WanVAEConfig(VAEConfig):
    """diffusers' config.json; fields of the encoder are read and not used."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _MEAN
    latents_std: tuple[float, ...] = _STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8

    def __post_init__(self) -> None:
        self._freeze()
        if self.decoder_base_dim is None:
            object.__setattr__(self, "decoder_base_dim", self.base_dim)
        if self.patch_size is None:
            object.__setattr__(self, "patch_size", 1)
        self._check_counts("decoder_base_dim", "z_dim", "num_res_blocks", "patch_size")
        if self.attn_scales:
            raise NotImplementedError(f"attn_scales={self.attn_scales} is not ported, only () is")
        if not self.dim_mult or any(type(n) is not int or n < 1 for n in self.dim_mult):
            raise ValueError(f"dim_mult={self.dim_mult} must be whole numbers of at least 1")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(f"temperal_downsample={self.temperal_downsample} must be one less than {self.dim_mult=}")
        if self.out_channels != 3 * self.patch**2:
            raise ValueError(f"out_channels={self.out_channels} must be 3 * patch_size ** 2; {self.patch_size=}")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if len(values) != self.z_dim or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise ValueError(f"{name} must be {self.z_dim} numbers, one a channel; got {values}")
        for name, ratio in (("scale_factor_temporal", self.time_ratio), ("scale_factor_spatial", self.space_ratio)):
            if getattr(self, name) not in (None, ratio):
                raise ValueError(f"{name}={getattr(self, name)} does not fit the blocks, which make {ratio}")

    @property
    def patch(self) -> int:
        """Pixels in each direction that the last convolution makes at once."""
        return self.patch_size or 1

    @property
    def time_ratio(self) -> int:
        """Frames of a latent frame."""
        return 2 ** sum(map(bool, self.temperal_downsample))

    @property
    def space_ratio(self) -> int:
        """Pixels of a latent, in each direction."""
        return 2 ** (len(self.dim_mult) - 1) * self.patch


class FrameCache:
    """The last two frames that each causal convolution has seen: with them a video decodes in pieces, exactly.

    Convolutions call `extend` in the order they run; `new` is the next piece's `old`. `old` None begins a video.
    """

    def __init__(self, old: Sequence[Array] | None):
        self.first = old is None
        self._old = None if old is None else iter(old)
        self.new: list[Array] = []

    def extend(self, x: Array) -> Array:
        """[B, T, H, W, C] to [B, 2 + T, H, W, C]; zeros come before a video."""
        before = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:])) if self._old is None else next(self._old)
        x = jnp.concatenate([before, x], axis=1)
        self.new.append(x[:, -2:])
        return x


class CausalConv(Conv):
    """Convolution that sees two frames before and none after; zeros around the picture."""

    def __call__(self, x: Array, cache: FrameCache | None = None) -> Array:
        """[B, T, H, W, in] to [B, T, H, W, out]; without a cache no frame sees another (kernels of one frame)."""
        sides = [(n // 2, n // 2) for n in self.kernel.shape[1:3]]
        x = x if cache is None else cache.extend(x)
        if x.shape[1] < self.kernel.shape[0]:
            return jnp.zeros_like(x, shape=(x.shape[0], 0, *x.shape[2:4], self.bias.shape[0]))
        return super().__call__(jnp.pad(x, ((0, 0), (0, 0), *sides, (0, 0))))


class RMSNorm(nnx.Module):
    """Scales each position's channels to norm sqrt(dim), in float32, and then by `gamma` in x's dtype."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.gamma = nnx.Param(jnp.ones(dim, dtype))

    def __call__(self, x: Array) -> Array:
        """[..., dim] to the same."""
        y = x.astype(jnp.float32)
        y = y / jnp.maximum(jnp.sqrt((y * y).sum(-1, keepdims=True)), 1e-12)
        return y.astype(x.dtype) * x.shape[-1] ** 0.5 * channels(self.gamma[...], x)


class Resnet(nnx.Module):
    """Two normed convolutions and a shortcut."""

    def __init__(self, in_dim: int, out_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.norm1 = RMSNorm(in_dim, **kw)
        self.conv1 = CausalConv(in_dim, out_dim, (3, 3, 3), **kw)
        self.norm2 = RMSNorm(out_dim, **kw)
        self.conv2 = CausalConv(out_dim, out_dim, (3, 3, 3), **kw)
        self.conv_shortcut = CausalConv(in_dim, out_dim, (1, 1, 1), **kw) if in_dim != out_dim else None

    def __call__(self, x: Array, cache: FrameCache) -> Array:
        """[B, T, H, W, in] to [B, T, H, W, out]."""
        y = self.conv1(silu(self.norm1(x)), cache)
        y = self.conv2(silu(self.norm2(y)), cache)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """One head; each frame attends to itself."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, dtype=dtype, rngs=rngs)
        self.to_qkv = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, dim] to the same, x added."""
        batch, frames, height, width, dim = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch * frames, height * width, 3 * dim)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        return x + self.proj(jax.nn.softmax(scores, -1).astype(x.dtype) @ v).reshape(x.shape)


class MidBlock(nnx.Module):
    """Resnet, attention, resnet."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.resnets = nnx.List([Resnet(dim, dim, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(dim, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Array, cache: FrameCache) -> Array:
        """[B, T, H, W, dim] to the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, cache)), cache)


class Upsampler(nnx.Module):
    """Doubles frames (a convolution makes both), unless `time` is false, and rows and columns (repeated, convolved).

    The first frame of a video stays single, and the convolution in time does not see it.
    """

    def __init__(self, dim: int, out_dim: int, time: bool, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.resample = CausalConv(dim, out_dim, (1, 3, 3), **kw)
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1), **kw) if time else None

    def __call__(self, x: Array, cache: FrameCache) -> Array:
        """[B, T, H, W, dim] to [B, T', 2 * H, 2 * W, out]."""
        if self.time_conv is not None:
            single, rest = (x[:, :1], x[:, 1:]) if cache.first else (x[:, :0], x)
            batch, _, height, width, dim = x.shape
            pairs = self.time_conv(rest, cache).reshape(batch, rest.shape[1], height, width, 2, dim)
            doubled = jnp.moveaxis(pairs, 4, 2).reshape(batch, 2 * rest.shape[1], height, width, dim)
            x = jnp.concatenate([single, doubled], axis=1)
        return self.resample(upsample(x, 1, 2))


def spread(x: Array, out_dim: int, time: int, first: bool) -> Array:
    """Channels of [B, T, H, W, C], repeated, become frames, rows and columns of [B, T', 2 * H, 2 * W, out_dim].

    The parameter-free shortcut of Wan 2.2 (diffusers `DupUp3D`); the first frame of a video makes one.
    """
    batch, frames, height, width, dim = x.shape
    x = jnp.repeat(x, out_dim * time * 4 // dim, axis=-1).reshape(batch, frames, height, width, out_dim, time, 2, 2)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, frames * time, 2 * height, 2 * width, out_dim)
    return x[:, time - 1 :] if first else x


class UpBlock(nnx.Module):
    """Resnets, then an upsampler unless it is the last block."""

    def __init__(self, in_dim: int, out_dim: int, layers: int, time: bool | None, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.resnets = nnx.List([Resnet(out_dim if i else in_dim, out_dim, **kw) for i in range(layers)])
        self.upsamplers = nnx.List([] if time is None else [Upsampler(out_dim, out_dim // 2, time, **kw)])

    def __call__(self, x: Array, cache: FrameCache) -> Array:
        """[B, T, H, W, in] to [B, T', H', W', out or out / 2]."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, cache)
        return x


class ResidualUpBlock(nnx.Module):
    """The block of Wan 2.2: a shortcut leads around resnets and upsampler."""

    def __init__(self, in_dim: int, out_dim: int, layers: int, time: bool | None, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        self.resnets = nnx.List([Resnet(out_dim if i else in_dim, out_dim, **kw) for i in range(layers)])
        self.upsampler = None if time is None else Upsampler(out_dim, out_dim, time, **kw)
        self.out_dim, self.frames = out_dim, 2 if time else 1

    def __call__(self, x: Array, cache: FrameCache) -> Array:
        """[B, T, H, W, in] to [B, T', H', W', out]."""
        y = x
        for resnet in self.resnets:
            y = resnet(y, cache)
        if self.upsampler is None:
            return y
        return self.upsampler(y, cache) + spread(x, self.out_dim, self.frames, cache.first)


class Decoder(nnx.Module):
    """Latents to pixels, channels last."""

    def __init__(self, config: WanVAEConfig, *, dtype: Any, rngs: nnx.Rngs):
        kw: Any = {"dtype": dtype, "rngs": rngs}
        base, layers = config.decoder_base_dim or 0, config.num_res_blocks + 1
        dims = [base * n for n in config.dim_mult[::-1]]
        self.conv_in = CausalConv(config.z_dim, dims[0], (3, 3, 3), **kw)
        self.mid_block = MidBlock(dims[0], **kw)
        blocks: list[nnx.Module] = []
        in_dim = dims[0]
        for out_dim, time in zip(dims, (*map(bool, config.temperal_downsample[::-1]), None), strict=True):
            block = ResidualUpBlock if config.is_residual else UpBlock
            blocks.append(block(in_dim, out_dim, layers, time, **kw))
            in_dim = out_dim if config.is_residual else out_dim // 2
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(dims[-1], **kw)
        self.conv_out = CausalConv(dims[-1], config.out_channels, (3, 3, 3), **kw)

    def __call__(self, x: Array, cache: FrameCache) -> Array:
        """[B, F, H, W, C] to [B, frames, height / patch, width / patch, out_channels]."""
        x = self.mid_block(self.conv_in(x, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out(silu(self.norm_out(x)), cache)


class WanVAE(VideoVAE):
    """The decoder; attributes are named as diffusers' keys are.

    Pieces in time are exact: every convolution keeps the frames it needs of the piece before. Tiles in space are not:
    a tile's middle attention sees that tile alone, which changes all of it a little, and its edges lack context, which
    blending hides. diffusers decodes in the same tiles; its last one along an axis is short where ours starts earlier,
    and where four tiles meet it blends twice.
    """

    def __init__(self, config: WanVAEConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype, self.channels = config, jnp.dtype(dtype), config.z_dim
        self.space_ratio, self.time_ratio = config.space_ratio, config.time_ratio
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, (1, 1, 1), dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Array, cache: tuple[Array, ...] | None = None) -> tuple[Array, tuple[Array, ...]]:
        """Unscaled [B, C, F, H, W] to ([B, 3, frames, height, width] not clipped, cache for the frames that follow).

        Without a cache the latents begin a video, whose first frame makes one frame, others `time_ratio`.
        """
        frames = FrameCache(cache)
        x = self.decoder(self.post_quant_conv(jnp.moveaxis(latents, 1, -1)), frames)
        batch, time, height, width, _ = x.shape
        patch = self.config.patch
        x = x.reshape(batch, time, height, width, 3, patch, patch).transpose(0, 4, 1, 2, 6, 3, 5)  # columns, then rows
        return x.reshape(batch, 3, time, height * patch, width * patch), tuple(frames.new)

    def unscale(self, latents: Array) -> Array:
        """latents * std + mean, by channel."""
        column = lambda values: np.array(values, np.float32)[None, :, None, None, None]
        return latents.astype(jnp.float32) * column(self.config.latents_std) + column(self.config.latents_mean)

    def _chunk(self, tiling: Tiling) -> int:
        """Latent frames of a piece."""
        return max(1, tiling.frames // self.time_ratio)

    def _windows(self, frames: int, tiling: Tiling) -> list[Window]:
        samples = self.time_ratio * (frames - 1) + 1
        return [Window(slice(0, frames), slice(0, samples), np.ones(samples, np.float32))]

    def _pieces(self, frames: int, tiling: Tiling) -> int:
        return 1 + -(-(frames - 1) // self._chunk(tiling))

    def _decode_window(self, step: Step, latents: np.ndarray, tiling: Tiling) -> Iterator[tuple[int, Array]]:
        total = latents.shape[2]
        chunk = min(self._chunk(tiling), max(total - 1, 1))
        pixels, cache = step(latents[:, :, :1], None)
        yield 0, pixels
        for start in range(1, total, chunk):
            piece = latents[:, :, start : start + chunk]
            # Frames made up behind the end change none before it, and no other shape compiles.
            piece = np.pad(piece, ((0, 0), (0, 0), (0, chunk - piece.shape[2]), (0, 0), (0, 0)))
            pixels, cache = step(piece, cache)
            yield self.time_ratio * (start - 1) + 1, pixels
