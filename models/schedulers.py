"""Samplers as per-step scalar tables built in numpy and a small step, for one `lax.scan`."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array

_CLASS = "FlowMatchEulerDiscreteScheduler"
_MUST_BE_OFF = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
)
"""Options of diffusers' scheduler that would change the result."""


@dataclass(frozen=True)
class FlowMatchEuler:
    """Euler steps of a flow-matching model (diffusers `FlowMatchEulerDiscreteScheduler`, HunyuanVideo's sigmas).

    Raises ValueError for numbers that cannot work.
    """

    shift: float = 7.0
    """Time shift: sigma -> shift * sigma / (1 + (shift - 1) * sigma)."""
    train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift} must be positive")
        if self.train_timesteps < 1:
            raise ValueError(f"train_timesteps={self.train_timesteps} must be at least 1")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FlowMatchEuler":
        """From a diffusers scheduler_config.json. Raises ValueError for what would sample differently."""
        if config.get("_class_name") != _CLASS:
            raise ValueError(
                f"scheduler {config.get('_class_name')!r} is not supported; this model samples with {_CLASS}"
            )
        for option in _MUST_BE_OFF:
            if config.get(option):
                raise ValueError(f"scheduler option {option}={config[option]!r} is not supported; it must be off")
        shift, train = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        for name, value in (("shift", shift), ("num_train_timesteps", train)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"scheduler option {name}={value!r} must be a number")
        return cls(float(shift), int(train))

    def tables(self, steps: int) -> dict[str, np.ndarray]:
        """float32 [steps] each: `timestep` = 1000 * sigma, and `dt`, the change of sigma (negative).

        Raises ValueError for fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"{steps=} must be at least 1")
        sigmas = np.linspace(1.0, 0.0, steps + 1)[:-1].astype(np.float32)
        sigmas = (self.shift * sigmas / (1 + (self.shift - 1) * sigmas)).astype(np.float32)
        return {
            "timestep": sigmas * np.float32(self.train_timesteps),
            "dt": np.append(sigmas[1:], np.float32(0)) - sigmas,
        }

    def init(self, latents: Array) -> Array:
        """The carry is the latents."""
        return latents

    def latents(self, carry: Array) -> Array:
        """What the model sees next."""
        return carry

    def step(self, carry: Array, prediction: Array, row: dict[str, Array]) -> Array:
        """latents + dt * velocity, in the latents' dtype."""
        return carry + row["dt"] * prediction.astype(carry.dtype)
