"""What the VAE decoders share: configs, convolutions, and decoding in tiles, with memory bounded by one of them."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from models.transformers.layers import channels

Progress = Callable[[int, int], None]
"""Called with (pieces decoded, pieces in all) after each piece."""


@dataclass(frozen=True)
class Tiling:
    """How decoding is cut up, in pixels and frames of the video; the defaults are diffusers'.

    Larger tiles are faster and closer to decoding at once, and take more memory. Raises ValueError for strides that
    leave gaps.
    """

    size: int = 256
    """Height and width of a tile; at least the video's: no tiles in space."""
    stride: int = 192
    """From one tile to the next; what they overlap in is blended."""
    frames: int = 16
    """Of one piece in time. HunyuanVideo: one more, the first; at least the video's: all at once."""
    frame_stride: int = 12
    """HunyuanVideo only: Wan's pieces in time join exactly, with no overlap."""

    def __post_init__(self) -> None:
        for length, stride in ((self.size, self.stride), (self.frames, self.frame_stride)):
            if not 0 < stride <= length:
                raise ValueError(f"{stride=} must be positive and at most the tile's {length}; got {self}")


WHOLE = Tiling(1 << 30, 1 << 30, 1 << 30, 1 << 30)
"""Everything at once: for short, small videos."""


class Window(NamedTuple):
    """One tile along one axis."""

    latents: slice
    samples: slice
    weight: np.ndarray
    """float32 [samples]: of this tile where it is blended with others; these add up to 1."""


def _ramps(spans: list[tuple[int, int]], blend: int) -> list[np.ndarray]:
    """float32 weight of each span of samples; linear over `blend` samples in the middle of each overlap."""
    ups = [np.ones(stop - start) for start, stop in spans]
    for (_, before), (start, stop), up in zip(spans, spans[1:], ups[1:], strict=False):
        first = start + (before - start - blend) // 2
        up[:] = ((np.arange(start, stop) - first) / blend).clip(0, 1) if blend else np.arange(start, stop) >= first
    weights = []
    for k, ((start, stop), weight) in enumerate(zip(spans, ups, strict=True)):
        for (later, _), up in zip(spans[k + 1 :], ups[k + 1 :], strict=True):
            if later < stop:
                weight[later - start :] *= 1 - up[: stop - later]
        weights.append(weight.astype(np.float32))
    return weights


def space_windows(size: int, ratio: int, tiling: Tiling) -> list[Window]:
    """Tiles along an axis of `size` latents of `ratio` samples each. All have the same length, so one compiles.

    The last one starts early rather than being short, unlike diffusers', and so sees more context. Raises ValueError
    for a tiling that `ratio` does not divide.
    """
    if tiling.size >= size * ratio:
        return [Window(slice(0, size), slice(0, size * ratio), np.ones(size * ratio, np.float32))]
    if tiling.size % ratio or tiling.stride % ratio:
        raise ValueError(f"{tiling} must have a size and a stride that are multiples of {ratio}")
    starts = _starts(size, tiling.size // ratio, tiling.stride // ratio)
    spans = [(start * ratio, start * ratio + tiling.size) for start in starts]
    return [
        Window(slice(start, start + tiling.size // ratio), slice(*span), weight)
        for start, span, weight in zip(starts, spans, _ramps(spans, tiling.size - tiling.stride), strict=True)
    ]


def _starts(size: int, tile: int, stride: int) -> list[int]:
    return [*range(0, size - tile, stride), size - tile]


def time_windows(size: int, ratio: int, tiling: Tiling) -> list[Window]:
    """Pieces of `size` latent frames, for a decoder whose first latent frame makes one frame and others `ratio`.

    The first frame of a piece that does not begin the video lacks the frames before it: samples leave it out. Raises
    ValueError for a tiling that `ratio` does not divide.
    """
    if tiling.frames + 1 >= ratio * (size - 1) + 1:
        samples = ratio * (size - 1) + 1
        return [Window(slice(0, size), slice(0, samples), np.ones(samples, np.float32))]
    if tiling.frames % ratio or tiling.frame_stride % ratio:
        raise ValueError(f"{tiling} must have frames and a frame_stride that are multiples of {ratio}")
    tile = tiling.frames // ratio + 1
    starts = _starts(size, tile, tiling.frame_stride // ratio)
    spans = [(ratio * start + (start > 0), ratio * (start + tile - 1) + 1) for start in starts]
    return [
        Window(slice(start, start + tile), slice(*span), weight)
        for start, span, weight in zip(starts, spans, _ramps(spans, tiling.frames - tiling.frame_stride), strict=True)
    ]


class VAEConfig:
    """Base of the decoders' configs: frozen dataclasses with the names and defaults of diffusers' config.json.

    Construction raises NotImplementedError for an architecture that is not ported, ValueError for what cannot work.
    """

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; keys that start with "_" are ignored, unknown ones are a ValueError."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        fields = {k: v for k, v in config.items() if not k.startswith("_")}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"config.json has options this port does not know: {', '.join(unknown)}")
        return cls(**fields)

    def _freeze(self) -> None:
        """Lists of config.json become tuples, which hash."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))

    def _check_counts(self, *names: str) -> None:
        """ValueError unless each field is a whole number of at least 1."""
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


class Conv(nnx.Module):
    """Convolution over [B, T, H, W, C] without padding; kernel [t, h, w, in, out]."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], *, dtype: Any, rngs: nnx.Rngs):
        bound = (in_dim * kernel[0] * kernel[1] * kernel[2]) ** -0.5
        shape = (*kernel, in_dim, out_dim)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, dtype, -bound, bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (out_dim,), dtype, -bound, bound))

    def __call__(self, x: Array) -> Array:
        """[B, T, H, W, in] to [B, T - t + 1, H - h + 1, W - w + 1, out]."""
        numbers = ("NDHWC", "DHWIO", "NDHWC")
        y = lax.conv_general_dilated(x, self.kernel[...], (1, 1, 1), "VALID", None, None, numbers)
        return y + channels(self.bias[...], y)


def upsample(x: Array, frames: int, size: int) -> Array:
    """Repeats frames, and rows and columns, of [B, T, H, W, C] (nearest neighbour)."""
    for axis, times in ((1, frames), (2, size), (3, size)):
        x = jnp.repeat(x, times, axis) if times > 1 else x
    return x


class VideoVAE(nnx.Module):
    """The decoder of a video VAE; latents as a sampler leaves them to pixels."""

    config: Any
    dtype: Any
    """Of parameters and computation; norms and softmax are float32 inside."""
    channels: int
    """Of the latents."""
    space_ratio: int
    """Pixels of a latent, in each direction."""
    time_ratio: int
    """Frames of a latent frame but the first, which makes one."""

    def unscale(self, latents: Array) -> Array:
        """float32 latents [B, C, F, H, W] of the sampler, as the decoder takes them."""
        raise NotImplementedError

    def _pieces(self, frames: int, tiling: Tiling) -> int:
        """Pieces in time that `_decode_tile` yields."""
        raise NotImplementedError

    def _decode_tile(
        self, graph: Any, weights: Any, latents: Array, tiling: Tiling
    ) -> Iterator[tuple[slice, np.ndarray, Array]]:
        """Decodes unscaled [1, C, F, H, W]; yields (frames, float32 weight of each, [3, frames, height, width])."""
        raise NotImplementedError

    def decode(self, latents: Array, tiling: Tiling | None = None, progress: Progress | None = None) -> np.ndarray:
        """float32 video [B, 3, time_ratio * (F - 1) + 1, H * space_ratio, W * space_ratio] in [-1, 1], on the host.

        `latents` [B, C, F, H, W] are a sampler's result: their scaling is undone here. Decoded sample by sample and
        tile by tile, so the device holds one piece at a time; each shape of piece compiles once. Tiling changes the
        video, near seams most: see the model's class. None: the default `Tiling`; `WHOLE`: none.

        Raises ValueError for latents of another shape and for a tiling that the ratios do not divide.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels or 0 in latents.shape:
            raise ValueError(f"latents must be [B, {self.channels}, F, H, W]; got {list(latents.shape)}")
        tiling = tiling or Tiling()
        batch, _, frames, *size = latents.shape
        rows, columns = (space_windows(n, self.space_ratio, tiling) for n in size)
        done, total = 0, batch * len(rows) * len(columns) * self._pieces(frames, tiling)
        graph, weights = nnx.split(self)
        unscaled = self.unscale(jnp.asarray(latents)).astype(self.dtype)
        height, width = (n * self.space_ratio for n in size)
        video = np.zeros((batch, 3, self.time_ratio * (frames - 1) + 1, height, width), np.float32)
        for sample, row, column in ((b, r, c) for b in range(batch) for r in rows for c in columns):
            tile = unscaled[sample : sample + 1, :, :, row.latents, column.latents]
            weight = row.weight[:, None] * column.weight
            for span, ramp, pixels in self._decode_tile(graph, weights, tile, tiling):
                share = np.asarray(pixels, np.float32) * (ramp[:, None, None] * weight)
                video[sample, :, span, row.samples, column.samples] += share
                done += 1
                if progress is not None:
                    progress(done, total)
        return np.clip(video, -1, 1, out=video)
