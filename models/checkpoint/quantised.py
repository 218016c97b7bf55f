"""Weights in fp8, plain and scaled, as views that become float32 slice by slice where they are read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from models.checkpoint.key_moves import Over, TensorView
from models.checkpoint.safetensors_folder import FP8, CheckpointError, is_finite

_SCALE = re.compile(r"(?P<module>(?:.*\.)?)(?:scale_weight|weight_scale)")
"""As ComfyUI names what a weight is to be multiplied by, its earlier name first."""
_UNUSED = re.compile(r"(?:.*\.)?(?:scaled_fp8|scale_input|input_scale|comfy_quant)")
"""Markers of such files, and scales of activations, which are not quantised here."""
_VALUES = {dtype: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for dtype in FP8}
"""Of each byte: many times faster than a cast."""


@dataclass(frozen=True)
class Scaled(Over):
    """A weight, usually in fp8, times a scale for all of it or one a row; worth bfloat16, and no problem."""

    scale: TensorView | None = None
    """Of one value, or [rows] or [rows, 1]; None: 1."""

    @property
    def dtype(self) -> np.dtype:
        """What a model of such weights has."""
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def problem(self) -> None:
        """None: what is dequantised can be a weight, whatever its bytes are."""
        return None

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The float32 product, of the slice alone."""
        value = self.tensor.read(index)
        table = _VALUES.get(value.dtype)
        value = value.astype(np.float32) if table is None else table[value.view(np.uint8)]
        if self.scale is None:
            return value
        scale = self.scale.read().astype(np.float32).reshape(-1)
        if not is_finite(scale):
            raise CheckpointError(
                f"{self.file}: {self.scale.name!r}, the scale of {self.name!r}, is NaN or infinite; it is broken"
            )
        if scale.size > 1:
            scale = scale[index[:1]].reshape(-1, *(1,) * (value.ndim - 1))
        return value * scale


def _scaled(key: str, tensor: TensorView, scale: TensorView) -> Scaled:
    """Raises CheckpointError for a scale that is none, or of blocks."""
    if scale.problem:
        raise CheckpointError(scale.problem)
    rows = tensor.shape[:1]
    if int(np.prod(scale.shape)) != 1 and scale.shape not in (rows, (*rows, 1)):
        raise CheckpointError(
            f"{tensor.file}: tensor {key!r} {list(tensor.shape)} has a scale of shape {list(scale.shape)}; "
            "read are one for all and one a row: give another quantisation of the model"
        )
    return Scaled(tensor, scale)


def dequantised(tensors: Mapping[str, TensorView]) -> dict[str, TensorView]:
    """The tensors with those in fp8, or with a scale, as float32 to read; the keys of scales and markers are gone.

    A scale without its weight stays, for `models.checkpoint.formats.refuse_keys`. Raises CheckpointError for scales of
    another shape than one for all or one a row.
    """
    kept, scales = {}, {}
    for key, tensor in tensors.items():
        if _UNUSED.fullmatch(key):
            continue
        match = _SCALE.fullmatch(key)
        if match and match["module"] + "weight" in tensors:
            scales[match["module"] + "weight"] = tensor
        else:
            kept[key] = tensor
    for key, tensor in kept.items():
        if tensor.dtype not in FP8 and (tensor.problem or key not in scales):
            continue
        kept[key] = _scaled(key, tensor, scales[key]) if key in scales else Scaled(tensor)
    return kept


def with_map(path: Path, tensors: Mapping[str, TensorView], scales: Mapping[str, TensorView]) -> dict[str, TensorView]:
    """Tencent's fp8 weights with the scales of the file beside them, whose keys are those of modules.

    Raises CheckpointError for a scale without its weight.
    """
    found: dict[str, TensorView] = dict(tensors)
    for name, scale in scales.items():
        keys = [key for key in tensors if key == f"{name}.weight" or key.endswith(f".{name}.weight")]
        if len(keys) != 1:
            raise CheckpointError(f"{path} has a scale of {name!r}, and its weights have {len(keys)} of that name")
        found[keys[0].removesuffix("weight") + "scale_weight"] = scale
    return found
