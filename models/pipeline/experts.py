"""Which of two experts takes which steps."""

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

from models.checkpoint.lora_file import Lora, LoraLike, as_loras
from models.checkpoint.safetensors_folder import CheckpointError
from models.transformers.base import VideoTransformer

NAMES: tuple[Literal["high_noise"], Literal["low_noise"]] = ("high_noise", "low_noise")
"""Of two experts, in the order in which they run."""
_NAMED = re.compile(r"(?:.*[^a-z])?(high|low)(?:[-_. ]?noise)?(?:[^a-z].*)?", re.IGNORECASE)
"""Names of files that are for one expert, as people name them."""


def share_loras(loras: Iterable[LoraLike], experts: int) -> list[tuple[Lora, ...]]:
    """The LoRAs of each expert: those for it, and those for all.

    Raises CheckpointError for a LoRA of an expert that there is not, and of two experts for one that by its name is for
    one of them and was given for both: merged into the other it would spoil it.
    """
    found = as_loras(loras)
    for lora in found:
        if experts == 1 and lora.expert is not None:
            raise CheckpointError(
                f"{lora.path} is given for {lora.expert}, and this model has one expert; give it for all, with --lora"
            )
        match = _NAMED.fullmatch(lora.path.name) if experts > 1 and lora.expert is None else None
        if match:
            name = f"{match[1].lower()}_noise"
            raise CheckpointError(
                f"{lora.path} is by its name for {name} alone: give it with --lora-{name.replace('_', '-')} (in Python "
                f"Lora(path, scale, {name!r})), and if it is for both, with both options"
            )
    return [tuple(lora for lora in found if lora.expert in (None, name)) for name in NAMES[:experts]]


def boundary_ratio(index: dict[str, Any], experts: tuple[VideoTransformer, ...]) -> float | None:
    """Share of the timesteps at which the second expert takes over; None: there is one expert.

    `index`: the model_index.json. Raises CheckpointError for what is no share.
    """
    ratio = index.get("boundary_ratio")
    if ratio is None:
        if len(experts) < 2:
            return None
        # In Wan's own format nothing says it.
        return 0.9 if experts[0].config.in_channels > experts[0].config.out_channels else 0.875
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool) and math.isfinite(ratio)
    if not number or not 0 <= ratio <= 1:
        raise CheckpointError(f"model_index.json: boundary_ratio={ratio!r} must be in [0, 1]")
    return ratio
