"""Every port by its name in config.json: read, converted, read again."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from flax import nnx
from safetensors.torch import load_file, save_file

import models
from convert.writer import convert
from models.checkpoint.registry import PORTS
from models.checkpoint.safetensors_folder import SINGLE, CheckpointError
from tests.models.transformers import test_cogvideox, test_hunyuan_video, test_wan
from tests.models.transformers.ports import reference, rounded

SOURCES = {
    "Wan": (WanTransformer3DModel, test_wan.VARIANTS["2.1 first and last frame"]),
    "CogVideoX": (CogVideoXTransformer3DModel, test_cogvideox.VARIANTS["1.0 5B I2V"]),
    "HunyuanVideo": (HunyuanVideoTransformer3DModel, test_hunyuan_video.VARIANTS["I2V, tokens"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_bfloat16_checkpoint_converts_bit_for_bit(name: str, tmp_path: Path) -> None:
    cls, options = SOURCES[name]
    rounded(reference(cls, options)).save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    direct, converted = (models.from_pretrained(tmp_path / folder) for folder in ("src", "dst"))
    assert direct.dtype == converted.dtype == "bfloat16"
    assert type(direct) is type(converted) is PORTS[cls.__name__].model
    assert direct.config == converted.config
    states = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (direct, converted)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert len({str(leaf.dtype) for leaf in jax.tree.leaves(states[1])}) == (2 if name == "Wan" else 1)


def test_weights_that_nothing_uses_are_left_out(tmp_path: Path) -> None:
    reference(WanTransformer3DModel, test_wan.VARIANTS["2.1 I2V"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["blocks.0.attn2.norm_added_q.weight"] = tensors["blocks.0.attn2.norm_q.weight"].clone()
    save_file(tensors, tmp_path / SINGLE)
    models.from_pretrained(tmp_path)


def test_an_unknown_class_lists_those_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "LTXVideoTransformer3DModel"}))
    with pytest.raises(CheckpointError, match="'LTXVideoTransformer3DModel' is not supported; supported: Hunyuan") as e:
        models.from_pretrained(tmp_path)
    assert all(name in str(e.value) for name in PORTS)


def test_an_architecture_that_is_not_ported_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    config = {"_class_name": "WanTransformer3DModel", "cross_attn_norm": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cross_attn_norm=False is not ported"):
        models.from_pretrained(tmp_path)
