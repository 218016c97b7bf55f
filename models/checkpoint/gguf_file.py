"""Reads GGUF files by memory map through the package `gguf`: quantised weights that become float32 where they are read.

As ComfyUI-GGUF (city96) writes them: the keys and shapes of the model's own format, shapes of five axes beside them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.checkpoint.safetensors_folder import CheckpointError

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **dict.fromkeys(
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        np.dtype(ml_dtypes.bfloat16),
    ),
}
"""GGML's types that are read -> what they are worth."""
_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's key: the field with its shape before it was cut to what GGUF holds, four axes."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: rows of blocks."""

    file: Path
    name: str
    offset: int
    kind: str
    """GGML's type."""
    stored: tuple[int, ...]
    """Its shape in the file; blocks lie along the last axis."""
    shape: tuple[int, ...]
    """As PyTorch has it."""
    architecture: str
    """The file's general.architecture."""
    problem: str | None = None

    @property
    def dtype(self) -> np.dtype:
        """What a model of such weights has."""
        return _DTYPES.get(self.kind, np.dtype(np.void))

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """float32, of a matrix no more blocks than the slice needs. CheckpointError if the file is gone."""
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        width = self.stored[-1] if self.stored else 1
        shape = (math.prod(self.stored) // width, width // block * size)
        try:
            data = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file} cannot be read any more ({error}); give it again") from error
        if self.stored != self.shape or len(self.shape) != 2:
            return gguf.dequantize(data, kind).reshape(self.shape)[index]
        rows, columns = (*index, *(slice(None),) * (2 - len(index)))
        begin, end, _ = columns.indices(width)
        first, last = begin // block, -(-end // block)
        value = gguf.dequantize(data[rows, first * size : last * size], kind)
        return value[:, begin - first * block : end - first * block]


def _text(field: Any) -> str:
    """A field of the file as text; "" if there is none."""
    return "" if field is None else str(field.contents())


def _tensor(path: Path, found: Any, reader: Any, architecture: str) -> GGUFTensor:
    """Checks one tensor of the reader, which has checked that it lies in the file."""
    stored = tuple(int(n) for n in reversed(found.shape))
    field = reader.get_field(_SHAPE + found.name)
    shape = stored if field is None else tuple(int(n) for n in field.contents())
    kind, problem = found.tensor_type.name, None
    if math.prod(shape) != math.prod(stored):
        raise ValueError(f"tensor {found.name!r} {list(stored)} cannot be {list(shape)}")
    if kind not in _DTYPES:
        problem = f"{path}: tensor {found.name!r} is {kind} of GGUF; read are {', '.join(_DTYPES)}: give one of those"
    return GGUFTensor(path, found.name, int(found.data_offset), kind, stored, shape, architecture, problem)


def read_gguf(path: Path) -> dict[str, GGUFTensor]:
    """Where all tensors of a GGUF file lie. Raises CheckpointError, also without the package `gguf`."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a GGUF file, and reading it needs the package gguf: pip install gguf, or the extra `demo`"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        architecture = _text(reader.get_field("general.architecture"))
        return {found.name: _tensor(path, found, reader, architecture) for found in reader.tensors}
    except Exception as error:  # whatever the reader makes of a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is a damaged or cut GGUF file ({reason}); download it again") from error
