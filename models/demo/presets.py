"""What `models.demo.train` can train: the embedded model, and the yardstick of benchmarks.quality."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.demo import clips, hard_clips
from models.demo.words import EMBED_DIM

Render = Callable[[int, int, torch.Generator, str], tuple[Tensor, list[str]]]


@dataclass(frozen=True)
class Stage:
    """A part of the training: clips of `frames` frames, `batch` a step, for `share` of the steps."""

    frames: int
    batch: int
    share: float


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained."""

    config: dict[str, Any]
    """Of diffusers' HunyuanVideoTransformer3DModel."""
    shift: float
    """Of time, when sampling."""
    size: int
    """Pixels of a side."""
    render: Render
    sheet_prompts: tuple[str, ...]
    steps: int
    batch: int
    """Whole clips a step."""
    short: Stage | None
    """A first stage of short windows, where a step is cheap; its `batch` in units of the whole clips'."""
    noise: tuple[float, float]
    """Mean and deviation of the logit of the noise level."""
    qk_gain: float
    """The first weights of the norms of q and k: scores of at most head_dim**0.5 * gain**2."""

    def stages(self, batch: int) -> tuple[Stage, ...]:
        """Of the training with `batch` whole clips a step."""
        if self.short is None:
            return (Stage(clips.FRAMES, batch, 1.0),)
        short = Stage(self.short.frames, self.short.batch * batch, self.short.share)
        return short, Stage(clips.FRAMES, batch, 1 - short.share)


def _config(heads: int, single: int) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "num_layers": 2,
        "num_single_layers": single,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": EMBED_DIM,
        "pooled_projection_dim": EMBED_DIM,
        "rope_axes_dim": (16, 24, 24),
        "guidance_embeds": False,
    }


DEMO = Preset(
    config=_config(heads=3, single=4),
    shift=1.0,
    size=clips.SIZE,
    render=clips.render,
    sheet_prompts=(
        "red circle moving left",
        "blue square moving down",
        "yellow triangle moving up",
        "green ring moving right",
        "white circle moving right",
    ),
    steps=12_000,
    batch=16,
    short=Stage(frames=4, batch=4, share=0.6),
    noise=(0.7, 1.0),
    qk_gain=1.0,
)
"""4,096 video tokens; easy: black around one shape, and a velocity that hardly changes."""

HARD = Preset(
    config=_config(heads=4, single=6),
    shift=5.0,
    size=hard_clips.SIZE,
    render=hard_clips.render,
    sheet_prompts=(
        "red circle moving left blue square moving down",
        "yellow triangle moving up white ring moving right",
        "green ring moving right red square moving left",
        "white circle moving down green triangle moving up",
    ),
    steps=5_000,
    batch=8,
    short=None,
    noise=(1.1, 1.5),
    qk_gain=2.2,
)
"""9,216 video tokens; attention that is as concentrated as a real model's, and a velocity that changes."""

PRESETS = {"demo": DEMO, "hard": HARD}
