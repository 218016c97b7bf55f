"""Checkpoints on disk to models: diffusers folders, and folders written by `python -m convert`."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.key_table import Leaf, plan
from models.registry import PORTS, Port
from models.safetensors_folder import CheckpointError, Tensor, read_folder, read_json
from models.transformer import TransformerConfig, VideoTransformer

MARK = "adaspa_jax"
"""Key of a converted folder's config.json that says who wrote it."""
FORMAT_VERSION = 1
WEIGHTS = "weights"
"""The orbax checkpoint inside a converted folder."""


@dataclass(frozen=True)
class Source:
    """A diffusers transformer, every key checked, nothing read yet."""

    folder: Path
    config: dict[str, Any]
    port: Port
    sizes: TransformerConfig
    tensors: dict[str, Tensor]
    leaves: list[Leaf]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of most weights: some stay float32 in a bfloat16 checkpoint, and in the model."""
        count: Counter[np.dtype] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype] += math.prod(tensor.shape)
        return max(count, key=lambda dtype: (count[dtype], dtype.itemsize))

    def dtypes(self, dtype: Any) -> dict[tuple[str, ...], np.dtype]:
        """NNX path -> dtype of every parameter of a model of `dtype`."""
        model = abstract_model(self.port, self.sizes, dtype)
        return {path: np.dtype(leaf.dtype) for path, leaf in parameters(model).items()}


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


def parse_config(folder: Path, config: dict[str, Any]) -> tuple[Port, TransformerConfig]:
    """The port of a config.json's class, and its config. Raises CheckpointError."""
    name = config.get("_class_name")
    if name not in PORTS:
        raise CheckpointError(
            f"{folder / 'config.json'}: class {name!r} is not supported; supported: {', '.join(PORTS)}"
        )
    try:
        return PORTS[name], PORTS[name].config.from_dict(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def abstract_model(port: Port, config: TransformerConfig, dtype: Any) -> VideoTransformer:
    """The model with shapes in place of weights."""
    create: Any = port.model
    return nnx.eval_shape(lambda: create(config, dtype=dtype, rngs=nnx.Rngs(0)))


def parameters(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    """NNX path -> leaf, with shape and dtype, of every parameter."""
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def parameter_shapes(model: nnx.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    """NNX path -> shape of every parameter."""
    return {path: tuple(leaf.shape) for path, leaf in parameters(model).items()}


def open_source(path: Path) -> Source:
    """Opens a diffusers folder and checks config, shards, keys and shapes. Raises CheckpointError."""
    folder = transformer_folder(path)
    config = read_json(folder / "config.json")
    if MARK in config:
        raise CheckpointError(f"{folder} is already converted; give the original checkpoint")
    port, sizes = parse_config(folder, config)
    tensors = read_folder(folder)
    shapes = parameter_shapes(abstract_model(port, sizes, jnp.float32))
    return Source(folder, config, port, sizes, tensors, plan(tensors, port.rules, shapes, port.stacks))


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
    model = abstract_model(*parse_config(folder, config), jnp.dtype(config[MARK]["dtype"]))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract: dict[str, Any] = {}
    for path, leaf in parameters(model).items():
        node = abstract
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    try:
        tree = ocp.load((folder / WEIGHTS).absolute(), abstract)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}); convert it again") from error
    for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(str(key.key) for key in path), value  # type: ignore[attr-defined]


def from_pretrained(path: str | Path, dtype: Any = None) -> VideoTransformer:
    """Loads a transformer from a converted folder or a diffusers folder (a transformer's, or a pipeline's root).

    Weights stream in parameter by parameter. `dtype` None keeps the checkpoint's; parameters that the architecture
    holds in float32 stay so. Raises CheckpointError, a
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
    model = abstract_model(*parse_config(folder, config), dtype)
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    by_name = {tuple(map(str, p)): p for p in flat}
    for name, value in values:
        leaf = flat[by_name[name]]
        flat[by_name[name]] = leaf.replace(jnp.asarray(value, leaf.dtype))
    nnx.update(model, nnx.from_flat_state(list(flat.items())))
    return model
