"""HunyuanVideo's transformer in Flax NNX, with AdaSpa inside (source: diffusers `HunyuanVideoTransformer3DModel`).

Module names follow diffusers' parameter names. Blocks of a kind are stacked and run by one `lax.scan`, the sparse
state of each layer going through its xs and ys.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from adaspa_jax import SparseConfig, SparseState, StepKind, TokenLayout, adaspa_attention
from models.layers import (
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    SiluMLP,
    gelu_tanh,
    layer_norm,
    merge_heads,
    modulate,
    silu,
    split_heads,
    timestep_embedding,
)
from models.rope import apply_rope, rope_tables
from pallas_kernels import Implementation

TIME_CHANNELS = 256
"""Sinusoids of a timestep."""
_COUNTS = {
    "in_channels",
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "num_single_layers",
    "num_refiner_layers",
    "patch_size",
    "patch_size_t",
    "text_embed_dim",
    "pooled_projection_dim",
}
"""Fields of the config that are whole numbers from 1."""


@dataclass(frozen=True)
class HunyuanVideoConfig:
    """diffusers' config names and defaults: the 13B text-to-video model.

    Raises NotImplementedError for an architecture that is not ported, ValueError for numbers that cannot work.
    """

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    image_condition_type: str | None = None

    def __post_init__(self) -> None:
        if self.image_condition_type is not None:
            raise NotImplementedError(
                f"image_condition_type={self.image_condition_type!r}: image-to-video is not ported, only None is"
            )
        if self.qk_norm != "rms_norm":
            raise NotImplementedError(f"qk_norm={self.qk_norm!r} is not ported, only 'rms_norm' is")
        if self.out_channels is None:  # diffusers: as many as go in
            object.__setattr__(self, "out_channels", self.in_channels)
        object.__setattr__(self, "rope_axes_dim", tuple(self.rope_axes_dim))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _COUNTS and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name}={value!r} must be a whole number of at least 1")
        axes = self.rope_axes_dim
        if len(axes) != 3 or any(type(n) is not int or n < 2 or n % 2 for n in axes):
            raise ValueError(f"rope_axes_dim={axes} must be three even numbers: frames, rows, columns")
        if sum(axes) != self.attention_head_dim:
            raise ValueError(f"rope_axes_dim={axes} must add up to attention_head_dim={self.attention_head_dim}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "HunyuanVideoConfig":
        """From a config.json; keys that start with "_" are ignored, unknown ones are a ValueError."""
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {k: v for k, v in config.items() if not k.startswith("_") and k != "adaspa_jax"}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"config.json has options this port does not know: {', '.join(unknown)}")
        return cls(**fields)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return self.patch_size_t, self.patch_size, self.patch_size

    @property
    def patch_volume(self) -> int:
        """Latent positions of a patch."""
        return math.prod(self.patch)


def _stack(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules as one, every parameter with a leading layer axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return create(rngs)

    return build(rngs)


class PatchEmbed(nnx.Module):
    """A linear map of each patch; the channels of a patch are ordered (C, pt, ph, pw), as a Conv3d kernel is."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.proj = Linear(config.in_channels * config.patch_volume, config.width, dtype=dtype, rngs=rngs)
        self.patch = config.patch

    def __call__(self, x: Array) -> Array:
        """[B, C, F, H, W] to [B, f * h * w, width]."""
        batch, channels, *size = x.shape
        f, h, w = (n // p for n, p in zip(size, self.patch, strict=True))
        pt, ph, pw = self.patch
        x = x.reshape(batch, channels, f, pt, h, ph, w, pw).transpose(0, 2, 4, 6, 1, 3, 5, 7)
        return self.proj(x.reshape(batch, f * h * w, -1))


class TimeTextEmbed(nnx.Module):
    """Embeds timestep, pooled text and, for a guidance-distilled model, the guidance scale."""

    def __init__(self, text_dim: int, width: int, guidance: bool, *, dtype: Any, rngs: nnx.Rngs):
        self.timestep_embedder = SiluMLP(TIME_CHANNELS, width, dtype=dtype, rngs=rngs)
        self.text_embedder = SiluMLP(text_dim, width, dtype=dtype, rngs=rngs)
        if guidance:
            self.guidance_embedder = SiluMLP(TIME_CHANNELS, width, dtype=dtype, rngs=rngs)

    def __call__(self, timestep: Array, pooled: Array, guidance: Array | None = None) -> Array:
        """timestep [B], pooled [B, text_dim], guidance [B] to [B, width]."""
        sinusoids = lambda t: timestep_embedding(t, TIME_CHANNELS).astype(pooled.dtype)
        embedding = self.timestep_embedder(sinusoids(timestep))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoids(guidance))
        return embedding + self.text_embedder(pooled)


class Modulation(nnx.Module):
    """SiLU and a linear map of the conditioning vector, cut into `parts`."""

    def __init__(self, width: int, parts: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(width, parts * width, dtype=dtype, rngs=rngs)
        self.parts = parts

    def __call__(self, temb: Array) -> list[Array]:
        """[B, width] to `parts` times [B, width]."""
        return jnp.split(self.linear(silu(temb)), self.parts, axis=-1)


class RefinerAttention(nnx.Module):
    """Self-attention among the few text tokens."""

    def __init__(self, width: int, heads: int, *, dtype: Any, rngs: nnx.Rngs):
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4))
        self.heads = heads

    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B, T, width], mask bool [B, 1, T, T]."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return self.to_out(merge_heads(jnp.einsum("bhqk,bkhd->bqhd", weights, v)))


class RefinerBlock(nnx.Module):
    """A transformer block over the text tokens, gated by timestep and pooled text."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.norm1 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attn = RefinerAttention(width, config.num_attention_heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(width, 4 * width, dtype=dtype, rngs=rngs)
        self.norm_out = Modulation(width, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, temb: Array, mask: Array) -> Array:
        """x [B, T, width]."""
        gate_attn, gate_ff = self.norm_out(temb)
        x = x + self.attn(self.norm1(x), mask) * gate_attn[:, None]
        return x + self.ff(self.norm2(x), silu) * gate_ff[:, None]


class TokenRefiner(nnx.Module):
    """Projects and refines the text embeddings."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.time_text_embed = TimeTextEmbed(config.text_embed_dim, config.width, False, dtype=dtype, rngs=rngs)
        self.proj_in = Linear(config.text_embed_dim, config.width, dtype=dtype, rngs=rngs)
        create = lambda rngs: RefinerBlock(config, dtype=dtype, rngs=rngs)
        self.refiner_blocks = _stack(create, config.num_refiner_layers, rngs)

    def __call__(self, text: Array, timestep: Array, mask: Array) -> Array:
        """text [B, T, E], mask [B, T] to [B, T, width]."""
        weight = mask.astype(jnp.float32)[..., None]
        pooled = ((text * weight).sum(1) / weight.sum(1)).astype(text.dtype)
        temb = self.time_text_embed(timestep, pooled)
        real = jnp.asarray(mask, bool)
        # Every row sees key 0, so that padding rows see something.
        pairs = (real[:, None, :] & real[:, :, None]).at[:, :, 0].set(True)[:, None]
        graph, weights = nnx.split(self.refiner_blocks)

        def block(x: Array, weights: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, weights)(x, temb, pairs).astype(x.dtype), None

        return lax.scan(block, self.proj_in(text), weights)[0]


class JointAttention(nnx.Module):
    """Projections and norms of joint attention; `context` adds own ones for text (dual-stream blocks)."""

    def __init__(self, config: HunyuanVideoConfig, context: bool, *, dtype: Any, rngs: nnx.Rngs):
        width, head_dim = config.width, config.attention_head_dim
        linear = lambda: Linear(width, width, dtype=dtype, rngs=rngs)
        norm = lambda: RMSNorm(head_dim, dtype=dtype, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k = linear(), linear(), linear(), norm(), norm()
        if context:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            self.norm_added_q, self.norm_added_k = norm(), norm()
            self.to_out, self.to_add_out = linear(), linear()
        self.heads = config.num_attention_heads

    def video_qkv(self, x: Array) -> tuple[Array, Array, Array]:
        """[B, N, width] to three times [B, N, H, D], q and k normalised."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def text_qkv(self, x: Array) -> tuple[Array, Array, Array]:
        """As `video_qkv`, with the weights for text."""
        projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (split_heads(project(x), self.heads) for project in projections)
        return self.norm_added_q(q), self.norm_added_k(k), v


@dataclass(frozen=True)
class AttentionCall:
    """What all layers of one forward pass share."""

    layout: TokenLayout
    config: SparseConfig
    block_valid: Array
    cos: Array
    sin: Array
    implementation: Implementation | None

    def rotate(self, x: Array) -> Array:
        """RoPE on the video part of [B, L or video_length, H, D]."""
        video = self.layout.video_length
        rotated = apply_rope(x[:, :video], self.cos, self.sin)
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


class DualStreamBlock(nnx.Module):
    """Video and text with weights of their own, joined in attention."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm1, self.norm1_context = (Modulation(width, 6, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attn = JointAttention(config, True, dtype=dtype, rngs=rngs)
        self.ff, self.ff_context = (FeedForward(width, hidden, dtype=dtype, rngs=rngs) for _ in range(2))

    def __call__(
        self, video: Array, text: Array, temb: Array, call: AttentionCall, state: SparseState | None, kind: Any
    ) -> tuple[Array, Array, SparseState | None]:
        """video [B, Nv, width], text [B, Nt, width], temb [B, width]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(temb)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = self.norm1_context(temb)
        length = video.shape[1]
        with jax.named_scope("qkv"):
            q, k, v = self.attn.video_qkv(modulate(layer_norm(video), shift, scale))  # [B, Nv, H, D]
            text_q, text_k, text_v = self.attn.text_qkv(modulate(layer_norm(text), t_shift, t_scale))  # [B, Nt, H, D]
            pairs = ((call.rotate(q), text_q), (call.rotate(k), text_k), (v, text_v))
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in pairs)  # [B, L, H, D]
        with jax.named_scope("attention"):
            out, state = call(q, k, v, state, kind)  # [B, L, width]
            video = video + self.attn.to_out(out[:, :length]) * gate[:, None]
            text = text + self.attn.to_add_out(out[:, length:]) * t_gate[:, None]
        with jax.named_scope("mlp"):
            ff = self.ff(modulate(layer_norm(video), ff_shift, ff_scale), gelu_tanh)
            text_ff = self.ff_context(modulate(layer_norm(text), t_ff_shift, t_ff_scale), gelu_tanh)
            return video + ff_gate[:, None] * ff, text + t_ff_gate[:, None] * text_ff, state


class SingleStreamBlock(nnx.Module):
    """Video and text as one sequence; attention and MLP side by side."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm = Modulation(width, 3, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config, False, dtype=dtype, rngs=rngs)
        self.proj_mlp = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(width + hidden, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Array, temb: Array, call: AttentionCall, state: SparseState | None, kind: Any
    ) -> tuple[Array, SparseState | None]:
        """x [B, L, width], temb [B, width]."""
        shift, scale, gate = self.norm(temb)
        normed = modulate(layer_norm(x), shift, scale)  # [B, L, width]
        with jax.named_scope("qkv"):
            q, k, v = self.attn.video_qkv(normed)  # [B, L, H, D]
            q, k = call.rotate(q), call.rotate(k)
        with jax.named_scope("attention"):
            out, state = call(q, k, v, state, kind)  # [B, L, width]
        with jax.named_scope("mlp"):
            hidden = jnp.concatenate([out, gelu_tanh(self.proj_mlp(normed))], axis=-1)  # [B, L, width + hidden]
            return x + gate[:, None] * self.proj_out(hidden), state


class HunyuanVideoTransformer(nnx.Module):
    """The denoiser. Parameters and computation share `dtype`; norms and softmax are float32 inside."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        width = config.width
        self.x_embedder = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.context_embedder = TokenRefiner(config, dtype=dtype, rngs=rngs)
        self.time_text_embed = TimeTextEmbed(
            config.pooled_projection_dim, width, config.guidance_embeds, dtype=dtype, rngs=rngs
        )
        dual = lambda rngs: DualStreamBlock(config, dtype=dtype, rngs=rngs)
        single = lambda rngs: SingleStreamBlock(config, dtype=dtype, rngs=rngs)
        self.transformer_blocks = _stack(dual, config.num_layers, rngs)
        self.single_transformer_blocks = _stack(single, config.num_single_layers, rngs)
        self.norm_out = Modulation(width, 2, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(width, config.out_channels * config.patch_volume, dtype=dtype, rngs=rngs)

    def layout(self, latent_shape: tuple[int, int, int], text: int, config: SparseConfig | None = None) -> TokenLayout:
        """The token layout for latents of (F, H, W) and `text` text tokens; None: raster order.

        Raises ValueError if the patch does not divide the latents, with the nearest size that fits.
        """
        patch = self.config.patch
        if any(n % p or n < p for n, p in zip(latent_shape, patch, strict=True)):
            nearest = tuple(max(p, round(n / p) * p) for n, p in zip(latent_shape, patch, strict=True))
            raise ValueError(f"latents of {tuple(latent_shape)} are no multiple of the {patch=}; nearest: {nearest}")
        grid = [n // p for n, p in zip(latent_shape, patch, strict=True)]
        return (config or _DENSE).layout((grid[0], grid[1], grid[2]), text)

    def init_state(
        self,
        config: SparseConfig,
        batch: int,
        latent_shape: tuple[int, int, int],
        text: int,
        keep_mass: bool = False,
    ) -> tuple[SparseState, SparseState]:
        """Empty states of the dual- and the single-stream layers, each stacked over its layers."""
        layout, heads = self.layout(latent_shape, text, config), self.config.num_attention_heads
        create = lambda layers: SparseState.create(layout, config, batch, heads, layers, keep_mass)
        return create(self.config.num_layers), create(self.config.num_single_layers)

    def __call__(
        self,
        hidden_states: Array,
        timestep: Array,
        encoder_hidden_states: Array,
        encoder_attention_mask: Array,
        pooled_projections: Array,
        guidance: Array | None = None,
        *,
        config: SparseConfig | None = None,
        state: tuple[SparseState, SparseState] | None = None,
        step_kind: StepKind | int | Array = StepKind.DENSE,
        implementation: Implementation | None = None,
    ) -> Any:
        """Predicts the velocity.

        Args:
          hidden_states: latents [B, C, F, H, W].
          timestep: [B], 1000 * sigma.
          encoder_hidden_states: text embeddings [B, T, text_embed_dim].
          encoder_attention_mask: [B, T], 1 for real text tokens, which come first.
          pooled_projections: [B, pooled_projection_dim].
          guidance: [B], 1000 * scale, if the model embeds guidance, else None. diffusers' pipeline multiplies in the
            model's dtype: 6016 for a scale of 6 in bfloat16.
          config: how AdaSpa runs; None: dense, in raster order.
          state: from `init_state`; None: dense.
          step_kind: StepKind or traced int32 scalar; needs a state unless dense.
          implementation: which kernels run, see `pallas_kernels`.

        Returns:
          The sample [B, out_channels, F, H, W]; with a state, (sample, new state).

        Raises:
          ValueError: shapes that do not fit the model or each other.
        """
        self._check(
            hidden_states, encoder_hidden_states, encoder_attention_mask, pooled_projections, timestep, guidance
        )
        batch, text_length = encoder_attention_mask.shape
        frames, height, width = hidden_states.shape[2:]
        sparse = config or _DENSE
        layout = self.layout((frames, height, width), text_length, sparse)
        if state is None and not (isinstance(step_kind, int) and step_kind == StepKind.DENSE):
            raise ValueError(f"{step_kind=} needs a state; make one with init_state")

        with jax.named_scope("embed"):
            temb = self.time_text_embed(timestep, pooled_projections, guidance)  # [B, width]
            text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
            text = layout.pack_text(text)  # [B, Nt, width]
            video = layout.pack_video(self.x_embedder(hidden_states))  # [B, Nv, width]
        cos, sin = rope_tables(layout.grid, self.config.rope_axes_dim, self.config.rope_theta)
        valid = layout.block_valid(encoder_attention_mask.sum(1, dtype=jnp.int32), batch)
        cos, sin = layout.pack_video(cos[None]), layout.pack_video(sin[None])  # [1, Nv, D / 2]
        call = AttentionCall(layout, sparse, valid, cos, sin, implementation)
        video, new_state = self._blocks(video, text, temb, call, state, step_kind)
        with jax.named_scope("output"):
            scale, shift = self.norm_out(temb)
            tokens = self.proj_out(modulate(layer_norm(video), shift, scale))  # [B, Nv, C * pt * ph * pw]
            sample = self._unpatchify(layout.unpack_video(tokens), layout.grid)
        return sample if state is None else (sample, new_state)

    def _blocks(
        self, video: Array, text: Array, temb: Array, call: AttentionCall, state: Any, step_kind: Any
    ) -> tuple[Array, Any]:
        """All transformer blocks; returns the video tokens and the new states."""
        dual_layers = self.config.num_layers
        kinds = call.config.layer_kinds(step_kind, dual_layers + self.config.num_single_layers)
        dual_state, single_state = (None, None) if state is None else state
        graph, weights = nnx.split(self.transformer_blocks)

        def dual(carry: Any, xs: Any) -> Any:
            weights, layer_state, kind = xs
            video, text, layer_state = nnx.merge(graph, weights)(*carry, temb, call, layer_state, kind)
            return (video.astype(carry[0].dtype), text.astype(carry[1].dtype)), layer_state

        with jax.named_scope("dual_stream_blocks"):
            (video, text), dual_state = lax.scan(dual, (video, text), (weights, dual_state, kinds[:dual_layers]))
        single_graph, single_weights = nnx.split(self.single_transformer_blocks)

        def single(x: Array, xs: Any) -> Any:
            weights, layer_state, kind = xs
            new, layer_state = nnx.merge(single_graph, weights)(x, temb, call, layer_state, kind)
            return new.astype(x.dtype), layer_state

        x = jnp.concatenate([video, text], axis=1)  # [B, L, width]
        with jax.named_scope("single_stream_blocks"):
            x, single_state = lax.scan(single, x, (single_weights, single_state, kinds[dual_layers:]))
        return x[:, : call.layout.video_length], (dual_state, single_state)

    def _unpatchify(self, tokens: Array, grid: tuple[int, int, int]) -> Array:
        """[B, f * h * w, C * pt * ph * pw] to [B, C, F, H, W]."""
        (f, h, w), (pt, ph, pw) = grid, self.config.patch
        x = tokens.reshape(-1, f, h, w, self.config.out_channels, pt, ph, pw).transpose(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(-1, self.config.out_channels, f * pt, h * ph, w * pw)

    def _check(
        self, latents: Array, text: Array, mask: Array, pooled: Array, timestep: Array, guidance: Array | None
    ) -> None:
        c, batch = self.config, latents.shape[0]
        if latents.ndim != 5 or latents.shape[1] != c.in_channels:
            raise ValueError(f"hidden_states must be [B, {c.in_channels}, F, H, W]; got {list(latents.shape)}")
        if text.ndim != 3 or text.shape[::2] != (batch, c.text_embed_dim):
            expected = f"[{batch}, T, {c.text_embed_dim}]"
            raise ValueError(f"encoder_hidden_states must be {expected}; got {list(text.shape)}")
        shapes: dict[str, tuple[Array | None, tuple[int, ...]]] = {
            "encoder_attention_mask": (mask, text.shape[:2]),
            "pooled_projections": (pooled, (batch, c.pooled_projection_dim)),
            "timestep": (timestep, (batch,)),
        }
        if c.guidance_embeds:
            shapes["guidance"] = (guidance, (batch,))
        elif guidance is not None:
            raise ValueError("guidance is given, but this model has guidance_embeds=False; leave it None")
        for name, (x, shape) in shapes.items():
            if x is None or x.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}; got {None if x is None else list(x.shape)}")


_DENSE = SparseConfig(token_order="raster")
