"""Full-size checkpoints with random weights, as files that diffusers could have written: to load, convert and sample.

Nothing of the model's size is ever in memory. Needs the `torch` extra, for keys and shapes of diffusers' classes.
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.checkpoint.registry import PORTS
from models.checkpoint.safetensors_folder import SINGLE
from models.pipeline.embeddings import write_tensors
from models.transformers.hunyuan_video import HunyuanVideoConfig

HUNYUAN_VIDEO = "HunyuanVideoTransformer3DModel"
_TEXT = 256


def write_transformer(folder: Path, name: str, options: dict[str, Any], scale: float = 1.0) -> int:
    """Writes `transformer/`-like files of a diffusers class, bfloat16, tensor by tensor; returns their bytes."""
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    shapes, size = {key: tuple(value.shape) for key, value in model.state_dict().items()}, 0
    header: dict[str, Any] = {}
    for key, shape in shapes.items():
        end = size + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, end]}
        size = end
    encoded = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(max(map(math.prod, shapes.values())), np.float32)
    noise = (scale * noise).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    with (folder / SINGLE).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            file.write(noise[: math.prod(shape)].tobytes())
    config = {"_class_name": name} | vars(PORTS[name].config.from_dict(options))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return size


def write_hunyuan_video(folder: Path) -> tuple[int, Path]:
    """A pipeline of HunyuanVideo 13B with its VAE and prompt embeddings: (bytes of the transformer, embeddings)."""
    import diffusers
    import torch

    # So small that activations stay finite through 60 layers.
    size = write_transformer(folder / "transformer", HUNYUAN_VIDEO, {}, scale=0.01)
    torch.manual_seed(0)
    vae: Any = diffusers.AutoencoderKLHunyuanVideo()
    vae.to(torch.float16).save_pretrained(folder / "vae")
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline"}), encoding="utf-8")
    rng, config = np.random.default_rng(1), HunyuanVideoConfig()
    embeddings = {
        "prompt_embeds": rng.standard_normal((1, _TEXT, config.text_embed_dim), np.float32),
        "prompt_attention_mask": np.ones((1, _TEXT), np.int64),
        "pooled_prompt_embeds": rng.standard_normal((1, config.pooled_projection_dim), np.float32),
    }
    file = folder / "prompts.safetensors"
    write_tensors(file, embeddings, {"prompts": json.dumps(["noise"])})
    return size, file
