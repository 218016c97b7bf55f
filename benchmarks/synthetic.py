"""Full-size checkpoints with random weights, as files that diffusers could have written: to load, convert and sample.

Nothing of the model's size is ever in memory. Needs the `torch` extra, for keys and shapes of diffusers' classes.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.checkpoint.registry import PORTS
from models.checkpoint.safetensors_folder import SINGLE
from models.pipeline.embeddings import write_tensors
from models.transformers.hunyuan_video import HunyuanVideoConfig
from models.transformers.wan import WanConfig

EMBEDDINGS = "prompts.safetensors"
"""The file of a pipeline's folder that is written last."""
HUNYUAN_VIDEO, WAN = "HunyuanVideoTransformer3DModel", "WanTransformer3DModel"


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


@dataclass(frozen=True)
class Synthetic:
    """A pipeline folder of a published model, with a VAE and prompt embeddings."""

    transformer: str
    """Class of diffusers."""
    vae: str
    vae_dtype: str
    scheduler: str
    scheduler_options: dict[str, Any]
    index: dict[str, Any]
    """What model_index.json says besides the folders."""
    embeddings: dict[str, tuple[int, ...]]
    """Name -> shape of one prompt's; masks are all ones."""
    experts: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """Of the transformer, where not the class's own."""
    vae_options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes it, its embeddings last."""
        import diffusers
        import torch

        for name in ("transformer", "transformer_2")[: self.experts]:
            # So small that activations stay finite through all layers.
            write_transformer(folder / name, self.transformer, self.options, scale=0.01)
        torch.manual_seed(0)
        vae = getattr(diffusers, self.vae)(**self.vae_options)
        vae.to(getattr(torch, self.vae_dtype)).save_pretrained(folder / "vae")
        getattr(diffusers, self.scheduler)(**self.scheduler_options).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(self.index), encoding="utf-8")
        rng = np.random.default_rng(1)
        draw = lambda name, shape: (
            np.ones(shape, np.int64) if "mask" in name else rng.standard_normal(shape, np.float32)
        )
        embeddings = {name: draw(name, (1, *shape)) for name, shape in self.embeddings.items()}
        write_tensors(folder / EMBEDDINGS, embeddings, {"prompts": json.dumps(["noise"])})


_HUNYUAN, _WAN = HunyuanVideoConfig(), WanConfig()
_HUNYUAN_TEXT, _WAN_TEXT = 256, 512
PIPELINES = {
    "HunyuanVideo 13B": Synthetic(
        transformer=HUNYUAN_VIDEO,
        vae="AutoencoderKLHunyuanVideo",
        vae_dtype="float16",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_options={"shift": 7.0},
        index={"_class_name": "HunyuanVideoPipeline"},
        embeddings={
            "prompt_embeds": (_HUNYUAN_TEXT, _HUNYUAN.text_embed_dim),
            "prompt_attention_mask": (_HUNYUAN_TEXT,),
            "pooled_prompt_embeds": (_HUNYUAN.pooled_projection_dim,),
        },
    ),
    "Wan 2.2 A14B": Synthetic(
        transformer=WAN,
        vae="AutoencoderKLWan",
        vae_dtype="float32",
        scheduler="UniPCMultistepScheduler",
        scheduler_options={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0},
        index={"_class_name": "WanPipeline", "boundary_ratio": 0.875},
        embeddings=dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (_WAN_TEXT, _WAN.text_dim)),
        experts=2,
    ),
}
"""At their published sizes."""
