"""Prompt embeddings in a safetensors file: what `python -m models.encode_prompt` writes and the samplers read."""

import json
import os
from collections.abc import Iterable, Mapping
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
the first frame; image_embeds [P, 257, E''] (Wan 2.1), for first and last frame [P, 2, 257, E''] or [2 P, 257, E''], the
two of a prompt side by side.
"""
NEGATIVE = "negative_"
_MASK = "prompt_attention_mask"


def read_embeddings(path: Path) -> Embeddings:
    """Reads a file; floats become float32, whole numbers int32. Raises ValueError, naming the file."""
    from safetensors.numpy import load_file

    if not path.is_file():
        raise ValueError(f"--embeddings {path} does not exist; make it with python -m models.encode_prompt")
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"--embeddings {path} is no safetensors file ({error})") from error
    whole = lambda x: x.dtype == np.bool_ or np.issubdtype(x.dtype, np.integer)
    return {name: _narrow(x, np.int32 if whole(x) else np.float32) for name, x in tensors.items()}


def _narrow(x: Any, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes infinite, which is refused
        return np.asarray(x, dtype)


def read_prompts(path: Path, count: int = 0) -> list[str]:
    """The prompts that a file was made from, or numbers where it does not say."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        stored = (file.metadata() or {}).get("prompts", "")
    try:
        prompts = json.loads(stored)
    except ValueError:
        prompts = None
    if isinstance(prompts, list) and len(prompts) == count and all(isinstance(p, str) for p in prompts):
        return prompts
    return [f"prompt {i + 1}" for i in range(count)]


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all, with the mode that the umask gives. Raises OSError."""
    from safetensors.numpy import save

    temporary = path.with_name(f".{path.name}.partial")
    content = save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, metadata)
    try:
        temporary.write_bytes(content)  # safetensors' own writer makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error
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
    if config.image_dim is not None:
        names["image_embeds"] = ("tokens", config.image_dim)
        if config.pos_embed_seq_len is not None:
            names["image_embeds"] = (2, config.pos_embed_seq_len // 2, config.image_dim)
    return names


def _wanted(
    model: VideoTransformer, latents: Grid, given: Iterable[str], guided: bool, first_frame: bool
) -> dict[str, tuple[int | str, ...]]:
    """Name -> shape of all that the model reads. ValueError for names in `given` that it has no use for."""
    wanted = _expected(model)
    negatives = {NEGATIVE + name: shape for name, shape in wanted.items() if name != "image_embeds"}
    extra = model.config.in_channels - model.config.out_channels
    if extra:
        wanted |= {"condition": (extra, *latents)}
    elif first_frame and "condition" in given:
        wanted |= {"condition": (model.config.out_channels, 1, *latents[1:])}
    unknown = sorted(set(given) - set(wanted) - set(negatives))
    if unknown:
        raise ValueError(
            f"this model takes no {', '.join(unknown)}, but {', '.join(wanted)}; encode the prompts with its pipeline"
        )
    return wanted | negatives if guided else wanted


def takes_image(model: VideoTransformer) -> bool:
    """Whether the model cannot do without an image to animate."""
    return bool(model.config.in_channels > model.config.out_channels)


def stand_ins(model: VideoTransformer, latents: Grid, count: int, *, image: bool, first_frame: bool) -> Embeddings:
    """Zeros for `count` prompts that `check_embeddings` takes, negative ones too: to check a run before encoding.

    `image`: the one to animate is given. `first_frame`: as there.
    """
    given = ["condition"] if image else []
    wanted = _wanted(model, latents, given, True, first_frame)
    make = lambda name: np.ones if name.endswith(_MASK) else np.zeros
    sizes = {name: (count, *(n if isinstance(n, int) else 1 for n in shape)) for name, shape in wanted.items()}
    return {name: make(name)(size, np.float32) for name, size in sizes.items()}


def _check_values(name: str, x: np.ndarray) -> None:
    """ValueError for numbers that would make every latent NaN."""
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has NaN or infinite values; encode again, in float32 or bfloat16 (float16 overflows)")
    if name.endswith(_MASK):
        if not np.isin(x, (0, 1)).all():
            raise ValueError(f"{name} must be 1 for real tokens and 0 for padding; it has other values")
        empty = np.flatnonzero(x.sum(1) == 0)
        if len(empty):
            raise ValueError(f"{name} has no token for prompt {empty[0] + 1}; at least one must be 1")


def check_embeddings(
    embeddings: Embeddings, model: VideoTransformer, latents: Grid, *, guided: bool, first_frame: bool
) -> Embeddings:
    """What the model reads, masks as int32 and all else as float32; image_embeds [P, 2, S, E] for two frames.

    `guided`: negative embeddings are needed. `first_frame`: the model can take latents of a first frame. Raises
    ValueError for what is missing, unknown or of another shape, for NaN and infinity, and for a mask without a token.
    """
    wanted = _wanted(model, latents, embeddings, guided, first_frame)
    missing = [name for name in wanted if name not in embeddings]
    if missing:
        why = "; a guidance of 1 needs no negative prompt" if any(n.startswith(NEGATIVE) for n in missing) else ""
        raise ValueError(f"the embeddings lack {', '.join(missing)}; they hold {', '.join(sorted(embeddings))}{why}")
    found = {name: _narrow(embeddings[name], np.float32) for name in wanted}
    count = len(found["prompt_embeds"]) if found["prompt_embeds"].ndim else 0
    for name, shape in wanted.items():
        if len(shape) == 3 and name == "image_embeds":
            found[name] = _by_prompt(found[name], count, shape)
        size = found[name].shape
        fits = len(size) == len(shape) + 1 and size[0] == count and 0 not in size
        if not fits or any(isinstance(w, int) and h != w for h, w in zip(size[1:], shape, strict=False)):
            raise ValueError(
                f"{name} must be [{', '.join(map(str, (count or 'prompts', *shape)))}] for this model; got {list(size)}"
            )
        if name.startswith(NEGATIVE) and size != found[name.removeprefix(NEGATIVE)].shape:
            raise ValueError(f"{name} {size} must have the shape of the positive one")
        _check_values(name, found[name])
    return {name: x.astype(np.int32) if name.endswith(_MASK) else x for name, x in found.items()}


def _by_prompt(x: np.ndarray, count: int, shape: tuple[Any, ...]) -> np.ndarray:
    """Embeddings of first and last frame as [P, 2, S, E], from [2 P, S, E] or [P, 2 S, E] too; else as they are."""
    frames, tokens, width = shape
    forms = ((frames * count, tokens, width), (count, frames * tokens, width))
    return x.reshape(count, *shape) if x.shape in forms else x
