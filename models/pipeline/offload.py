"""Weights that wait in the memory of the host: each layer's until it runs, or an expert's while the other runs."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from models.pipeline.mesh import is_stacked

Offload = Literal["none", "experts", "layers"]
"""What waits: nothing; of two experts the one that does not run; all layers, fetched one by one as they run."""
_HOST = "pinned_host"
_LARGE = 0.6
"""Share of a device's memory above which two experts are not both kept in it."""


def host_memory(device: jax.Device | None = None) -> NamedSharding:
    """The memory of the host that a device, None: the default one, reads by itself. NotImplementedError: has none."""
    device = device or jax.devices()[0]
    if _HOST not in (memory.kind for memory in device.addressable_memories()):
        raise NotImplementedError(f"{device.device_kind} has no {_HOST} memory, where offloaded weights wait")
    return NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec(), memory_kind=_HOST)


def waits(x: Any) -> bool:
    """Whether an array, or a shape with a sharding, is in the memory of the host."""
    return getattr(getattr(x, "sharding", None), "memory_kind", None) == _HOST


def resting_place(offload: Offload) -> Callable[[tuple[Any, ...], tuple[int, ...]], Any] | None:
    """Where each parameter lies, by NNX path and shape; None: all on the default device. Raises as `host_memory`."""
    if offload == "none":
        return None
    host, device = host_memory(), SingleDeviceSharding(jax.devices()[0])
    return lambda path, shape: host if offload == "experts" or is_stacked(path) else device


def fetched(weights: Any) -> Any:
    """Weights on the device, those that wait brought there."""
    device = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.device_put(x, device) if waits(x) else x, weights)


def check_offload(offload: Offload, experts: int) -> None:
    """ValueError for what is none, and for the turns of a single expert."""
    if offload not in get_args(Offload):
        raise ValueError(f"{offload=} must be one of {', '.join(get_args(Offload))}")
    if offload == "experts" and experts < 2:
        raise ValueError(f"{offload=} is for models of two experts, and this one has one; give layers or none")


def default_offload(experts: int, weights: int, limit: int | None) -> Offload:
    """Of "experts" and "none": turns where two, of `weights` bytes, would fill most of a device's `limit`."""
    return "experts" if experts > 1 and limit is not None and weights > _LARGE * limit else "none"
