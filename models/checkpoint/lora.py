"""LoRA adapters merged into a checkpoint's tensors as views: the sum is made in float32, slice by slice, where read."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from models.checkpoint.formats import FORMATS
from models.checkpoint.key_moves import Move, Over, TensorView, move
from models.checkpoint.key_table import map_keys
from models.checkpoint.lora_file import Adapter, Lora, LoraFile, Part, read_lora, some
from models.checkpoint.registry import PORTS
from models.checkpoint.safetensors_folder import CheckpointError, is_finite

_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "module.",
    "unet.",
    "pipe.",
    "dit.",
    "lora_unet_",
    "lora_transformer_",
)
"""That writers put before the names of modules, some of them several."""
_WHOLE: dict[Part, str] = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}
"""Part -> parameter of the module that it is a difference of."""


def _finite(tensor: TensorView, index: tuple[slice, ...]) -> np.ndarray:
    """Its values in float32. Raises CheckpointError for NaN and infinite ones."""
    value = tensor.read(index).astype(np.float32)
    if not is_finite(value):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} has NaN or infinite values; the LoRA is broken")
    return value


@dataclass(frozen=True)
class Whole:
    """A difference of a parameter, of its shape."""

    key: str
    tensor: TensorView
    factor: float

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it cannot be added to a parameter of that shape; None: it can."""
        return None if self.tensor.shape == shape else f"{self.key!r} is {list(self.tensor.shape)}"

    def read(self, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """float32, of the slice."""
        return _finite(self.tensor, index) * np.float32(self.factor)


@dataclass(frozen=True)
class LowRank:
    """B @ A, [out, r] @ [r, in]; of convolutions the axes of the patch belong to `in`."""

    key: str
    """A's."""
    down: TensorView
    up: TensorView
    factor: float

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it cannot be added to a parameter of that shape; None: it can."""
        down, up = self.down.shape, self.up.shape
        ranked = len(down) > 1 and down[0] > 0
        fits = len(shape) > 1 and ranked and up[:2] == (shape[0], down[0]) and math.prod(up[2:]) == 1
        if fits and math.prod(down[1:]) == math.prod(shape[1:]):
            return None
        return f"{self.key!r} is {list(down)}, and its other half {list(up)}"

    def read(self, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """float32, of the slice, computed from the rows of B and columns of A that it needs."""
        rank, columns = self.down.shape[0], index[1:]
        up = _finite(self.up, index[:1]).reshape(-1, rank)
        down = _finite(self.down, (slice(None), *columns) if columns else ()).reshape(rank, -1)
        return (up @ down * np.float32(self.factor)).reshape(-1, *(shape[1:] if not columns else down.shape[1:]))


@dataclass(frozen=True)
class Merged(Over):
    """A tensor plus differences."""

    differences: tuple[Whole | LowRank, ...]

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The float32 sum, of the slice."""
        value = np.array(self.tensor.read(index), np.float32)
        for difference in self.differences:
            value += difference.read(self.shape, index)
        return value


class _Names:
    """Finds the parameters of a model by the names that LoRAs have for them."""

    def __init__(self, class_name: str, keys: Iterable[str]):
        self.class_name, self.keys = class_name, set(keys)
        self.flat = {key.rpartition(".")[0].replace(".", "_"): key.rpartition(".")[0] for key in self.keys}
        self.tables = []
        for known in FORMATS:
            if known.class_name == class_name and known.moves:
                flat = (Move(m.source.replace(r"\.", "_"), m.targets, m.chunks) for m in known.moves)
                plain = {m.source for m in known.moves}
                self.tables.append((*known.moves, *(m for m in flat if m.source not in plain)))

    def find(self, module: str, parameter: str, tensor: TensorView) -> dict[str, TensorView]:
        """diffusers' keys -> the rows of `tensor` that belong to each; {}: the model has no such parameter.

        Kohya writes names with "_" in place of dots. Raises CheckpointError for rows that cannot be cut.
        """
        for name in _without_prefixes(module):
            for plain in (name, self.flat.get(name, name)):
                if plain + parameter in self.keys:
                    return {plain + parameter: tensor}
            for table in self.tables:
                found = move({name + parameter: tensor}, table)
                if found and self.keys.issuperset(found):
                    return found
        return {}


def _without_prefixes(module: str) -> Iterator[str]:
    """The name as it is, then with one prefix after the other taken off."""
    while True:
        yield module
        prefix = next((p for p in _PREFIXES if module.startswith(p)), None)
        if prefix is None:
            return
        module = module.removeprefix(prefix)


Difference = Whole | LowRank
Piece = tuple[str, str, TensorView, Callable[[TensorView], Difference]]


def _pieces(file: LoraFile, adapter: Adapter, scale: float) -> Iterator[Piece]:
    """(key, parameter of the module, tensor, what the rows of it that belong to a parameter are to be).

    Raises CheckpointError for half of a pair.
    """
    parts = adapter.parts
    if ("down" in parts) != ("up" in parts):
        half = parts["down" if "down" in parts else "up"][0]
        raise CheckpointError(f"{file.path} has {half!r} without its other half; download it again")
    factor = scale
    if "down" in parts:
        key, down = parts["down"]
        *_, plain = _without_prefixes(adapter.module)
        factor *= file.factor(adapter, plain, max([1, *down.shape[:1]]))
        yield key, ".weight", parts["up"][1], lambda rows: LowRank(key, down, rows, factor)
    if "bias" in parts:
        name, bias = parts["bias"]
        yield name, ".bias", bias, lambda rows: Whole(name, rows, factor)
    for part, parameter in _WHOLE.items():
        if part in parts:
            key_of, tensor = parts[part]
            yield key_of, parameter, tensor, lambda rows, key_of=key_of: Whole(key_of, rows, scale)  # type: ignore[misc]
    if "alpha" in parts and "down" not in parts:
        yield parts["alpha"][0], ".alpha", parts["alpha"][1], lambda rows: Whole("", rows, 0)


def _class_of(modules: Iterable[str]) -> str | None:
    """The class of the ported models that has all these modules, in whatever format; None: none has."""
    modules = list(modules)
    for name, port in PORTS.items():
        moves = [m for known in FORMATS if known.class_name == name for m in known.moves or ()]
        regex = re.compile("|".join(f"(?:{s})" for m in moves for s in {m.source, m.source.replace(r"\.", "_")}))
        candidates = {module: list(_without_prefixes(module)) for module in modules}
        keys = {f"{plain}.weight" for several in candidates.values() for plain in several}
        foreign = set(map_keys(keys, port.rules)[1])
        fits = lambda plain: f"{plain}.weight" not in foreign or regex.fullmatch(plain) is not None  # noqa: B023
        if all(any(map(fits, several)) for several in candidates.values()):
            return name
    return None


def _fit(file: LoraFile, names: _Names, tensors: Mapping[str, TensorView], scale: float) -> dict[str, list[Difference]]:
    """All differences of a LoRA by diffusers' keys. Raises CheckpointError for unused keys, and for shapes."""
    found: dict[str, list[Difference]] = {}
    unused = []
    for adapter in file.adapters.values():
        for key, parameter, tensor, make in _pieces(file, adapter, scale):
            targets = names.find(adapter.module, parameter, tensor)
            unused += [] if targets else [key]
            for target, rows in targets.items():
                difference, shape = make(rows), tensors[target].shape
                if misfit := difference.misfit(shape):
                    raise CheckpointError(
                        f"{file.path} is a LoRA of a model of other sizes: {misfit}, for {target} {list(shape)}"
                    )
                found.setdefault(target, []).append(difference)
    if unused:
        other = _class_of(file.adapters)
        if not found and other not in (None, names.class_name):
            raise CheckpointError(f"{file.path} is a LoRA of a {other}, and the checkpoint is a {names.class_name}")
        raise CheckpointError(
            f"{file.path}: {len(unused)} keys are of no parameter of this {names.class_name}: {some(unused)}; "
            "check that LoRA and checkpoint belong together"
        )
    return found


def merged(
    tensors: Mapping[str, TensorView], class_name: str, loras: Iterable[Lora], follow_links: bool = False
) -> dict[str, TensorView]:
    """A checkpoint's tensors, under diffusers' keys, with LoRAs merged: W + scale * alpha / rank * B @ A each.

    Reads no weights. Raises CheckpointError for what is no LoRA or not one of this model, and for keys that would stay
    unused.
    """
    names = _Names(class_name, tensors)
    found: dict[str, list[Difference]] = {}
    for lora in loras:
        for key, differences in _fit(read_lora(lora.path, follow_links), names, tensors, lora.scale).items():
            found.setdefault(key, []).extend(differences)
    return {key: Merged(tensor, tuple(found[key])) if key in found else tensor for key, tensor in tensors.items()}
