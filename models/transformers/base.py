"""What the ports share: the interface that pipelines see, stacks of blocks, patches, the attention call."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from adaspa_jax import AttentionSharding, Parts, SparseConfig, SparseState, StepKind, TokenLayout, attend
from models.transformers.layers import merge_heads
from models.transformers.rope import apply_rope
from pallas_kernels import Implementation, flash_attention

DENSE = SparseConfig(token_order="raster")
"""The layout of a model that is called without a SparseConfig."""

Grid = tuple[int, int, int]
"""Frames, rows and columns, of tokens or of latents."""
Carry = TypeVar("Carry")
QKV = tuple[Array, Array, Array]
"""[B, N, H, D] each."""


class TransformerConfig:
    """Base of the ports' configs: frozen dataclasses with the names and defaults of diffusers' config.json.

    Construction raises NotImplementedError for an architecture that is not ported, ValueError for numbers that
    cannot work.
    """

    in_channels: int
    out_channels: int
    num_attention_heads: int
    attention_head_dim: int

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; keys that start with "_" are ignored, unknown ones are a ValueError."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        fields = {k: v for k, v in config.items() if not k.startswith("_") and k != "adaspa_jax"}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"config.json has options this port does not know: {', '.join(unknown)}")
        return cls(**fields)

    @property
    def patch(self) -> Grid:
        """Frames, rows and columns of a patch."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_volume(self) -> int:
        """Latent positions of a patch."""
        return math.prod(self.patch)

    def _check_counts(self, *names: str) -> None:
        """ValueError unless each field is a whole number of at least 1."""
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")

    def _check_ported(self, **only: Any) -> None:
        """NotImplementedError unless each field has the one value that is ported."""
        for name, value in only.items():
            if getattr(self, name) != value:
                raise NotImplementedError(f"{name}={getattr(self, name)!r} is not ported, only {value!r} is")

    def _set(self, **values: Any) -> None:
        """Normalises fields of the frozen dataclass."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class VideoTransformer(nnx.Module):
    """The interface of every port: a denoiser that AdaSpa runs in.

    A call takes the keyword names and array layouts of diffusers' class, which `denoise` documents, and four more that
    say how AdaSpa runs, see `__call__`. So a pipeline that scans over steps needs to know of a model only which
    keywords to feed it.
    """

    config: Any
    """Its TransformerConfig."""
    dtype: Any
    """Of parameters and computation; norms and softmax are float32 inside."""
    joint_text: ClassVar[bool] = True
    """Whether text tokens take part in self-attention, behind the video's."""

    def stack_sizes(self) -> tuple[int, ...]:
        """Layers of each stack of blocks that attends with AdaSpa, in the order they run."""
        raise NotImplementedError

    def layout(self, latent_shape: Grid, text: int, config: SparseConfig | None = None) -> TokenLayout:
        """The token layout for latents of (F, H, W) and `text` text tokens; None: raster order.

        A model without joint text has none in its layout, whatever `text` is. Raises ValueError if the patch does not
        divide the latents, with the nearest size that fits.
        """
        patch = self.config.patch
        if any(n % p or n < p for n, p in zip(latent_shape, patch, strict=True)):
            nearest = tuple(max(p, round(n / p) * p) for n, p in zip(latent_shape, patch, strict=True))
            raise ValueError(f"latents of {tuple(latent_shape)} are no multiple of the {patch=}; nearest: {nearest}")
        grid = [n // p for n, p in zip(latent_shape, patch, strict=True)]
        return (config or DENSE).layout((grid[0], grid[1], grid[2]), text if self.joint_text else 0)

    def init_state(
        self,
        config: SparseConfig,
        batch: int,
        latent_shape: Grid,
        text: int,
        keep_mass: bool = False,
        sharding: AttentionSharding | None = None,
    ) -> tuple[SparseState, ...]:
        """Empty states, one for each stack of blocks, with a leading layer axis; see `SparseState.create`."""
        layout, heads = self.layout(latent_shape, text, config), self.config.num_attention_heads
        create = lambda layers: SparseState.create(layout, config, batch, heads, layers, keep_mass, sharding)
        return tuple(create(layers) for layers in self.stack_sizes())

    def __call__(
        self,
        *args: Array,
        config: SparseConfig | None = None,
        state: tuple[SparseState, ...] | None = None,
        step_kind: StepKind | int | Array = StepKind.DENSE,
        implementation: Implementation | None = None,
        sharding: AttentionSharding | None = None,
        **inputs: Any,
    ) -> Any:
        """Predicts what the scheduler steps along.

        Args:
          args: as `denoise` takes them.
          config: how AdaSpa runs; None: dense, in raster order.
          state: from `init_state`; None: dense.
          step_kind: StepKind or traced int32 scalar; needs a state unless dense.
          implementation: which kernels run, see `pallas_kernels`.
          sharding: over which devices, inside `jax.jit`; the state must be of the same. Weights may be replicated, or
            sharded in any way: each layer's are gathered as it runs.
          inputs: as `denoise` takes them.

        Returns:
          The sample, shaped like the latents; with a state, (sample, new state).

        Raises:
          ValueError: shapes that do not fit the model or each other.
        """
        sparse = config or DENSE
        how = Pass(sparse, self._stacks(sparse, step_kind, state), implementation, sharding)
        sample, states = self.denoise(how, *args, **inputs)
        return sample if state is None else (sample, states)

    def denoise(self, how: "Pass", *args: Any, **inputs: Any) -> tuple[Array, tuple[SparseState | None, ...]]:
        """(sample, the new state of each stack); the inputs are diffusers'."""
        raise NotImplementedError

    def _stacks(self, config: SparseConfig, step_kind: Any, state: Any) -> list[tuple[SparseState | None, Array]]:
        """For each stack of blocks its state and int32 [layers] step kinds. ValueError if these do not fit."""
        sizes = self.stack_sizes()
        if state is None and not (isinstance(step_kind, int) and step_kind == StepKind.DENSE):
            raise ValueError(f"{step_kind=} needs a state; make one with init_state")
        if state is not None and len(state) != len(sizes):
            raise ValueError(f"state must hold {len(sizes)} SparseStates, from init_state; got {len(state)}")
        kinds = jnp.split(config.layer_kinds(step_kind, sum(sizes)), np.cumsum(sizes)[:-1])
        return list(zip([None] * len(sizes) if state is None else state, kinds, strict=True))


@dataclass(frozen=True)
class Pass:
    """How AdaSpa runs in one forward pass."""

    config: SparseConfig
    layers: list[tuple[SparseState | None, Array]]
    """Of each stack of blocks the state, if any, and int32 [layers] step kinds."""
    implementation: Implementation | None
    sharding: AttentionSharding | None


@dataclass(frozen=True)
class AttentionCall:
    """What all layers of one forward pass share; make it with `create`."""

    layout: TokenLayout
    config: SparseConfig
    block_valid: Array
    rope: tuple[Array, Array] | None
    """(cos, sin) float32 [1, Nv, D / 2] in the layout's order; None: no rotation."""
    implementation: Implementation | None
    sharding: AttentionSharding | None

    @classmethod
    def create(
        cls,
        how: Pass,
        layout: TokenLayout,
        rope: tuple[Array, Array] | None,
        batch: int,
        text_valid: Array | None = None,
    ) -> Self:
        """`rope` [video_tokens, D / 2] in raster order; `text_valid` [B]: real text tokens, None: all are."""
        valid = layout.block_valid(text_valid, batch)
        call = cls(layout, how.config, valid, None, how.implementation, how.sharding)
        if rope is None:
            return call
        return dataclasses.replace(
            call, rope=(call.pack(rope[0][None], shared=True), call.pack(rope[1][None], shared=True))
        )

    def pack(self, x: Array, shared: bool = False) -> Array:
        """[B, video_tokens, ...] to [B, Nv, ...]: the layout's order, on a mesh padded and sharded over the tokens.

        `shared`: B is 1, for all samples.
        """
        x = self.layout.pack_video(x)
        return x if self.sharding is None else self.sharding.pad(x, self.layout, shared)

    def unpack(self, x: Array) -> Array:
        """The way back."""
        return self.layout.unpack_video(x[:, : self.layout.video_length])

    def text(self, x: Array) -> Array:
        """Text tokens [B, Nt, ...], on a mesh whole on every device."""
        return x if self.sharding is None else self.sharding.text(x)

    def keep(self, parts: Parts) -> Parts:
        """Video and text [B, N, ...], on a mesh pinned to where they are: else XLA gathers tokens to multiply them."""
        return parts if self.sharding is None else (self.sharding.video(parts[0]), self.sharding.text(parts[1]))

    def keep_video(self, x: Array) -> Array:
        """`keep` of the video alone."""
        return x if self.sharding is None else self.sharding.video(x)

    def cross(self, q: Array, k: Array, v: Array) -> Array:
        """[B, Nv, H, D] of the video's q, like it, over all of k and v [B, T, H, D]; on a mesh by tokens."""

        def local(q: Array, k: Array, v: Array) -> Array:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            return flash_attention(q, k, v, implementation=self.implementation).swapaxes(1, 2)

        return local(q, k, v) if self.sharding is None else self.sharding.over_tokens(local, q, k, v)

    def rotate(self, x: Array) -> Array:
        """RoPE on the video's [B, Nv, H, D]."""
        return x if self.rope is None else apply_rope(x, *self.rope)

    def __call__(
        self, video: QKV, text: QKV | None, state: SparseState | None, kind: Any
    ) -> tuple[Parts, SparseState | None]:
        """q, k and v of video [B, Nv, H, D] and text [B, Nt, H, D] to ([B, Nv, width] and [B, Nt, width], state).

        Rotates the video's q and k. None: the model's text does not take part.
        """
        none = video[0][:, :0]
        pairs = zip(video, text or (none, none, none), strict=True)
        q, k, v = (self.keep((of_video, of_text)) for of_video, of_text in pairs)
        out, state = attend(
            (self.rotate(q[0]), q[1]),
            (self.rotate(k[0]), k[1]),
            v,
            state,
            StepKind.DENSE if state is None else kind,
            layout=self.layout,
            config=self.config,
            block_valid=self.block_valid,
            implementation=self.implementation,
            sharding=self.sharding,
        )
        return (merge_heads(out[0]), merge_heads(out[1])), state


def stack(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules as one, every parameter with a leading layer axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return create(rngs)

    return build(rngs)


def scan_blocks(
    run: Callable[[Any, Carry, SparseState | None, Array], tuple[Carry, SparseState | None]],
    blocks: nnx.Module,
    carry: Carry,
    layers: tuple[SparseState | None, Array],
    sharding: AttentionSharding | None = None,
) -> tuple[Carry, SparseState | None]:
    """Runs stacked blocks one after the other, each with its layer's part of `layers`: state and step kind.

    `run(block, carry, state, kind)` gives the next carry, which is cast back to the carry's dtypes, and the new state.
    On a mesh sharded weights are gathered here, those of one layer at a time; weights that are in the memory of the
    host are fetched here likewise.
    """
    graph, weights = nnx.split(blocks)

    def step(carry: Carry, xs: Any) -> Any:
        weights, (state, kind) = xs
        weights = on_device(weights) if sharding is None else sharding.replicated(weights)
        new, state = run(nnx.merge(graph, weights), carry, state, kind)
        return jax.tree.map(lambda x, old: x.astype(old.dtype), new, carry), state

    return lax.scan(step, carry, (weights, layers))


def on_device(weights: Any) -> Any:
    """Inside `jax.jit`: on the device, if their type says that they are in the memory of the host."""
    space = jax.memory.Space
    fetch = lambda x: jax.device_put(x, space.Device) if jax.typeof(x).memory_space == space.Host else x
    return jax.tree.map(fetch, weights)


def patchify(x: Array, patch: Grid) -> Array:
    """[B, C, F, H, W] to [B, f * h * w, C * pt * ph * pw], channels first in a patch as in a Conv3d kernel."""
    batch, channels, *size = x.shape
    f, h, w = (n // p for n, p in zip(size, patch, strict=True))
    pt, ph, pw = patch
    x = x.reshape(batch, channels, f, pt, h, ph, w, pw).transpose(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(batch, f * h * w, -1)


def unpatchify(tokens: Array, grid: Grid, patch: Grid, *, channels_last: bool = False) -> Array:
    """[B, f * h * w, C * pt * ph * pw], or with C last in a patch, to [B, C, F, H, W]."""
    (f, h, w), (pt, ph, pw) = grid, patch
    if channels_last:
        x = tokens.reshape(-1, f, h, w, pt, ph, pw, tokens.shape[-1] // math.prod(patch))
        x = x.transpose(0, 7, 1, 4, 2, 5, 3, 6)
    else:
        x = tokens.reshape(-1, f, h, w, tokens.shape[-1] // math.prod(patch), pt, ph, pw)
        x = x.transpose(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(-1, x.shape[1], f * pt, h * ph, w * pw)


def check_shape(name: str, x: Array | None, shape: Sequence[int | str]) -> None:
    """ValueError unless x has that shape; a dimension named by a string may be anything."""
    found = None if x is None else list(x.shape)
    if (
        found is None
        or len(found) != len(shape)
        or any(isinstance(want, int) and have != want for have, want in zip(found, shape, strict=True))
    ):
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}]; got {found}")
