"""CogVideoX against diffusers, with random weights; the published sizes by shapes alone."""

import ast
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from flax import nnx

from models.transformers.cogvideox import (
    ROPE_THETA,
    CogVideoXConfig,
    CogVideoXTransformer,
    rope_positions,
    sinusoidal_positions,
)
from models.transformers.rope import rope_tables
from tests.matrix import only
from tests.models.transformers.ports import (
    call,
    check_adaspa,
    check_checkpoint,
    check_full_size_call,
    check_parity,
    jax_inputs,
)
from tests.relative_error import relative_error

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "num_layers": 2,
    "max_text_seq_length": 11,
    "sample_height": 12,
    "sample_width": 18,
    "sample_frames": 9,
}
ROTARY = {"use_rotary_positional_embeddings": True}
V15 = SMALL | ROTARY | {"patch_size_t": 2, "patch_bias": False, "sample_height": 30, "sample_width": 30}
VARIANTS = {
    "1.5 T2V": V15,
    "1.5 I2V": V15 | {"in_channels": 8, "ofs_embed_dim": 32},
    "1.0 2B T2V": SMALL,
    "1.0 5B T2V": SMALL | ROTARY,
    "1.0 5B I2V": SMALL | ROTARY | {"in_channels": 8, "use_learned_positional_embeddings": True},
}
"""As in the published checkpoints, which differ in sizes alone."""


def crop_region(grid: tuple[int, int], columns: int, rows: int) -> Any:
    """`get_resize_crop_region_for_grid` of diffusers' pipeline, whose module needs transformers to be imported."""
    source = Path(diffusers.__file__).parent / "pipelines" / "cogvideo" / "pipeline_cogvideox.py"
    name = "get_resize_crop_region_for_grid"
    found = [f for f in ast.parse(source.read_text()).body if isinstance(f, ast.FunctionDef) and f.name == name]
    scope: dict[str, Any] = {}
    exec(ast.unparse(found[0]), scope)
    return scope[name](grid, columns, rows)


def diffusers_rope(options: dict[str, Any], size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What diffusers' pipeline passes for latents of `size`: its `_prepare_rotary_positional_embeddings`."""
    (frames, height, width), base = size, (options["sample_height"] // 2, options["sample_width"] // 2)
    grid = (height // 2, width // 2)
    if "patch_size_t" in options:
        kind: dict[str, Any] = {"crops_coords": None, "grid_type": "slice", "max_size": base}
        tables = get_3d_rotary_pos_embed(64, grid_size=grid, temporal_size=frames // 2, **kind)
    else:
        crop = crop_region(grid, base[1], base[0])
        tables = get_3d_rotary_pos_embed(64, crops_coords=crop, grid_size=grid, temporal_size=frames)
    return tables[0].numpy(), tables[1].numpy()


def inputs_of(name: str, size: tuple[int, int, int], text: int = 11) -> dict[str, Any]:
    (frames, height, width), options, rng = size, VARIANTS[name], np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((2, frames, options["in_channels"], height, width), np.float32),
        "encoder_hidden_states": rng.standard_normal((2, text, 24), np.float32),
        "timestep": np.array([999, 419]),
    }
    if "ofs_embed_dim" in options:
        inputs["ofs"] = np.full(1, 2.0, np.float32)
    if options.get("use_rotary_positional_embeddings"):
        inputs["image_rotary_emb"] = diffusers_rope(options, size)
    return inputs


@pytest.mark.parametrize("name", only({"1.0 2B T2V", "1.5 I2V"}, VARIANTS))
def test_parity_with_diffusers(name: str, tmp_path) -> None:
    shapes = [(6, 10, 14), (4, 14, 6)] if name.startswith("1.5") else [(3, 10, 14), (5, 14, 6)]
    if name == "1.0 5B I2V":  # learned positions fit one size
        shapes = [(3, 12, 18), (3, 12, 18)]
    sizes = [inputs_of(name, shape) for shape in shapes]
    check_parity(CogVideoXTransformer3DModel, VARIANTS[name], sizes, tmp_path)


@pytest.mark.parametrize("name", ["1.5 T2V", "1.0 5B T2V"])
@pytest.mark.parametrize("size", [(2, 12, 18), (4, 30, 10), (2, 6, 30), (2, 8, 14)])
def test_rope_is_that_of_diffusers_pipeline(name: str, size: tuple[int, int, int]) -> None:
    config = CogVideoXConfig.from_dict(VARIANTS[name])
    frames, height, width = size
    grid = (frames // config.patch[0], height // 2, width // 2)
    ours = rope_tables(rope_positions(config, grid), config.rope_axes_dim, ROPE_THETA)
    for table, theirs in zip(ours, diffusers_rope(VARIANTS[name], size), strict=True):
        np.testing.assert_allclose(np.repeat(table, 2, axis=1), theirs, atol=3e-6)


def test_sinusoidal_positions_are_diffusers() -> None:
    config = CogVideoXConfig()
    theirs = get_3d_sincos_pos_embed(config.width, (7, 5), 3, 1.875, 1.0).flatten(0, 1)
    np.testing.assert_allclose(sinusoidal_positions(config, (3, 5, 7)), theirs, atol=1e-6)


def test_explicit_rope_replaces_the_model_s_own() -> None:
    inputs = inputs_of("1.5 T2V", (2, 10, 14))
    model, arrays, given = create(), jax_inputs(inputs), inputs["image_rotary_emb"]
    own = call(model, arrays)
    assert relative_error(call(model, arrays | {"image_rotary_emb": given}), own) <= 1e-6
    rolled = tuple(np.roll(table, 3, axis=0) for table in given)
    assert relative_error(call(model, arrays | {"image_rotary_emb": rolled}), own) > 1e-3


FIVE_B = {"num_attention_heads": 48, "num_layers": 42, **ROTARY}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "1.0 2B T2V": ({}, 736, 1_693_783_872),
    "1.0 5B T2V": (FIVE_B, 1024, 5_570_283_072),
    "1.0 5B I2V": (
        FIVE_B | {"in_channels": 32, "use_learned_positional_embeddings": True},
        1025,
        5_570_283_072 + 3072 * 16 * 4 + 3072 * (226 + 13 * 30 * 45),
    ),
    "1.5 5B T2V": (
        FIVE_B
        | {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
        | {"sample_frames": 81},
        1024,
        5_570_676_352,
    ),
    "1.5 5B I2V": (
        FIVE_B
        | {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
        | {"sample_frames": 81, "in_channels": 32, "ofs_embed_dim": 512},
        1028,
        5_571_594_880,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_and_shape_of_the_checkpoint_is_mapped(name: str) -> None:
    options, keys, parameters = PUBLISHED[name]
    check_checkpoint(CogVideoXTransformer3DModel, options, keys, parameters)


def test_a_768p_step_by_shapes() -> None:
    options, size = PUBLISHED["1.5 5B I2V"][0], (22, 96, 170)
    shapes = {
        "hidden_states": (2, 22, 32, 96, 170),
        "timestep": (2,),
        "encoder_hidden_states": (2, 226, 4096),
        "ofs": (1,),
    }
    check_full_size_call(CogVideoXTransformer3DModel, options, shapes, size)


def create(name: str = "1.5 T2V") -> CogVideoXTransformer:
    return CogVideoXTransformer(CogVideoXConfig.from_dict(VARIANTS[name]), rngs=nnx.Rngs(0))


def test_adaspa_runs_inside() -> None:
    check_adaspa(create, inputs_of("1.5 T2V", (4, 24, 24), text=17), (4, 24, 24), 17)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flip_sin_to_cos": False}, NotImplementedError, "flip_sin_to_cos=False is not ported"),
        ({"patch_bias": False}, NotImplementedError, "patch_bias=False"),
        ({"patch_size_t": 0}, ValueError, "patch_size_t=0 must be a whole number"),
        ({"attention_head_dim": 24}, ValueError, "attention_head_dim=24 must be a multiple of 16"),
        ({"ofs_embed_dim": 256}, ValueError, "ofs_embed_dim=256 must be time_embed_dim=512"),
        ({"use_learned_positional_embeddings": True}, ValueError, "needs use_rotary_positional_embeddings=True"),
        ({"window": 3}, ValueError, "does not know: window"),
    ],
)
def test_configs_that_cannot_work(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CogVideoXConfig.from_dict(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": np.zeros((2, 4, 6, 10, 14))}, r"must be \[B, F, 4, H, W\]; got \[2, 4, 6, 10, 14\]"),
        ({"hidden_states": np.zeros((2, 3, 4, 10, 14))}, r"no multiple of the patch=\(2, 2, 2\)"),
        ({"hidden_states": np.zeros((2, 2, 4, 10, 32))}, "5 x 16 patches are more than the 15 x 15 of training"),
        ({"encoder_hidden_states": np.zeros((1, 11, 24))}, r"must be \[2, T, 24\]"),
        ({"timestep": np.zeros(1)}, r"timestep must be \[2\]; got \[1\]"),
        ({"ofs": np.zeros(1)}, "ofs is given, but this model has no ofs_embed_dim"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()(**jax_inputs(inputs_of("1.5 T2V", (2, 10, 14)) | change))


def test_an_ofs_model_needs_ofs() -> None:
    inputs = jax_inputs(inputs_of("1.5 I2V", (2, 10, 14)))
    del inputs["ofs"]
    with pytest.raises(ValueError, match=r"ofs must be \[1\] or \[2\]; got None"):
        create("1.5 I2V")(**inputs)


def test_learned_positions_fix_the_size() -> None:
    with pytest.raises(ValueError, match=r"learned positions fit 11 text tokens and \(3, 6, 9\) patches only"):
        create("1.0 5B I2V")(**jax_inputs(inputs_of("1.0 5B I2V", (3, 10, 14))))
