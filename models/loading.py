"""Checkpoints on disk to models: diffusers folders, and folders written by `python -m convert`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import hunyuan_keys
from models.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from models.key_table import Leaf, plan
from models.safetensors_folder import CheckpointError, Tensor, read_folder, read_json

MARK = "adaspa_jax"
"""Key of a converted folder's config.json that says who wrote it."""
FORMAT_VERSION = 1
WEIGHTS = "weights"
"""The orbax checkpoint inside a converted folder."""
CLASSES = ("HunyuanVideoTransformer3DModel",)
"""diffusers classes that are ported."""


@dataclass(frozen=True)
class Source:
    """A diffusers transformer, every key checked, nothing read yet."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    leaves: list[Leaf]

    @property
    def dtype(self) -> np.dtype:
        """The widest dtype among the weights."""
        return max({t.dtype for t in self.tensors.values()}, key=lambda d: d.itemsize)


def transformer_folder(path: Path) -> Path:
    """`path`, or its transformer/ if `path` is a pipeline. Raises CheckpointError if it is no checkpoint."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder of a checkpoint")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the folder of a checkpoint")
    if (path / "config.json").is_file():
        return path
    if (path / "transformer" / "config.json").is_file():
        return path / "transformer"
    raise CheckpointError(f"{path} is no checkpoint: neither config.json nor transformer/config.json is in it")


def _parse_config(folder: Path, config: dict[str, Any]) -> HunyuanVideoConfig:
    name = config.get("_class_name")
    if name not in CLASSES:
        raise CheckpointError(
            f"{folder / 'config.json'}: class {name!r} is not supported; supported: {', '.join(CLASSES)}"
        )
    try:
        return HunyuanVideoConfig.from_dict(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def abstract_model(config: HunyuanVideoConfig, dtype: Any) -> HunyuanVideoTransformer:
    """The model with shapes in place of weights."""
    return nnx.eval_shape(lambda: HunyuanVideoTransformer(config, dtype=dtype, rngs=nnx.Rngs(0)))


def parameter_shapes(model: nnx.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    """NNX path -> shape of every parameter."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {tuple(map(str, path)): tuple(leaf.shape) for path, leaf in flat}


def open_source(path: Path) -> Source:
    """Opens a diffusers folder and checks config, shards, keys and shapes. Raises CheckpointError."""
    folder = transformer_folder(path)
    config = read_json(folder / "config.json")
    if MARK in config:
        raise CheckpointError(f"{folder} is already converted; give the original checkpoint")
    model = abstract_model(_parse_config(folder, config), jnp.float32)
    tensors = read_folder(folder)
    leaves = plan(tensors, hunyuan_keys.DIFFUSERS, parameter_shapes(model), hunyuan_keys.STACKS)
    return Source(folder, config, tensors, leaves)


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A tree with one leaf."""
    for name in reversed(path):
        value = {name: value}
    return value


def _read_converted(folder: Path, config: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    """Restores the orbax checkpoint of a converted folder."""
    from orbax.checkpoint import v1 as ocp

    version = config[MARK].get("format") if isinstance(config[MARK], dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {version!r}, this version reads {FORMAT_VERSION}; convert it again")
    if not (folder / WEIGHTS).is_dir():
        raise CheckpointError(f"{folder} has no {WEIGHTS}/; convert it again")
    model = abstract_model(_parse_config(folder, config), jnp.dtype(config[MARK]["dtype"]))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        node = abstract
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    try:
        tree = ocp.load((folder / WEIGHTS).absolute(), abstract)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}); convert it again") from error
    for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(str(key.key) for key in path), value  # type: ignore[attr-defined]


def from_pretrained(path: str | Path, dtype: Any = None) -> HunyuanVideoTransformer:
    """Loads a transformer from a converted folder or a diffusers folder (a transformer's, or a pipeline's root).

    Weights stream in parameter by parameter. `dtype` None keeps the checkpoint's. Raises CheckpointError, a
    ValueError, for anything that cannot be loaded whole.
    """
    folder = transformer_folder(Path(path))
    config = read_json(folder / "config.json")
    if MARK in config:
        stored = jnp.dtype(config[MARK]["dtype"]) if isinstance(config[MARK], dict) else None
        values: Iterator[tuple[tuple[str, ...], Any]] = _read_converted(folder, config)
    else:
        source = open_source(folder)
        stored = source.dtype
        values = ((leaf.path, leaf.read(source.tensors)) for leaf in source.leaves)
    dtype = jnp.dtype(dtype or stored)
    model = abstract_model(_parse_config(folder, config), dtype)
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    by_name = {tuple(map(str, p)): p for p in flat}
    for name, value in values:
        flat[by_name[name]] = flat[by_name[name]].replace(jnp.asarray(value, dtype))
    nnx.update(model, nnx.from_flat_state(list(flat.items())))
    return model
