"""UniPC of order 2 on flow-matching sigmas: Wan's sampler."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from models.schedulers import options

_CLASS = "UniPCMultistepScheduler"
_MUST_BE_OFF = (
    "disable_corrector",
    "shift_terminal",
    "solver_p",
    "thresholding",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
_ONLY = {
    "final_sigmas_type": ("zero", "zero"),
    "lower_order_final": (True, True),
    "predict_x0": (True, True),
    "prediction_type": ("epsilon", "flow_prediction"),
    "solver_order": (2, 2),
    "solver_type": ("bh2", "bh2"),
    "use_flow_sigmas": (False, True),
}
"""Option -> (diffusers' default, the one value supported)."""
_FACTORS = (
    *("correct_latents", "correct_last", "correct_x0", "correct_x0_before", "correct_new"),
    *("predict_latents", "predict_x0", "predict_x0_before"),
)


class UniPCCarry(NamedTuple):
    """Arrays shaped like the latents."""

    latents: Array
    """Predicted for the next step."""
    last: Array
    """Corrected latents of the step before."""
    x0: Array
    """Clean latents that the model last predicted."""
    x0_before: Array
    """And the time before that."""


@dataclass(frozen=True)
class UniPC:
    """UniPC (Zhao et al., arXiv 2302.04867), order 2, B(h) = e^h - 1, first order in the first and last step.

    diffusers `UniPCMultistepScheduler` with flow prediction and flow sigmas. Each step corrects the latents with the
    model's new prediction, then predicts the next ones. Raises ValueError for numbers that cannot work.
    """

    shift: float = 3.0
    """Time shift, diffusers' `flow_shift`: sigma -> shift * sigma / (1 + (shift - 1) * sigma)."""
    train_timesteps: int = 1000

    def __post_init__(self) -> None:
        options.check_positive(shift=self.shift)
        options.check_train_timesteps(self.train_timesteps)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "UniPC":
        """From a diffusers scheduler_config.json. Raises ValueError for what would sample differently."""
        options.check_class(config, _CLASS)
        options.check_off(config, *_MUST_BE_OFF)
        for option, (default, supported) in _ONLY.items():
            options.check_only(config, option, default, supported)
        shift, train = options.number(config, "flow_shift", 1.0), options.whole(config, "num_train_timesteps", 1000)
        return cls(float(shift), train)

    def tables(self, steps: int) -> dict[str, np.ndarray]:
        """float32 [steps] each; computed in float64 from sigmas that are rounded to float32, as diffusers' are.

        `timestep`: whole numbers, truncated; `sigma`; `correct_*` and `predict_*`: factors of the arrays in the carry
        (`correct_new`: of the clean latents predicted in this step). Raises ValueError for fewer than one step.
        """
        options.check_steps(steps)
        sigma = np.linspace(1, 1 / self.train_timesteps, steps + 1)[:-1]
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        if abs(sigma[0] - 1) < 1e-6:
            sigma[0] -= 1e-6  # alpha = 0 has no logarithm
        timestep = np.trunc(sigma * self.train_timesteps)
        sigma = np.append(sigma.astype(np.float32), 0).astype(np.float64)
        table = {"timestep": timestep, "sigma": sigma[:-1]}
        table |= {name: np.zeros(steps) for name in _FACTORS}
        table["correct_latents"][0] = 1
        for i in range(steps):
            if i > 0:
                table["correct_last"][i] = sigma[i] / sigma[i - 1]
                known = sigma[max(i - 2, 0) : i + 1]
                table["correct_x0_before"][i], table["correct_x0"][i], table["correct_new"][i] = _corrector(known)
            table["predict_latents"][i] = sigma[i + 1] / sigma[i]
            known = sigma[i if i in (0, steps - 1) else i - 1 : i + 2]
            table["predict_x0_before"][i], table["predict_x0"][i] = _predictor(known)
        return {name: value.astype(np.float32) for name, value in table.items()}

    def init(self, latents: Array) -> UniPCCarry:
        """No history: the tables give it no weight in the first steps."""
        zeros = jnp.zeros_like(latents)
        return UniPCCarry(latents, zeros, zeros, zeros)

    def latents(self, carry: UniPCCarry) -> Array:
        """What the model sees next."""
        return carry.latents

    def step(self, carry: UniPCCarry, prediction: Array, row: dict[str, Array]) -> UniPCCarry:
        """Corrects the latents with the model's flow and predicts the next ones, in the latents' dtype."""
        latents, last, x0, x0_before = carry
        new = latents - row["sigma"] * prediction.astype(latents.dtype)
        corrected = row["correct_latents"] * latents + row["correct_last"] * last
        corrected += row["correct_x0"] * x0 + row["correct_x0_before"] * x0_before + row["correct_new"] * new
        predicted = row["predict_latents"] * corrected + row["predict_x0"] * new + row["predict_x0_before"] * x0
        dtype = latents.dtype
        return UniPCCarry(predicted.astype(dtype), corrected.astype(dtype), new.astype(dtype), x0)


def _log_snr(sigma: np.ndarray) -> np.ndarray:
    """Half of the log of the signal-to-noise ratio."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigma) - np.log(sigma)


def _predictor(sigma: np.ndarray) -> tuple[float, float]:
    """Factors of (x0 before, x0); sigma [(the step before's), this step's, the next one's]."""
    *before, now, then = _log_snr(sigma)
    scale = -(1 - sigma[-1]) * np.expm1(now - then)
    if not before:
        return 0.0, scale
    slope = 0.5 * scale * (then - now) / (before[0] - now)
    return slope, scale - slope


def _corrector(sigma: np.ndarray) -> tuple[float, float, float]:
    """Factors of (x0 before, x0, this step's x0); sigma [(two steps ago), the step before's, this one's]."""
    *before, last, now = _log_snr(sigma)
    h = last - now
    B = np.expm1(h)
    scale = -(1 - sigma[-1]) * B
    if not before:
        return 0.0, 0.5 * scale, 0.5 * scale
    ratio = (before[0] - last) / (now - last)
    phi = B / h - 1
    rho_before, rho = np.linalg.solve([[1, 1], [ratio, 1]], [phi / B, 2 * (phi / h - 0.5) / B])
    slope = scale * rho_before / ratio
    return slope, scale - slope - scale * rho, scale * rho
