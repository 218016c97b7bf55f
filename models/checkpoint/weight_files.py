"""Finds and opens the weights of a checkpoint, of a transformer or a VAE, whatever they were saved as."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from models.checkpoint.gguf_file import read_gguf
from models.checkpoint.key_moves import TensorView
from models.checkpoint.quantised import with_map
from models.checkpoint.safetensors_folder import (
    FP8,
    INDEX,
    SINGLE,
    CheckpointError,
    inside,
    read_json,
    read_safetensors,
)
from models.checkpoint.torch_file import read_torch

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_SUFFIXES = (".safetensors", ".gguf", *_TORCH_SUFFIXES)
_KIND = r"\.(?:safetensors|pt|pth|ckpt|bin)"
_INDEX = re.compile(rf"(?P<stem>.+)(?P<kind>{_KIND})\.index(?:\.(?P<variant>.+))?\.json")
_SHARD = re.compile(rf"(?P<stem>.+?)-?0*(?P<number>\d+)-of-0*(?P<count>\d+)(?P<rest>.*){_KIND}")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Of the files of diffusers and transformers."""
_PLAIN = tuple(
    f"{stem}.{kind}{index}" for stem in _STEMS for kind in ("safetensors", "bin") for index in (".index.json", "")
)
"""As `save_pretrained` names them without a variant, in the order in which diffusers prefers them."""
_VARIANTS = tuple(
    re.compile(f"(?:{'|'.join(_STEMS)})" + pattern)
    for kind in ("safetensors", "bin")
    for pattern in (rf"\.{kind}\.index\.(?P<variant>.+)\.json", rf"\.(?P<variant>.+)\.{kind}")
)
_TRAINER_FILE = re.compile(r"(optimizer|scheduler|scaler|training_args|(random|rng)_states?(_\d+)?)\..+")
"""What trainers leave beside the weights."""


def _is_shard(name: str) -> bool:
    """Whether a file of that name holds only a part of the weights."""
    match = _SHARD.fullmatch(name)
    return match is not None and int(match["count"]) > 1


def _candidates(names: list[str]) -> list[str]:
    """The names of whole sets of weights that a folder may mean: of equal rank, the best."""
    for name in _PLAIN:
        if name in names:
            return [name]
    whole = [name for name in names if not _is_shard(name)]
    variants: dict[str, str] = {}
    for regex in _VARIANTS:
        for match in filter(None, map(regex.fullmatch, whole)):
            variants.setdefault(match["variant"], match.string)
    if variants:
        return sorted(variants.values())
    return [name for name in whole if _INDEX.fullmatch(name)] or [
        name for name in whole if name.endswith(_SUFFIXES) and not _TRAINER_FILE.fullmatch(name)
    ]


def _lost_index(shard: Path) -> CheckpointError:
    """The error for a shard without its index."""
    match = _SHARD.fullmatch(shard.name)
    assert match is not None
    stem, variant = match["stem"], match["rest"]
    if re.match(r"\w*model\.", stem) and not variant:  # a variant of diffusers or transformers
        stem, dot, name = stem.partition(".")
        variant = dot + name
    name = f"{stem}{shard.suffix}.index{variant}.json"
    return CheckpointError(
        f"{shard} is one of {match['count']} shards, and the index that lists them is missing; download {name} too"
    )


def weights_file(folder: Path, follow_links: bool = False) -> Path | None:
    """The one file of weights, or the one index of shards, that a folder means; None if there is none.

    As diffusers chooses: without a variant before with one, safetensors before .bin, shards before a file. Raises
    CheckpointError for several of equal rank, for shards without an index, and for links out of the folder unless
    `follow_links`.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_symlink() or path.is_file())
    names = [name for name in names if not name.startswith(".")]
    found = _candidates(names)
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds several files of weights; give one of them: {', '.join(found)}")
    if found:
        return inside(folder, found[0], follow_links)
    if shards := [name for name in names if _is_shard(name)]:
        raise _lost_index(folder / shards[0])
    return None


def variant_of(file: Path) -> str | None:
    """The variant that a file of weights or an index was saved as, such as "fp16"; None: none."""
    found = (regex.fullmatch(file.name) for regex in _VARIANTS)
    return next((match["variant"] for match in found if match), None)


def expert_folders(path: Path) -> list[Path]:
    """The transformers of a checkpoint: `path` itself, or two for Wan 2.2 A14B, that of high noise first.

    Two are a pipeline whose model_index.json has a `boundary_ratio`, with transformer/ and transformer_2/, or Wan's own
    high_noise_model/ and low_noise_model/. Raises CheckpointError if one of the two is missing.
    """
    index = path / "model_index.json"
    pairs = [("high_noise_model", "low_noise_model")]
    if index.is_file() and read_json(index).get("boundary_ratio") is not None:
        pairs = [("transformer", "transformer_2")]
    elif index.is_file() or not any((path / name).is_dir() for name in pairs[0]):
        return [path]
    folders = [path / name for name in pairs[0]]
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(f"{path} has two experts, but {folder.name}/ is missing; download it again")
    return folders


def _read_fp8(path: Path, tensors: Mapping[str, TensorView], follow_links: bool) -> dict[str, TensorView]:
    """Tencent's fp8 weights with the scales of the file beside them, X_map.pt of X.pt.

    Raises CheckpointError if it is missing: without scales the weights are wrong.
    """
    scales = path.with_name(f"{path.stem}_map{path.suffix}")
    if not scales.exists():
        raise CheckpointError(f"{path} is in fp8, and {scales.name}, which holds its scales, is missing; download it")
    return with_map(scales, tensors, read_torch(inside(path.parent, scales.name, follow_links)))


def read_file(path: Path, follow_links: bool = False) -> Mapping[str, TensorView]:
    """Where all tensors lie of one file, whose content tells what it is. Raises CheckpointError.

    `follow_links`: a file that belongs to it may be a link out of its folder.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, download it again")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give the file or folder of a checkpoint")
    with path.open("rb") as file:
        begin = file.read(24)
    if begin.startswith(b"GGUF"):
        return read_gguf(path)
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the weights; download them: git lfs pull")
    if begin.startswith(b"PK") or (path.suffix in _TORCH_SUFFIXES and begin[8:9] != b"{"):
        tensors = read_torch(path)
        fp8 = any(tensor.dtype in FP8 for key, tensor in tensors.items() if "double_blocks." in key)
        scaled = any("scale" in key.rpartition(".")[2] for key in tensors)
        return _read_fp8(path, tensors, follow_links) if fp8 and not scaled else tensors
    return read_safetensors(path)


def _read_index(index: Path, follow_links: bool) -> dict[str, TensorView]:
    """All tensors of the shards that an index lists, in its folder."""
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no valid weight_map; download it again")
    tensors: dict[str, TensorView] = {}
    for shard in sorted(set(weight_map.values())):
        found = read_file(inside(folder, shard, follow_links), follow_links)
        listed = {key for key, name in weight_map.items() if name == shard}
        if set(found) != listed:
            odd = sorted(set(found) ^ listed)
            raise CheckpointError(f"{folder / shard} and its index disagree on {len(odd)} keys, such as {odd[0]!r}")
        tensors |= found
    return tensors


def _indices(shard: Path) -> Iterable[Path]:
    """The indices beside a shard that list it."""
    for path in sorted(shard.parent.iterdir()):
        if _INDEX.fullmatch(path.name) and shard.name in path.read_text(encoding="utf-8", errors="replace"):
            yield path


def read_weights(path: Path, follow_links: bool = False) -> Mapping[str, TensorView]:
    """Where all tensors lie of a file (safetensors, PyTorch, GGUF), of the shards of an index, or of a folder with one.

    Raises CheckpointError for what is no whole set of weights, and for links out of a folder unless `follow_links`.
    """
    if path.is_dir():
        file = weights_file(path, follow_links)
        if file is None:
            raise CheckpointError(
                f"{path} holds neither {SINGLE} nor {INDEX}, nor other weights; "
                "give the folder of a diffusers transformer or VAE"
            )
        path = file
    if _INDEX.fullmatch(path.name):
        return _read_index(path, follow_links)
    if path.suffix == ".json":
        raise CheckpointError(f"{path} holds no weights; give the folder that it is in")
    if path.is_file() and _is_shard(path.name):
        for index in _indices(path):
            raise CheckpointError(f"{path} is one of several shards; give their index, {index}")
        raise _lost_index(path)
    return read_file(path, follow_links)
