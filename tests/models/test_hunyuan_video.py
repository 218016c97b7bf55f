"""The port against diffusers, with random weights; the 13B model by shapes alone."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

import models
from adaspa_jax import SparseConfig
from models import hunyuan_keys, loading
from models.hunyuan_video import HunyuanVideoConfig
from models.key_table import plan
from tests.relative_error import relative_error

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
CONFIGS = {
    "D 64": SMALL,
    "D 128, guidance off": SMALL
    | {"attention_head_dim": 128, "rope_axes_dim": (16, 56, 56), "guidance_embeds": False, "num_refiner_layers": 2},
    "temporal patch": SMALL | {"patch_size_t": 2, "out_channels": 3, "mlp_ratio": 2.0},
}


def reference(options: dict) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of(options: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros((2, 11), np.int64)
    mask[0, :11], mask[1, :4] = 1, 1
    inputs = {
        "hidden_states": rng.standard_normal((2, 4, 4 if "patch_size_t" in options else 3, 10, 14), np.float32),
        "timestep": np.array([937.0, 41.5], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 11, 24), np.float32),
        "encoder_attention_mask": mask,
        "pooled_projections": rng.standard_normal((2, 16), np.float32),
    }
    return inputs | ({"guidance": np.full(2, 6000.0, np.float32)} if options.get("guidance_embeds", True) else {})


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name: str, tmp_path) -> None:
    options, inputs = CONFIGS[name], inputs_of(CONFIGS[name])
    torch_model = reference(options)
    torch_model.save_pretrained(tmp_path)
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    with torch.no_grad():
        expected = torch_model(**tensors, return_dict=False)[0].numpy()
        low = {k: v.bfloat16() if v.is_floating_point() and k != "timestep" else v for k, v in tensors.items()}
        torch_low = torch_model.bfloat16()(**low, return_dict=False)[0].float().numpy()
    distance = lambda x: relative_error(np.asarray(x, np.float32), expected)

    arrays = {k: jnp.asarray(v) for k, v in inputs.items() if k != "encoder_attention_mask"}
    arrays["encoder_attention_mask"] = jnp.asarray(inputs["encoder_attention_mask"].astype(np.int32))
    model = models.from_pretrained(tmp_path, dtype="float32")
    for config in (None, SparseConfig(block_size=16, token_order="cube")):
        assert distance(model(**arrays, config=config)) <= 5e-6

    narrow = {
        k: v.astype(jnp.bfloat16) if jnp.issubdtype(v.dtype, jnp.floating) and k != "timestep" else v
        for k, v in arrays.items()
    }
    assert distance(models.from_pretrained(tmp_path, dtype="bfloat16")(**narrow)) <= 1.5 * distance(torch_low)


def test_every_key_and_shape_of_the_13b_model_is_mapped() -> None:
    with torch.device("meta"):
        tensors = HunyuanVideoTransformer3DModel().state_dict()
    shapes = loading.parameter_shapes(loading.abstract_model(HunyuanVideoConfig(), jnp.bfloat16))
    leaves = plan(tensors, hunyuan_keys.DIFFUSERS, shapes, hunyuan_keys.STACKS)
    used = [key for leaf in leaves for key in leaf.keys]
    assert len(used) == len(set(used)) == 1264
    assert set(used) == set(tensors)
    assert sum(leaf.size for leaf in leaves) == 12_821_012_544
