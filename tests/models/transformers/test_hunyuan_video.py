"""HunyuanVideo against diffusers, with random weights; the published sizes by shapes alone."""

from typing import Any

import numpy as np
import pytest
from diffusers import HunyuanVideoTransformer3DModel
from flax import nnx

from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from tests.matrix import only
from tests.models.transformers.ports import (
    check_adaspa,
    check_checkpoint,
    check_full_size_call,
    check_parity,
    jax_inputs,
)

SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (16, 24, 24),
}
VARIANTS = {
    "T2V": SMALL,
    "T2V, D 128, guidance off": SMALL
    | {"attention_head_dim": 128, "rope_axes_dim": (16, 56, 56), "guidance_embeds": False, "num_refiner_layers": 2},
    "T2V, temporal patch": SMALL | {"patch_size_t": 2, "out_channels": 3, "mlp_ratio": 2.0},
    "I2V, latents": SMALL | {"in_channels": 9, "image_condition_type": "latent_concat", "guidance_embeds": False},
    "I2V, tokens": SMALL | {"image_condition_type": "token_replace"},
}


def inputs_of(name: str, size: tuple[int, int, int], text: int = 11) -> dict[str, np.ndarray]:
    options, rng = VARIANTS[name], np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((2, options["in_channels"], *size), np.float32),
        "timestep": np.array([937.0, 41.5], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, text, 24), np.float32),
        "encoder_attention_mask": (np.arange(text) < [[text], [4]]).astype(np.int64),
        "pooled_projections": rng.standard_normal((2, 16), np.float32),
    }
    # 6016 is a bfloat16: the rounding of 6000 alone would cost 7e-2.
    return inputs | ({"guidance": np.full(2, 6016.0, np.float32)} if options.get("guidance_embeds", True) else {})


@pytest.mark.parametrize("name", only({"T2V", "I2V, tokens"}, VARIANTS))
def test_parity_with_diffusers(name: str, tmp_path) -> None:
    frames = 2 if "temporal" in name else 1
    sizes = [inputs_of(name, (2 * frames, 10, 14)), inputs_of(name, (3 * frames, 6, 18))]
    check_parity(HunyuanVideoTransformer3DModel, VARIANTS[name], sizes, tmp_path)


PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "T2V 13B": ({}, 1264, 12_821_012_544),
    "I2V 13B, latents": (
        {"in_channels": 33, "image_condition_type": "latent_concat", "guidance_embeds": False},
        1260,
        12_821_012_544 + 17 * 4 * 3072 - 3072 * (256 + 3072 + 2),
    ),
    "I2V 13B, tokens": ({"image_condition_type": "token_replace"}, 1264, 12_821_012_544),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_and_shape_of_the_checkpoint_is_mapped(name: str) -> None:
    options, keys, parameters = PUBLISHED[name]
    check_checkpoint(HunyuanVideoTransformer3DModel, options, keys, parameters)


def test_a_720p_step_by_shapes() -> None:
    shapes = {
        "hidden_states": (1, 16, 33, 90, 160),
        "timestep": (1,),
        "encoder_hidden_states": (1, 256, 4096),
        "encoder_attention_mask": (1, 256),
        "pooled_projections": (1, 768),
        "guidance": (1,),
    }
    check_full_size_call(HunyuanVideoTransformer3DModel, PUBLISHED["I2V 13B, tokens"][0], shapes, (33, 90, 160))


def create(name: str = "T2V") -> HunyuanVideoTransformer:
    return HunyuanVideoTransformer(HunyuanVideoConfig.from_dict(VARIANTS[name]), rngs=nnx.Rngs(0))


def test_adaspa_runs_inside() -> None:
    check_adaspa(create, inputs_of("T2V", (2, 24, 24), text=17), (2, 24, 24), 17)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qk_norm": "layer_norm"}, NotImplementedError, "qk_norm='layer_norm' is not ported"),
        ({"image_condition_type": "clip"}, ValueError, "image_condition_type='clip' must be None, 'latent_concat'"),
        ({"rope_axes_dim": (16, 56, 58)}, ValueError, "must add up to attention_head_dim=128"),
        ({"num_layers": 1.5}, ValueError, "num_layers=1.5 must be a whole number"),
        ({"norm": 1}, ValueError, "does not know: norm"),
    ],
)
def test_configs_that_cannot_work(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HunyuanVideoConfig.from_dict(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": np.zeros((2, 3, 2, 10, 14))}, r"must be \[B, 4, F, H, W\]; got \[2, 3, 2, 10, 14\]"),
        ({"hidden_states": np.zeros((2, 4, 2, 9, 14))}, r"no multiple of the patch=\(1, 2, 2\); nearest: \(2, 8, 14\)"),
        ({"encoder_attention_mask": np.zeros((2, 10))}, r"encoder_attention_mask must be \[2, 11\]; got \[2, 10\]"),
        ({"guidance": None}, r"guidance must be \[2\]; got None"),
        ({"state": ()}, "state must hold 2 SparseStates, from init_state; got 0"),
        ({"step_kind": 3}, "step_kind=3 needs a state; make one with init_state"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()(**jax_inputs(inputs_of("T2V", (2, 10, 14))) | change)
