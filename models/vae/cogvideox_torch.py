"""CogVideoX's VAE decoder, through diffusers: it has no JAX port."""

from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.vae.load import ENCODER, read_finite, read_vae, vae_folder

_CLASS = "AutoencoderKLCogVideoX"


def _load(folder: Path, config: dict[str, Any], follow_links: bool) -> Any:
    """diffusers' VAE in float32 with the weights of a folder, every key of its decoder used once."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_config(config).eval()
    decoder = {key for key in vae.state_dict() if not ENCODER.fullmatch(key)}
    tensors = read_vae(folder, decoder, follow_links)
    values = {key: torch.from_numpy(np.array(read_finite(x), np.float32)) for key, x in tensors.items()}
    try:
        missing, unexpected = vae.load_state_dict(values, strict=False)
    except RuntimeError as error:  # of other shapes
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {str(error).splitlines()[-1]}") from error
    problems = {"missing": sorted(decoder.intersection(missing)), "unexpected": unexpected}
    for title, keys in problems.items():
        if keys:
            raise CheckpointError(
                f"{folder}: the weights do not fit config.json: {len(keys)} {title} keys, such as {keys[0]}; "
                "check that config.json and the weights belong together"
            )
    return vae


def decode_with_diffusers(
    path: str | Path,
    latents: Any,
    *,
    dtype: str = "float32",
    device: str | None = None,
    tiled: bool = True,
    follow_links: bool = False,
) -> np.ndarray:
    """float32 video [B, 3, 4 * (F - 1) + 1, 8 * H, 8 * W] in [-1, 1] of latents [B, 16, F, H, W], on the host.

    `path` is a diffusers `vae/` folder of CogVideoX or the pipeline folder around it. `latents` are a sampler's result
    without the frames that CogVideoX1.5 pads with, channels before frames. They are divided by `scaling_factor` for
    1.5 too: its `invert_scale_latents` speaks of the image that image-to-video encodes, as in diffusers' pipelines.
    `device` None: "cuda" if there is one. `tiled`: sample by sample in blended tiles, for memory. `follow_links`: the
    files of the folder may be links out of it.

    Raises CheckpointError, a ValueError, for another VAE and for weights that cannot be loaded whole, ValueError for
    latents of another shape, and ImportError, saying what to install, without the `torch` extra.
    """
    folder = vae_folder(Path(path))
    config = read_json(folder / "config.json")
    if config.get("_class_name") != _CLASS:
        raise CheckpointError(f"{folder / 'config.json'}: {config.get('_class_name')!r} is no {_CLASS}; use load_vae")
    if np.ndim(latents) != 5 or np.shape(latents)[1] != config.get("latent_channels", 16):
        expected = f"[B, {config.get('latent_channels', 16)}, F, H, W]"
        raise ValueError(f"latents must be {expected}; got {list(np.shape(latents))}")
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        raise ImportError(f"decoding CogVideoX needs PyTorch ({error}): pip install 'adaspa_jax[torch]'") from error

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    vae = _load(folder, config, follow_links).to(device, getattr(torch, dtype))
    if tiled:
        vae.enable_tiling()
        vae.enable_slicing()
    scaled = torch.from_numpy(np.array(latents, np.float32)).to(device) / vae.config.scaling_factor
    with torch.no_grad():
        video = vae.decode(scaled.to(vae.dtype)).sample
    return np.clip(video.float().cpu().numpy(), -1, 1)
