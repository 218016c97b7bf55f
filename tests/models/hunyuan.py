"""Tiny HunyuanVideo models in PyTorch, with inputs, for the tests of models and convert."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import HunyuanVideoTransformer3DModel

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 16,
    "rope_axes_dim": [16, 24, 24],
    "mlp_ratio": 2.0,
}
WIDE = TINY | {
    "attention_head_dim": 128,
    "rope_axes_dim": [16, 56, 56],
    "num_refiner_layers": 2,
    "guidance_embeds": False,
    "patch_size_t": 2,
}
SMALLEST = TINY | {
    "num_attention_heads": 1,
    "num_layers": 1,
    "num_single_layers": 2,
    "in_channels": 2,
    "mlp_ratio": 1.0,
}


def torch_model(config: dict[str, Any], seed: int = 0) -> HunyuanVideoTransformer3DModel:
    """A model none of whose parameters is neutral: norms and biases are perturbed."""
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def torch_inputs(
    config: dict[str, Any], size: tuple[int, int, int], text: int, lengths: list[int]
) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward pass, one row a text length."""
    batch = len(lengths)
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    inputs = {
        "hidden_states": normal(batch, config["in_channels"], *size),
        "timestep": torch.tensor([937.5, 412.0, 3.0][:batch]),
        "encoder_hidden_states": normal(batch, text, config["text_embed_dim"]),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor(lengths)[:, None]).long(),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
    }
    if config.get("guidance_embeds", True):
        inputs["guidance"] = torch.tensor([6000.0, 4500.0, 1000.0][:batch])
    return inputs


def run_torch(model: HunyuanVideoTransformer3DModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """The sample in float32."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0].float().numpy()


def to_jax(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same inputs for the port; bfloat16 stays bfloat16."""
    return {
        name: jnp.asarray(x.float().numpy(), jnp.bfloat16) if x.dtype == torch.bfloat16 else jnp.asarray(x.numpy())
        for name, x in inputs.items()
    }


def save_pipeline(root: Path, model: HunyuanVideoTransformer3DModel, **options: Any) -> Path:
    """Writes a diffusers pipeline folder with the transformer and a scheduler."""
    model.save_pretrained(root / "transformer", **options)
    (root / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline"}))
    return root


def relative_error(x: Any, reference: Any) -> float:
    """L2 norm of the difference over that of the reference."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
