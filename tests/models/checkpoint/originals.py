"""diffusers state dicts turned into the files that the models' authors publish: the tables of `models`, inverted."""

import re
from collections.abc import Mapping
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def _renamed(key: str, table: Mapping[str, str]) -> str:
    """The key with the first matching pattern replaced; every key must match one."""
    for pattern, target in table.items():
        name, count = re.subn(f"^{pattern}(?=$|\\.)", target, key)
        if count:
            return name
    raise AssertionError(f"no original name of {key!r}")


def _joined(weights: Weights, groups: Mapping[str, tuple[str, ...]]) -> Weights:
    """Modules whose names end alike in one: each group of suffixes becomes the key, rows one after the other."""
    out = dict(weights)
    for name, parts in groups.items():
        for key in list(out):
            for parameter in (".weight", ".bias"):
                first = parts[0] + parameter
                if key.endswith(first) and key in out:
                    stem = key.removesuffix(first)
                    out[stem + name + parameter] = torch.cat([out.pop(stem + part + parameter) for part in parts])
    return out


HUNYUAN = {
    r"x_embedder\.proj": "img_in.proj",
    r"time_text_embed\.timestep_embedder\.linear_1": "time_in.mlp.0",
    r"time_text_embed\.timestep_embedder\.linear_2": "time_in.mlp.2",
    r"time_text_embed\.guidance_embedder\.linear_1": "guidance_in.mlp.0",
    r"time_text_embed\.guidance_embedder\.linear_2": "guidance_in.mlp.2",
    r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
    r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
    r"context_embedder\.proj_in": "txt_in.input_embedder",
    r"context_embedder\.time_text_embed\.timestep_embedder\.linear_1": "txt_in.t_embedder.mlp.0",
    r"context_embedder\.time_text_embed\.timestep_embedder\.linear_2": "txt_in.t_embedder.mlp.2",
    r"context_embedder\.time_text_embed\.text_embedder\.(linear_[12])": r"txt_in.c_embedder.\1",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
} | {
    source + old: target + new
    for source, target, names in (
        (
            r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.",
            r"txt_in.individual_token_refiner.blocks.\1.",
            {
                "norm1": "norm1",
                "norm2": "norm2",
                "QKV": "self_attn_qkv",
                r"attn\.to_out\.0": "self_attn_proj",
                r"ff\.net\.0\.proj": "mlp.fc1",
                r"ff\.net\.2": "mlp.fc2",
                r"norm_out\.linear": "adaLN_modulation.1",
            },
        ),
        (
            r"transformer_blocks\.(\d+)\.",
            r"double_blocks.\1.",
            {
                r"norm1\.linear": "img_mod.linear",
                r"norm1_context\.linear": "txt_mod.linear",
                "QKV": "img_attn_qkv",
                "ADDED": "txt_attn_qkv",
                r"attn\.norm_q": "img_attn_q_norm",
                r"attn\.norm_k": "img_attn_k_norm",
                r"attn\.norm_added_q": "txt_attn_q_norm",
                r"attn\.norm_added_k": "txt_attn_k_norm",
                r"attn\.to_out\.0": "img_attn_proj",
                r"attn\.to_add_out": "txt_attn_proj",
                r"ff\.net\.0\.proj": "img_mlp.fc1",
                r"ff\.net\.2": "img_mlp.fc2",
                r"ff_context\.net\.0\.proj": "txt_mlp.fc1",
                r"ff_context\.net\.2": "txt_mlp.fc2",
            },
        ),
        (
            r"single_transformer_blocks\.(\d+)\.",
            r"single_blocks.\1.",
            {
                r"norm\.linear": "modulation.linear",
                "LINEAR1": "linear1",
                r"proj_out": "linear2",
                r"attn\.norm_q": "q_norm",
                r"attn\.norm_k": "k_norm",
            },
        ),
    )
    for old, new in names.items()
}


def to_hunyuan(weights: Weights) -> Weights:
    """Tencent's keys."""
    qkv = ("attn.to_q", "attn.to_k", "attn.to_v")
    single = {k: v for k, v in weights.items() if k.startswith("single_transformer_blocks.")}
    others = {k: v for k, v in weights.items() if k not in single}
    joined = _joined(single, {"LINEAR1": (*qkv, "proj_mlp")})
    joined |= _joined(others, {"QKV": qkv, "ADDED": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")})
    for key in ("norm_out.linear.weight", "norm_out.linear.bias"):
        scale, shift = joined[key].chunk(2)
        joined[key] = torch.cat([shift, scale])
    return {_renamed(key, HUNYUAN): value for key, value in joined.items()}


WAN = {
    r"patch_embedding": "patch_embedding",
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
    r"condition_embedder\.image_embedder\.pos_embed": "img_emb.emb_pos",
    r"blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.self_attn.\2",
    r"blocks\.(\d+)\.attn2\.to_([qkv])": r"blocks.\1.cross_attn.\2",
    r"blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.self_attn.o",
    r"blocks\.(\d+)\.attn2\.to_out\.0": r"blocks.\1.cross_attn.o",
    r"blocks\.(\d+)\.attn1\.norm_([qk])": r"blocks.\1.self_attn.norm_\2",
    r"blocks\.(\d+)\.attn2\.norm_([qk])": r"blocks.\1.cross_attn.norm_\2",
    r"blocks\.(\d+)\.attn2\.add_([kv])_proj": r"blocks.\1.cross_attn.\2_img",
    r"blocks\.(\d+)\.attn2\.norm_added_k": r"blocks.\1.cross_attn.norm_k_img",
    r"blocks\.(\d+)\.norm2": r"blocks.\1.norm3",
    r"blocks\.(\d+)\.ffn\.net\.0\.proj": r"blocks.\1.ffn.0",
    r"blocks\.(\d+)\.ffn\.net\.2": r"blocks.\1.ffn.2",
    r"blocks\.(\d+)\.scale_shift_table": r"blocks.\1.modulation",
    r"scale_shift_table": "head.modulation",
    r"proj_out": "head.head",
}


def to_wan(weights: Weights) -> Weights:
    """Wan's own keys."""
    return {_renamed(key, WAN): value for key, value in weights.items()}


COGVIDEOX = {
    r"patch_embed\.(proj|text_proj)": r"mixins.patch_embed.\1",
    r"patch_embed\.pos_embedding": "mixins.pos_embed.pos_embedding",
    r"(time|ofs)_embedding\.linear_1": r"\1_embed.0",
    r"(time|ofs)_embedding\.linear_2": r"\1_embed.2",
    r"transformer_blocks\.(\d+)\.ADALN": r"mixins.adaln_layer.adaLN_modulations.\1.1",
    r"transformer_blocks\.(\d+)\.attn1\.norm_q": r"mixins.adaln_layer.query_layernorm_list.\1",
    r"transformer_blocks\.(\d+)\.attn1\.norm_k": r"mixins.adaln_layer.key_layernorm_list.\1",
    r"transformer_blocks\.(\d+)\.norm1\.norm": r"transformer.layers.\1.input_layernorm",
    r"transformer_blocks\.(\d+)\.norm2\.norm": r"transformer.layers.\1.post_attention_layernorm",
    r"transformer_blocks\.(\d+)\.QKV": r"transformer.layers.\1.attention.query_key_value",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": r"transformer.layers.\1.attention.dense",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"transformer.layers.\1.mlp.dense_h_to_4h",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"transformer.layers.\1.mlp.dense_4h_to_h",
    r"norm_final": "transformer.final_layernorm",
    r"norm_out\.norm": "mixins.final_layer.norm_final",
    r"norm_out\.linear": "mixins.final_layer.adaLN_modulation.1",
    r"proj_out": "mixins.final_layer.linear",
}


def to_cogvideox(weights: Weights, rotary: bool = True) -> Weights:
    """SAT's keys; its tables of RoPE are buffers of the checkpoint, where 2B has sinusoids."""
    joined = _joined(weights, {"QKV": ("attn1.to_q", "attn1.to_k", "attn1.to_v")})
    for key in [key for key in joined if ".norm1.linear." in key]:
        video, text = (joined.pop(k).chunk(6) for k in (key, key.replace("norm1", "norm2")))
        twelve = torch.cat([*video[:3], *text[:3], *video[3:], *text[3:]])
        joined[key.replace("norm1.linear", "ADALN")] = twelve
    out = {_renamed(key, COGVIDEOX): value for key, value in joined.items()}
    device = next(iter(weights.values())).device
    extra: Any = ("freqs_sin", "freqs_cos") if rotary else ("pos_embedding",)
    out |= {f"mixins.pos_embed.{name}": torch.ones(1, device=device) for name in extra}
    return {f"model.diffusion_model.{key}": value for key, value in out.items()}
