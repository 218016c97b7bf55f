"""LoRA adapters on disk: which module each tensor belongs to, in which part, and the alpha of each; nothing is merged.

Read are the ways in which diffusers, PEFT, Kohya's and musubi's scripts, DiffSynth and LightX2V write them; the names
of the modules are left as they are, `models.checkpoint.lora` finds them in a model.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.checkpoint.key_moves import TensorView
from models.checkpoint.quantised import dequantised
from models.checkpoint.safetensors_folder import CheckpointError, read_json, read_metadata
from models.checkpoint.weight_files import read_file, weights_file

Part = Literal["down", "up", "bias", "alpha", "diff", "diff_b", "diff_m"]
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # PEFT may name it
_PARTS: dict[str, Part] = {
    rf"\.(?:lora_A|lora_down|lora\.down){_ADAPTER}(?:\.weight)?": "down",
    rf"\.(?:lora_B|lora_up|lora\.up){_ADAPTER}(?:\.weight)?": "up",
    rf"\.(?:lora_B|lora_up|lora\.up){_ADAPTER}\.bias": "bias",
    r"\.alpha": "alpha",
    r"\.diff": "diff",
    r"\.diff_b": "diff_b",
    r"\.diff_m": "diff_m",
}
"""End of a key -> what the tensor is: A, B, the bias of B, or a whole difference of weight, bias or modulation."""
_REGEX = {re.compile(rf"(?P<module>.+?){end}"): part for end, part in _PARTS.items()}
_OTHERS = {
    r".*(?:hada_w|hada_t).*": "LoHa",
    r".*lokr_(?:w|t).*": "LoKr",
    r".*(?:dora_scale|lora_magnitude_vector).*": "DoRA",
    r".*lora_mid.*": "LoCon with a core",
    r".*\.(?:a1|a2|b1|b2)\.weight|.*oft_.*|.*boft_.*": "OFT or GLoRA",
}
"""Keys of relatives of LoRA that are not read -> their names."""


_LARGEST = 1e6
"""Scale: beyond it float32 may not hold the sum."""


@dataclass(frozen=True)
class Lora:
    """An adapter to merge into a transformer."""

    path: Path
    """A file, or a folder of PEFT or diffusers with one."""
    scale: float = 1.0
    """That all of it is multiplied by; negative takes it away."""
    expert: Literal["high_noise", "low_noise"] | None = None
    """Of Wan 2.2 A14B, whose; None: of all."""

    def __post_init__(self) -> None:
        if not 0 < abs(self.scale) <= _LARGEST:
            raise CheckpointError(
                f"{self.path}: the scale of a LoRA must be a number other than 0, at most {_LARGEST:g} in size, not "
                f"{self.scale}"
            )


LoraLike = Lora | tuple[str | Path, float] | str | Path
"""What people give: a path, of scale 1, or a path and a scale."""


def as_loras(given: Iterable[LoraLike]) -> tuple[Lora, ...]:
    """Raises CheckpointError for scales that are none."""
    found = []
    for one in given:
        if isinstance(one, Lora):
            found.append(one)
        elif isinstance(one, tuple):
            try:
                scale = float(one[1])
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{one[0]}: {one[1]!r} is no scale of a LoRA; give a number") from error
            found.append(Lora(Path(one[0]), scale))
        else:
            found.append(Lora(Path(one)))
    return tuple(found)


@dataclass(frozen=True)
class Adapter:
    """What a file has of one module."""

    module: str
    """Its name in the file, with all prefixes."""
    parts: dict[Part, tuple[str, TensorView]] = field(default_factory=dict)
    """Part -> (key, tensor)."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on disk, nothing read yet but its header."""

    path: Path
    adapters: dict[str, Adapter]
    """By module."""
    config: Mapping[str, Any]
    """PEFT's, from the file's metadata or adapter_config.json; {}: there is none."""

    def factor(self, adapter: Adapter, name: str, rank: int) -> float:
        """What B @ A is multiplied by; `name` is the module's without prefixes.

        alpha / rank, or with PEFT's rsLoRA alpha / sqrt(rank). Without an alpha 1. Raises CheckpointError for what is
        no number.
        """
        if "alpha" in adapter.parts:
            key, tensor = adapter.parts["alpha"]
            values = tensor.read()
            alpha: Any = values.item() if values.size == 1 else values.shape
            where = f"{tensor.file}: tensor {key!r}"
        else:
            patterns = self.config.get("alpha_pattern") or {}
            fits = (alpha for end, alpha in patterns.items() if _names(end, name, self.path))
            alpha, where = next(fits, self.config.get("lora_alpha")), f"{self.path}: lora_alpha"
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{where} is {alpha!r}, no number; the LoRA is damaged")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _names(pattern: str, name: str, path: Path) -> bool:
    """Whether a key of PEFT's patterns, a regex for the end of a name, means a module."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise CheckpointError(f"{path}: alpha_pattern {pattern!r} is no regular expression ({error})") from error


def _peft_config(file: Path) -> Mapping[str, Any]:
    """PEFT's config of a LoRA: in the metadata, as diffusers writes it, or beside the file. {} if it has none."""
    beside = file.parent / "adapter_config.json"
    if file.name.startswith("adapter_model") and beside.is_file():
        return read_json(beside)
    with file.open("rb") as opened:
        if opened.read(9)[8:] != b"{":
            return {}  # no safetensors
    text = read_metadata(file).get("lora_adapter_metadata")
    if not isinstance(text, str):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its lora_adapter_metadata is not valid JSON ({error})") from error
    parts = found.items() if isinstance(found, dict) else ()
    return {key.removeprefix("transformer."): value for key, value in parts}


def _locate(path: Path, follow_links: bool) -> Path:
    """The file of a LoRA."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the file of a LoRA")
    if not path.is_dir():
        return path
    file = weights_file(path, follow_links)
    if file is None or file.suffix == ".json":
        raise CheckpointError(f"{path} holds no single file of a LoRA; give the file")
    return file


def read_lora(path: Path, follow_links: bool = False) -> LoraFile:
    """Sorts the keys of a LoRA. Raises CheckpointError for keys that are none of a LoRA, and for its relatives."""
    file, unknown = _locate(path, follow_links), []
    adapters: dict[str, Adapter] = {}
    for key, tensor in dequantised(read_file(file, follow_links)).items():
        if other := next((name for regex, name in _OTHERS.items() if re.fullmatch(regex, key)), None):
            raise CheckpointError(f"{path} is a {other} (it has {key!r}), which is not read; give a LoRA")
        hits = ((match, part) for regex, part in _REGEX.items() if (match := regex.fullmatch(key)))
        match, part = next(hits, (None, None))
        if match is None or part is None:
            unknown.append(key)
            continue
        if tensor.problem and part != "alpha":
            raise CheckpointError(tensor.problem)
        adapter = adapters.setdefault(match["module"], Adapter(match["module"]))
        if part in adapter.parts:
            raise CheckpointError(f"{path} has {adapter.parts[part][0]!r} and {key!r}, which are the same; keep one")
        adapter.parts[part] = key, tensor
    if not adapters:
        raise CheckpointError(f"{path} is no LoRA, by its keys ({some(unknown) or 'none'}); give the file of a LoRA")
    if unknown:
        raise CheckpointError(f"{path}: {len(unknown)} keys are none of a LoRA's: {some(unknown)}")
    config = _peft_config(file)
    if config.get("use_dora"):
        raise CheckpointError(f"{path} is a DoRA, which is not read; give a LoRA")
    return LoraFile(path, adapters, config)


def some(keys: Iterable[str]) -> str:
    """The first three of them."""
    keys = sorted(keys)
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
