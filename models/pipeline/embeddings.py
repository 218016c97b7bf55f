"""Prompt embeddings in a safetensors file: what `python -m models.encode_prompt` writes and the samplers read."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.transformers.base import Grid, VideoTransformer
from models.transformers.cogvideox import CogVideoXTransformer
from models.transformers.hunyuan_video import HunyuanVideoTransformer
from models.transformers.wan import WanTransformer

Embeddings = dict[str, np.ndarray]
"""[P, ...] each, P prompts.

prompt_embeds [P, T, E]: of the text encoder. HunyuanVideo has besides prompt_attention_mask [P, T], 1 for real tokens,
and pooled_prompt_embeds [P, E']. negative_...: the same of the negative prompt, for classifier-free guidance. Image to
video: condition [P, C, F, H, W], latents that go in behind the noisy ones, channel by channel, or with F = 1 those of
the first frame; image_embeds [P, 257, E''] (Wan 2.1).
"""
NEGATIVE = "negative_"


def read_embeddings(path: Path) -> Embeddings:
    """Reads a file; bfloat16 and float16 become float32. Raises ValueError, naming the file."""
    from safetensors.flax import load_file

    if not path.is_file():
        raise ValueError(f"--embeddings {path} does not exist; make it with python -m models.encode_prompt")
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"--embeddings {path} is no safetensors file ({error})") from error
    wide = lambda x: np.asarray(x, np.int32 if np.issubdtype(x.dtype, np.integer) else np.float32)
    return {name: wide(x) for name, x in tensors.items()}


def read_prompts(path: Path, count: int) -> list[str]:
    """The prompts that a file was made from, or numbers where it does not say."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        prompts = json.loads((file.metadata() or {}).get("prompts", "[]"))
    return prompts if len(prompts) == count else [f"prompt {i + 1}" for i in range(count)]


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _expected(model: VideoTransformer) -> dict[str, tuple[int | str, ...]]:
    """Name -> shape of one prompt's embeddings; a dimension named by a string may be anything."""
    config = model.config
    if isinstance(model, HunyuanVideoTransformer):
        return {
            "prompt_embeds": ("T", config.text_embed_dim),
            "prompt_attention_mask": ("T",),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
    if isinstance(model, CogVideoXTransformer):
        return {"prompt_embeds": (config.max_text_seq_length, config.text_embed_dim)}
    assert isinstance(model, WanTransformer)
    names: dict[str, tuple[int | str, ...]] = {"prompt_embeds": ("T", config.text_dim)}
    return names | ({"image_embeds": ("tokens", config.image_dim)} if config.image_dim is not None else {})


def check_embeddings(
    embeddings: Embeddings, model: VideoTransformer, latents: Grid, *, guided: bool, first_frame: bool
) -> int:
    """Number of prompts. ValueError for what is missing, unknown or of another shape.

    `guided`: negative embeddings are needed. `first_frame`: the model can take latents of a first frame.
    """
    wanted = _expected(model)
    if guided:
        wanted |= {NEGATIVE + name: shape for name, shape in wanted.items() if name != "image_embeds"}
    extra = model.config.in_channels - model.config.out_channels
    if extra:
        wanted |= {"condition": (extra, *latents)}
    elif first_frame and "condition" in embeddings:
        wanted |= {"condition": (model.config.out_channels, 1, *latents[1:])}
    missing = [name for name in wanted if name not in embeddings]
    if missing:
        why = "; a guidance of 1 needs no negative prompt" if any(n.startswith(NEGATIVE) for n in missing) else ""
        raise ValueError(f"the embeddings lack {', '.join(missing)}; they hold {', '.join(sorted(embeddings))}{why}")
    count = len(embeddings["prompt_embeds"])
    for name, shape in wanted.items():
        found = embeddings[name].shape
        fits = len(found) == len(shape) + 1 and found[0] == count
        if not fits or any(isinstance(w, int) and h != w for h, w in zip(found[1:], shape, strict=False)):
            raise ValueError(
                f"{name} must be [{', '.join(map(str, (count, *shape)))}] for this model; got {list(found)}"
            )
    for name in wanted:
        if name.startswith(NEGATIVE) and embeddings[name].shape != embeddings[name.removeprefix(NEGATIVE)].shape:
            raise ValueError(f"{name} {embeddings[name].shape} must have the shape of the positive one")
    return count
