"""Samplers as per-step scalar tables built in numpy and a small step, for one `lax.scan`.

Each is a frozen dataclass with `from_config`, `tables(steps)`, and what `adaspa_jax.denoise` asks of a scheduler.
Resolution-dependent settings are fields: `dataclasses.replace(scheduler, shift=3.0)`.
"""

from typing import Any

from models.schedulers.cogvideox_ddim import CogVideoXDDIM
from models.schedulers.cogvideox_dpm import CogVideoXDPM
from models.schedulers.few_step import FewStep
from models.schedulers.flow_match_euler import FlowMatchEuler
from models.schedulers.unipc import UniPC

__all__ = ["SCHEDULERS", "CogVideoXDDIM", "CogVideoXDPM", "FewStep", "FlowMatchEuler", "UniPC", "from_config"]

AnyScheduler = FlowMatchEuler | UniPC | CogVideoXDDIM | CogVideoXDPM | FewStep

SCHEDULERS: dict[str, type[FlowMatchEuler | UniPC | CogVideoXDDIM | CogVideoXDPM]] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEuler,
    "UniPCMultistepScheduler": UniPC,
    "CogVideoXDDIMScheduler": CogVideoXDDIM,
    "CogVideoXDPMScheduler": CogVideoXDPM,
}
"""diffusers class name -> scheduler."""


def from_config(config: dict[str, Any]) -> AnyScheduler:
    """From a diffusers scheduler_config.json. Raises ValueError for classes and options that are not supported."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is not supported; supported: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name].from_config(config)
