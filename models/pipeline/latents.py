"""Sampled latents in a safetensors file, with what decoding and a reader need to know of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.pipeline.embeddings import write_tensors


@dataclass(frozen=True)
class SavedLatents:
    """The runs of one call of `python -m models.sample`."""

    runs: dict[str, np.ndarray]
    """Name ("dense", "AdaSpa") -> float32 [B, C, F, H, W]."""
    prompts: list[str]
    """[B], one a video."""
    fps: int
    skip_frames: int = 0
    """Frames of the decoded video that are not shown."""


def write_latents(path: Path, saved: SavedLatents) -> None:
    """Writes a file, whole or not at all."""
    fields = {
        "runs": list(saved.runs),  # the file sorts them
        "prompts": saved.prompts,
        "fps": saved.fps,
        "skip_frames": saved.skip_frames,
    }
    write_tensors(path, saved.runs, {name: json.dumps(value) for name, value in fields.items()})


def read_latents(path: Path) -> SavedLatents:
    """Reads a file. Raises ValueError, naming it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"--latents {path} does not exist; give the latents.safetensors of models.sample")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            names = ("runs", "prompts", "fps", "skip_frames")
            order, prompts, fps, skip = (json.loads(metadata[name]) for name in names)
            runs = {name: file.get_tensor(name) for name in order}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"--latents {path} holds no latents of models.sample ({error})") from error
    if not runs or any(x.ndim != 5 or len(x) != len(prompts) for x in runs.values()):
        raise ValueError(f"--latents {path} must hold [{len(prompts)}, C, F, H, W] for each run")
    return SavedLatents(runs, prompts, fps, skip)
