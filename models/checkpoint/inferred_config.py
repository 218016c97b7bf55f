"""The config.json that a file of weights comes without, from the shapes of its tensors, under diffusers' names.

Shapes do not tell everything. What they leave open gets the published models' value, and a diffusers config.json
beside the file overrides it:

- Wan: heads have 128 channels; `eps`.
- HunyuanVideo: heads have the channels of their norms; RoPE has axes of 16, 56 and 56 and theta 256; image to video
  by "token_replace" has the keys of text to video, and is taken for it.
- CogVideoX: 1.5 is told from 1.0 by its patch embedding, a matrix instead of a convolution, and has patches of 2 x 2 x
  2; 1.0 has RoPE with more than 30 layers or learned positions (5B, not 2B), unless the format tells; the size of the
  videos of training and the scales of the positions.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from models.checkpoint.safetensors_folder import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
WAN_CLASS = "WanModel"
"""Class of the config.json that Wan publishes its own files with."""
_WAN_OPTIONS = {
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "eps": "eps",
    "patch_size": "patch_size",
    "cross_attn_norm": "cross_attn_norm",
}


def _count(shapes: Shapes, stack: str) -> int:
    """Number of blocks of a stack."""
    layers = [int(match[1]) for key in shapes if (match := re.match(rf"{stack}\.(\d+)\.", key))]
    return 1 + max(layers, default=-1)


def _hunyuan(shapes: Shapes) -> dict[str, Any]:
    width, channels, frames, rows, _ = shapes["x_embedder.proj.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    out = shapes["proj_out.weight"][0] // (frames * rows * rows)
    return {
        "in_channels": channels,
        "out_channels": out,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "num_refiner_layers": _count(shapes, r"context_embedder\.token_refiner\.refiner_blocks"),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "patch_size": rows,
        "patch_size_t": frames,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "image_condition_type": "latent_concat" if channels == 2 * out + 1 else None,
    }


def _cogvideox(shapes: Shapes) -> dict[str, Any]:
    width, *patch = shapes["patch_embed.proj.weight"]
    newer = len(patch) == 1
    size = 2 if newer else patch[1]
    volume = 8 if newer else size * size
    head = shapes["transformer_blocks.0.attn1.norm_q.weight"][0]
    layers = _count(shapes, "transformer_blocks")
    learned = "patch_embed.pos_embedding" in shapes
    return {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": patch[0] // volume if newer else patch[0],
        "out_channels": shapes["proj_out.weight"][0] // volume,
        "time_embed_dim": shapes["time_embedding.linear_1.weight"][0],
        "ofs_embed_dim": shapes.get("ofs_embedding.linear_1.weight", (None,))[0],
        "text_embed_dim": shapes["patch_embed.text_proj.weight"][1],
        "num_layers": layers,
        "patch_size": size,
        "patch_size_t": 2 if newer else None,
        "patch_bias": not newer,
        "use_rotary_positional_embeddings": newer or learned or layers > 30,
        "use_learned_positional_embeddings": learned,
        **({"sample_height": 300, "sample_width": 300, "sample_frames": 81} if newer else {}),
    }


def _wan(shapes: Shapes) -> dict[str, Any]:
    width, channels, *patch = shapes["patch_embedding.weight"]
    image, block = "condition_embedder.image_embedder.", "blocks.0."
    return {
        "patch_size": patch,
        "num_attention_heads": width // 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes[block + "ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, "blocks"),
        "image_dim": shapes.get(image + "norm1.weight", (None,))[0],
        "added_kv_proj_dim": shapes.get(block + "attn2.add_k_proj.weight", (None,))[0],
        "pos_embed_seq_len": shapes.get(image + "pos_embed", (None, None))[1],
    }


_INFER: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "WanTransformer3DModel": _wan,
}


def infer_config(class_name: str, shapes: Shapes) -> dict[str, Any]:
    """The config of a checkpoint whose tensors have these shapes under diffusers' keys. Raises CheckpointError."""
    try:
        return {"_class_name": class_name} | _INFER[class_name](shapes)
    except KeyError as error:
        raise CheckpointError(
            f"the weights are no whole {class_name}: {error} is missing; download them again"
        ) from error
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the weights have shapes that no {class_name} has ({error})") from error


def wan_config(original: Mapping[str, Any]) -> dict[str, Any]:
    """What Wan's own config.json tells, under diffusers' names."""
    config = {new: original[old] for old, new in _WAN_OPTIONS.items() if old in original}
    if isinstance(original.get("dim"), int) and isinstance(original.get("num_heads"), int) and original["num_heads"]:
        config["attention_head_dim"] = original["dim"] // original["num_heads"]
    return config
