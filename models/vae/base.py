"""What the VAE decoders share: configs, convolutions, and decoding in pieces, one at a time on each device."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.transformers.layers import channels
from models.vae.tiling import Tiling, Window, space_windows

Progress = Callable[[int, int], None]
"""Called with (pieces decoded, pieces in all) as they are done."""
Step = Callable[[Any, Any], tuple[Array, Any]]
"""What decodes a wave: (latents [n, C, f, H, W], cache or None) to (pixels [n, 3, f', height, width], cache)."""


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

    def __call__(self, latents: Array, cache: Any = None) -> tuple[Array, Any]:
        """Unscaled [B, C, F, H, W] to [B, 3, frames, height, width] not clipped, and a cache for the frames behind."""
        raise NotImplementedError

    def unscale(self, latents: Array) -> Array:
        """float32 latents [B, C, F, H, W] of the sampler, as the decoder takes them."""
        raise NotImplementedError

    def _windows(self, frames: int, tiling: Tiling) -> list[Window]:
        """Windows in time that are decoded each for itself; all have as many latent frames."""
        raise NotImplementedError

    def _pieces(self, frames: int, tiling: Tiling) -> int:
        """Pieces that `_decode_window` yields of a window of so many latent frames."""
        return 1

    def _decode_window(self, step: Step, latents: np.ndarray, tiling: Tiling) -> Iterator[tuple[int, Array]]:
        """Decodes a wave of windows [n, C, f, H, W]: (first frame, pixels [n, 3, frames, height, width]) by piece."""
        yield 0, step(latents, None)[0]

    def decode(
        self,
        latents: Array,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
        mesh: Mesh | None = None,
    ) -> np.ndarray:
        """float32 video [B, 3, time_ratio * (F - 1) + 1, H * space_ratio, W * space_ratio] in [-1, 1], on the host.

        `latents` [B, C, F, H, W] are a sampler's result: their scaling is undone here. Decoded piece by piece, so a
        device holds one at a time; each shape of piece compiles once. All devices of `mesh` decode, a piece each, to
        the same video; None: one. Tiling changes the video, near seams most: see the model's class. None: the default
        `Tiling`; `WHOLE`: none.

        Raises ValueError for latents of another shape and for a tiling that the ratios do not divide.
        """
        tiling = tiling or Tiling()
        windows, span = self._all_windows(latents.shape, tiling)
        done, total = 0, len(windows) * self._pieces(span, tiling)
        step, count = self._step(mesh), 1 if mesh is None else mesh.size
        unscaled = np.asarray(self.unscale(jnp.asarray(latents)).astype(self.dtype))
        batch, _, frames, *size = latents.shape
        height, width = (n * self.space_ratio for n in size)
        video = np.zeros((batch, 3, self.time_ratio * (frames - 1) + 1, height, width), np.float32)
        for begin in range(0, len(windows), count):
            wave = windows[begin : begin + count]
            tiles = [unscaled[b, :, t.latents, r.latents, c.latents] for b, t, r, c in wave]
            tiles += tiles[-1:] * (count - len(wave))
            for first, pixels in self._decode_window(step, np.stack(tiles), tiling):
                for window, own in zip(wave, np.asarray(pixels), strict=False):
                    _blend(video, window, first, own, self.time_ratio * (span - 1) + 1)
                done += len(wave)
                if progress is not None:
                    progress(done, total)
        return np.clip(video, -1, 1, out=video)

    def _all_windows(
        self, shape: tuple[int, ...], tiling: Tiling
    ) -> tuple[list[tuple[int, Window, Window, Window]], int]:
        """((sample, time, row, column) of every window of latents [B, C, F, H, W], latent frames of one)."""
        if len(shape) != 5 or shape[1] != self.channels or 0 in shape:
            raise ValueError(f"latents must be [B, {self.channels}, F, H, W]; got {list(shape)}")
        batch, _, frames, *size = shape
        rows, columns = (space_windows(n, self.space_ratio, tiling) for n in size)
        times = self._windows(frames, tiling)
        found = [(b, t, r, c) for b in range(batch) for t in times for r in rows for c in columns]
        return found, times[0].latents.stop - times[0].latents.start

    def need(self, shape: tuple[int, ...], tiling: Tiling | None = None, mesh: Mesh | None = None) -> int:
        """Bytes of a device that `decode` of latents of this shape takes, weights and all, as the compiler has it.

        Weights need not be there. Each shape of piece is compiled, as `decode` will again, or finds it in JAX's cache.
        Raises ValueError as `decode`.
        """
        tiling = tiling or Tiling()
        windows, span = self._all_windows(shape, tiling)
        graph, weights = nnx.split(self)
        place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), weights)
        found: dict[Any, tuple[Any, int]] = {}

        def step(latents: Any, cache: Any) -> tuple[Any, Any]:
            key = latents.shape, *(x.shape for x in jax.tree.leaves(cache))
            if key not in found:
                compiled = decode_wave.lower(graph, mesh, weights, latents, cache).compile()
                memory = compiled.memory_analysis()
                sizes = memory and (
                    memory.argument_size_in_bytes,
                    memory.output_size_in_bytes,
                    memory.temp_size_in_bytes,
                )
                as_input = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                out = jax.tree.map(as_input, compiled.out_info, compiled.output_shardings)
                found[key] = out, sum(sizes or ())
            return found[key][0]

        sides = [part.latents.stop - part.latents.start for part in windows[0][2:]]
        wave = np.zeros((1 if mesh is None else mesh.size, self.channels, span, *sides), self.dtype)
        for _ in self._decode_window(step, wave, tiling):
            pass
        return max(size for _, size in found.values())

    def _step(self, mesh: Mesh | None) -> Step:
        """One piece on every device of the mesh."""
        graph, weights = nnx.split(self)
        if mesh is None:
            return lambda latents, cache: decode_wave(graph, None, weights, latents, cache)
        weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
        return lambda latents, cache: decode_wave(graph, mesh, weights, latents, cache)


@partial(jax.jit, static_argnums=(0, 1))
def decode_wave(graph: Any, mesh: Mesh | None, weights: Any, latents: Array, cache: Any) -> tuple[Array, Any]:
    """A piece a device, [n, C, f, H, W], to pixels [n, 3, f', height, width] on all of them; each keeps its cache."""
    decode = lambda weights, latents, cache: nnx.merge(graph, weights)(latents, cache)
    if mesh is None:
        return decode(weights, latents, cache)
    whole, own = PartitionSpec(), PartitionSpec(mesh.axis_names)
    wave = jax.shard_map(decode, mesh=mesh, in_specs=(whole, own, own), out_specs=own, check_vma=False)
    pixels, cache = wave(weights, latents, cache)
    return lax.with_sharding_constraint(pixels, NamedSharding(mesh, whole)), cache


def _blend(video: np.ndarray, window: tuple[int, Window, Window, Window], first: int, pixels: Any, frames: int) -> None:
    """Adds pixels [3, f, height, width], from frame `first` of a window's `frames`, to [B, 3, F, H, W], weighted."""
    sample, time, row, column = window
    # What a window shows later than its first frame is at the end of its frames.
    skipped = frames - len(time.weight)
    begin, stop = max(first, skipped), min(first + pixels.shape[1], frames)
    if begin >= stop:
        return
    weight = time.weight[begin - skipped : stop - skipped, None, None] * (row.weight[:, None] * column.weight)
    span = slice(time.samples.start + begin - skipped, time.samples.start + stop - skipped)
    share = np.asarray(pixels[:, begin - first : stop - first], np.float32) * weight
    video[sample, :, span, row.samples, column.samples] += share
