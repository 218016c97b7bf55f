"""Refuses a kernel that XLA would run whole on every device of several, its operands gathered in silence.

XLA partitions its own operations, never a Pallas kernel. What a program is lowered for is known in its lowering alone.
"""

from typing import Any

from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_whole = Primitive("adaspa_whole")


def check_whole(x: Array, kernel: str) -> Array:
    """x, an operand of `kernel`; NotImplementedError, when the program is lowered or before, if XLA would gather it.

    Inside `jax.shard_map` over all axes a device has its operands to itself.
    """
    return _whole.bind(x, kernel=kernel)


def _refuse(kernel: str, devices: int) -> None:
    if devices > 1:
        raise NotImplementedError(
            f"{kernel} would run whole on each of {devices} devices, its operands gathered: call it inside "
            "jax.shard_map, pass sharding=AttentionSharding(mesh) to adaspa_attention, or implementation='xla'"
        )


def _now(x: Array, *, kernel: str) -> Array:
    _refuse(kernel, len(x.sharding.device_set))
    return x


def _lower(context: Any, x: Any, *, kernel: str) -> list[Any]:
    where = context.module_context.axis_context
    manual = getattr(where, "manual_axes", None)
    if manual is None:
        _refuse(kernel, getattr(where, "num_devices", 1))
    else:
        free = [n for axis, n in where.mesh.shape.items() if axis not in manual | set(where.mesh.manual_axes)]
        for devices in free:
            _refuse(kernel, devices)
    return [x]


_whole.def_impl(_now)
_whole.def_abstract_eval(lambda x, *, kernel: x)
mlir.register_lowering(_whole, _lower)
batching.primitive_batchers[_whole] = lambda xs, axes, *, kernel: (check_whole(xs[0], kernel), axes[0])
