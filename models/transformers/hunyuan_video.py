"""HunyuanVideo's transformer in Flax NNX, with AdaSpa inside (source: diffusers `HunyuanVideoTransformer3DModel`).

Module names follow diffusers' parameter names. Blocks of a kind are stacked and run by one `lax.scan`, the sparse
state of each layer going through its xs and ys.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from adaspa_jax import Parts, SparseState
from models.transformers.base import (
    AttentionCall,
    Grid,
    Pass,
    TransformerConfig,
    VideoTransformer,
    check_shape,
    on_device,
    patchify,
    scan_blocks,
    stack,
    unpatchify,
)
from models.transformers.layers import (
    EmbedMLP,
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    gelu_tanh,
    layer_norm,
    merge_heads,
    modulate,
    silu,
    split_heads,
    timestep_embedding,
)
from models.transformers.rope import rope_tables

TIME_CHANNELS = 256
"""Sinusoids of a timestep."""


@dataclass(frozen=True)
class HunyuanVideoConfig(TransformerConfig):
    """diffusers' names and defaults: the 13B text-to-video model."""

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
    """Image to video: "latent_concat" takes the image as further channels of the latents, "token_replace" as their
    first frame, which is then modulated as at timestep 0."""

    def __post_init__(self) -> None:
        # diffusers: without out_channels as many as go in
        self._set(out_channels=self.out_channels or self.in_channels, rope_axes_dim=tuple(self.rope_axes_dim))
        self._check_ported(qk_norm="rms_norm")
        self._check_counts("in_channels", "out_channels", "num_attention_heads", "attention_head_dim")
        self._check_counts("num_layers", "num_single_layers", "num_refiner_layers", "patch_size", "patch_size_t")
        self._check_counts("text_embed_dim", "pooled_projection_dim")
        if self.image_condition_type not in (None, "latent_concat", "token_replace"):
            raise ValueError(
                f"image_condition_type={self.image_condition_type!r} must be None, 'latent_concat' or 'token_replace'"
            )
        axes = self.rope_axes_dim
        if len(axes) != 3 or any(type(n) is not int or n < 2 or n % 2 for n in axes):
            raise ValueError(f"rope_axes_dim={axes} must be three even numbers: frames, rows, columns")
        if sum(axes) != self.attention_head_dim:
            raise ValueError(f"rope_axes_dim={axes} must add up to attention_head_dim={self.attention_head_dim}")

    @property
    def patch(self) -> Grid:
        """Frames, rows and columns of a patch."""
        return self.patch_size_t, self.patch_size, self.patch_size


class PatchEmbed(nnx.Module):
    """A linear map of each patch."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.proj = Linear(config.in_channels * config.patch_volume, config.width, dtype=dtype, rngs=rngs)
        self.patch = config.patch

    def __call__(self, x: Array, call: AttentionCall) -> Array:
        """[B, C, F, H, W] to [B, Nv, width]."""
        return self.proj(call.pack(patchify(x, self.patch)))


class TimeTextEmbed(nnx.Module):
    """Embeds timestep, pooled text and, for a guidance-distilled model, the guidance scale."""

    def __init__(self, text_dim: int, width: int, guidance: bool, *, dtype: Any, rngs: nnx.Rngs):
        self.timestep_embedder = EmbedMLP(TIME_CHANNELS, width, dtype=dtype, rngs=rngs)
        self.text_embedder = EmbedMLP(text_dim, width, dtype=dtype, rngs=rngs)
        if guidance:
            self.guidance_embedder = EmbedMLP(TIME_CHANNELS, width, dtype=dtype, rngs=rngs)

    def __call__(self, timestep: Array, pooled: Array, guidance: Array | None = None) -> Array:
        """timestep [B], pooled [B, text_dim], guidance [B] to [B, width]."""
        sinusoids = lambda t: timestep_embedding(t, TIME_CHANNELS).astype(pooled.dtype)
        embedding = self.timestep_embedder(sinusoids(timestep))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoids(guidance))
        return embedding + self.text_embedder(pooled)


@dataclass(frozen=True)
class Conditioning:
    """What modulates the tokens."""

    temb: Array
    """[B, width]."""
    image_temb: Array | None = None
    """[B, width], of the tokens of the first frame if they hold a clean image ("token_replace")."""
    first_frame: Array | None = None
    """bool [1, Nv, 1], with `image_temb`: which tokens of the video those are."""


class Modulation(nnx.Module):
    """SiLU and a linear map of the conditioning vector, cut into `parts`."""

    def __init__(self, width: int, parts: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(width, parts * width, dtype=dtype, rngs=rngs)
        self.parts = parts

    def __call__(self, temb: Array) -> list[Array]:
        """[B, width] to `parts` times [B, 1, width]."""
        return jnp.split(self.linear(silu(temb))[:, None], self.parts, axis=-1)

    def of_video(self, conditioning: Conditioning) -> list[Array]:
        """`parts` times [B, 1, width], or [B, Nv, width] where the first frame is an image."""
        parts = self(conditioning.temb)
        if conditioning.image_temb is None or conditioning.first_frame is None:
            return parts
        pairs = zip(self(conditioning.image_temb), parts, strict=True)
        return [jnp.where(conditioning.first_frame, of_image, part) for of_image, part in pairs]


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
        x = x + self.attn(self.norm1(x), mask) * gate_attn
        return x + self.ff(self.norm2(x), silu) * gate_ff


class TokenRefiner(nnx.Module):
    """Projects and refines the text embeddings."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.time_text_embed = TimeTextEmbed(config.text_embed_dim, config.width, False, dtype=dtype, rngs=rngs)
        self.proj_in = Linear(config.text_embed_dim, config.width, dtype=dtype, rngs=rngs)
        create = lambda rngs: RefinerBlock(config, dtype=dtype, rngs=rngs)
        self.refiner_blocks = stack(create, config.num_refiner_layers, rngs)

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
            return nnx.merge(graph, on_device(weights))(x, temb, pairs).astype(x.dtype), None

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


class DualStreamBlock(nnx.Module):
    """Video and text with weights of their own, joined in attention."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm1, self.norm1_context = (Modulation(width, 6, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attn = JointAttention(config, True, dtype=dtype, rngs=rngs)
        self.ff, self.ff_context = (FeedForward(width, hidden, dtype=dtype, rngs=rngs) for _ in range(2))

    def __call__(
        self,
        video: Array,
        text: Array,
        conditioning: Conditioning,
        call: AttentionCall,
        state: SparseState | None,
        kind: Any,
    ) -> tuple[tuple[Array, Array], SparseState | None]:
        """video [B, Nv, width], text [B, Nt, width]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1.of_video(conditioning)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = self.norm1_context(conditioning.temb)
        with jax.named_scope("qkv"):
            qkv = self.attn.video_qkv(modulate(layer_norm(video), shift, scale))  # [B, Nv, H, D]
            text_qkv = self.attn.text_qkv(modulate(layer_norm(text), t_shift, t_scale))  # [B, Nt, H, D]
        with jax.named_scope("attention"):
            (out, text_out), state = call(qkv, text_qkv, state, kind)  # [B, Nv or Nt, width]
            video = video + self.attn.to_out(out) * gate
            text = text + self.attn.to_add_out(text_out) * t_gate
        with jax.named_scope("mlp"):
            ff = self.ff(modulate(layer_norm(video), ff_shift, ff_scale), gelu_tanh)
            text_ff = self.ff_context(modulate(layer_norm(text), t_ff_shift, t_ff_scale), gelu_tanh)
            return call.keep((video + ff_gate * ff, text + t_ff_gate * text_ff)), state


class SingleStreamBlock(nnx.Module):
    """Video and text as one sequence; attention and MLP side by side."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: Any, rngs: nnx.Rngs):
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm = Modulation(width, 3, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config, False, dtype=dtype, rngs=rngs)
        self.proj_mlp = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(width + hidden, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Parts, conditioning: Conditioning, call: AttentionCall, state: SparseState | None, kind: Any
    ) -> tuple[Parts, SparseState | None]:
        """Video [B, Nv, width] and text [B, Nt, width]."""
        of_video, of_text = self.norm.of_video(conditioning), self.norm(conditioning.temb)
        pairs = zip(x, (of_video, of_text), strict=True)
        normed = [modulate(layer_norm(part), shift, scale) for part, (shift, scale, _) in pairs]
        with jax.named_scope("qkv"):
            qkv, text_qkv = (self.attn.video_qkv(part) for part in normed)  # [B, Nv or Nt, H, D]
        with jax.named_scope("attention"):
            outs, state = call(qkv, text_qkv, state, kind)  # [B, Nv or Nt, width]

        def end(part: Array, normed: Array, out: Array, gate: Array) -> Array:
            hidden = jnp.concatenate([out, gelu_tanh(self.proj_mlp(normed))], axis=-1)  # [B, N, width + hidden]
            return part + gate * self.proj_out(hidden)

        with jax.named_scope("mlp"):
            gates = of_video[2], of_text[2]
            video, text = (end(*each) for each in zip(x, normed, outs, gates, strict=True))
            return call.keep((video, text)), state


class HunyuanVideoTransformer(VideoTransformer):
    """The denoiser, text to video and image to video."""

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
        self.transformer_blocks = stack(dual, config.num_layers, rngs)
        self.single_transformer_blocks = stack(single, config.num_single_layers, rngs)
        self.norm_out = Modulation(width, 2, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(width, config.out_channels * config.patch_volume, dtype=dtype, rngs=rngs)

    def stack_sizes(self) -> tuple[int, ...]:
        """Dual-stream layers, single-stream layers."""
        return self.config.num_layers, self.config.num_single_layers

    def denoise(
        self,
        how: Pass,
        hidden_states: Array,
        timestep: Array,
        encoder_hidden_states: Array,
        encoder_attention_mask: Array,
        pooled_projections: Array,
        guidance: Array | None = None,
    ) -> tuple[Array, tuple[SparseState | None, ...]]:
        """Predicts the velocity, see `VideoTransformer`.

        Args:
          how: how AdaSpa runs.
          hidden_states: latents [B, C, F, H, W].
          timestep: [B], 1000 * sigma.
          encoder_hidden_states: text embeddings [B, T, text_embed_dim].
          encoder_attention_mask: [B, T], 1 for real text tokens, which come first.
          pooled_projections: [B, pooled_projection_dim].
          guidance: [B], 1000 * scale, if the model embeds guidance, else None. diffusers' pipeline multiplies in the
            model's dtype: 6016 for a scale of 6 in bfloat16.

        Returns:
          (sample [B, out_channels, F, H, W], the new states).

        Raises:
          ValueError: shapes that do not fit the model or each other.
        """
        self._check(
            hidden_states, encoder_hidden_states, encoder_attention_mask, pooled_projections, timestep, guidance
        )
        batch, text_length = encoder_attention_mask.shape
        dual_layers, single_layers = how.layers
        frames, height, width = hidden_states.shape[2:]
        layout = self.layout((frames, height, width), text_length, how.config)
        rope = rope_tables(layout.grid, self.config.rope_axes_dim, self.config.rope_theta)
        text_valid = encoder_attention_mask.sum(1, dtype=jnp.int32)
        call = AttentionCall.create(how, layout, rope, batch, text_valid)

        with jax.named_scope("embed"):
            conditioning = self._conditioning(timestep, pooled_projections, guidance, call)
            text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
            text = call.text(layout.pack_text(text))  # [B, Nt, width]
            video = self.x_embedder(hidden_states, call)  # [B, Nv, width]
        with jax.named_scope("dual_stream_blocks"):
            dual = lambda block, carry, *layer: block(*carry, conditioning, call, *layer)
            parts, dual_state = scan_blocks(dual, self.transformer_blocks, (video, text), dual_layers, how.sharding)
        with jax.named_scope("single_stream_blocks"):
            single = lambda block, x, *layer: block(x, conditioning, call, *layer)
            blocks = self.single_transformer_blocks
            parts, single_state = scan_blocks(single, blocks, parts, single_layers, how.sharding)
        with jax.named_scope("output"):
            scale, shift = self.norm_out(conditioning.temb)
            video = modulate(layer_norm(parts[0]), shift, scale)  # [B, Nv, width]
            tokens = call.unpack(self.proj_out(video))  # [B, f * h * w, C * pt * ph * pw]
            sample = unpatchify(tokens, layout.grid, self.config.patch)
        return sample, (dual_state, single_state)

    def _conditioning(
        self, timestep: Array, pooled: Array, guidance: Array | None, call: AttentionCall
    ) -> Conditioning:
        temb = self.time_text_embed(timestep, pooled, guidance)
        if self.config.image_condition_type != "token_replace":
            return Conditioning(temb)
        _, rows, columns = call.layout.grid
        tokens = jnp.asarray(np.arange(call.layout.video_tokens)[None] < rows * columns)
        first = call.pack(tokens, shared=True)[..., None]  # [1, Nv, 1]
        return Conditioning(temb, self.time_text_embed(jnp.zeros_like(timestep), pooled), first)

    def _check(
        self, latents: Array, text: Array, mask: Array, pooled: Array, timestep: Array, guidance: Array | None
    ) -> None:
        c, batch = self.config, latents.shape[0]
        check_shape("hidden_states", latents, ("B", c.in_channels, "F", "H", "W"))
        check_shape("encoder_hidden_states", text, (batch, "T", c.text_embed_dim))
        check_shape("encoder_attention_mask", mask, text.shape[:2])
        check_shape("pooled_projections", pooled, (batch, c.pooled_projection_dim))
        check_shape("timestep", timestep, (batch,))
        if c.guidance_embeds:
            check_shape("guidance", guidance, (batch,))
        elif guidance is not None:
            raise ValueError("guidance is given, but this model has guidance_embeds=False; leave it None")
