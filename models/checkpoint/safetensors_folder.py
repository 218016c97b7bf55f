"""Reads safetensors files by memory map, trusting nothing in them, and keeps names and links inside a checkpoint.

Works for bfloat16, which numpy's own reader lacks.
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

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""Of weights, as safetensors names them."""
FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
"""Of weights that `models.checkpoint.quantised` reads."""
_OTHER_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": FP8[0],
    "F8_E5M2": FP8[1],
    **{f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
}
"""Of what lies beside weights: counters, tables, quantised weights."""
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = SINGLE + ".index.json"
_METADATA = "__metadata__"
_HEADER_LIMIT = 100 * 1024 * 1024  # the limit of the safetensors format


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or key and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8, with or without a byte order mark, or CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _allowed_roots(folder: Path) -> list[Path]:
    """The folders files may resolve into: itself, and the blobs that the snapshots of a hub's cache link to."""
    resolved = folder.resolve()
    snapshots = [parent for parent in resolved.parents if parent.name == "snapshots"]
    return [resolved, *((parent.parent / "blobs").resolve() for parent in snapshots)]


def inside(folder: Path, name: str, follow_links: bool = False) -> Path:
    """`folder / name`. CheckpointError if the name leaves the folder, or a link does unless `follow_links`."""
    path = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{folder}: file name {name!r} leaves the checkpoint's folder; refused")
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which does not exist; download it again")
    target = path.resolve()
    if not follow_links and not any(target.is_relative_to(root) for root in _allowed_roots(folder)):
        raise CheckpointError(
            f"{path} is a link to {target}, which leaves the checkpoint's folder; to allow that, pass --follow-links, "
            "or follow_links=True in Python"
        )
    return path


def dtype_problem(path: Path, key: str, name: str, supported: Iterable[str]) -> str | None:
    """Why a tensor of the dtype `name`, as its file spells it, is no weight; None: it is one."""
    if name in supported:
        return None
    if re.match(r"F8_|float8", name):
        return f"{path} is quantised to fp8 (tensor {key!r} is {name}); give the unquantised weights"
    return f"{path}: tensor {key!r} is {name}; supported are {', '.join(supported)}: use an unquantised file"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    name: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    problem: str | None = None
    """Why it cannot be a weight, as an error message; None: it can."""

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A read-only view of the file's pages; costs no memory until used. CheckpointError if the file is gone."""
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)[index]
        try:
            return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)[index]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file} cannot be read any more ({error}); give it again") from error


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
    dtype, available = (DTYPES | _OTHER_DTYPES).get(name), path.stat().st_size - start
    size = end - begin if dtype is None else math.prod(shape) * dtype.itemsize
    if end - begin != size or end > available:
        raise CheckpointError(
            f"{path}: tensor {key!r} {name}{list(shape)} lies at bytes {begin}-{end} of {available}: "
            "the file is truncated or corrupt; download it again"
        )
    return Tensor(path, key, start + begin, dtype or np.dtype(np.void), shape, dtype_problem(path, key, name, DTYPES))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Where all tensors of one safetensors file lie. Raises CheckpointError."""
    header, start = _read_header(path)
    return {key: _read_entry(path, key, entry, start) for key, entry in header.items() if key != _METADATA}


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself. Raises CheckpointError."""
    found = _read_header(path)[0].get(_METADATA)
    return found if isinstance(found, dict) else {}


def is_finite(x: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite."""
    if x.dtype == ml_dtypes.bfloat16:  # on the bits: many times faster
        return not bool(((x.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(x).all())
