"""VAE decoders from a checkpoint: diffusers `vae/` folders to Flax modules, every decoder key used once."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoint.formats import prefixes, several_models, under
from models.checkpoint.key_moves import TensorView
from models.checkpoint.safetensors_folder import CheckpointError, is_finite, read_json
from models.checkpoint.weight_files import read_weights
from models.vae.base import VAEConfig, VideoVAE
from models.vae.hunyuan import HunyuanVAEConfig, HunyuanVideoVAE
from models.vae.tiling import WHOLE, Tiling
from models.vae.wan import WanVAE, WanVAEConfig

__all__ = ["VAES", "WHOLE", "Tiling", "VideoVAE", "load_vae", "plan_vae", "vae_folder"]


@dataclass(frozen=True)
class VAEPort:
    """One architecture."""

    config: type[VAEConfig]
    model: type[VideoVAE]


VAES = {
    "AutoencoderKLHunyuanVideo": VAEPort(HunyuanVAEConfig, HunyuanVideoVAE),
    "AutoencoderKLWan": VAEPort(WanVAEConfig, WanVAE),
}
"""diffusers class name -> port."""

ENCODER = re.compile(r"(encoder|quant_conv)\..+")
"""Keys that decoding has no use for."""
_NAMES = {"kernel": "weight", "scale": "weight", "resample": "resample.1", "to_out": "to_out.0"}
"""NNX attributes that diffusers names differently."""


def vae_folder(path: Path) -> Path:
    """`path`, or its vae/ if `path` is a pipeline. Raises CheckpointError if it is neither."""
    for folder in (path / "vae", path):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} has neither config.json nor vae/config.json; give a diffusers vae or pipeline folder"
    )


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a PyTorch tensor fills an NNX parameter; norms and 1 x 1 kernels may have axes of length 1 at the end."""
    if len(shape) == 5:
        time, height, width, into, out = shape
        return found in ((out, into, time, height, width), (out, into, height, width)[: 4 if time == 1 else 0])
    torch = shape[::-1]
    return found[: len(torch)] == torch and set(found[len(torch) :]) <= {1}


def _to_nnx(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A PyTorch weight in NNX layout: kernels are [in, out] or [t, h, w, in, out]."""
    if len(shape) == 5:
        value = value if value.ndim == 5 else value[:, :, None]
        return value.transpose(2, 3, 4, 1, 0)
    return value.reshape(shape[::-1]).T


def abstract_vae(config: dict[str, Any], dtype: Any) -> VideoVAE:
    """The decoder of a config.json with shapes in place of weights.

    Raises ValueError for a class or an option that is not ported.
    """
    name = config.get("_class_name")
    if name == "AutoencoderKLCogVideoX":
        raise ValueError(
            f"{name} has no JAX port; supported: {', '.join(VAES)}. `python -m models.decode` takes CogVideoX latents "
            "through diffusers: install the `torch` extra"
        )
    if not isinstance(name, str) or name not in VAES:
        raise ValueError(f"VAE class {name!r} is not supported; supported: {', '.join(VAES)}")
    try:
        sizes = VAES[name].config.from_dict(config)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"{name}: {error}") from error
    create: Any = VAES[name].model
    return nnx.eval_shape(lambda: create(sizes, dtype=dtype, rngs=nnx.Rngs(0)))


def _parameters(vae: VideoVAE) -> dict[tuple[Any, ...], Any]:
    return dict(nnx.to_flat_state(nnx.state(vae, nnx.Param)))


def _keys(vae: VideoVAE) -> dict[tuple[Any, ...], str]:
    """NNX path -> diffusers' key of every parameter."""
    return {path: ".".join(_NAMES.get(str(part), str(part)) for part in path) for path in _parameters(vae)}


def plan_vae(tensors: Mapping[str, Any], vae: VideoVAE) -> dict[tuple[Any, ...], str]:
    """NNX path -> key of the tensor (anything with `.shape`) that fills it.

    Keys of the encoder are left out; every other key is used once. Raises CheckpointError with the missing, unexpected
    or misshapen keys before anything is read.
    """
    parameters = _parameters(vae)
    keys = _keys(vae)
    wanted = set(keys.values())
    misshapen = [
        f"{key} {list(tensors[key].shape)} for {list(parameters[path].shape)}"
        for path, key in keys.items()
        if key in tensors and not _fits(tuple(tensors[key].shape), tuple(parameters[path].shape))
    ]
    unexpected = [key for key in tensors if key not in wanted and not ENCODER.fullmatch(key)]
    problems = {"missing": sorted(wanted - set(tensors)), "unexpected": unexpected, "misshapen": misshapen}
    for title, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"the weights do not fit config.json: {len(names)} {title} keys: {', '.join(names[:3])}{more}; "
                "check that config.json and the weights belong together"
            )
    return keys


def read_vae(folder: Path, keys: Collection[str], follow_links: bool = False) -> dict[str, TensorView]:
    """The tensors of a VAE's folder, without a prefix of them all, and without buffers that are none of `keys`.

    `keys`: what its decoder has. Raises CheckpointError, also for weights of a dtype that is not supported.
    """
    tensors = read_weights(folder, follow_links)
    found = prefixes(tensors, (min(keys),))
    if len(found) > 1:
        raise several_models(folder, found)
    tensors = under(tensors, found[0] if found else "")
    for key in keys:
        if key in tensors and (problem := tensors[key].problem):
            raise CheckpointError(problem)
    return {key: tensor for key, tensor in tensors.items() if not tensor.problem}


def read_finite(tensor: TensorView) -> np.ndarray:
    """The values of a tensor. Raises CheckpointError for NaN and infinite ones."""
    value = tensor.read()
    if not is_finite(value):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} has NaN or infinite values; it is broken")
    return value


def load_vae(path: str | Path, dtype: Any = jnp.float32, *, follow_links: bool = False) -> VideoVAE:
    """Loads the decoder of a diffusers `vae/` folder, or of the pipeline folder around it.

    `dtype` of weights and computation: the published videos are decoded in float32 or float16 (Wan, HunyuanVideo).
    `follow_links`: the files of the folder may be links out of it; else only to the blobs of its own hub cache.
    Raises CheckpointError, a ValueError, for anything that cannot be loaded whole.
    """
    folder = vae_folder(Path(path))
    try:
        vae = abstract_vae(read_json(folder / "config.json"), jnp.dtype(dtype))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    tensors = read_vae(folder, _keys(vae).values(), follow_links)
    flat = _parameters(vae)
    for place, key in plan_vae(tensors, vae).items():
        value, leaf = read_finite(tensors[key]), flat[place]
        flat[place] = leaf.replace(jnp.asarray(_to_nnx(value, leaf.shape), leaf.dtype))
    nnx.update(vae, nnx.from_flat_state(list(flat.items())))
    return vae
