"""CogVideoX's stochastic DPM-Solver++ (2M)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.schedulers.cogvideox_ddim import CogVideoXSchedule, x0_from_velocity
from models.schedulers.seeds import Noise, as_key, check_seed, normal


class DPMCarry(NamedTuple):
    """The state of the solver."""

    latents: Array
    x0: Array
    """Clean latents predicted in the step before, shaped like the latents."""
    key: Array
    """PRNG key of the noise still to be drawn."""


@dataclass(frozen=True)
class CogVideoXDPM(CogVideoXSchedule):
    """SDE DPM-Solver++ of second order on v-prediction (diffusers `CogVideoXDPMScheduler`).

    It adds noise in every step but the last.
    """

    seed: Any = 0
    """Of the noise: an int in 0 .. 2^64 - 1, or a traced int32 scalar or PRNG key, so that another seed needs no
    compilation."""
    noise: Noise = normal
    """(key, int32 number of the step from 0, latents) -> noise shaped like the latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, Array):
            check_seed(self.seed)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CogVideoXDPM":
        """From a diffusers scheduler_config.json. Raises ValueError for what would sample differently."""
        return cls._from_config(config, "CogVideoXDPMScheduler")

    def tables(self, steps: int) -> dict[str, np.ndarray]:
        """[steps] each, computed in float64.

        float32 `timestep` (whole numbers), `alpha`, `sigma`; factors of latents, clean latents and noise;
        `extrapolate`: how far the clean latents are carried on along their last change. int32 `number` of the step.
        Raises ValueError for fewer than one step or more than there are timesteps.
        """
        timestep, now, after, ends = self._rows(steps)
        with np.errstate(divide="ignore", invalid="ignore"):  # alpha_bar is 0 at first, 1 at last
            log_snr = 0.5 * np.log(now / (1 - now))
            h = 0.5 * np.log(after / (1 - after)) - log_snr
            extrapolate = h / (2 * np.diff(log_snr, prepend=np.nan))
        first_order = ends | (np.arange(steps) == 0)
        table = {
            "timestep": timestep,
            "alpha": np.sqrt(now),
            "sigma": np.sqrt(1 - now),
            "from_latents": np.sqrt((1 - after) / (1 - now)) * np.exp(-h),
            "from_x0": -np.expm1(-2 * h) * np.sqrt(after),
            "from_noise": np.sqrt(1 - after) * np.sqrt(-np.expm1(-2 * h)),
            "extrapolate": np.where(first_order, 0, extrapolate),
        }
        rows = {name: value.astype(np.float32) for name, value in table.items()}
        return rows | {"number": np.arange(steps, dtype=np.int32)}

    def init(self, latents: Array) -> DPMCarry:
        """No history: the tables give it no weight in the first step."""
        return DPMCarry(latents, jnp.zeros_like(latents), as_key(self.seed))

    def latents(self, carry: DPMCarry) -> Array:
        """What the model sees next."""
        return carry.latents

    def step(self, carry: DPMCarry, prediction: Array, row: dict[str, Array]) -> DPMCarry:
        """Moves towards the extrapolated clean latents and adds noise, in the latents' dtype."""
        latents, before, key = carry
        key, this_key = jax.random.split(key)
        x0 = x0_from_velocity(latents, prediction, row)
        target = x0 + row["extrapolate"] * (x0 - before)
        noise = self.noise(this_key, row["number"], latents)
        moved = row["from_latents"] * latents + row["from_x0"] * target + row["from_noise"] * noise
        return DPMCarry(moved.astype(latents.dtype), x0.astype(latents.dtype), key)
