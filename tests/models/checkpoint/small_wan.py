"""A Wan transformer of a few kilobytes, whose config follows from the shapes of its weights."""

from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

import models

OPTIONS = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
}


def small_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**OPTIONS)


def weights() -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in small_wan().state_dict().items()}


def values(path: Path, **options: bool) -> dict[str, np.ndarray]:
    """NNX path -> value of a loaded checkpoint."""
    state = nnx.to_flat_state(nnx.state(models.from_pretrained(path, **options)))
    return {".".join(map(str, name)): np.asarray(leaf) for name, leaf in state}


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
