"""Reads the files of `torch.save` by memory map: where their tensors lie, unpickling nothing but tensors."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.checkpoint.safetensors_folder import FP8, CheckpointError, Tensor, dtype_problem

_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_FP8 = {"float8_e4m3fn": FP8[0], "float8_e5m2": FP8[1]}


class _Emptied:
    """Stands for a class or function that a file names: nothing of it is imported, its items are kept as a dict's."""

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        return OrderedDict()


class _Forgotten:
    """The same for NumPy's numbers, whose state is no dict."""

    def __init__(self, *arguments: Any, **named: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Path) -> tuple[Any, list[str]]:
    """(content, its tensors without storage, and what else it names), such as a trainer's arguments."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        stand_ins: list[Any] = [(_Forgotten if name.startswith("numpy.") else _Emptied, name) for name in names]
        with FakeTensorMode(), torch.serialization.safe_globals(stand_ins):
            return torch.load(path, mmap=True, weights_only=True), names
    except Exception as error:  # whatever a damaged or hostile pickle makes of it
        lines = (line.partition("WeightsUnpickler error:")[2].strip() or line for line in str(error).splitlines())
        # Some lines advise to run what is in the file.
        reason = next((line for line in lines if line and "weights_only" not in line), type(error).__name__)
        raise CheckpointError(
            f"{path} cannot be read: {reason}; it is damaged, of PyTorch before 1.6, or holds more than tensors"
        ) from error


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, tensor) of nested dicts, the keys joined by dots."""
    import torch

    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value


def _place(path: Path, key: str, value: Any, size: int) -> Tensor:
    """Where one tensor lies in a file of `size` bytes."""
    import torch

    name = str(value.dtype).removeprefix("torch.")
    dtype, shape = (_DTYPES | _FP8).get(name, np.dtype(np.void)), tuple(value.shape)
    problem = dtype_problem(path, key, name, _DTYPES)
    if problem and name not in _FP8:
        return Tensor(path, key, 0, dtype, shape, problem)
    offset = None
    if value.layout is torch.strided:
        offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or not value.is_contiguous():
        pieces = f"{path}: tensor {key!r} does not lie in one piece; save the file again"
        return Tensor(path, key, 0, np.dtype(np.void), shape, pieces)
    offset += value.storage_offset() * dtype.itemsize
    if offset + math.prod(shape) * dtype.itemsize > size:
        raise CheckpointError(f"{path}: tensor {key!r} lies beyond the end of the file; download it again")
    return Tensor(path, key, offset, dtype, shape, problem)


def read_torch(path: Path) -> dict[str, Tensor]:
    """Where all tensors of a file of PyTorch lie, by the keys of all dicts around them, joined by dots.

    Raises CheckpointError, also without PyTorch.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a PyTorch file, and reading it needs PyTorch; install the extra `torch`, or give safetensors"
        ) from error
    content, names = _load(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no named tensors")
    size, tensors = path.stat().st_size, {}
    try:
        found = list(_flat(content))
    except RecursionError as error:
        raise CheckpointError(f"{path} holds dicts without end; it is damaged") from error
    for key, value in found:
        if key in tensors:
            raise CheckpointError(f"{path}: several tensors are {key!r}; save the file again")
        tensors[key] = _place(path, key, value, size)
    if names and not tensors:
        raise CheckpointError(
            f"{path} cannot be read: it holds more than tensors ({', '.join(names[:3])}) and no named tensor; "
            "save the state_dict() of the model alone"
        )
    return tensors
