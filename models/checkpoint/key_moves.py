"""Tensors of other checkpoint formats under diffusers' names: renamed, split and reordered as views, nothing read."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.checkpoint.safetensors_folder import CheckpointError


class TensorView(Protocol):
    """A tensor on disk, or rows of one."""

    @property
    def file(self) -> Path:
        """Where it lies, for messages."""

    @property
    def name(self) -> str:
        """Its key in the file, for messages."""

    @property
    def dtype(self) -> np.dtype:
        """Of the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As PyTorch has it."""

    @property
    def problem(self) -> str | None:
        """Why it cannot be a weight, as an error message; None: it can."""

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The values, or those of a slice of the first axes; without a copy where they lie in one piece.

        Of another dtype than `dtype` where that is only what they are worth, as of quantised weights.
        """


@dataclass(frozen=True)
class Over:
    """What a view of another tensor has of it; each kind of view says what differs, and reads."""

    tensor: TensorView

    @property
    def file(self) -> Path:
        """The tensor's."""
        return self.tensor.file

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.tensor.name

    @property
    def dtype(self) -> np.dtype:
        """The tensor's."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return self.tensor.shape

    @property
    def problem(self) -> str | None:
        """The tensor's."""
        return self.tensor.problem


@dataclass(frozen=True)
class Rows(Over):
    """Ranges of rows of a tensor, one after the other."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's, with as many rows as the ranges have."""
        return (sum(end - begin for begin, end in self.ranges), *self.tensor.shape[1:])

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A view for one range, else a copy; reads no other rows."""
        if len(self.ranges) == 1 and index:
            rows = range(*self.ranges[0])[index[0]]
            return self.tensor.read((slice(rows.start, rows.stop, rows.step), *index[1:]))
        parts = [self.tensor.read((slice(*rows), *index[1:])) for rows in self.ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)[index[:1]]


@dataclass(frozen=True)
class Move:
    """A module or parameter whose key matches the regex `source`, under diffusers' names.

    A target is a template of the regex's groups, numbered {0}, {1}, ...; ".weight" or ".bias" follows by itself. With
    `chunks` the rows are cut into that many equal ones, and each target takes those named for it, in that order.
    Without a target the tensor is left out.
    """

    source: str
    targets: Mapping[str, tuple[int, ...]]
    chunks: int = 1


def rename(source: str, target: str) -> Move:
    """The whole tensor under another name."""
    return Move(source, {target: (0,)})


def split(source: str, *targets: str) -> Move:
    """Equal parts of the rows, one for each target."""
    return Move(source, {target: (i,) for i, target in enumerate(targets)}, len(targets))


def drop(source: str) -> Move:
    """Left out: recomputed here, or used by no computation."""
    return Move(source, {})


@dataclass(frozen=True)
class Format:
    """One way in which the weights of a class are published, told by its keys alone."""

    name: str
    class_name: str
    """diffusers' class."""
    marks: tuple[str, ...]
    """Keys that together are in no other format."""
    moves: tuple[Move, ...] | None = None
    """To diffusers' keys; None: they are."""
    without: tuple[str, ...] = ()
    """Keys that it does not have."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Options that follow from the format."""

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether a checkpoint of these keys has this format."""
        keys = set(keys)
        return keys.issuperset(self.marks) and keys.isdisjoint(self.without)


def _ranges(rows: int, chunks: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Rows of the wanted chunks; neighbours become one range."""
    size = rows // chunks
    ranges: list[tuple[int, int]] = []
    for chunk in wanted:
        begin = chunk * size
        if ranges and ranges[-1][1] == begin:
            begin = ranges.pop()[0]
        ranges.append((begin, (chunk + 1) * size))
    return tuple(ranges)


def move(tensors: Mapping[str, TensorView], moves: Iterable[Move]) -> dict[str, TensorView]:
    """The tensors under diffusers' keys. Keys that no move matches stay as they are: the key table reports them."""
    compiled = [(re.compile(f"(?:{m.source})" + r"(?P<parameter>\.weight|\.bias)?"), m) for m in moves]
    moved: dict[str, TensorView] = {}
    for key, tensor in tensors.items():
        hits = [(match, m) for regex, m in compiled if (match := regex.fullmatch(key))]
        if len(hits) > 1:
            raise AssertionError(f"{key!r} matches {len(hits)} moves")
        if not hits:
            moved[key] = tensor
            continue
        match, found = hits[0]
        if found.chunks > 1 and (not tensor.shape or tensor.shape[0] % found.chunks):
            raise CheckpointError(
                f"{tensor.file}: tensor {key!r} {list(tensor.shape)} does not split into {found.chunks} equal parts"
            )
        for target, wanted in found.targets.items():
            name = target.format(*match.groups()) + (match["parameter"] or "")
            if name in moved:
                raise CheckpointError(f"{tensor.file}: several tensors are {name!r}, such as {key!r}")
            whole = found.chunks == 1
            moved[name] = tensor if whole else Rows(tensor, _ranges(tensor.shape[0], found.chunks, wanted))
    return moved
