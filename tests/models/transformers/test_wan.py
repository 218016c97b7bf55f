"""Wan against diffusers, with random weights; the published sizes by shapes alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import WanTransformer3DModel
from flax import nnx

from models.transformers.wan import WanConfig, WanTransformer
from tests.matrix import only
from tests.models.transformers.ports import (
    check_adaspa,
    check_checkpoint,
    check_full_size_call,
    check_parity,
    jax_inputs,
)

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
IMAGE = {"image_dim": 20, "added_kv_proj_dim": 128, "in_channels": 9}
VARIANTS = {
    "2.1 T2V": SMALL,
    "2.1 T2V, D 128, temporal patch": SMALL | {"attention_head_dim": 128, "patch_size": (2, 2, 2)},
    "2.1 I2V": SMALL | IMAGE,
    "2.1 first and last frame": SMALL | IMAGE | {"pos_embed_seq_len": 14},
    "2.2 I2V": SMALL | {"in_channels": 9},
    "2.2 TI2V": SMALL | {"in_channels": 6, "out_channels": 6},
}
"""As in the published checkpoints, which differ in sizes alone."""


def inputs_of(name: str, size: tuple[int, int, int]) -> dict[str, Any]:
    options, rng = VARIANTS[name], np.random.default_rng(0)
    text = 512 if "image_dim" in options else 11  # diffusers cuts the image off in front of 512
    inputs = {
        "hidden_states": rng.standard_normal((2, options["in_channels"], *size), np.float32),
        "timestep": np.array([937, 41]),
        "encoder_hidden_states": rng.standard_normal((2, text, 24), np.float32),
    }
    if "TI2V" in name:  # the first frame is given
        tokens, first = size[0] * size[1] * size[2] // 4, size[1] * size[2] // 4
        inputs["timestep"] = np.where(np.arange(tokens) < first, 0, [[937.0], [41.5]]).astype(np.float32)
    if "image_dim" in options:
        images = 4 if "pos_embed_seq_len" in options else 2
        inputs["encoder_hidden_states_image"] = rng.standard_normal((images, 7, 20), np.float32)
    return inputs


@pytest.mark.parametrize("name", only({"2.1 T2V", "2.1 I2V", "2.2 TI2V"}, VARIANTS))
def test_parity_with_diffusers(name: str, tmp_path) -> None:
    frames = 2 if "temporal" in name else 1
    sizes = [inputs_of(name, (3 * frames, 10, 14)), inputs_of(name, (5 * frames, 6, 18))]
    check_parity(WanTransformer3DModel, VARIANTS[name], sizes, tmp_path)


PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "2.1 T2V 1.3B": ({"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}, 825, 1_418_996_800),
    "2.1 T2V 14B, 2.2 T2V A14B": ({}, 1095, 14_288_491_584),
    "2.1 I2V 14B": ({"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}, 1303, 16_394_878_784),
    "2.1 FLF2V 14B": (
        {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36, "pos_embed_seq_len": 514},
        1304,
        16_394_878_784 + 514 * 1280,
    ),
    "2.2 I2V A14B": ({"in_channels": 36}, 1095, 14_288_491_584 + 5120 * 20 * 4),
    "2.2 TI2V 5B": (
        {"ffn_dim": 14336, "in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30},
        825,
        4_999_787_712,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_and_shape_of_the_checkpoint_is_mapped(name: str) -> None:
    options, keys, parameters = PUBLISHED[name]
    check_checkpoint(WanTransformer3DModel, options, keys, parameters)


@pytest.mark.parametrize("name", ["2.1 I2V 14B", "2.2 TI2V 5B"])
def test_a_720p_step_by_shapes(name: str) -> None:
    options = PUBLISHED[name][0]
    size = (31, 44, 80) if "TI2V" in name else (21, 90, 160)
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_states": (2, options["in_channels"], *size),
        "timestep": (2, 31 * 22 * 40) if "TI2V" in name else (2,),
        "encoder_hidden_states": (2, 512, 4096),
    }
    if "image_dim" in options:
        shapes["encoder_hidden_states_image"] = (2, 257, 1280)
    check_full_size_call(WanTransformer3DModel, options, shapes, size)


def create(name: str = "2.1 T2V", dtype: Any = jnp.float32) -> WanTransformer:
    return WanTransformer(WanConfig.from_dict(VARIANTS[name]), dtype=dtype, rngs=nnx.Rngs(0))


def test_adaspa_runs_inside() -> None:
    check_adaspa(create, inputs_of("2.1 T2V", (5, 16, 16)), (5, 16, 16), 11)


def test_what_stays_float32_in_a_bfloat16_model() -> None:
    model = create("2.1 I2V", jnp.bfloat16)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    wide = {path for path, leaf in flat if leaf.dtype == jnp.float32}
    kept = {"time_embedder", "scale_shift_table", "norm1", "norm2"}
    assert wide == {path for path, _ in flat if kept & set(path)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qk_norm": None}, NotImplementedError, "qk_norm=None is not ported"),
        ({"cross_attn_norm": False}, NotImplementedError, "cross_attn_norm=False"),
        ({"num_layers": 0}, ValueError, "num_layers=0 must be a whole number"),
        ({"image_dim": 1280}, ValueError, "added_kv_proj_dim=None must be 5120"),
        ({"patch_size": (2, 2)}, ValueError, r"patch_size=\(2, 2\)"),
        ({"teacache": True}, ValueError, "does not know: teacache"),
    ],
)
def test_configs_that_cannot_work(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WanConfig.from_dict(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": np.zeros((2, 5, 3, 10, 14))}, r"hidden_states must be \[B, 4, F, H, W\]; got \[2, 5,"),
        ({"hidden_states": np.zeros((2, 4, 3, 10, 13))}, r"no multiple of the patch=\(1, 2, 2\)"),
        ({"encoder_hidden_states": np.zeros((2, 11, 23))}, r"must be \[2, T, 24\]"),
        ({"timestep": np.zeros((2, 7))}, r"timestep must be \[2, 105\]; got \[2, 7\]"),
        ({"encoder_hidden_states_image": np.zeros((2, 7, 20))}, "is given, but this model has image_dim=None"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()(**jax_inputs(inputs_of("2.1 T2V", (3, 10, 14)) | change))


def test_an_image_model_needs_the_image() -> None:
    inputs = jax_inputs(inputs_of("2.1 I2V", (3, 10, 14)))
    del inputs["encoder_hidden_states_image"]
    with pytest.raises(ValueError, match="is missing, but this model has image_dim=20"):
        create("2.1 I2V")(**inputs)
