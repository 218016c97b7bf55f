"""Encodes prompts, and an image to animate, with a checkpoint's own encoders in PyTorch.

    python -m models.encode_prompt --checkpoint PIPELINE --prompt "a cat on a roof" --out prompts.safetensors
    python -m models.encode_prompt --checkpoint PIPELINE --prompt "it turns" --image cat.png --out cat.safetensors

PIPELINE is a diffusers pipeline folder with its text encoders; template, crop and length are those of its pipeline in
diffusers, whose code runs. Needs the `torch` extra. The file holds what `python -m models.sample --embeddings` reads.
"""

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.commands.cli import run_cli
from models.pipeline.embeddings import NEGATIVE, Embeddings, write_tensors
from models.pipeline.families import VideoSize, default_size

console = Console(stderr=True)
PIPELINES = {
    "HunyuanVideoPipeline": "hunyuan",
    "HunyuanVideoImageToVideoPipeline": "hunyuan",
    "CogVideoXPipeline": "cogvideox",
    "CogVideoXImageToVideoPipeline": "cogvideox",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
}
"""diffusers class -> family."""
_BRANCHES = ("prompt_embeds", NEGATIVE + "prompt_embeds")
_OPTIONAL = ("transformer", "transformer_2", "vae", "image_encoder", "image_processor")


def load_encoders(checkpoint: Path, *, image: bool, dtype: str = "float32", device: str | None = None) -> Any:
    """The diffusers pipeline of a folder with its text encoders, and with VAE and image encoder for an `image`.

    Raises CheckpointError for a folder or class that cannot be used, ImportError, saying what to install, without the
    `torch` extra. Weights are read from safetensors alone, never unpickled.
    """
    if not (checkpoint / "model_index.json").is_file():
        raise CheckpointError(f"{checkpoint} has no model_index.json; give a whole diffusers pipeline folder")
    index = read_json(checkpoint / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise CheckpointError(f"{checkpoint}: pipeline {name!r} is not supported; supported: {', '.join(PIPELINES)}")
    if image and "ImageToVideo" not in name:
        raise CheckpointError(f"{checkpoint} is a {name}, which takes no --image; leave it out")
    if not image and name == "HunyuanVideoImageToVideoPipeline":
        raise CheckpointError(f"{checkpoint} is a {name}, whose text encoder sees the image; give --image")
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ImportError(f"encoding needs PyTorch ({error}): pip install 'adaspa_jax[torch]'") from error
    left_out = {part: None for part in _OPTIONAL if part in index and (part.startswith("transformer") or not image)}
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "low_cpu_mem_usage": False}
    options |= {"local_files_only": True, "use_safetensors": True}
    pipe = getattr(diffusers, name).from_pretrained(checkpoint, **left_out, **options)
    pipe.transformer = SimpleNamespace(config=SimpleNamespace(**read_json(checkpoint / "transformer/config.json")))
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _array(x: Any) -> np.ndarray:
    x = x.detach().cpu()
    return x.float().numpy() if x.is_floating_point() else x.numpy().astype(np.int32)


def encode_text(pipe: Any, prompts: list[str], negative: str | None, image: Any = None) -> Embeddings:
    """What the text encoders make of prompts, and of a negative prompt that serves each of them; None: none.

    `image`: the PIL image that HunyuanVideo's image-to-video encoder sees with the prompt; black with the negative one.
    """
    family, negatives = PIPELINES[type(pipe).__name__], [negative] * len(prompts)
    if family != "hunyuan":
        tokens = 512 if family == "wan" else getattr(pipe.transformer.config, "max_text_seq_length", 226)
        guided = negative is not None
        options = {"do_classifier_free_guidance": guided, "max_sequence_length": tokens}
        embeds = pipe.encode_prompt(prompts, negatives if guided else None, **options)
        return {name: _array(x) for name, x in zip(_BRANCHES[: 1 + guided], embeds, strict=False)}
    found: Embeddings = {}
    texts: dict[str, tuple[Any, Any]] = {"": (prompts, image)}
    if negative is not None:
        texts[NEGATIVE] = (negatives, None if image is None else image.point(lambda _: 0))
    for prefix, (text, seen) in texts.items():
        shown = {} if seen is None else {"image": seen}
        embeds, pooled, mask = pipe.encode_prompt(**shown, prompt=text, max_sequence_length=256)
        parts = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
        found |= {prefix + name: _array(x) for name, x in parts.items()}
    return found


def encode_image(pipe: Any, image: Any, count: int, size: VideoSize) -> Embeddings:
    """Latents of a PIL image, as the transformer takes them, for `count` prompts; Wan 2.1's CLIP embedding too."""
    import torch

    family, device, config = PIPELINES[type(pipe).__name__], pipe._execution_device, pipe.transformer.config
    pixels = pipe.video_processor.preprocess(image, size.height, size.width).to(device, pipe.vae.dtype)
    sizes: dict[str, Any] = {"num_frames": size.frames, "height": size.height, "width": size.width}
    # Of noise that is thrown away, and of the image's latents where a model samples them.
    sizes |= {"dtype": torch.float32, "device": device, "generator": torch.Generator(device).manual_seed(0)}
    if family == "cogvideox":
        extra = -(1 + (size.frames - 1) // 4) % (config.patch_size_t or 1)
        sizes["num_frames"] += 4 * extra
        _, condition = pipe.prepare_latents(pixels, 1, pipe.vae.config.latent_channels, **sizes)
        condition = condition.swapaxes(1, 2)
    elif family == "wan":
        condition = pipe.prepare_latents(pixels, 1, pipe.vae.config.z_dim, **sizes)[1]
    else:
        kind = config.image_condition_type
        sizes["image_condition_type"] = kind
        _, condition = pipe.prepare_latents(pixels, 1, pipe.vae.config.latent_channels, **sizes)
        if kind == "latent_concat":
            condition[:, :, 1:] = 0
            mask = torch.zeros_like(condition[:, :1])
            mask[:, :, 0] = 1
            condition = torch.cat([condition, mask], 1)
    found = {"condition": _array(condition).repeat(count, 0)}
    if family == "wan" and config.image_dim is not None:
        found["image_embeds"] = _array(pipe.encode_image(image)).repeat(count, 0)
    return found


def encode(
    checkpoint: Path, prompts: list[str], negative: str | None, image: Path | None, size: Any, dtype: str
) -> Embeddings:
    """The embeddings of prompts, and of an image for a video of `size`, three numbers or None each."""
    import torch

    pipe = load_encoders(checkpoint, image=image is not None, dtype=dtype)
    family = PIPELINES[type(pipe).__name__]
    picture = None
    if image is not None:
        from PIL import Image

        picture = Image.open(image).convert("RGB")
    with torch.no_grad():
        negative = "" if negative is None and family != "hunyuan" else negative
        found = encode_text(pipe, prompts, negative, picture if family == "hunyuan" else None)
        if picture is not None:
            own = default_size(checkpoint)
            wanted = VideoSize(*(given or value for given, value in zip(size, dataclasses.astuple(own), strict=True)))
            found |= encode_image(pipe, picture, len(prompts), wanted)
    return found


def main(
    checkpoint: Annotated[Path, typer.Option(help="diffusers pipeline folder with text encoders")],
    prompt: Annotated[list[str], typer.Option(help="what to show; repeat for a batch")],
    negative: Annotated[
        str | None, typer.Option(help="what to avoid; default: nothing, for models that need one for guidance")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="a picture to animate, for image-to-video models")] = None,
    frames: Annotated[int | None, typer.Option(help="of the video, with --image")] = None,
    height: Annotated[int | None, typer.Option(help="pixels, with --image")] = None,
    width: Annotated[int | None, typer.Option(help="pixels, with --image")] = None,
    dtype: Annotated[str, typer.Option(help="of the encoders: float32 or bfloat16")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="file to write")] = Path("prompts.safetensors"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Encodes prompts to a file."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype} must be float32 or bfloat16")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist; make it first")
    if image is not None and not image.is_file():
        raise ValueError(f"--image {image} does not exist")
    if image is None and (frames, height, width) != (None, None, None):
        raise ValueError("--frames, --height and --width go with --image; else they are given to models.sample")
    found = encode(checkpoint, prompt, negative, image, (frames, height, width), dtype)
    write_tensors(out, found, {"prompts": json.dumps(prompt)})
    console.print(f"wrote {out}: {', '.join(f'{k} {list(v.shape)}' for k, v in found.items())}", highlight=False)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    run_cli(main)
