"""Total mapping of a PyTorch checkpoint's keys to NNX parameters: every key used once, every shape checked."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from models.checkpoint.key_moves import TensorView
from models.checkpoint.safetensors_folder import CheckpointError, is_finite

Kind = Literal["linear", "conv", "norm", "array", "unused"]
Path = tuple[str, ...]
_ALIGNMENT = 64  # bytes
_STRIP = 256
_THREADS = min(8, os.cpu_count() or 1)
"""That read layers side by side: transposing is slower than memory."""
_SMALL = 1 << 20
"""Bytes of a parameter for which threads do not pay."""


@dataclass(frozen=True)
class Rule:
    """Modules whose key matches `source` (a regex; its group "layer" numbers a stack) fill the NNX module `target`.

    Of kind "array" source and target are no modules but parameters of their own, taken as they are; "unused" ones are
    left out.
    """

    source: str
    target: str
    kind: Kind


@dataclass(frozen=True)
class Leaf:
    """One NNX parameter and the tensors that fill it: one, or one a layer."""

    path: Path
    shape: tuple[int, ...]
    stacked: bool
    keys: tuple[str, ...]
    kind: Kind

    def read(
        self,
        tensors: Mapping[str, TensorView],
        dtype: np.dtype | None = None,
        index: tuple[slice, ...] | None = None,
    ) -> np.ndarray:
        """The parameter's value or a slice of it, in `dtype` or the checkpoint's; reads no more than that.

        Raises CheckpointError for non-finite weights.
        """
        index = index or (slice(None),) * len(self.shape)
        layers = range(self.shape[0])[index[0]] if self.stacked else (0,)
        one = index[1:] if self.stacked else index
        shape = tuple(len(range(n)[part]) for n, part in zip(self.shape, index, strict=True))
        out = _aligned(shape, np.dtype(dtype or tensors[self.keys[0]].dtype))

        def fill(i: int, layer: int) -> None:
            tensor = tensors[self.keys[layer]]
            value = _read_slice(tensor, self.kind, self.path[-1], one)
            if problem := _copy(out[i] if self.stacked else out, value):
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} has {problem}")

        if len(layers) == 1 or out.nbytes < _SMALL:
            for i, layer in enumerate(layers):
                fill(i, layer)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(fill, range(len(layers)), layers))
        return out

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts where JAX takes it over on the CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _strips(out: np.ndarray, value: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both, a transposed matrix in strips that stay in the cache: copied twice as fast."""
    if value.ndim != 2 or value.strides[0] > value.strides[1]:
        yield out, value
        return
    for i in range(0, value.shape[1], _STRIP):
        yield out[:, i : i + _STRIP], value[:, i : i + _STRIP]


def _copy(out: np.ndarray, value: np.ndarray) -> str | None:
    """Copies, with a cast if need be; None, or what is wrong with the values: then not all are copied."""
    narrower = float(ml_dtypes.finfo(out.dtype).max) < float(ml_dtypes.finfo(value.dtype).max)
    for target, source in _strips(out, value):
        if not is_finite(source):
            return "NaN or infinite values; the weights are broken"
        if target.dtype == source.dtype and target.dtype.itemsize == 2:
            # As numpy's own type: bfloat16 copies element by element.
            target, source = target.view(np.uint16), source.view(np.uint16)
        with np.errstate(over="ignore"):
            target[...] = source
        if narrower and not is_finite(target):
            return f"values that {out.dtype} cannot hold; load it in float32"
    return None


def _read_slice(tensor: TensorView, kind: Kind, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """The values at `index` of a PyTorch tensor in NNX layout; of convolutions all are read, they are small."""
    if len(tensor.shape) != len(index):
        return to_nnx(tensor.read(), kind, name)[index]
    return to_nnx(tensor.read(index[::-1] if name == "kernel" else index), kind, name)


def to_nnx(value: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """A PyTorch weight in NNX layout: kernels are [in, out], a Conv2d or Conv3d over patches is one of them."""
    if name != "kernel":
        return value
    return value.reshape(value.shape[0], -1).T if kind == "conv" else value.T


def _name(kind: Kind, parameter: str) -> str:
    if parameter == "bias":
        return "bias"
    return "scale" if kind == "norm" else "kernel"


def map_keys(keys: Iterable[str], rules: Iterable[Rule]) -> tuple[dict[Path, dict[int, tuple[str, Kind]]], list[str]]:
    """(NNX path -> layer -> (key, kind), keys no rule matches); layer -1 outside stacks."""
    suffix = lambda kind: "" if kind == "array" else r"\.(?P<parameter>weight|bias)"
    compiled = [(re.compile(rule.source + suffix(rule.kind)), rule) for rule in rules]
    mapped: dict[Path, dict[int, tuple[str, Kind]]] = {}
    unexpected = []
    for key in keys:
        hits = [(match, rule) for regex, rule in compiled if (match := regex.fullmatch(key))]
        if not hits:
            unexpected.append(key)
            continue
        if len(hits) > 1:
            raise AssertionError(f"{key!r} matches {len(hits)} rules")
        match, rule = hits[0]
        if rule.kind == "unused":
            continue
        groups = match.groupdict()
        layer = int(groups["layer"]) if "layer" in groups else -1
        target = rule.target.format(*match.groups()) if "{" in rule.target else rule.target
        names = () if rule.kind == "array" else (_name(rule.kind, groups["parameter"]),)
        mapped.setdefault((*target.split("."), *names), {})[layer] = (key, rule.kind)
    return mapped, unexpected


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _torch_shape(expected: tuple[int, ...], kind: Kind, name: str, found: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `found` fills one layer of shape `expected`."""
    if name != "kernel":
        return found == expected
    flat = (found[0], math.prod(found[1:])) if kind == "conv" and len(found) > 2 else found
    return flat == expected[::-1]


def plan(
    tensors: Mapping[str, Any],
    rules: Iterable[Rule],
    expected: Mapping[Path, tuple[int, ...]],
    stacks: set[str],
    config: str = "config.json",
) -> list[Leaf]:
    """Assigns every tensor (anything with `.shape`) to a parameter of the shapes `expected`.

    `stacks` names the modules with a leading layer axis; `config`, for messages, is where `expected` is from. Raises
    CheckpointError with the missing, unexpected or misshapen keys before anything is read.
    """
    mapped, unexpected = map_keys(tensors, rules)
    unexpected += [key for path in set(mapped) - set(expected) for key, _ in mapped[path].values()]
    missing, misshapen, leaves = [], [], []
    for path, shape in expected.items():
        stacked = bool(stacks & set(path))
        one = shape[1:] if stacked else shape
        wanted = range(shape[0]) if stacked else (-1,)
        have = mapped.get(path, {})
        missing += [f"{'.'.join(path)}" + (f" of layer {i}" if stacked else "") for i in wanted if i not in have]
        unexpected += [key for i, (key, _) in have.items() if i not in wanted]
        for i in wanted:
            if i in have and not _torch_shape(one, have[i][1], path[-1], tuple(tensors[have[i][0]].shape)):
                found = list(tensors[have[i][0]].shape)
                misshapen.append(f"{have[i][0]} {found} for {'.'.join(path)} {list(one)}")
        if all(i in have for i in wanted):
            keys = tuple(have[i][0] for i in wanted)
            leaves.append(Leaf(path, shape, stacked, keys, have[wanted[0]][1]))
    for title, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            raise CheckpointError(
                f"the weights do not fit {config}: {len(names)} {title} keys: {_some(names)}; "
                "check that config.json and the weights belong together"
            )
    return leaves
