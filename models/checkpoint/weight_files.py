"""Finds and opens the weights of a checkpoint, whatever it was published as, and names its format by its keys."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from models.checkpoint import cogvideox_keys, hunyuan_keys, wan_keys
from models.checkpoint.key_moves import Format, TensorView, move
from models.checkpoint.safetensors_folder import (
    INDEX,
    SINGLE,
    CheckpointError,
    Tensor,
    read_file,
    read_folder,
    read_index,
    read_json,
    refuse_keys,
)

FORMATS = (*hunyuan_keys.FORMATS, *cogvideox_keys.FORMATS, *wan_keys.FORMATS)
PREFIXES = ("", "model.diffusion_model.", "model.model.", "diffusion_model.", "model.", "module.")
"""Of all keys, depending on who saved the file."""
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_SUFFIXES = (".safetensors", ".gguf", *_TORCH_SUFFIXES)
_INDEX_SUFFIX = ".safetensors.index.json"
_TORCH_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.float16, "float32": np.float32}
_WRAPPERS = ("module", "model", "state_dict")
"""Keys under which a training checkpoint holds the weights."""
_VAE_KEY = re.compile(r"(?:.*\.)?decoder\.(?:conv|mid|up|head).*")
"""A decoder of images, which no text encoder has."""


def weights_file(folder: Path) -> Path | None:
    """The one file of weights, or the one index of shards, of a folder without config.json.

    None if there is none; CheckpointError if there are several.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    indices = [path for path in files if path.name.endswith(_INDEX_SUFFIX)]
    found = indices or [path for path in files if path.suffix in _SUFFIXES]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder} holds several files of weights; give one of them: {names}")
    return found[0] if found else None


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


def _read_torch(path: Path) -> dict[str, Tensor]:
    """Where the tensors of a PyTorch file lie; its pickle may hold nothing but tensors, and none is loaded."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a PyTorch file, and reading it needs PyTorch; install the extra `torch`, or give safetensors"
        ) from error
    try:
        with FakeTensorMode():
            content = torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read: {reason}; it is damaged, of PyTorch before 1.6, or holds more than tensors"
        ) from error
    while isinstance(content, Mapping) and (
        inner := [content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)]
    ):
        content = inner[0]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no named tensors")
    tensors: dict[str, Tensor] = {}
    size = path.stat().st_size
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            continue
        name = str(value.dtype).removeprefix("torch.")
        if name.startswith("float8"):
            raise CheckpointError(
                f"{path} is quantised to fp8 (tensor {key!r} is {name}); give the unquantised weights"
            )
        if name not in _TORCH_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {key!r} is {name}; supported are {', '.join(_TORCH_DTYPES)}: use an unquantised file"
            )
        dtype, shape = np.dtype(_TORCH_DTYPES[name]), tuple(value.shape)
        offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or not value.is_contiguous():
            raise CheckpointError(f"{path}: tensor {key!r} does not lie in one piece; save the file again")
        offset += value.storage_offset() * dtype.itemsize
        if offset + math.prod(shape) * dtype.itemsize > size:
            raise CheckpointError(f"{path}: tensor {key!r} lies beyond the end of the file; download it again")
        tensors[str(key)] = Tensor(path, offset, dtype, shape)
    return tensors


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file (safetensors, an index of shards, PyTorch), or of a folder. Raises CheckpointError."""
    if path.is_dir():
        if (path / INDEX).exists() or (path / SINGLE).exists() or not (file := weights_file(path)):
            return read_folder(path)
        path = file
    if path.name.endswith(_INDEX_SUFFIX):
        return read_index(path)
    with path.open("rb") as file_:
        magic = file_.read(4)
    if magic == b"GGUF":
        raise CheckpointError(f"{path} is a GGUF file, quantised; give the unquantised weights, as safetensors or .pt")
    if magic[:2] != b"PK" and path.suffix not in _TORCH_SUFFIXES:
        return read_file(path)
    tensors = _read_torch(path)
    refuse_keys(path, tensors)
    return tensors


def to_diffusers(tensors: Mapping[str, TensorView]) -> tuple[Format | None, dict[str, TensorView]]:
    """(format, the tensors under diffusers' keys); (None, as they are) for keys of no known format."""
    for prefix in PREFIXES:
        if not all(key.startswith(prefix) for key in tensors):
            continue
        keys = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        for known in FORMATS:
            if known.fits(keys):
                return known, keys if known.moves is None else move(keys, known.moves)
    return None, dict(tensors)


def unknown_format(path: Path, keys: Mapping[str, TensorView]) -> CheckpointError:
    """The error for weights of no known format."""
    supported = ", ".join(dict.fromkeys(f"{known.class_name} ({known.name})" for known in FORMATS))
    if any(_VAE_KEY.fullmatch(key) for key in keys):
        return CheckpointError(f"{path} is a VAE, no transformer; give the transformer of one of: {supported}")
    shown = ", ".join(map(repr, sorted(keys)[:3])) or "none"
    return CheckpointError(
        f"{path} is no transformer that is supported, by its keys ({shown}, ...); supported: {supported}"
    )
