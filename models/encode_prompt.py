"""Encodes prompts, and an image to animate, with a checkpoint's own encoders in PyTorch.

    python -m models.encode_prompt --checkpoint PIPELINE --prompt "a cat on a roof" --out prompts.safetensors
    python -m models.encode_prompt --checkpoint PIPELINE --prompt "it turns" --image cat.png --out cat.safetensors
    python -m models.encode_prompt --checkpoint PIPELINE --prompt "it turns" --image cat.png --last-image tail.png

PIPELINE is a diffusers pipeline folder with its text encoders; template, crop and length are those of its pipeline in
diffusers, whose code runs. Needs the `torch` extra. The file holds what `python -m models.sample --embeddings` reads.
"""

import importlib
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.checkpoint.weight_files import variant_of, weights_file
from models.commands.cli import run_cli
from models.commands.encoders import (
    OF_IMAGES,
    OF_SAMPLING,
    PIPELINES,
    check_frames,
    check_last_image,
    check_pictures,
    decoded,
    default_size,
    given_prompts,
    pipeline_class,
    read_pictures,
    video_size,
)
from models.pipeline.embeddings import NEGATIVE, Embeddings, write_tensors
from models.pipeline.families import VideoSize, stored_family

console = Console(stderr=True)
_BRANCHES = ("prompt_embeds", NEGATIVE + "prompt_embeds")
_LIBRARIES = ("diffusers", "transformers")
_AT_ONCE = 8
"""Prompts, so that a file of many needs no more memory."""


def _unusual_parts(checkpoint: Path, index: dict[str, Any], left_out: set[str], dtypes: dict[str, Any]) -> Any:
    """The parts of a pipeline that its own loading does not find: saved as a variant, or as .bin.

    Raises CheckpointError for a part without weights. Pickles are read with `weights_only`, in both libraries.
    """
    import torch

    parts = {}
    for name, value in index.items():
        if name in left_out or not isinstance(value, list) or len(value) != 2 or value[0] not in _LIBRARIES:
            continue
        create: Any = getattr(importlib.import_module(value[0]), str(value[1]), None)
        if not (isinstance(create, type) and issubclass(create, torch.nn.Module)):
            continue  # a tokenizer or a scheduler
        file = weights_file(checkpoint / name, follow_links=True)
        if file is None:
            raise CheckpointError(f"{checkpoint / name} holds no weights; download it again")
        pickled, variant = ".bin" in file.name, variant_of(file)
        if pickled or variant is not None:
            options = {"dtype": dtypes.get(name, dtypes["default"]), "use_safetensors": not pickled}
            options |= {"low_cpu_mem_usage": False, "local_files_only": True}
            model: Any = create
            parts[name] = model.from_pretrained(checkpoint / name, variant=variant, **options)
    return parts


def load_encoders(
    checkpoint: Path, *, image: bool, last_image: bool = False, dtype: str = "float32", device: str | None = None
) -> Any:
    """The diffusers pipeline of a folder with its text encoders, and with VAE and image encoder for an `image`.

    Raises CheckpointError for a folder or class that cannot be used, ValueError for a `last_image` that it has no place
    for or that it needs, ImportError, saying what to install, without the
    `torch` extra. `dtype` is that of the text encoders: VAE and image encoder are float32, as in the models' own
    examples. No pickle is run: .bin files are read with `weights_only`.
    """
    name, index = pipeline_class(checkpoint, image), read_json(checkpoint / "model_index.json")
    if image:
        check_last_image(*stored_family(checkpoint), last_image)
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ImportError(f"encoding needs PyTorch ({error}): pip install 'adaspa_jax[torch]'") from error
    config = SimpleNamespace(**read_json(checkpoint / "transformer/config.json"))
    unused = (*OF_SAMPLING, *(() if image else OF_IMAGES))
    left_out = {part: None for part in unused if part in index}
    dtypes = {part: torch.float32 for part in OF_IMAGES if image and part in index}
    dtypes |= {"default": getattr(torch, dtype)}
    parts = _unusual_parts(checkpoint, index, set(left_out), dtypes)
    options: dict[str, Any] = {"dtype": dtypes, "low_cpu_mem_usage": False}
    options |= {"local_files_only": True, "use_safetensors": True}
    pipe = getattr(diffusers, name).from_pretrained(checkpoint, **left_out, **parts, **options)
    pipe.transformer = SimpleNamespace(config=config)
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


def encode_image(pipe: Any, image: Any, count: int, size: VideoSize, last: Any = None) -> Embeddings:
    """Latents of a PIL image, as the transformer takes them, for `count` prompts; Wan 2.1's CLIP embedding too.

    `last`: the image that Wan's video ends with; the embeddings are then [count, 2, S, E].
    """
    import torch

    family, device, config = PIPELINES[type(pipe).__name__], pipe._execution_device, pipe.transformer.config
    preprocess = lambda x: pipe.video_processor.preprocess(x, size.height, size.width).to(device, pipe.vae.dtype)
    pixels = preprocess(image)
    sizes: dict[str, Any] = {"num_frames": size.frames, "height": size.height, "width": size.width}
    # Of noise that is thrown away, and of the image's latents where a model samples them.
    sizes |= {"dtype": torch.float32, "device": device, "generator": torch.Generator(device).manual_seed(0)}
    if family == "cogvideox":
        extra = -(1 + (size.frames - 1) // 4) % (config.patch_size_t or 1)
        sizes["num_frames"] += 4 * extra
        _, condition = pipe.prepare_latents(pixels, 1, pipe.vae.config.latent_channels, **sizes)
        condition = condition.swapaxes(1, 2)
    elif family == "wan":
        end = {} if last is None else {"last_image": preprocess(last)}
        condition = pipe.prepare_latents(pixels, 1, pipe.vae.config.z_dim, **sizes, **end)[1]
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
        embeds = _array(pipe.encode_image(image if last is None else [image, last]))
        found["image_embeds"] = (embeds if last is None else embeds[None]).repeat(count, 0)
    return found


def encode(
    checkpoint: Path,
    prompts: list[str],
    negative: str | None,
    image: Path | None,
    size: Any,
    dtype: str,
    last_image: Path | None = None,
) -> Embeddings:
    """The embeddings of prompts, and of an image for a video of `size`, three numbers or None each.

    `last_image`: what the video ends with. Raises ValueError for a picture, a size or a checkpoint that cannot be used,
    before anything is loaded.
    """
    picture, last = read_pictures(image, last_image)
    wanted = None
    if image is not None:
        own = all(n is None for n in size)
        wanted = default_size(checkpoint) if own else video_size(*stored_family(checkpoint), size)
        check_frames(wanted, last is not None)
    pipe = load_encoders(checkpoint, image=image is not None, last_image=last is not None, dtype=dtype)
    import torch

    family = PIPELINES[type(pipe).__name__]
    with torch.no_grad():
        negative = "" if negative is None and family != "hunyuan" else negative
        seen = picture if family == "hunyuan" else None
        parts = [encode_text(pipe, prompts[i : i + _AT_ONCE], negative, seen) for i in range(0, len(prompts), _AT_ONCE)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if wanted is not None:
            found |= encode_image(pipe, picture, len(prompts), wanted, last)
    return found


def _check_files(out: Path, image: Path | None, last_image: Path | None) -> None:
    """ValueError for a file that cannot be written or read."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist; make it first")
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out} cannot be written; name a file in a folder you may write to")
    check_pictures(image, last_image)


def main(
    checkpoint: Annotated[Path, typer.Option(help="diffusers pipeline folder with text encoders")],
    prompt: Annotated[list[str] | None, typer.Option(help="what to show; repeat for a batch")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file of prompts, one a line, in place of --prompt")] = None,
    negative: Annotated[
        str | None, typer.Option(help="what to avoid; default: nothing, for models that need one for guidance")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="a picture to animate, for image-to-video models")] = None,
    last_image: Annotated[
        Path | None,
        typer.Option(help="the picture that the video ends with, with --image: Wan for first and last frame"),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="of the video, with --image")] = None,
    height: Annotated[int | None, typer.Option(help="pixels, with --image")] = None,
    width: Annotated[int | None, typer.Option(help="pixels, with --image")] = None,
    dtype: Annotated[str, typer.Option(help="of the text encoders: float32 or bfloat16")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="file to write")] = Path("prompts.safetensors"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Encodes prompts to a file."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype} must be float32 or bfloat16")
    _check_files(out, image, last_image)
    if image is None and (frames, height, width) != (None, None, None):
        raise ValueError("--frames, --height and --width go with --image; else they are given to models.sample")
    texts = given_prompts(prompt, prompts)
    if not texts:
        raise ValueError("give at least one --prompt, or --prompts FILE")
    negative = None if negative is None else decoded(negative)
    found = encode(checkpoint, texts, negative, image, (frames, height, width), dtype, last_image)
    write_tensors(out, found, {"prompts": json.dumps(texts)})
    console.print(f"wrote {out}: {', '.join(f'{k} {list(v.shape)}' for k, v in found.items())}", highlight=False)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    run_cli(main)
