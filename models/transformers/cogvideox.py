"""CogVideoX's transformer in Flax NNX, with AdaSpa inside (source: diffusers `CogVideoXTransformer3DModel`).

CogVideoX 1.0 (2B, 5B) and 1.5 (5B), text and image to video. Video and text share all weights but their modulation;
padded text is attended to, as in training.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from adaspa_jax import Parts, SparseState
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
    gelu_tanh,
    modulate,
    silu,
    split_heads,
    timestep_embedding,
)
from models.transformers.rope import rope_tables

ROPE_THETA = 10000.0
QK_EPS = 1e-6


@dataclass(frozen=True)
class CogVideoXConfig(TransformerConfig):
    """diffusers' names and defaults: CogVideoX 2B."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    """Sinusoids of `ofs`, of 1.5's image to video; None: the model takes no `ofs`."""
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    """Of training; nothing is dropped here."""
    attention_bias: bool = True
    sample_width: int = 90
    """Columns of the latents in training; with `sample_height` the frame that 1.0's RoPE stretches a video to."""
    sample_height: int = 60
    sample_frames: int = 49
    """Frames of the video in pixels in training."""
    patch_size: int = 2
    patch_size_t: int | None = None
    """Latent frames of a patch: None for 1.0, 2 for 1.5."""
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    """Divides rows and columns of the sinusoidal positions; for frames `temporal_interpolation_scale`."""
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    """False: sinusoidal positions are added to the video tokens."""
    use_learned_positional_embeddings: bool = False
    """Learned positions are added to text and video tokens, besides RoPE: 1.0 5B, image to video."""
    patch_bias: bool = True
    """Of 1.0's patch embedding; 1.5's has a bias whatever this says."""

    def __post_init__(self) -> None:
        self._set(out_channels=self.out_channels or self.in_channels)
        self._check_ported(flip_sin_to_cos=True, freq_shift=0, attention_bias=True, norm_elementwise_affine=True)
        self._check_ported(activation_fn="gelu-approximate", timestep_activation_fn="silu")
        self._check_counts("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
        self._check_counts("time_embed_dim", "text_embed_dim", "num_layers", "patch_size", "max_text_seq_length")
        self._check_counts("sample_width", "sample_height", "sample_frames", "temporal_compression_ratio")
        for name in ("patch_size_t", "ofs_embed_dim"):
            if getattr(self, name) is not None:
                self._check_counts(name)
        if self.patch_size_t is None:
            self._check_ported(patch_bias=True)
        if self.attention_head_dim % 16:
            raise ValueError(f"attention_head_dim={self.attention_head_dim} must be a multiple of 16")
        if self.ofs_embed_dim is not None and self.ofs_embed_dim != self.time_embed_dim:
            raise ValueError(f"ofs_embed_dim={self.ofs_embed_dim} must be time_embed_dim={self.time_embed_dim}")
        if self.use_learned_positional_embeddings and not self.use_rotary_positional_embeddings:
            raise ValueError("use_learned_positional_embeddings=True needs use_rotary_positional_embeddings=True")
        if self.use_learned_positional_embeddings and self.patch_size_t is not None:
            raise NotImplementedError("use_learned_positional_embeddings=True is ported with patch_size_t=None only")

    @property
    def patch(self) -> Grid:
        """Frames, rows and columns of a patch."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def rope_axes_dim(self) -> Grid:
        """Channels of a head that frames, rows and columns rotate."""
        space = self.attention_head_dim // 8 * 3
        return self.attention_head_dim // 4, space, space

    @property
    def sample_grid(self) -> Grid:
        """Tokens of the videos of training, without a temporal patch."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size


def rope_positions(config: CogVideoXConfig, grid: Grid) -> tuple[np.ndarray, ...]:
    """Positions of frames, rows and columns that RoPE rotates by.

    1.5 numbers them. 1.0 stretches the video to fit into the frame of training, centred, and numbers that one's.
    Source: diffusers `CogVideoXPipeline._prepare_rotary_positional_embeddings` and `get_3d_rotary_pos_embed`, grid
    types "slice" and "linspace". Raises ValueError for a video larger than 1.5's frame of training.
    """
    frames, rows, columns = grid
    _, most_rows, most_columns = config.sample_grid
    if config.patch_size_t is not None:
        if rows > most_rows or columns > most_columns:
            raise ValueError(f"{rows} x {columns} patches are more than the {most_rows} x {most_columns} of training")
        return np.arange(frames), np.arange(rows), np.arange(columns)
    if rows * most_columns > most_rows * columns:  # narrower than the frame
        height, width = most_rows, round(most_rows / rows * columns)
    else:
        height, width = round(most_columns / columns * rows), most_columns
    top, left = round((most_rows - height) / 2), round((most_columns - width) / 2)
    along = lambda start, length, n: np.linspace(start, (start + length) * (n - 1) / n, n)
    return np.arange(frames), along(top, height, rows), along(left, width, columns)


def sinusoidal_positions(config: CogVideoXConfig, grid: Grid) -> Array:
    """float32 [f * h * w, width], added to the tokens of a model without RoPE (diffusers `get_3d_sincos_pos_embed`).

    A quarter of the channels is for frames, the rest half for columns and half for rows.
    """

    def sinusoids(axis: int, scale: float, dim: int) -> Array:
        frequencies = 1.0 / 10000 ** (np.arange(dim // 2) / (dim / 2))
        angles = (np.arange(grid[axis]) / scale)[:, None] * frequencies
        shape = [1, 1, 1, dim]
        shape[axis] = grid[axis]
        table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).reshape(shape)
        return jnp.broadcast_to(jnp.asarray(table, jnp.float32), (*grid, dim))

    width, space = config.width, config.spatial_interpolation_scale
    of_frames = sinusoids(0, config.temporal_interpolation_scale, width // 4)
    of_rows, of_columns = (sinusoids(axis, space, 3 * width // 8) for axis in (1, 2))
    return jnp.concatenate([of_frames, of_columns, of_rows], axis=-1).reshape(-1, width)


class PatchEmbed(nnx.Module):
    """Linear maps of patches and of text embeddings, and the learned positions of a model that has them."""

    def __init__(self, config: CogVideoXConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.proj = Linear(config.in_channels * config.patch_volume, config.width, dtype=dtype, rngs=rngs)
        self.text_proj = Linear(config.text_embed_dim, config.width, dtype=dtype, rngs=rngs)
        self.config = config
        if config.use_learned_positional_embeddings:
            tokens = config.max_text_seq_length + int(np.prod(config.sample_grid))
            self.pos_embedding = nnx.Param(jnp.zeros((1, tokens, config.width), dtype))

    def __call__(self, x: Array, text: Array, grid: Grid) -> tuple[Array, Array]:
        """x [B, C, F, H, W], text [B, T, E] to [B, f * h * w, width], [B, T, width]."""
        c = self.config
        video, text = self.proj(patchify(x, c.patch)), self.text_proj(text)
        if not c.use_rotary_positional_embeddings:
            return video + sinusoidal_positions(c, grid).astype(video.dtype)[None], text
        if not c.use_learned_positional_embeddings:
            return video, text
        if (grid, text.shape[1]) != (c.sample_grid, c.max_text_seq_length):
            raise ValueError(
                f"learned positions fit {c.max_text_seq_length} text tokens and {c.sample_grid} patches only; "
                f"got {text.shape[1]} and {grid}"
            )
        positions = self.pos_embedding[...]
        return video + positions[:, text.shape[1] :], text + positions[:, : text.shape[1]]


class NormZero(nnx.Module):
    """LayerNorm with modulation for video and text."""

    def __init__(self, config: CogVideoXConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(config.time_embed_dim, 6 * config.width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(config.width, dtype=dtype, rngs=rngs, eps=config.norm_eps)

    def __call__(self, x: Parts, temb: Array) -> tuple[Parts, Parts]:
        """Video and text [B, N, width], temb [B, time_embed_dim] to both modulated, and their gates [B, 1, width]."""
        parts = jnp.split(self.linear(silu(temb))[:, None], 6, axis=-1)  # [B, 1, width]
        (shift, scale, gate), (text_shift, text_scale, text_gate) = parts[:3], parts[3:]
        video, text = self.norm(x[0]), self.norm(x[1])
        return (modulate(video, shift, scale), modulate(text, text_shift, text_scale)), (gate, text_gate)


class JointAttention(nnx.Module):
    """Projections and norms of joint attention."""

    def __init__(self, config: CogVideoXConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4))
        norm = lambda: LayerNorm(config.attention_head_dim, dtype=dtype, rngs=rngs, eps=QK_EPS)
        self.norm_q, self.norm_k = norm(), norm()
        self.heads = config.num_attention_heads

    def qkv(self, x: Array) -> tuple[Array, Array, Array]:
        """[B, L, width] to three times [B, L, H, D], q and k normalised."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class CogVideoXBlock(nnx.Module):
    """Video and text as one sequence: attention, then MLP."""

    def __init__(self, config: CogVideoXConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (NormZero(config, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attn1 = JointAttention(config, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(config.width, 4 * config.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Parts, temb: Array, call: AttentionCall, state: SparseState | None, kind: Any
    ) -> tuple[Parts, SparseState | None]:
        """Video [B, Nv, width] and text [B, Nt, width], temb [B, time_embed_dim]."""
        add = lambda x, gates, ys: tuple(part + gate * y for part, gate, y in zip(x, gates, ys, strict=True))
        with jax.named_scope("qkv"):
            normed, gates = self.norm1(x, temb)
            qkv, text_qkv = (self.attn1.qkv(part) for part in normed)  # [B, Nv or Nt, H, D]
        with jax.named_scope("attention"):
            outs, state = call(qkv, text_qkv, state, kind)  # [B, Nv or Nt, width]
            x = add(x, gates, [self.attn1.to_out(out) for out in outs])
        with jax.named_scope("mlp"):
            normed, gates = self.norm2(x, temb)
            return call.keep(add(x, gates, [self.ff(part, gelu_tanh) for part in normed])), state


class FinalNorm(nnx.Module):
    """LayerNorm with shift and scale of the conditioning vector."""

    def __init__(self, config: CogVideoXConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(config.time_embed_dim, 2 * config.width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(config.width, dtype=dtype, rngs=rngs, eps=config.norm_eps)

    def __call__(self, x: Array, temb: Array) -> Array:
        """x [B, N, width], temb [B, time_embed_dim]."""
        shift, scale = jnp.split(self.linear(silu(temb))[:, None], 2, axis=-1)
        return modulate(self.norm(x), shift, scale)


class CogVideoXTransformer(VideoTransformer):
    """The denoiser of CogVideoX 1.0 and 1.5, text to video and image to video."""

    def __init__(self, config: CogVideoXConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.time_embedding = EmbedMLP(config.width, config.time_embed_dim, dtype=dtype, rngs=rngs)
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = EmbedMLP(config.ofs_embed_dim, config.ofs_embed_dim, dtype=dtype, rngs=rngs)
        create = lambda rngs: CogVideoXBlock(config, dtype=dtype, rngs=rngs)
        self.transformer_blocks = stack(create, config.num_layers, rngs)
        self.norm_final = LayerNorm(config.width, dtype=dtype, rngs=rngs, eps=config.norm_eps)
        self.norm_out = FinalNorm(config, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(config.width, config.out_channels * config.patch_volume, dtype=dtype, rngs=rngs)

    def stack_sizes(self) -> tuple[int, ...]:
        """All layers are of one kind."""
        return (self.config.num_layers,)

    def denoise(
        self,
        how: Pass,
        hidden_states: Array,
        encoder_hidden_states: Array,
        timestep: Array,
        ofs: Array | None = None,
        image_rotary_emb: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[SparseState | None, ...]]:
        """Predicts the velocity, see `VideoTransformer`.

        Args:
          how: how AdaSpa runs.
          hidden_states: latents [B, F, C, H, W]; for image to video with those of the image as further channels.
          encoder_hidden_states: text embeddings [B, T, text_embed_dim]; padding is attended to.
          timestep: [B], integers.
          ofs: [B] or [1] if the model has `ofs_embed_dim` (diffusers' pipeline passes 2.0), else None.
          image_rotary_emb: (cos, sin), each [f * h * w, attention_head_dim] with every value twice, as diffusers
            passes them; None: those of `rope_positions`.

        Returns:
          (sample [B, F, out_channels, H, W], the new states).

        Raises:
          ValueError: shapes that do not fit the model or each other.
        """
        c, batch = self.config, hidden_states.shape[0]
        check_shape("hidden_states", hidden_states, ("B", "F", c.in_channels, "H", "W"))
        check_shape("encoder_hidden_states", encoder_hidden_states, (batch, "T", c.text_embed_dim))
        check_shape("timestep", timestep, (batch,))
        (layers,) = how.layers
        frames, _, height, width = hidden_states.shape[1:]
        layout = self.layout((frames, height, width), encoder_hidden_states.shape[1], how.config)
        rope = self._rope(image_rotary_emb, layout.grid)
        call = AttentionCall.create(how, layout, rope, batch)

        with jax.named_scope("embed"):
            temb = self._time(timestep, ofs, hidden_states.dtype)  # [B, time_embed_dim]
            latents = hidden_states.swapaxes(1, 2)  # [B, C, F, H, W]
            video, text = self.patch_embed(latents, encoder_hidden_states, layout.grid)
            x = call.pack(video), call.text(layout.pack_text(text))  # [B, Nv, width], [B, Nt, width]
        run = lambda block, x, *layer: block(x, temb, call, *layer)
        with jax.named_scope("blocks"):
            x, new_state = scan_blocks(run, self.transformer_blocks, x, layers, how.sharding)
        with jax.named_scope("output"):
            video = self.norm_out(self.norm_final(x[0]), temb)  # [B, Nv, width]
            tokens = call.unpack(self.proj_out(video))  # [B, f * h * w, C * pt * ph * pw]
            sample = unpatchify(tokens, layout.grid, c.patch).swapaxes(1, 2)
        return sample, (new_state,)

    def _time(self, timestep: Array, ofs: Array | None, dtype: Any) -> Array:
        """[B, time_embed_dim] of timestep [B] and, for a model that takes it, ofs."""
        c = self.config
        temb = self.time_embedding(timestep_embedding(timestep, c.width).astype(dtype))
        if c.ofs_embed_dim is None:
            if ofs is not None:
                raise ValueError("ofs is given, but this model has no ofs_embed_dim; leave it None")
            return temb
        if ofs is None or ofs.shape not in ((1,), timestep.shape):
            raise ValueError(
                f"ofs must be [1] or {list(timestep.shape)}; got {None if ofs is None else list(ofs.shape)}"
            )
        return temb + self.ofs_embedding(timestep_embedding(ofs, c.ofs_embed_dim).astype(dtype))

    def _rope(self, given: tuple[Array, Array] | None, grid: Grid) -> tuple[Array, Array] | None:
        """(cos, sin), each [f * h * w, D / 2]."""
        c = self.config
        if given is not None:
            for table in given:
                check_shape("image_rotary_emb", table, (int(np.prod(grid)), c.attention_head_dim))
            return given[0][:, ::2], given[1][:, ::2]
        if not c.use_rotary_positional_embeddings:
            return None
        return rope_tables(rope_positions(c, grid), c.rope_axes_dim, ROPE_THETA)
