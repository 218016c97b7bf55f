"""A pipeline on a mesh of devices: where weights, noise and states lie, and which mesh suits a model."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from adaspa_jax import AttentionSharding, SparseConfig, SparseState
from adaspa_jax.sharding import DATA, HEADS, ROWS
from models.checkpoint.registry import PORTS

Weights = Literal["replicated", "sharded"]
"""Whole on every device; or a slice of each on every device, gathered layer by layer as they are used (FSDP)."""
_AXES = (DATA, ROWS, HEADS)
_STACKS = frozenset().union(*(port.stacks for port in PORTS.values()))


def make_mesh(data: int = 1, heads: int = 1, rows: int = 1, devices: Any = None) -> Mesh:
    """A mesh with the axes of `AttentionSharding`, over the first devices, the heads on neighbours.

    ValueError if there are too few, or only some of those of several hosts.
    """
    devices, count = jax.devices() if devices is None else devices, data * heads * rows
    if count > len(devices):
        raise ValueError(f"data={data}, heads={heads}, rows={rows} needs {count} devices; there are {len(devices)}")
    if len({device.process_index for device in devices}) > 1 and count < len(devices):
        raise ValueError(f"data={data}, heads={heads}, rows={rows} must take all {len(devices)} devices of the hosts")
    return jax.make_mesh((data, rows, heads), _AXES, (AxisType.Auto,) * 3, devices=devices[:count])


def parse_mesh(text: str, heads: int, batch: int, config: SparseConfig, devices: Any = None) -> Mesh:
    """The mesh of "data=2,heads=4", or for "auto" the best over all devices.

    `heads` of the model, `batch` with both branches of guidance counted. ValueError for what is no mesh.
    """
    sizes = parse_axes(text)
    if sizes is None:
        return make_mesh(*best_mesh(len(jax.devices() if devices is None else devices), heads, batch, config), devices)
    return make_mesh(**sizes, devices=devices)


def parse_axes(text: str) -> dict[str, int] | None:
    """The sizes of "data=2,heads=4", None for "auto"; asks for no device. ValueError for what is no mesh."""
    if text == "auto":
        return None
    sizes = dict.fromkeys(_AXES, 1)
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh {text!r}: {part!r} is no axis; give auto, or some of data=N,heads=N,rows=N")
        sizes[name] = int(size)
    return sizes


def best_mesh(devices: int, heads: int, batch: int, config: SparseConfig) -> tuple[int, int, int]:
    """(data, heads, rows) over all devices: branches apart first, which costs nothing; then heads; rows last.

    K and V are gathered over rows, an all-to-all over heads moves less.
    """
    data = 1 if config.share_cfg_indices else math.gcd(devices, batch)
    over = math.gcd(devices // data, heads)
    rows = devices // data // over
    if rows > 1 and not config.row_wise:
        raise ValueError(f"row_wise=False needs rows=1, which {devices} devices do not give; use {data * over} of them")
    return data, over, rows


def placement(mesh: Mesh, weights: Weights) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]:
    """The sharding of every parameter, by its NNX path and shape, for `from_pretrained`."""
    if weights not in get_args(Weights):
        raise ValueError(f"{weights=} must be one of {', '.join(get_args(Weights))}")

    def place(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        spec: list[Any] = [None] * len(shape)
        first = 1 if is_stacked(path) else 0
        fits = [axis for axis in range(first, len(shape)) if shape[axis] % mesh.size == 0]
        if weights == "sharded" and fits:
            spec[max(fits, key=lambda axis: shape[axis])] = mesh.axis_names
        return NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return place


Place = Callable[[tuple[Any, ...], tuple[int, ...]], Any]
"""NNX path and shape of a parameter -> its sharding."""


def placed(weights: Any, place: Place | None) -> Any:
    """The shapes of weights with where they lie, or will lie by `place`; None: on the default device."""

    def shape(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        where = None if place is None else getattr(x, "sharding", None) or place(tuple(map(_name, path)), x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(shape, weights)


def _name(part: Any) -> str:
    """Of one part of a path in a tree."""
    return str(getattr(part, "key", getattr(part, "name", part)))


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether a parameter belongs to a stack of layers, which gathers its own weights."""
    return bool(_STACKS & {str(getattr(part, "key", part)) for part in path})


def gather_small(weights: Any, sharding: AttentionSharding) -> Any:
    """Inside `jax.jit`: all weights outside of the stacks of layers, whole on every device."""
    keep = lambda path, x: x if is_stacked(path) else sharding.replicated(x)
    return jax.tree_util.tree_map_with_path(keep, weights)


def put(x: Any, sharding: AttentionSharding | None) -> jax.Array:
    """An array of the host on every device."""
    return jax.numpy.asarray(x) if sharding is None else jax.device_put(np.asarray(x), sharding.named())


def create_states(create: Callable[[], Any], sharding: AttentionSharding | None) -> Any:
    """A model's states, made where they belong."""
    if sharding is None:
        return create()
    named = SparseState.shardings(sharding)
    return jax.jit(create, out_shardings=tuple(named for _ in jax.eval_shape(create)))()


def for_report(states: Any, sharding: AttentionSharding | None) -> Any:
    """The states with counts that every host can read."""
    if sharding is None:
        return states
    whole = jax.jit(lambda x: x, out_shardings=sharding.named())
    is_state = lambda x: isinstance(x, SparseState)
    return jax.tree.map(lambda s: s._replace(counts=whole(s.counts)), states, is_leaf=is_state)
