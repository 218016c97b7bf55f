"""Seeds to PRNG keys: 64 bits, and the same numbers whatever `jax_enable_x64` and the default PRNG are."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Noise = Callable[[Array, Array, Array], Array]
"""(key, int32 number of the step from 0, latents) -> noise shaped like the latents."""


def check_seed(seed: Any) -> int:
    """`seed` as an int. Raises ValueError unless it is a whole number in 0 .. 2^64 - 1."""
    try:
        number = -1 if isinstance(seed, bool | np.bool_) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 64:
        raise ValueError(f"seed={seed!r} must be a whole number in 0 .. 2^64 - 1")
    return number


def words_of(seed: Any) -> np.ndarray:
    """A seed as uint32 [2], for `key_of`. Raises ValueError for what is no seed."""
    number = check_seed(seed)
    # Both halves by hand: without x64 `jax.random.key` drops the upper one.
    return np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


def key_of(words: Array) -> Array:
    """The threefry key of `words_of` a seed, which may be traced."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def random_key(seed: Any) -> Array:
    """The key of a seed, a threefry key of its own for each; below 2^32 that of `jax.random.key`.

    Raises ValueError for what is no seed.
    """
    return key_of(jnp.asarray(words_of(seed)))


def as_key(seed: Any) -> Array:
    """The key of a seed, of a traced whole number of 32 bits, or a key as it is."""
    if not isinstance(seed, Array):
        return random_key(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    return jax.random.key(seed, impl="threefry2x32")


def normal(key: Array, number: Array, latents: Array) -> Array:
    """Standard normal noise shaped like the latents; `number` of the step is not used, the key differs in each."""
    return jax.random.normal(key, latents.shape, latents.dtype)
