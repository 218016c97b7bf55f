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

from adaspa_jax import SparseConfig, SparseState, StepKind, TokenLayout, adaspa_attention
from models.transformers.layers import merge_heads
from models.transformers.rope import apply_rope
from pallas_kernels import Implementation

DENSE = SparseConfig(token_order="raster")
"""The layout of a model that is called without a SparseConfig."""

Grid = tuple[int, int, int]
"""Frames, rows and columns, of tokens or of latents."""
Carry = TypeVar("Carry")


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
        self, config: SparseConfig, batch: int, latent_shape: Grid, text: int, keep_mass: bool = False
    ) -> tuple[SparseState, ...]:
        """Empty states, one for each stack of blocks, with a leading layer axis."""
        layout, heads = self.layout(latent_shape, text, config), self.config.num_attention_heads
        create = lambda layers: SparseState.create(layout, config, batch, heads, layers, keep_mass)
        return tuple(create(layers) for layers in self.stack_sizes())

    def __call__(
        self,
        *args: Array,
        config: SparseConfig | None = None,
        state: tuple[SparseState, ...] | None = None,
        step_kind: StepKind | int | Array = StepKind.DENSE,
        implementation: Implementation | None = None,
        **inputs: Any,
    ) -> Any:
        """Predicts what the scheduler steps along.

        Args:
          args: as `denoise` takes them.
          config: how AdaSpa runs; None: dense, in raster order.
          state: from `init_state`; None: dense.
          step_kind: StepKind or traced int32 scalar; needs a state unless dense.
          implementation: which kernels run, see `pallas_kernels`.
          inputs: as `denoise` takes them.

        Returns:
          The sample, shaped like the latents; with a state, (sample, new state).

        Raises:
          ValueError: shapes that do not fit the model or each other.
        """
        sparse = config or DENSE
        how = Pass(sparse, self._stacks(sparse, step_kind, state), implementation)
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


@dataclass(frozen=True)
class AttentionCall:
    """What all layers of one forward pass share; make it with `create`."""

    layout: TokenLayout
    config: SparseConfig
    block_valid: Array
    rope: tuple[Array, Array] | None
    """(cos, sin) float32 [1, video_length, D / 2] in the layout's order; None: no rotation."""
    implementation: Implementation | None

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
        packed = None if rope is None else (layout.pack_video(rope[0][None]), layout.pack_video(rope[1][None]))
        return cls(layout, how.config, layout.block_valid(text_valid, batch), packed, how.implementation)

    def rotate(self, x: Array) -> Array:
        """RoPE on the video part of [B, L or video_length, H, D]."""
        if self.rope is None:
            return x
        video = self.layout.video_length
        rotated = apply_rope(x[:, :video], *self.rope)
        return rotated if x.shape[1] == video else jnp.concatenate([rotated, x[:, video:]], axis=1)

    def __call__(
        self, q: Array, k: Array, v: Array, state: SparseState | None, kind: Any
    ) -> tuple[Array, SparseState | None]:
        """[B, L, H, D] each to ([B, L, width], state)."""
        out, state = adaspa_attention(
            q,
            k,
            v,
            state,
            StepKind.DENSE if state is None else kind,
            layout=self.layout,
            config=self.config,
            block_valid=self.block_valid,
            implementation=self.implementation,
        )
        return merge_heads(out), state


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
) -> tuple[Carry, SparseState | None]:
    """Runs stacked blocks one after the other, each with its layer's part of `layers`: state and step kind.

    `run(block, carry, state, kind)` gives the next carry, which is cast back to the carry's dtypes, and the new state.
    """
    graph, weights = nnx.split(blocks)

    def step(carry: Carry, xs: Any) -> Any:
        weights, (state, kind) = xs
        new, state = run(nnx.merge(graph, weights), carry, state, kind)
        return jax.tree.map(lambda x, old: x.astype(old.dtype), new, carry), state

    return lax.scan(step, carry, (weights, layers))


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
