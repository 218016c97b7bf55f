"""How a video is cut into pieces to decode: tiles in space, windows in time, and how they are blended."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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
