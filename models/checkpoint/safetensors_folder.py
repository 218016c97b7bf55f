"""Reads safetensors files, alone or in shards, by memory map, trusting nothing in them.

Works for bfloat16, which numpy's own reader lacks, and never leaves the checkpoint's folder.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = SINGLE + ".index.json"
_HEADER_LIMIT = 100 * 1024 * 1024  # the limit of the safetensors format


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or key and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or CheckpointError."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _allowed_root(folder: Path) -> Path:
    """The folder files may resolve into: itself, or a hub cache's repository, whose snapshots link to its blobs."""
    resolved = folder.resolve()
    for parent in resolved.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return resolved


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, or CheckpointError if that leaves the folder, itself or through a link."""
    path = folder / name
    if Path(name).name != name or not path.resolve().is_relative_to(_allowed_root(folder)):
        raise CheckpointError(f"{folder}: file name {name!r} leaves the checkpoint's folder; refused")
    return path


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """A read-only view of the file's pages; costs no memory until used."""
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(tensor entries, offset of the data) of one shard."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _HEADER_LIMIT + 1
        if length > min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes); download it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a corrupt header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt header; download it again")
    header.pop("__metadata__", None)
    return header, 8 + length


def _read_entry(path: Path, key: str, entry: Any, start: int) -> Tensor:
    """Checks one header entry against the file."""
    try:
        name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = isinstance(name, str) and all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{path}: tensor {key!r} has a corrupt header entry; download it again")
    if name.startswith("F8_"):
        raise CheckpointError(f"{path} is quantised to fp8 (tensor {key!r} is {name}); give the unquantised weights")
    if name not in DTYPES:
        supported = ", ".join(DTYPES)
        raise CheckpointError(f"{path}: tensor {key!r} is {name}; supported are {supported}: use an unquantised file")
    dtype, available = DTYPES[name], path.stat().st_size - start
    if end - begin != math.prod(shape) * dtype.itemsize or end > available:
        raise CheckpointError(
            f"{path}: tensor {key!r} {name}{list(shape)} lies at bytes {begin}-{end} of {available}: "
            "the file is truncated or corrupt; download it again"
        )
    return Tensor(path, start + begin, dtype, shape)


def refuse_keys(path: Path, keys: Iterable[str]) -> None:
    """CheckpointError for what is no model by itself, or a quantised one."""
    for key in keys:
        if re.search(r"(^|[._])(lora_(A|B|up|down)\b|hada_w|lokr_w)", key) or key.endswith(".alpha"):
            raise CheckpointError(
                f"{path} is a LoRA (it has {key!r}), no transformer; merge it into its base model and give that"
            )
        if re.search(r"(^|\.)(scaled_fp8$|(scale_weight|weight_scale)(\.|$))", key):
            raise CheckpointError(f"{path} is quantised to fp8 (it has {key!r}); give the unquantised weights")


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, download it again")
    header, start = _read_header(path)
    refuse_keys(path, header)
    return {key: _read_entry(path, key, entry, start) for key, entry in header.items()}


def read_index(index: Path) -> dict[str, Tensor]:
    """All tensors of the shards that an index lists, in its folder. Raises CheckpointError."""
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no valid weight_map; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        found = read_file(inside(folder, shard))
        listed = {key for key, name in weight_map.items() if name == shard}
        if set(found) != listed:
            odd = sorted(set(found) ^ listed)
            raise CheckpointError(f"{folder / shard} and its index disagree on {len(odd)} keys, such as {odd[0]!r}")
        tensors |= found
    return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder with one safetensors file, or with shards and their index. Raises CheckpointError."""
    if (folder / INDEX).exists():
        return read_index(inside(folder, INDEX))
    if (folder / SINGLE).exists():
        return read_file(inside(folder, SINGLE))
    raise CheckpointError(
        f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a diffusers transformer or VAE"
    )


def is_finite(x: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite."""
    if x.dtype == ml_dtypes.bfloat16:  # on the bits: many times faster
        return not bool(((x.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(x).all())
