"""What sampling needs to know of a model besides its weights: sizes, rates, guidance, the scheduler it was made with.

Source: the model cards, and the defaults of diffusers' pipelines.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from adaspa_jax import SparseConfig
from models.checkpoint.loading import abstract_model, parse_config
from models.checkpoint.safetensors_folder import read_json
from models.schedulers import AnyScheduler, CogVideoXDDIM, CogVideoXDPM, FlowMatchEuler, UniPC
from models.transformers.base import Grid, VideoTransformer
from models.transformers.cogvideox import CogVideoXTransformer
from models.transformers.hunyuan_video import HunyuanVideoTransformer
from models.transformers.wan import WanTransformer


def _check_counts(sizes: Any) -> None:
    """ValueError unless every field of a dataclass is a whole number of at least 1."""
    for name, value in dataclasses.asdict(sizes).items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


@dataclass(frozen=True)
class VideoSize:
    """Frames, height and width in pixels. Raises ValueError for what is no whole number of at least 1."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True)
class Family:
    """How a model samples unless it is told otherwise."""

    name: str
    size: VideoSize
    fps: int
    steps: int
    guidance: tuple[float, ...]
    """Embedded in the model, or of classifier-free guidance; the second, if any, is that of the low-noise expert."""
    scheduler: AnyScheduler
    """Used when the checkpoint brings none."""
    time_ratio: int = 4
    """Frames of a latent frame, after the first."""
    space_ratio: int = 8
    """Pixels of a latent, each way."""
    embedded_guidance: bool = False
    """The scale is an input of the model, if it has one; a second branch runs only for `true_cfg`."""
    frame_tokens: bool = False
    """A timestep for each token: a given first frame has 0 (Wan 2.2 TI2V)."""
    fixed_first_frame: bool = False
    """An image to animate is the first latent frame, in every step."""

    starts_from_image: bool = False
    """The noise has a thousandth of the image mixed in (HunyuanVideo)."""
    skip_frames: int = 0
    """Frames of the decoded video that are not shown: HunyuanVideo's first latent frame, where the image stood."""

    def config(self, preset: str | None = None, **changes: Any) -> SparseConfig:
        """The SparseConfig of a preset ("quality", "balanced", "fast") for this model, with `changes` on top."""
        return SparseConfig.preset(preset or "balanced", **({"steps": self.steps} | changes))

    def latent_shape(self, size: VideoSize, model: VideoTransformer) -> Grid:
        """Latent frames, rows and columns that the model samples, frames that it only pads with included.

        Raises ValueError for a size it cannot make, with the nearest one it can.
        """
        step = [self.space_ratio * p for p in model.config.patch[1:]]
        wanted = (size.frames, size.height, size.width)
        # At least one frame more than are hidden.
        least = -(-self.skip_frames // self.time_ratio)
        frames = 1 + self.time_ratio * max(least, round((size.frames - 1) / self.time_ratio))
        nearest = (frames, *(max(s, s * round(n / s)) for n, s in zip(wanted[1:], step, strict=True)))
        if wanted != nearest:
            hidden = f" (the first {self.skip_frames}, of the image, are not shown)" if self.skip_frames else ""
            raise ValueError(
                f"{self.name} makes videos of 1 + {self.time_ratio}n frames{hidden}, heights in steps of {step[0]} and "
                f"widths in steps of {step[1]}; {wanted} is not one, the nearest is {nearest}"
            )
        latent = 1 + (size.frames - 1) // self.time_ratio
        padded = latent + -latent % model.config.patch[0]
        return padded, size.height // self.space_ratio, size.width // self.space_ratio

    def start(self, noise: Array, condition: Array | None) -> Array:
        """What sampling starts from, shaped like `noise` [B, C, F, H, W]: HunyuanVideo mixes the image in."""
        if not self.starts_from_image or condition is None:
            return noise
        image = condition[-len(noise) :, : noise.shape[1], :1]
        return 0.999 * noise + 0.001 * image

    def padding_frames(self, size: VideoSize, model: VideoTransformer) -> int:
        """The first latent frames that are dropped before decoding (CogVideoX1.5 pads to even)."""
        return -(1 + (size.frames - 1) // self.time_ratio) % model.config.patch[0]


def _hunyuan(model: HunyuanVideoTransformer) -> Family:
    image = model.config.image_condition_type
    return Family(
        "HunyuanVideo" + (" I2V" if image else ""),
        VideoSize(129, 720, 1280),
        fps=24,
        steps=50,
        guidance=(6.0,),
        scheduler=FlowMatchEuler(7.0),
        embedded_guidance=True,
        fixed_first_frame=image == "token_replace",
        starts_from_image=image is not None,
        skip_frames=4 if image == "latent_concat" else 0,
    )


def _cogvideox(model: CogVideoXTransformer) -> Family:
    newer = model.config.patch_size_t is not None
    small = model.config.num_layers <= 30 and not newer
    return Family(
        "CogVideoX1.5" if newer else "CogVideoX",
        VideoSize(81, 768, 1360) if newer else VideoSize(49, 480, 720),
        fps=16 if newer else 8,
        steps=50,
        guidance=(6.0,),
        scheduler=CogVideoXDDIM(snr_shift_scale=3.0) if small else CogVideoXDPM(),
    )


def _wan(model: WanTransformer, index: dict[str, Any]) -> Family:
    config = model.config
    if config.out_channels == 48 or index.get("expand_timesteps"):
        return Family(
            "Wan 2.2 TI2V",
            VideoSize(121, 704, 1280),
            fps=24,
            steps=50,
            guidance=(5.0,),
            scheduler=UniPC(5.0),
            space_ratio=16 if config.out_channels == 48 else 8,
            frame_tokens=True,
            fixed_first_frame=True,
        )
    image = config.in_channels > config.out_channels
    if index.get("boundary_ratio") is not None:
        guidance, shift = ((3.5, 3.5), 5.0) if image else ((4.0, 3.0), 12.0)
        size = VideoSize(81, 720, 1280)
        return Family("Wan 2.2 A14B", size, 16, 40, guidance, UniPC(shift))
    small = config.width <= 1536
    size = VideoSize(81, 480, 832) if small else VideoSize(81, 720, 1280)
    return Family("Wan 2.1" + (" I2V" if image else ""), size, 16, 50, (5.0,), UniPC(3.0 if small else 5.0))


def family_of(model: VideoTransformer, index: dict[str, Any] | None = None) -> Family:
    """The family of a model; `index` is the model_index.json of its pipeline, which tells experts."""
    if isinstance(model, HunyuanVideoTransformer):
        return _hunyuan(model)
    if isinstance(model, CogVideoXTransformer):
        return _cogvideox(model)
    if isinstance(model, WanTransformer):
        return _wan(model, index or {})
    raise ValueError(f"{type(model).__name__} has no sampling defaults")


def stored_family(checkpoint: Path) -> tuple[Family, VideoTransformer]:
    """(family, model without weights) of a pipeline folder. Raises CheckpointError."""
    folder = checkpoint / "transformer"
    port, sizes = parse_config(folder, read_json(folder / "config.json"))
    model = abstract_model(port, sizes, "float32")
    return family_of(model, read_json(checkpoint / "model_index.json")), model


@dataclass(frozen=True)
class PixelSize:
    """What a model of pixels was trained on: frames, height and width, and the playing speed.

    Raises ValueError for what is no whole number of at least 1.
    """

    frames: int
    height: int
    width: int
    fps: int

    def __post_init__(self) -> None:
        _check_counts(self)


def pixel_family(size: PixelSize, scheduler: AnyScheduler) -> Family:
    """A model of pixels without a VAE, such as the embedded one."""
    video = VideoSize(size.frames, size.height, size.width)
    return Family("pixels", video, size.fps, 50, (1.0,), scheduler, time_ratio=1, space_ratio=1)
