"""Arrays made from constants, and results of kernels, inside `jax.shard_map`: they vary over the operands' mesh axes.

With `check_vma=True`, shard_map's default, a loop must end with values that vary over the axes they started with.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def _axes(operands: Sequence[Array]) -> tuple[str, ...]:
    return tuple(sorted(set().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))))


def constant(value: float, shape: Any, dtype: Any, *operands: Array) -> Array:
    """An array full of `value` that varies over every mesh axis that one of the operands varies over."""
    x, axes = jnp.full(shape, value, dtype), _axes(operands)
    return lax.pcast(x, axes, to="varying") if axes else x


def result(shape: tuple[int, ...], dtype: Any, *operands: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel's result that varies over what its operands vary over."""
    like = jax.typeof(constant(0, (), dtype, *operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=like.manual_axis_type)
