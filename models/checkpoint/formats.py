"""Names the format of weights by their keys, whatever wraps them, and brings them under diffusers' keys."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from models.checkpoint import cogvideox_keys, hunyuan_keys, wan_keys
from models.checkpoint.gguf_file import GGUFTensor
from models.checkpoint.key_moves import Format, TensorView, move
from models.checkpoint.safetensors_folder import CheckpointError

FORMATS = (*hunyuan_keys.FORMATS, *cogvideox_keys.FORMATS, *wan_keys.FORMATS)
T = TypeVar("T")
_OTHER_PARTS = re.compile(
    r"(vae|first_stage_model|text_encoders?(_\d)?|conditioner|cond_stage_model|image_encoder|clip(_vision)?"
    r"|optimizers?|optimizer_states|(lr_)?schedulers?|rng_states?|loss)\..+"
)
"""Keys of what lies beside a model in one file."""
_VAE_KEY = re.compile(r"(?:.*\.)?decoder\.(?:conv|mid|up|head).*")
"""A decoder of images, which no text encoder has."""
_NOT_PORTED = {
    r"(?:.*\.)?to_gate_compress\..*": "of VSA (FastVideo's Video Sparse Attention), whose gates have no port here; "
    "give the model without VSA, whose attention AdaSpa can make sparse",
    r"(?:.*\.)?vace_(?:blocks|patch_embedding)\..*": "of VACE, which has no port here; give Wan T2V, I2V or TI2V",
}
"""Keys of relatives of the supported transformers -> what they are."""
_LORA_KEY = re.compile(r"(?:.*[._])?(?:lora_(?:A|B|up|down)\b|hada_w|lokr_w).*|.*\.alpha")
_SCALE_KEY = re.compile(r"(?:.*\.)?(?:scale_weight|weight_scale(?:_inv|_2)?)(?:\..*)?")
_QUANTISED_KEY = re.compile(r"(?:.*\.)?(?:qweight|qzeros|absmax|quant_map|quant_state\..*)")


def prefixes(keys: Iterable[str], marks: Sequence[str]) -> list[str]:
    """What stands before all of `marks` among the keys: "", or a wrapper's prefix, which ends with a dot."""
    have = set(keys)
    found = {key.removesuffix(marks[0]) for key in have if key.endswith(marks[0])}
    return sorted(p for p in found if (not p or p.endswith(".")) and all(p + mark in have for mark in marks))


def under(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The tensors of one model of a file, without its prefix; what else the file holds is left out."""
    if not prefix:
        return {key: tensor for key, tensor in tensors.items() if not _OTHER_PARTS.fullmatch(key)}
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def several_models(path: Path, found: Sequence[str]) -> CheckpointError:
    """The error for a file with several readings, by their prefixes."""
    names = ", ".join(repr(prefix.rstrip(".")) if prefix else "no prefix" for prefix in found)
    return CheckpointError(
        f"{path} holds several models, under the keys {names}; save the one you mean in a file of its own "
        "(for sampling usually the average, called ema)"
    )


def refuse_keys(path: Path, keys: Iterable[str]) -> None:
    """CheckpointError for what is no model by itself, a quantised one, or a relative that is not ported."""
    for key in keys:
        if _LORA_KEY.fullmatch(key):
            raise CheckpointError(
                f"{path} is a LoRA (it has {key!r}), no transformer; give its base model, and this with --lora, or "
                "loras=[(path, scale)] in Python"
            )
        if _SCALE_KEY.fullmatch(key) or _QUANTISED_KEY.fullmatch(key):
            raise CheckpointError(
                f"{path} is quantised in a way that is not read (it has {key!r}); read are fp8 with one scale a weight "
                "or a row, and GGUF: give one of those or the unquantised weights"
            )
        for pattern, kind in _NOT_PORTED.items():
            if re.fullmatch(pattern, key):
                raise CheckpointError(f"{path} is a checkpoint {kind} (it has {key!r})")


def _find(path: Path, tensors: Mapping[str, TensorView]) -> tuple[str, Format] | None:
    """(prefix, format) of the one transformer among the tensors; None: no known format. Raises CheckpointError."""
    found: dict[str, Format] = {}
    for known in FORMATS:
        for prefix in prefixes(tensors, known.marks):
            if prefix not in found and known.fits(under(tensors, prefix)):
                found[prefix] = known
    if len(found) > 1:
        raise several_models(path, sorted(found))
    return next(iter(found.items()), None)


def beside(path: Path, tensors: Mapping[str, TensorView]) -> dict[str, int]:
    """What a file holds besides its one transformer: name of the part -> number of tensors."""
    found = _find(path, tensors)
    if found is None:
        return {}
    kept = {found[0] + key for key in under(tensors, found[0])}
    return dict(Counter(key.partition(".")[0] for key in tensors if key not in kept))


def to_diffusers(path: Path, tensors: Mapping[str, TensorView]) -> tuple[Format | None, dict[str, TensorView]]:
    """(format, the tensors of the one transformer under diffusers' keys); (None, as they are): no known format.

    A prefix of all its keys is taken off, and what else the file holds is left out. `path` is for messages. Raises
    CheckpointError for several transformers, and for what `refuse_keys` knows.
    """
    found = _find(path, tensors)
    if found is None:
        refuse_keys(path, tensors)
        return None, dict(tensors)
    prefix, known = found
    keys = under(tensors, prefix)
    refuse_keys(path, keys)
    return known, keys if known.moves is None else move(keys, known.moves)


def unknown_format(path: Path, tensors: Mapping[str, TensorView]) -> CheckpointError:
    """The error for weights of no known format."""
    for tensor in tensors.values():
        if tensor.problem and len(tensor.shape) > 1:  # no mere counter
            return CheckpointError(tensor.problem)
    supported = ", ".join(dict.fromkeys(f"{known.class_name} ({known.name})" for known in FORMATS))
    for tensor in tensors.values():
        if isinstance(tensor, GGUFTensor) and tensor.architecture:
            return CheckpointError(
                f"{path} is a GGUF of {tensor.architecture!r}, no transformer that is supported; supported: {supported}"
            )
    if any(_VAE_KEY.fullmatch(key) for key in tensors):
        return CheckpointError(f"{path} is a VAE, no transformer; give the transformer of one of: {supported}")
    shown = ", ".join(map(repr, sorted(tensors)[:3])) or "none"
    return CheckpointError(
        f"{path} is no transformer that is supported, by its keys ({shown}, ...); supported: {supported}"
    )
