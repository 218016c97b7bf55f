"""Checkpoints on disk to models: diffusers folders, original files, and folders written by `python -m convert`."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoint.formats import beside, to_diffusers, unknown_format
from models.checkpoint.inferred_config import WAN_CLASS, infer_config, wan_config
from models.checkpoint.key_moves import Format, TensorView
from models.checkpoint.key_table import Leaf, map_keys, plan
from models.checkpoint.lora import merged
from models.checkpoint.lora_file import LoraLike, as_loras
from models.checkpoint.orbax_errors import reason_of, silenced
from models.checkpoint.quantised import dequantised
from models.checkpoint.registry import PORTS, Port
from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.checkpoint.weight_files import expert_folders, read_weights, weights_file
from models.transformers.base import TransformerConfig, VideoTransformer

__all__ = ["CheckpointError", "Source", "describe", "expert_folders", "from_pretrained", "open_source"]

_LOG = logging.getLogger(__name__)
MARK = "adaspa_jax"
"""Key of a converted folder's config.json that says who wrote it."""
FORMAT_VERSION = 1
WEIGHTS = "weights"
"""The orbax checkpoint inside a converted folder."""

Placement = jax.sharding.Sharding | Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""One sharding for all parameters, or one for each by its NNX path and shape."""
Progress = Callable[[int, int], None]
"""Called with the numbers of parameters done so far and in all."""


@dataclass(frozen=True)
class Source:
    """A transformer on disk, every key checked, nothing read yet."""

    path: Path
    """Its folder or its only file."""
    format: str
    """Whose keys the file has."""
    config: dict[str, Any]
    port: Port
    sizes: TransformerConfig
    tensors: dict[str, TensorView]
    """Under diffusers' keys."""
    leaves: list[Leaf]
    beside: dict[str, int] = field(default_factory=dict)
    """What else is in the file, and is left out: name of the part -> number of tensors."""

    def say_beside(self) -> None:
        """Logs what is left out, if anything is."""
        if self.beside:
            parts = ", ".join(f"{name} ({count})" for name, count in self.beside.items())
            _LOG.warning("%s: its transformer is read; not read, by name and number of tensors: %s", self.path, parts)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of most weights: some stay float32 in a bfloat16 checkpoint, and in the model.

        float32 for float64, bfloat16 for what is quantised.
        """
        count: Counter[np.dtype] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype] += math.prod(tensor.shape)
        most = max(count, key=lambda dtype: (count[dtype], dtype.itemsize))
        return np.dtype(np.float32) if most == np.float64 else most

    def dtypes(self, dtype: Any) -> dict[tuple[str, ...], np.dtype]:
        """NNX path -> dtype of every parameter of a model of `dtype`."""
        model = abstract_model(self.port, self.sizes, dtype)
        return {path: np.dtype(leaf.dtype) for path, leaf in parameters(model).items()}


@dataclass(frozen=True)
class Converted:
    """A folder that `python -m convert` wrote, its config checked, nothing read yet."""

    path: Path
    port: Port
    sizes: TransformerConfig
    dtype: np.dtype
    """That it was converted to; some weights stay float32 in it."""


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder or file of a checkpoint")
    return path


def transformer_folder(path: Path) -> Path:
    """`path`, or its transformer/ if `path` is a pipeline. Raises CheckpointError if it is no checkpoint."""
    if not _existing(path).is_dir():
        raise CheckpointError(f"{path} is a file; give the folder of a checkpoint")
    if (path / "config.json").is_file():
        return path
    if (path / "transformer" / "config.json").is_file():
        return path / "transformer"
    raise CheckpointError(f"{path} is no checkpoint: neither config.json nor transformer/config.json is in it")


def locate(path: Path, follow_links: bool = False) -> Path:
    """The folder with config.json or the file of weights that `path` means. Raises CheckpointError.

    `follow_links`: the file may be a link out of its folder.
    """
    if not _existing(path).is_dir():
        return path
    if len(expert_folders(path)) > 1:
        names = " and ".join(f"{folder.name}/" for folder in expert_folders(path))
        raise CheckpointError(f"{path} has two experts; give {names} one at a time")
    configs = ("config.json", "transformer/config.json", "model_index.json")  # a pipeline is never without config
    if not any((path / name).is_file() for name in configs):
        for folder in (path, path / "transformer", path / "transformers"):
            if folder.is_dir() and (file := weights_file(folder, follow_links)):
                return file
    return transformer_folder(path)


_KINDS = {"Autoencoder": ", a VAE,", "WanVACE": ", Wan with VACE,", "VaceWan": ", Wan with VACE,"}
"""Beginnings of the names of classes that are not ported -> what they are."""


def parse_config(path: Path, config: dict[str, Any]) -> tuple[Port, TransformerConfig]:
    """The port of a config's class, and its config; `path`, its file or folder, is for messages.

    Raises CheckpointError.
    """
    file = path / "config.json" if path.is_dir() else path
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in PORTS:
        kind = next((kind for start, kind in _KINDS.items() if str(name).startswith(start)), "")
        raise CheckpointError(f"{file}: class {name!r}{kind} is not supported; supported: {', '.join(PORTS)}")
    try:
        return PORTS[name], PORTS[name].config.from_dict(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{file}: {error}") from error


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


def _config(path: Path, known: Format | None, tensors: dict[str, TensorView]) -> tuple[Path, dict[str, Any]]:
    """(where it is from, the config in diffusers' names): config.json if it is of this model, else from the shapes."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    stored = read_json(file) if file.is_file() else {}
    name = stored.get("_class_name")
    if path.is_dir() and name != WAN_CLASS:
        return file, stored
    if known is None:
        raise unknown_format(path, tensors)
    if name == known.class_name:
        return file, stored
    config = infer_config(known.class_name, {key: tuple(t.shape) for key, t in tensors.items()}) | dict(known.config)
    if name == WAN_CLASS and known.class_name == "WanTransformer3DModel":
        return file, config | wan_config(stored)
    return path, config


def _weights(tensors: dict[str, TensorView], port: Port) -> dict[str, TensorView]:
    """Without the buffers beside them: integers, booleans and float64 under no key of the model.

    Raises CheckpointError for weights of a dtype that is not supported.
    """
    unmatched = set(map_keys(tensors, port.rules)[1])
    kept = {}
    for key, tensor in tensors.items():
        if key in unmatched and (tensor.problem or tensor.dtype == np.float64):
            continue
        if tensor.problem:
            raise CheckpointError(tensor.problem)
        kept[key] = tensor
    return kept


def open_source(path: Path, follow_links: bool = False) -> Source:
    """Opens a checkpoint and checks config, shards, keys and shapes. Raises CheckpointError.

    A diffusers folder, or original weights: a file of safetensors or of PyTorch, an index of shards, or a folder with
    one of them. The keys tell the format. `follow_links`: files of the folder may be links out of it.
    """
    path = locate(path, follow_links)
    if path.is_dir():
        config = read_json(path / "config.json")
        if MARK in config:
            raise CheckpointError(f"{path} is already converted; give the original checkpoint")
        if config.get("_class_name") != WAN_CLASS:
            parse_config(path / "config.json", config)  # before the weights, which may be of anything
    found = dequantised(read_weights(path, follow_links))
    known, tensors = to_diffusers(path, found)
    file, config = _config(path, known, tensors)
    port, sizes = parse_config(file, config)
    if known is not None and known.class_name != config["_class_name"]:
        raise CheckpointError(f"{file} says {config['_class_name']}, but the weights are of a {known.class_name}")
    tensors = _weights(tensors, port)
    shapes = parameter_shapes(abstract_model(port, sizes, jnp.float32))
    origin = "the config inferred from their shapes" if file == path else "config.json"
    leaves = plan(tensors, port.rules, shapes, port.stacks, origin)
    name = known.name if known else "diffusers"
    return Source(path, name, config, port, sizes, tensors, leaves, beside(path, found))


def _open_converted(folder: Path, config: dict[str, Any]) -> Converted:
    """Checks what a converted folder says of itself. Raises CheckpointError."""
    mark = config[MARK] if isinstance(config[MARK], dict) else {}
    version, name = mark.get("format"), mark.get("dtype")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {version!r}, this version reads {FORMAT_VERSION}; convert it again")
    if not (folder / WEIGHTS).is_dir():
        raise CheckpointError(f"{folder} has no {WEIGHTS}/; convert it again")
    port, sizes = parse_config(folder, config)
    try:
        dtype = jnp.dtype(str(name))
    except TypeError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {name!r} is no dtype; convert it again") from error
    return Converted(folder, port, sizes, dtype)


def open_checkpoint(path: Path, follow_links: bool = False, loras: Sequence[LoraLike] = ()) -> Source | Converted:
    """Opens what `open_source` does, or a converted folder, and checks all but the values. Raises CheckpointError."""
    folder = locate(path, follow_links)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if MARK in config:
        if loras:
            raise CheckpointError(f"{folder} is converted, and a LoRA needs the checkpoint that it is from; give that")
        return _open_converted(folder, config)
    source = open_source(folder, follow_links)
    if not loras:
        return source
    name = source.config["_class_name"]
    return replace(source, tensors=merged(source.tensors, name, as_loras(loras), follow_links))


def _model_of(opened: Source | Converted, dtype: Any) -> VideoTransformer:
    """The model with shapes in place of weights; `dtype` None: the checkpoint's."""
    return abstract_model(opened.port, opened.sizes, jnp.dtype(dtype or opened.dtype))


def describe(
    path: str | Path, dtype: Any = None, *, follow_links: bool = False, loras: Sequence[LoraLike] = ()
) -> VideoTransformer:
    """The transformer that `from_pretrained` would load, with shapes in place of weights.

    Raises CheckpointError for what it would refuse but for the values of the weights.
    """
    return _model_of(open_checkpoint(Path(path), follow_links, loras), dtype)


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A tree with one leaf."""
    for name in reversed(path):
        value = {name: value}
    return value


def _sharding(placement: Placement | None, path: tuple[str, ...], shape: tuple[int, ...]) -> Any:
    """The sharding of one parameter; None: the default device."""
    return placement(path, shape) if callable(placement) else placement


def _read_converted(source: Converted, placement: Placement | None) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    """Restores the orbax checkpoint of a converted folder."""
    from orbax.checkpoint import v1 as ocp

    folder, model = source.path, _model_of(source, None)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract: dict[str, Any] = {}
    for path, leaf in parameters(model).items():
        node = abstract
        for name in path[:-1]:
            node = node.setdefault(name, {})
        sharding = _sharding(placement, path, leaf.shape) or default
        node[path[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    try:
        with silenced():
            tree = ocp.load((folder / WEIGHTS).absolute(), abstract)
    except Exception as error:  # whatever orbax makes of a damaged folder
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({reason_of(error)}); convert it again") from error
    for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(str(key.key) for key in path), value  # type: ignore[attr-defined]


def _read_leaf(source: Source, leaf: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """One parameter on its devices: each slice is read once, and of the file only that slice."""
    if sharding is None:
        return jax.device_put(leaf.read(source.tensors, dtype))
    slices: dict[Any, np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index or ())
        if key not in slices:  # devices that hold the same
            slices[key] = leaf.read(source.tensors, dtype, index)
        return slices[key]

    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _stream(
    source: Source, dtypes: dict[tuple[str, ...], np.dtype], placement: Placement | None
) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    """All parameters; on the host no more than one that has not arrived on its devices."""
    for leaf in source.leaves:
        value = _read_leaf(source, leaf, dtypes[leaf.path], _sharding(placement, leaf.path, leaf.shape))
        yield leaf.path, jax.block_until_ready(value)


def from_pretrained(
    path: str | Path,
    dtype: Any = None,
    sharding: Placement | None = None,
    progress: Progress | None = None,
    *,
    follow_links: bool = False,
    loras: Sequence[LoraLike] = (),
) -> VideoTransformer:
    """Loads a transformer, parameter by parameter, straight onto its devices.

    Args:
      path: a converted folder; a diffusers folder, a transformer's or a pipeline's root; or original weights: a
        .safetensors, .pt or .gguf file, an index of shards, or a folder with one of them. Weights in fp8 and of GGUF
        are dequantised. A lone file takes its config from a
        config.json beside it, else from its shapes (`models.checkpoint.inferred_config` says what they leave open).
      dtype: None keeps the checkpoint's; parameters that the architecture holds in float32 stay so.
      sharding: of all parameters, or a function of NNX path and shape that gives each one's; every device reads its
        own slice. None: the default device.
      progress: called with the numbers of parameters loaded so far and in all.
      follow_links: the files of a folder may be links out of it; else only to the blobs of its own hub cache.
      loras: adapters to merge, files or (file, scale); see `models.checkpoint.lora`. In float32, as weights are read.

    Raises:
      CheckpointError: a ValueError, for anything that cannot be loaded whole.
    """
    source = open_checkpoint(Path(path), follow_links, loras)
    model = _model_of(source, dtype)
    if isinstance(source, Converted):
        values = _read_converted(source, sharding)
    else:
        source.say_beside()
        dtypes = {name: np.dtype(leaf.dtype) for name, leaf in parameters(model).items()}
        values = _stream(source, dtypes, sharding)
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    by_name = {tuple(map(str, p)): p for p in flat}
    total, done = sum(math.prod(leaf.shape) for leaf in flat.values()), 0
    for name, value in values:
        leaf = flat[by_name[name]]
        flat[by_name[name]] = leaf.replace(value if value.dtype == leaf.dtype else value.astype(leaf.dtype))
        done += value.size
        if progress:
            progress(done, total)
    nnx.update(model, nnx.from_flat_state(list(flat.items())))
    return model
