"""Latents to video, with the VAE of a checkpoint: the Flax decoders, or diffusers' for CogVideoX."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.checkpoint.safetensors_folder import is_finite, read_json
from models.vae.load import abstract_vae, load_vae, vae_folder


def check_decoder(path: str | Path, channels: int, follow_links: bool = False) -> None:
    """Raises what `decode_latents` would for latents of so many channels, before there are any.

    A Flax decoder is loaded for it, and dropped. `follow_links`: as there.
    """
    folder = vae_folder(Path(path))
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("_class_name") != "AutoencoderKLCogVideoX":
        found = load_vae(folder, follow_links=follow_links).channels
    else:
        found = config.get("latent_channels", 16)
        for name in ("torch", "diffusers"):
            if find_spec(name) is None:
                raise ImportError(f"decoding CogVideoX needs {name}: pip install 'adaspa_jax[torch]'")
    if found != channels:
        raise ValueError(
            f"{folder} decodes latents of {found} channels, but the model samples {channels}; give the model's VAE"
        )


def decoding_need(path: str | Path, shape: tuple[int, ...], *, dtype: str = "float32", mesh: Mesh | None = None) -> int:
    """Bytes of a device that `decode_latents` of latents [B, C, F, H, W] takes; 0 for PyTorch's, which uses none.

    Reads no weights, see `VideoVAE.need`.
    """
    config: dict[str, Any] = read_json(vae_folder(Path(path)) / "config.json")
    if config.get("_class_name") == "AutoencoderKLCogVideoX":
        return 0
    return abstract_vae(config, jnp.dtype(dtype)).need(shape, mesh=mesh)


def decode_latents(
    path: str | Path,
    latents: np.ndarray,
    *,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    follow_links: bool = False,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """float32 video [B, 3, F', H', W'] in [-1, 1] of latents [B, C, F, H, W], tiled so that memory stays bounded.

    `path`: a diffusers `vae/` folder or the pipeline folder around it. `progress` gets the pieces done and in all.
    `follow_links`: the files of the folder may be links out of it. All devices of `mesh` decode; CogVideoX's decoder is
    PyTorch's and uses none of them.

    Raises ValueError for a VAE that cannot be loaded or has other channels and for latents that are not finite,
    ImportError without the `torch` extra for CogVideoX.
    """
    if not is_finite(latents):
        raise ValueError("latents have NaN or infinite values, which make no video; sample them again")
    folder = vae_folder(Path(path))
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("_class_name") == "AutoencoderKLCogVideoX":
        from models.vae.cogvideox_torch import decode_with_diffusers

        return decode_with_diffusers(folder, latents, dtype=dtype, follow_links=follow_links)
    vae = load_vae(folder, dtype=dtype, follow_links=follow_links)
    if latents.ndim != 5 or latents.shape[1] != vae.channels:
        raise ValueError(f"{folder} decodes latents [B, {vae.channels}, F, H, W]; got {list(latents.shape)}")
    return vae.decode(jnp.asarray(latents), progress=progress, mesh=mesh)
