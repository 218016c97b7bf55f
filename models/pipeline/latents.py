"""Sampled latents in a safetensors file, with what decoding and a reader need to know of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.pipeline.embeddings import write_tensors

TIME_RATIO = 4
"""Frames of a latent frame but the first, of every VAE that skips frames."""


@dataclass(frozen=True)
class SavedLatents:
    """The runs of one call of `python -m models.sample`."""

    runs: dict[str, np.ndarray]
    """Name ("dense", "AdaSpa") -> float32 [B, C, F, H, W]; of the embedded model pixels in [-1, 1], but not clipped."""
    prompts: list[str]
    """[B], one a video."""
    fps: int
    skip_frames: int = 0
    """Frames of the decoded video that are not shown."""


def broken_runs(runs: dict[str, np.ndarray]) -> list[str]:
    """The names of the runs that have NaN or infinite values."""
    return [name for name, x in runs.items() if not np.isfinite(x).all()]


def write_latents(path: Path, saved: SavedLatents) -> None:
    """Writes a file, whole or not at all. Raises OSError."""
    fields = {
        "runs": list(saved.runs),  # the file sorts them
        "prompts": saved.prompts,
        "fps": saved.fps,
        "skip_frames": saved.skip_frames,
    }
    write_tensors(path, saved.runs, {name: json.dumps(value) for name, value in fields.items()})


def read_latents(path: Path) -> SavedLatents:
    """Reads a file, whatever the values of its latents. Raises ValueError, naming it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"--latents {path} does not exist; give the latents.safetensors of models.sample")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            names = ("runs", "prompts", "fps", "skip_frames")
            order, prompts, fps, skip = (json.loads(metadata[name]) for name in names)
            _check_fields(order, prompts, fps, skip)
            runs = {name: np.asarray(file.get_tensor(name), np.float32) for name in order}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"--latents {path} holds no latents of models.sample ({error})") from error
    if not runs or any(x.ndim != 5 or len(x) != len(prompts) or 0 in x.shape for x in runs.values()):
        raise ValueError(f"--latents {path} must hold [{len(prompts)}, C, F, H, W] for each run")
    if len({x.shape for x in runs.values()}) > 1:
        raise ValueError(f"--latents {path}: its runs have several shapes, {[list(x.shape) for x in runs.values()]}")
    frames = TIME_RATIO * (next(iter(runs.values())).shape[2] - 1) + 1
    if skip and skip >= frames:
        raise ValueError(f"--latents {path}: of {frames} frames the first {skip} are not shown; sample a longer video")
    return SavedLatents(runs, prompts, fps, skip)


def _check_fields(runs: Any, prompts: Any, fps: Any, skip: Any) -> None:
    """ValueError for metadata that `write_latents` did not write."""
    texts = lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x)
    if not texts(runs) or not texts(prompts):
        raise ValueError(f"{runs=} and {prompts=} must be lists of text")
    if type(fps) is not int or fps < 1 or type(skip) is not int or skip < 0:
        raise ValueError(f"{fps=} must be a whole number of at least 1 and {skip=} one of at least 0")
