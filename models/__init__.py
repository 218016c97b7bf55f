"""Flax ports of video diffusion transformers, their schedulers and pipelines."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.checkpoint.loading import Placement, Progress
    from models.checkpoint.lora_file import LoraLike
    from models.transformers.base import VideoTransformer

__all__ = ["from_pretrained"]


def from_pretrained(
    path: str | Path,
    dtype: Any = None,
    sharding: "Placement | None" = None,
    progress: "Progress | None" = None,
    *,
    follow_links: bool = False,
    loras: "Sequence[LoraLike]" = (),
) -> "VideoTransformer":
    """Loads a transformer; see `models.checkpoint.loading.from_pretrained`.

    Imported late: the demo's training needs no flax.
    """
    from models.checkpoint import loading

    return loading.from_pretrained(path, dtype, sharding, progress, follow_links=follow_links, loras=loras)
