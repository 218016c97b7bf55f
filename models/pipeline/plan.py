"""What a run of a pipeline is before it has weights: its steps by expert, its branches, its noise."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adaspa_jax import StepKind
from models.pipeline.embeddings import NEGATIVE, Embeddings
from models.schedulers.seeds import random_key


@dataclass(frozen=True)
class Part:
    """The steps of one expert."""

    expert: int
    first: int
    """Number of its first step, from 0."""
    kinds: np.ndarray
    """int32 [steps]: StepKinds."""


def split_steps(timesteps: np.ndarray, boundary: float | None, kinds: np.ndarray) -> list[Part]:
    """The steps of each expert: from `boundary` up the first, below it the second.

    An expert that begins among sparse steps searches in its first: it has seen no attention of its own.
    """
    high = len(kinds) if boundary is None else int((timesteps >= boundary).sum())
    parts = []
    for expert, (begin, end) in enumerate(((0, high), (high, len(kinds)))):
        own = kinds[begin:end].copy()
        sparse = np.flatnonzero(own != StepKind.DENSE)
        if len(sparse):
            own[sparse[0]] = StepKind.FUSED_SEARCH
        if begin < end:
            parts.append(Part(expert, begin, own))
    return parts


@dataclass(frozen=True)
class Plan:
    """What a run is, but for its noise and weights."""

    scheduler: Any
    tables: dict[str, np.ndarray]
    """The scheduler's, and `guidance`, the scale of classifier-free guidance."""
    scale: float
    """Embedded in the model."""
    guided: bool
    """Two branches, the unconditional first."""
    parts: list[Part]
    given: dict[str, np.ndarray]
    """Embeddings of both branches, one behind the other, or of the conditional one alone."""
    shape: tuple[int, int, int, int, int]
    """Of the latents, [B, C, F, H, W]."""


def branches(embeddings: Embeddings, guided: bool) -> dict[str, np.ndarray]:
    """What the model reads of [unconditional, conditional], or of the conditional branch alone."""
    names = [name for name in embeddings if not name.startswith(NEGATIVE)]
    if not guided:
        return {name: embeddings[name] for name in names}
    return {
        name: np.concatenate([embeddings.get(NEGATIVE + name, embeddings[name]), embeddings[name]]) for name in names
    }


def initial_noise(shape: tuple[int, ...], seed: int, given: Any) -> Array:
    """float32 noise of a seed, the same whatever `jax_enable_x64` is, or what is given. ValueError unless it fits."""
    if given is None:
        return jax.random.normal(random_key(seed), shape, jnp.float32)
    noise = jnp.asarray(given, jnp.float32)
    if noise.shape != shape:
        raise ValueError(f"noise must be {list(shape)}; got {list(noise.shape)}")
    if not jnp.isfinite(noise).all():
        raise ValueError("noise has NaN or infinite values; give finite ones")
    return noise
