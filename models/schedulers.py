"""Samplers as per-step scalar tables built in numpy and a small step, for one `lax.scan`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array


@dataclass(frozen=True)
class FlowMatchEuler:
    """Euler steps of a flow-matching model (diffusers `FlowMatchEulerDiscreteScheduler`, HunyuanVideo's sigmas)."""

    shift: float = 7.0
    """Time shift: sigma -> shift * sigma / (1 + (shift - 1) * sigma)."""
    train_timesteps: int = 1000

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FlowMatchEuler":
        """From a diffusers scheduler_config.json. Raises ValueError for what would sample differently."""
        name = "FlowMatchEulerDiscreteScheduler"
        if config.get("_class_name") != name:
            raise ValueError(
                f"scheduler {config.get('_class_name')!r} is not supported; this model samples with {name}"
            )
        options = (
            "use_dynamic_shifting",
            "invert_sigmas",
            "stochastic_sampling",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "shift_terminal",
        )
        for option in options:
            if config.get(option):
                raise ValueError(f"scheduler option {option}={config[option]!r} is not supported; it must be off")
        return cls(float(config.get("shift", 1.0)), int(config.get("num_train_timesteps", 1000)))

    def tables(self, steps: int) -> dict[str, np.ndarray]:
        """float32 [steps] each: `timestep` = 1000 * sigma, and `dt`, the change of sigma (negative)."""
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
