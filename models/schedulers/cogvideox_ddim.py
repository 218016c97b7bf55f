"""CogVideoX's DDIM, and the noise schedule its DPM solver shares."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jax import Array

from models.schedulers import options


@dataclass(frozen=True)
class CogVideoXSchedule:
    """The noise schedule of CogVideoX: scaled-linear betas, SNR shift, zero terminal SNR, trailing timesteps.

    Raises ValueError for numbers that cannot work.
    """

    snr_shift_scale: float = 1.0
    """alpha_bar -> alpha_bar / (scale + (1 - scale) * alpha_bar)."""
    zero_terminal_snr: bool = True
    """Stretch sqrt(alpha_bar) so that the first step starts from pure noise (Lin et al., arXiv 2305.08891)."""
    end_at_one: bool = True
    """alpha_bar after the last step: 1, or (False) that of the first training timestep."""
    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        options.check_train_timesteps(self.train_timesteps)
        options.check_positive(snr_shift_scale=self.snr_shift_scale, beta_start=self.beta_start, beta_end=self.beta_end)
        if max(self.beta_start, self.beta_end) >= 1:
            raise ValueError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must be below 1")

    @classmethod
    def _from_config(cls, config: dict[str, Any], name: str) -> Self:
        options.check_class(config, name)
        options.check_only(config, "prediction_type", "epsilon", "v_prediction")
        options.check_only(config, "timestep_spacing", "leading", "trailing")
        options.check_only(config, "beta_schedule", "scaled_linear", "scaled_linear")
        options.check_off(config, "trained_betas")
        return cls(
            snr_shift_scale=float(options.number(config, "snr_shift_scale", 3.0)),
            zero_terminal_snr=options.flag(config, "rescale_betas_zero_snr", False),
            end_at_one=options.flag(config, "set_alpha_to_one", True),
            train_timesteps=options.whole(config, "num_train_timesteps", 1000),
            beta_start=float(options.number(config, "beta_start", 0.00085)),
            beta_end=float(options.number(config, "beta_end", 0.012)),
        )

    def _alpha_bar(self) -> np.ndarray:
        """float64 [train_timesteps]: the part of the signal in the variance."""
        beta = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_timesteps) ** 2
        alpha_bar = np.cumprod(1 - beta)
        alpha_bar /= self.snr_shift_scale + (1 - self.snr_shift_scale) * alpha_bar
        if self.zero_terminal_snr:
            root = np.sqrt(alpha_bar)
            alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return alpha_bar

    def _rows(self, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(timestep, alpha_bar of it, alpha_bar of the next, whether this step ends the schedule), [steps] each."""
        options.check_steps(steps)
        train = self.train_timesteps
        if steps > train:
            raise ValueError(f"{steps=} must be at most train_timesteps={train}")
        # Cut to `steps`: for some of them rounding makes one more, below zero.
        timestep = np.round(np.arange(train, 0, -train / steps)[:steps]).astype(np.int64) - 1
        # Not the next timestep: diffusers takes a whole stride, which skips a little where steps do not divide.
        following = timestep - train // steps
        alpha_bar = self._alpha_bar()
        end = 1.0 if self.end_at_one else alpha_bar[0]
        after = np.where(following >= 0, alpha_bar[np.maximum(following, 0)], end)
        return timestep, alpha_bar[timestep], after, following < 0


def x0_from_velocity(latents: Array, prediction: Array, row: dict[str, Array]) -> Array:
    """The clean latents of a v-prediction, float32."""
    return row["alpha"] * latents - row["sigma"] * prediction.astype(latents.dtype)


@dataclass(frozen=True)
class CogVideoXDDIM(CogVideoXSchedule):
    """Deterministic DDIM steps on v-prediction (diffusers `CogVideoXDDIMScheduler`)."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CogVideoXDDIM":
        """From a diffusers scheduler_config.json. Raises ValueError for what would sample differently."""
        return cls._from_config(config, "CogVideoXDDIMScheduler")

    def tables(self, steps: int) -> dict[str, np.ndarray]:
        """float32 [steps] each: `timestep` (whole numbers), `alpha`, `sigma`, and factors of latents and clean latents.

        Computed in float64. Raises ValueError for fewer than one step or more than there are timesteps.
        """
        timestep, now, after, _ = self._rows(steps)
        keep = np.sqrt((1 - after) / (1 - now))
        table = {
            "timestep": timestep,
            "alpha": np.sqrt(now),
            "sigma": np.sqrt(1 - now),
            "from_latents": keep,
            "from_x0": np.sqrt(after) - np.sqrt(now) * keep,
        }
        return {name: value.astype(np.float32) for name, value in table.items()}

    def init(self, latents: Array) -> Array:
        """The carry is the latents."""
        return latents

    def latents(self, carry: Array) -> Array:
        """What the model sees next."""
        return carry

    def step(self, carry: Array, prediction: Array, row: dict[str, Array]) -> Array:
        """Moves towards the clean latents that the prediction implies, in the latents' dtype."""
        x0 = x0_from_velocity(carry, prediction, row)
        return (row["from_latents"] * carry + row["from_x0"] * x0).astype(carry.dtype)
