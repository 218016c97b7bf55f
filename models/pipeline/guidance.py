"""Classifier-free guidance, its scale a table with one entry a step. Off at a scale of at most 1, as in diffusers."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Guidance:
    """How prompt and negative prompt are weighed; None takes the model's own.

    Raises ValueError for a scale that is negative or not finite. A scale of classifier-free guidance of at most 1
    turns it off, as in diffusers: the prompt alone, and half the work.
    """

    scale: float | None = None
    """Embedded in the model, or of classifier-free guidance; of Wan 2.2's two experts it turns both off."""
    low_noise: float | None = None
    """Of the second expert of Wan 2.2; below 1 it leans to the negative prompt, as in diffusers."""
    true_cfg: float | None = None
    """Classifier-free guidance on top of an embedded scale (HunyuanVideo); None: off."""
    dynamic: bool = False
    """CogVideoX's dynamic scale."""

    def __post_init__(self) -> None:
        for name in ("scale", "low_noise", "true_cfg"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"guidance: {name}={value} must be finite and not negative; at most 1 turns it off")


def cfg(uncond: Array, cond: Array, scale: Any) -> Array:
    """float32 uncond + scale * (cond - uncond), shaped like both predictions; scale 1 gives `cond`."""
    uncond, cond = uncond.astype(jnp.float32), cond.astype(jnp.float32)
    return uncond + scale * (cond - uncond)


def constant_scale(scale: float, steps: int) -> np.ndarray:
    """float32 [steps]. Raises ValueError for a scale that is not finite."""
    _check(scale)
    return np.full(steps, scale, np.float32)


def dynamic_scale(scale: float, timesteps: np.ndarray) -> np.ndarray:
    """float32 [steps] for a scheduler's `timestep` table: the scale of diffusers' CogVideoXPipeline, use_dynamic_cfg.

    Its formula compares a timestep (up to 999) with the number of steps, so the scale swings between 1 and 1 + `scale`
    in the early steps; the published samples have that. Computed in float64, which the arguments of the cosine need
    (up to 1e7 for 50 steps). Raises ValueError for a scale that is not finite.
    """
    _check(scale)
    steps = len(timesteps)
    swing = (1 - np.cos(np.pi * ((steps - timesteps.astype(np.float64)) / steps) ** 5.0)) / 2
    return (1 + scale * swing).astype(np.float32)


def _check(scale: float) -> None:
    if not np.isfinite(scale):
        raise ValueError(f"guidance {scale=} must be finite")
