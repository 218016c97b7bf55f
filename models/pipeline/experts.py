"""Which of two experts takes which steps."""

import math
from typing import Any

from models.checkpoint.safetensors_folder import CheckpointError
from models.transformers.base import VideoTransformer


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
