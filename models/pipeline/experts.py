"""The transformers of a checkpoint with shapes in place of weights: what can be checked before anything is loaded."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from models.checkpoint.loading import MARK, abstract_model, locate, open_source, parse_config
from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.transformers.base import VideoTransformer


def describe(path: Path, dtype: Any = None, follow_links: bool = False) -> VideoTransformer:
    """The transformer that `models.from_pretrained` would load, without weights.

    Raises CheckpointError for what it would refuse but for the values of the weights.
    """
    folder = locate(path, follow_links)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if MARK in config:
        stored = config[MARK].get("dtype", "float32") if isinstance(config[MARK], dict) else "float32"
        port, sizes = parse_config(folder, config)
        return abstract_model(port, sizes, jnp.dtype(dtype or stored))
    source = open_source(folder, follow_links)
    return abstract_model(source.port, source.sizes, jnp.dtype(dtype or source.dtype))


def boundary_ratio(index: dict[str, Any], experts: tuple[VideoTransformer, ...]) -> float | None:
    """Share of the timesteps at which the second expert takes over; None: there is one expert.

    `index`: the model_index.json. Raises CheckpointError for what is no share.
    """
    ratio = index.get("boundary_ratio")
    if ratio is None:
        if len(experts) < 2:
            return None
        # In Wan's own format nothing says it.
        return 0.9 if experts[0].config.in_channels > experts[0].config.out_channels else 0.875
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool) and math.isfinite(ratio)
    if not number or not 0 <= ratio <= 1:
        raise CheckpointError(f"model_index.json: boundary_ratio={ratio!r} must be in [0, 1]")
    return ratio
