"""Wan's transformer in Flax NNX, with AdaSpa inside (source: diffusers `WanTransformer3DModel`).

Wan 2.1 and 2.2, text and image to video. Only video tokens attend to each other; text and image embeddings enter by
cross-attention. As in diffusers the timestep embedder, norms, modulation and residual sums are float32, whatever the
dtype of the model.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from adaspa_jax import SparseState
from models.transformers.base import (
    AttentionCall,
    Grid,
    Pass,
    TransformerConfig,
    VideoTransformer,
    check_shape,
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
    gelu,
    gelu_tanh,
    layer_norm,
    merge_heads,
    modulate,
    silu,
    split_heads,
    timestep_embedding,
)
from models.transformers.rope import rope_tables

ROPE_THETA = 10000.0
IMAGE_EPS = 1e-5
"""Of the norms around the image projection."""


@dataclass(frozen=True)
class WanConfig(TransformerConfig):
    """diffusers' names and defaults: Wan 2.1 14B, text to video."""

    patch_size: Grid = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    """Sinusoids of a timestep."""
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    """Channels of the image embeddings that Wan 2.1 image to video attends to; None: none."""
    added_kv_proj_dim: int | None = None
    """With `image_dim`, the width of the model."""
    rope_max_seq_len: int = 1024
    """Length of diffusers' RoPE tables; here they are as long as the video needs."""
    pos_embed_seq_len: int | None = None
    """Tokens of the two images, first and last frame, that have learned positions; None: one image, without."""

    def __post_init__(self) -> None:
        self._set(patch_size=tuple(self.patch_size), out_channels=self.out_channels or self.in_channels)
        self._check_ported(cross_attn_norm=True, qk_norm="rms_norm_across_heads")
        self._check_counts("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "text_dim")
        self._check_counts("freq_dim", "ffn_dim", "num_layers")
        if len(self.patch_size) != 3 or any(type(n) is not int or n < 1 for n in self.patch_size):
            raise ValueError(f"patch_size={self.patch_size} must be three whole numbers: frames, rows, columns")
        if self.attention_head_dim % 2:
            raise ValueError(f"attention_head_dim={self.attention_head_dim} must be even")
        expected = None if self.image_dim is None else self.width
        if self.added_kv_proj_dim != expected:
            raise ValueError(
                f"added_kv_proj_dim={self.added_kv_proj_dim} must be {expected} with image_dim={self.image_dim} "
                f"and a width of {self.width}"
            )

    @property
    def patch(self) -> Grid:
        """Frames, rows and columns of a patch."""
        return self.patch_size

    @property
    def rope_axes_dim(self) -> Grid:
        """Channels of a head that frames, rows and columns rotate."""
        space = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * space, space, space


class ImageEmbed(nnx.Module):
    """Projects image embeddings to the width of the model."""

    def __init__(self, config: WanConfig, image_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(image_dim, dtype=jnp.float32, rngs=rngs, eps=IMAGE_EPS)
        self.ff = FeedForward(image_dim, image_dim, config.width, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.width, dtype=jnp.float32, rngs=rngs, eps=IMAGE_EPS)
        if config.pos_embed_seq_len is not None:
            self.pos_embed = nnx.Param(jnp.zeros((1, config.pos_embed_seq_len, image_dim), dtype))

    def __call__(self, image: Array) -> Array:
        """[B, S, image_dim] to [B, S, width]."""
        if hasattr(self, "pos_embed"):
            image = image + self.pos_embed[...]
        return self.norm2(self.ff(self.norm1(image), gelu))


class ConditionEmbed(nnx.Module):
    """Embeds timestep, text and, for Wan 2.1 image to video, the image embeddings."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.time_embedder = EmbedMLP(config.freq_dim, width, dtype=jnp.float32, rngs=rngs)
        self.time_proj = Linear(width, 6 * width, dtype=dtype, rngs=rngs)
        self.text_embedder = EmbedMLP(config.text_dim, width, dtype=dtype, rngs=rngs)
        if config.image_dim is not None:
            self.image_embedder = ImageEmbed(config, config.image_dim, dtype=dtype, rngs=rngs)
        self.freq_dim = config.freq_dim

    def time(self, timestep: Array, dtype: Any) -> tuple[Array, Array]:
        """timestep [B, T] to the embedding [B, T, width] and its projection [B, T, 6, width], both in `dtype`."""
        temb = self.time_embedder(timestep_embedding(timestep, self.freq_dim)).astype(dtype)
        projected = self.time_proj(silu(temb))
        return temb, projected.reshape(*temb.shape[:2], 6, -1)


def modulation(table: Array, temb: Array) -> list[Array]:
    """table [1, P, C] + temb [B, T, P or 1, C] in float32, as P times [B, T, C]."""
    parts = table[None].astype(jnp.float32) + temb.astype(jnp.float32)  # [B, T, P, C]
    return [parts[:, :, i] for i in range(parts.shape[2])]


class WanAttention(nnx.Module):
    """Projections and norms of attention; q and k are normalised over all heads together."""

    def __init__(self, config: WanConfig, image: bool = False, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        linear = lambda: Linear(width, width, dtype=dtype, rngs=rngs)
        norm = lambda: RMSNorm(width, dtype=dtype, rngs=rngs, eps=config.eps)
        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()
        self.norm_q, self.norm_k = norm(), norm()
        if image:
            self.add_k_proj, self.add_v_proj, self.norm_added_k = linear(), linear(), norm()
        self.heads = config.num_attention_heads

    def q(self, x: Array) -> Array:
        """[B, N, width] to [B, N, H, D]."""
        return split_heads(self.norm_q(self.to_q(x)), self.heads)

    def kv(self, x: Array) -> tuple[Array, Array]:
        """[B, N, width] to two times [B, N, H, D]."""
        return split_heads(self.norm_k(self.to_k(x)), self.heads), split_heads(self.to_v(x), self.heads)

    def image_kv(self, x: Array) -> tuple[Array, Array]:
        """As `kv`, with the weights for image embeddings."""
        key = self.norm_added_k(self.add_k_proj(x))
        return split_heads(key, self.heads), split_heads(self.add_v_proj(x), self.heads)

    def cross(self, x: Array, text: Array, image: Array | None, call: AttentionCall) -> Array:
        """x [B, N, width] attends to text [B, T, width] and image [B, S, width], each with a softmax of its own."""
        q = self.q(x)
        pairs = [self.kv(text)] + ([] if image is None else [self.image_kv(image)])
        outs = [merge_heads(call.cross(q, k, v)) for k, v in pairs]
        return self.to_out(sum(outs[1:], outs[0]))


class WanBlock(nnx.Module):
    """Self-attention of the video, cross-attention, MLP."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.attn1 = WanAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=jnp.float32, rngs=rngs, eps=config.eps)
        self.attn2 = WanAttention(config, config.image_dim is not None, dtype=dtype, rngs=rngs)
        self.ffn = FeedForward(width, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (1, 6, width)) * width**-0.5)
        self.eps = config.eps

    def __call__(
        self,
        x: Array,
        text: Array,
        image: Array | None,
        time: Array,
        call: AttentionCall,
        state: SparseState | None,
        kind: Any,
    ) -> tuple[Array, SparseState | None]:
        """x [B, Nv, width], text [B, T, width], image [B, S, width], time [B, 1 or Nv, 6, width]."""
        dtype = x.dtype
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation(self.scale_shift_table[...], time)
        normed = lambda x: layer_norm(x.astype(jnp.float32), eps=self.eps)
        with jax.named_scope("qkv"):
            y = modulate(normed(x), shift, scale).astype(dtype)
            qkv = self.attn1.q(y), *self.attn1.kv(y)  # [B, Nv, H, D]
        with jax.named_scope("attention"):
            (out, _), state = call(qkv, None, state, kind)  # [B, Nv, width]
            x = (x + self.attn1.to_out(out) * gate).astype(dtype)
        with jax.named_scope("cross_attention"):
            x = x + self.attn2.cross(self.norm2(x), text, image, call)
        with jax.named_scope("mlp"):
            y = modulate(normed(x), ff_shift, ff_scale).astype(dtype)
            return call.keep_video((x + self.ffn(y, gelu_tanh) * ff_gate).astype(dtype)), state


class WanTransformer(VideoTransformer):
    """The denoiser of Wan 2.1 and 2.2; Wan 2.2 A14B is two of them, for high and low noise."""

    joint_text: ClassVar[bool] = False

    def __init__(self, config: WanConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        width = config.width
        self.patch_embedding = Linear(config.in_channels * config.patch_volume, width, dtype=dtype, rngs=rngs)
        self.condition_embedder = ConditionEmbed(config, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: WanBlock(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (1, 2, width)) * width**-0.5)
        self.proj_out = Linear(width, config.out_channels * config.patch_volume, dtype=dtype, rngs=rngs)

    def stack_sizes(self) -> tuple[int, ...]:
        """All layers are of one kind."""
        return (self.config.num_layers,)

    def denoise(
        self,
        how: Pass,
        hidden_states: Array,
        timestep: Array,
        encoder_hidden_states: Array,
        encoder_hidden_states_image: Array | None = None,
    ) -> tuple[Array, tuple[SparseState | None, ...]]:
        """Predicts the velocity, see `VideoTransformer`.

        Args:
          how: how AdaSpa runs.
          hidden_states: latents [B, C, F, H, W]; for image to video with the mask and the image as further channels.
          timestep: [B], 1000 * sigma; or [B, f * h * w], one for each token in raster order (Wan 2.2 TI2V, where the
            tokens of a given first frame are at 0).
          encoder_hidden_states: text embeddings [B, T, text_dim]; padding is attended to.
          encoder_hidden_states_image: image embeddings [B, S, image_dim] if the model takes them; for first and last
            frame [2 * B, S, image_dim].

        Returns:
          (sample [B, out_channels, F, H, W], the new states).

        Raises:
          ValueError: shapes that do not fit the model or each other.
        """
        c, batch = self.config, hidden_states.shape[0]
        check_shape("hidden_states", hidden_states, ("B", c.in_channels, "F", "H", "W"))
        check_shape("encoder_hidden_states", encoder_hidden_states, (batch, "T", c.text_dim))
        (layers,) = how.layers
        frames, height, width = hidden_states.shape[2:]
        layout = self.layout((frames, height, width), 0, how.config)
        check_shape("timestep", timestep, (batch,) if timestep.ndim == 1 else (batch, layout.video_tokens))
        rope = rope_tables(layout.grid, c.rope_axes_dim, ROPE_THETA)
        call = AttentionCall.create(how, layout, rope, batch)

        with jax.named_scope("embed"):
            steps = timestep[:, None] if timestep.ndim == 1 else call.pack(timestep)
            temb, time = self.condition_embedder.time(steps, encoder_hidden_states.dtype)
            text = self.condition_embedder.text_embedder(encoder_hidden_states, gelu_tanh)  # [B, T, width]
            image = self._image(encoder_hidden_states_image, batch)  # [B, S, width]
            x = self.patch_embedding(call.pack(patchify(hidden_states, c.patch)))  # [B, Nv, width]
        run = lambda block, x, *layer: block(x, text, image, time, call, *layer)
        with jax.named_scope("blocks"):
            x, new_state = scan_blocks(run, self.blocks, x, layers, how.sharding)
        with jax.named_scope("output"):
            shift, scale = modulation(self.scale_shift_table[...], temb[:, :, None])
            x = modulate(layer_norm(x.astype(jnp.float32), eps=c.eps), shift, scale).astype(x.dtype)
            tokens = call.unpack(self.proj_out(x))  # [B, f * h * w, pt * ph * pw * C]
            sample = unpatchify(tokens, layout.grid, c.patch, channels_last=True)
        return sample, (new_state,)

    def _image(self, image: Array | None, batch: int) -> Array | None:
        """[B, S, width] of encoder_hidden_states_image, for a model that takes it."""
        c = self.config
        if image is None or c.image_dim is None:
            if image is not None or c.image_dim is not None:
                given = "missing" if image is None else "given"
                raise ValueError(f"encoder_hidden_states_image is {given}, but this model has image_dim={c.image_dim}")
            return None
        images, tokens = (1, "S") if c.pos_embed_seq_len is None else (2, c.pos_embed_seq_len // 2)
        check_shape("encoder_hidden_states_image", image, (images * batch, tokens, c.image_dim))
        return self.condition_embedder.image_embedder(image.reshape(batch, -1, c.image_dim))
