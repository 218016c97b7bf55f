"""A few steps at given timesteps: flow models that were distilled to them, guidance included."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from models.schedulers import options
from models.schedulers.seeds import Noise, as_key, check_seed, normal


class FewStepCarry(NamedTuple):
    """The state of the solver."""

    latents: Array
    key: Array
    """PRNG key of the noise still to be drawn."""


@dataclass(frozen=True)
class FewStep:
    """Euler steps at given timesteps, or `renoise`: clean latents, and fresh noise on them, in each step.

    Euler: models and adapters of 4 steps as LightX2V samples them. Renoise: those distilled by distribution matching
    (FastWan), diffusers' `stochastic_sampling`. Raises ValueError for numbers that cannot work.
    """

    timesteps: tuple[float, ...]
    """Falling, the first at most `train_timesteps`, the last above 0; before the shift."""
    shift: float = 1.0
    """Time shift: sigma -> shift * sigma / (1 + (shift - 1) * sigma), of sigma = timestep / train_timesteps."""
    renoise: bool = False
    train_timesteps: int = 1000
    seed: Any = 0
    """Of the noise, as for `CogVideoXDPM`."""
    noise: Noise = normal

    def __post_init__(self) -> None:
        options.check_positive(shift=self.shift)
        options.check_train_timesteps(self.train_timesteps)
        if not isinstance(self.seed, Array):
            check_seed(self.seed)
        pairs = itertools.pairwise((*self.timesteps, 0))
        if not self.timesteps or self.timesteps[0] > self.train_timesteps or not all(a > b for a, b in pairs):
            shown = ",".join(f"{t:g}" for t in self.timesteps)
            raise ValueError(f"timesteps={shown} must fall from at most {self.train_timesteps} and end above 0")

    def tables(self, steps: int) -> dict[str, np.ndarray]:
        """[steps] each: float32 `timestep` = 1000 * sigma, `sigma`, and `next`, the sigma after it; int32 `number`.

        Raises ValueError if `steps` is not the number of the timesteps.
        """
        if steps != len(self.timesteps):
            raise ValueError(f"steps={steps} must be the number of the timesteps, {len(self.timesteps)}")
        sigma = np.array(self.timesteps, np.float32) / np.float32(self.train_timesteps)
        sigma = (self.shift * sigma / (1 + (self.shift - 1) * sigma)).astype(np.float32)
        table = {"timestep": sigma * np.float32(self.train_timesteps), "sigma": sigma}
        return table | {"next": np.append(sigma[1:], np.float32(0)), "number": np.arange(steps, dtype=np.int32)}

    def init(self, latents: Array) -> FewStepCarry:
        """Latents and the key of the seed."""
        return FewStepCarry(latents, as_key(self.seed))

    def latents(self, carry: FewStepCarry) -> Array:
        """What the model sees next."""
        return carry.latents

    def step(self, carry: FewStepCarry, prediction: Array, row: dict[str, Array]) -> FewStepCarry:
        """Moves along the velocity, or to the clean latents with fresh noise on them, in the latents' dtype."""
        latents, key = carry
        velocity = prediction.astype(latents.dtype)
        if self.renoise:
            key, own = jax.random.split(key)
            clean = latents - row["sigma"] * velocity
            moved = (1 - row["next"]) * clean + row["next"] * self.noise(own, row["number"], latents)
        else:
            moved = latents + (row["next"] - row["sigma"]) * velocity
        return FewStepCarry(moved.astype(latents.dtype), key)


def of_flow(scheduler: Any, timesteps: tuple[float, ...], renoise: bool) -> FewStep:
    """In place of a flow scheduler, with its shift. Raises ValueError for one that has none, and as `FewStep` does."""
    fields = {field.name for field in dataclasses.fields(scheduler)}
    if "shift" not in fields:
        raise ValueError(f"timesteps are for flow models; {type(scheduler).__name__} takes none, leave them out")
    return FewStep(timesteps, scheduler.shift, renoise, scheduler.train_timesteps)
