"""Latents to video, with the VAE of a checkpoint: the Flax decoders, or diffusers' for CogVideoX."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.checkpoint.safetensors_folder import read_json
from models.vae.load import load_vae, vae_folder


def decode_latents(
    path: str | Path, latents: np.ndarray, *, dtype: str = "float32", progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """float32 video [B, 3, F', H', W'] in [-1, 1] of latents [B, C, F, H, W], tiled so that memory stays bounded.

    `path`: a diffusers `vae/` folder or the pipeline folder around it. `progress` gets the pieces done and in all.
    Raises ValueError for a VAE that cannot be loaded or has other channels, ImportError without the `torch` extra for
    CogVideoX.
    """
    folder = vae_folder(Path(path))
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("_class_name") == "AutoencoderKLCogVideoX":
        from models.vae.cogvideox_torch import decode_with_diffusers

        return decode_with_diffusers(folder, latents, dtype=dtype)
    vae = load_vae(folder, dtype=dtype)
    if latents.ndim != 5 or latents.shape[1] != vae.channels:
        raise ValueError(f"{folder} decodes latents [B, {vae.channels}, F, H, W]; got {list(latents.shape)}")
    return vae.decode(jnp.asarray(latents), progress=progress)
