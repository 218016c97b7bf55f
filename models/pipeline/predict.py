"""One call of a port, whatever its model: latents, timestep and embeddings to what the scheduler takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.pipeline.families import Family
from models.transformers.base import VideoTransformer
from models.transformers.cogvideox import CogVideoXTransformer
from models.transformers.hunyuan_video import HunyuanVideoTransformer
from models.transformers.wan import WanTransformer


def predict(
    model: VideoTransformer,
    family: Family,
    latents: Array,
    t: Array,
    given: dict[str, Array],
    scale: float,
    **rest: Any,
) -> Any:
    """Calls a model on latents [B, C, F, H, W] at timestep t with the embeddings `given`; returns as it does."""
    batch, dtype = latents.shape[0], model.dtype
    condition, times = given.get("condition"), jnp.broadcast_to(t, (batch,))
    if condition is not None and family.fixed_first_frame:
        latents = jnp.concatenate([condition, latents[:, :, 1:]], axis=2)
    elif condition is not None:
        latents = jnp.concatenate([latents, condition], axis=1)
    inputs: dict[str, Any] = {"encoder_hidden_states": given["prompt_embeds"].astype(dtype)}
    if isinstance(model, HunyuanVideoTransformer):
        inputs |= {
            "encoder_attention_mask": given["prompt_attention_mask"],
            "pooled_projections": given["pooled_prompt_embeds"].astype(dtype),
        }
        if model.config.guidance_embeds:
            # Multiplied in the model's dtype, as diffusers does: 6016 for 6 in bfloat16.
            inputs["guidance"] = jnp.full(batch, scale, dtype) * jnp.asarray(1000, dtype)
    if isinstance(model, WanTransformer):
        if "image_embeds" in given:
            image = given["image_embeds"]  # [B, S, E], or [B, 2, S, E] for the model's [2 B, S, E]
            inputs["encoder_hidden_states_image"] = image.reshape(-1, *image.shape[-2:]).astype(dtype)
        if family.frame_tokens:
            grid = model.layout((latents.shape[2], latents.shape[3], latents.shape[4]), 0).grid
            first = np.arange(np.prod(grid)) < grid[1] * grid[2]
            clean = condition is not None
            times = jnp.where(jnp.asarray(first & clean)[None], 0, times[:, None])
    if isinstance(model, CogVideoXTransformer):
        times = times.astype(jnp.int32)
        if model.config.ofs_embed_dim is not None:
            inputs["ofs"] = jnp.full(1, 2.0, dtype)
    if not isinstance(model, CogVideoXTransformer):
        return model(hidden_states=latents.astype(dtype), timestep=times, **inputs, **rest)
    out = model(hidden_states=latents.swapaxes(1, 2).astype(dtype), timestep=times, **inputs, **rest)
    return jax.tree.map(lambda x: x.swapaxes(1, 2), out) if rest["state"] is None else (out[0].swapaxes(1, 2), out[1])
