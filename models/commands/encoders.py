"""What can be said of prompts, pictures and a pipeline's encoders before PyTorch is loaded."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.pipeline.families import Family, VideoSize, stored_family
from models.transformers.base import VideoTransformer
from models.transformers.wan import WanConfig

PIPELINES = {
    "HunyuanVideoPipeline": "hunyuan",
    "HunyuanVideoImageToVideoPipeline": "hunyuan",
    "CogVideoXPipeline": "cogvideox",
    "CogVideoXImageToVideoPipeline": "cogvideox",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
}
"""diffusers class -> family."""
_ALIASES = {"WanDMDPipeline": "WanPipeline"}
"""Class that others save a pipeline with -> diffusers class with the same encoders."""
OF_IMAGES = ("vae", "image_encoder", "image_processor")
"""Parts of a pipeline that only encode pictures."""
OF_SAMPLING = ("transformer", "transformer_2")
"""Parts that encode nothing."""


def pipeline_class(checkpoint: Path, image: bool) -> str:
    """The diffusers class that encodes for a pipeline folder, with an image or without. Raises CheckpointError."""
    if not (checkpoint / "model_index.json").is_file():
        raise CheckpointError(f"{checkpoint} has no model_index.json; give a whole diffusers pipeline folder")
    index = read_json(checkpoint / "model_index.json")
    name = _ALIASES.get(str(index.get("_class_name")), index.get("_class_name"))
    if name not in PIPELINES:
        raise CheckpointError(
            f"{checkpoint}: pipeline {name!r} is not supported; supported: {', '.join((*PIPELINES, *_ALIASES))}"
        )
    if image and "ImageToVideo" not in name:
        raise CheckpointError(f"{checkpoint} is a {name}, which takes no --image; leave it out")
    if not image and name == "HunyuanVideoImageToVideoPipeline":
        raise CheckpointError(f"{checkpoint} is a {name}, whose text encoder sees the image; give --image")
    if not (checkpoint / "text_encoder").is_dir():
        raise CheckpointError(f"{checkpoint} has no text_encoder/; give a whole diffusers pipeline folder")
    return name


def read_picture(path: Path, option: str = "--image") -> Any:
    """An RGB PIL image, upright, as diffusers' load_image makes it. Raises ValueError for what is no picture."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # whatever a damaged picture makes of it
        raise ValueError(f"{option} {path} cannot be read as a picture ({error}); give a PNG or JPEG file") from error


def check_pictures(image: Path | None, last_image: Path | None) -> None:
    """ValueError for files that are not there, and for a last picture without a first."""
    if image is None and last_image is not None:
        raise ValueError(f"--last-image {last_image} goes with --image, the picture that the video begins with")
    for option, picture in (("--image", image), ("--last-image", last_image)):
        if picture is not None and not picture.is_file():
            problem = "is no file; give a PNG or JPEG" if picture.exists() else "does not exist"
            raise ValueError(f"{option} {picture} {problem}")


def read_pictures(image: Path | None, last_image: Path | None) -> tuple[Any, Any]:
    """The first and the last picture of a video, None for None. Raises ValueError for what is none."""
    check_pictures(image, last_image)
    first = None if image is None else read_picture(image)
    return first, None if last_image is None else read_picture(last_image, "--last-image")


def default_size(checkpoint: Path) -> VideoSize:
    """The video that a checkpoint makes where no size is given."""
    return stored_family(checkpoint)[0].size


def video_size(family: Family, model: VideoTransformer, size: tuple[int | None, int | None, int | None]) -> VideoSize:
    """The video that frames, height and width ask for; None: the model's own. ValueError if it cannot make that."""
    given = {name: n for name, n in zip(("frames", "height", "width"), size, strict=True) if n is not None}
    for name, n in given.items():
        if type(n) is not int or n < 1:
            raise ValueError(f"--{name} {n} must be a whole number of at least 1")
    wanted = dataclasses.replace(family.size, **given)
    if wanted != family.size:
        family.latent_shape(wanted, model)
    return wanted


def check_frames(size: VideoSize, last: bool) -> None:
    """ValueError for a video too short to have a `last` picture."""
    if last and size.frames < 2:
        raise ValueError(f"--frames {size.frames} is too few for a first and a last image; give at least 5")


def check_last_image(family: Family, model: VideoTransformer, given: bool) -> None:
    """ValueError for a last image that the model has no place for, and for one that it needs and is not given."""
    config = model.config
    between = isinstance(config, WanConfig) and config.in_channels > config.out_channels and not family.frame_tokens
    # Wan 2.1 sees its pictures through CLIP too: one, or always two. Wan 2.2 has them in the latents alone.
    clip = isinstance(config, WanConfig) and config.image_dim is not None
    two = isinstance(config, WanConfig) and config.pos_embed_seq_len is not None
    if given and (not between or (clip and not two)):
        raise ValueError(f"this {family.name} has no place for a --last-image; leave it out")
    if not given and between and clip and two:
        raise ValueError(f"this {family.name} is made for a first and a last frame; give --last-image too")


def decoded(text: str) -> str:
    """An argument of the command line as UTF-8, where a locale such as C has left its bytes undecoded.

    Raises ValueError if it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{text!a} is no text in UTF-8; set the locale that it was typed in") from error
    return text


def given_prompts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    """Those of --prompt, or of --prompts FILE; [] of neither. Raises ValueError for both, and for what is no text."""
    if prompt and prompts is not None:
        raise ValueError(f"--prompt and --prompts {prompts} exclude each other; put all prompts into the file")
    return [decoded(text) for text in prompt or ()] if prompts is None else read_lines(prompts)


def read_lines(path: Path) -> list[str]:
    """The prompts of a text file in UTF-8, one a line. ValueError for no file, no text, no prompt, an empty line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is no text in UTF-8 ({error}); save it as UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"--prompts {path}: line {number} is empty; give one prompt a line")
    return lines
