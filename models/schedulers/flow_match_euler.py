"""Euler steps of flow matching: HunyuanVideo, and Wan checkpoints that ask for it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array

from models.schedulers import options

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
    """Euler steps of a flow-matching model (diffusers `FlowMatchEulerDiscreteScheduler`).

    Raises ValueError for numbers that cannot work.
    """

    shift: float = 7.0
    """Time shift: sigma -> shift * sigma / (1 + (shift - 1) * sigma)."""
    train_timesteps: int = 1000
    default_sigmas: bool = False
    """Which sigmas are shifted. False: 1 to 0, the last left out, which `HunyuanVideoPipeline` passes. True: those of
    `set_timesteps(steps)` alone, as `WanPipeline` calls it: they end at the least sigma of training, itself shifted."""

    def __post_init__(self) -> None:
        options.check_positive(shift=self.shift)
        options.check_train_timesteps(self.train_timesteps)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FlowMatchEuler":
        """From a diffusers scheduler_config.json. Raises ValueError for what would sample differently."""
        options.check_class(config, _CLASS)
        options.check_off(config, *_MUST_BE_OFF)
        shift, train = options.number(config, "shift", 1.0), options.whole(config, "num_train_timesteps", 1000)
        return cls(float(shift), train)

    def _shifted(self, sigmas: np.ndarray) -> np.ndarray:
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def _sigmas(self, steps: int) -> np.ndarray:
        """float32 [steps], rounded where diffusers rounds."""
        if not self.default_sigmas:
            return self._shifted(np.linspace(1.0, 0.0, steps + 1)[:-1].astype(np.float32)).astype(np.float32)
        train = np.array([self.train_timesteps, 1], np.float32) / np.float32(self.train_timesteps)
        first, last = self._shifted(train).astype(np.float64)
        return self._shifted(np.linspace(first, last, steps)).astype(np.float32)

    def tables(self, steps: int) -> dict[str, np.ndarray]:
        """float32 [steps] each: `timestep` = 1000 * sigma, and `dt`, the change of sigma (negative).

        Raises ValueError for fewer than one step.
        """
        options.check_steps(steps)
        sigmas = self._sigmas(steps)
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
        return (carry + row["dt"] * prediction.astype(carry.dtype)).astype(carry.dtype)
