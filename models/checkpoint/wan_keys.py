"""Key tables of Wan checkpoints: diffusers' format, and Wan's own in front of it."""

from models.checkpoint.key_moves import Format, rename
from models.checkpoint.key_table import Rule

STACKS = {"blocks"}
"""NNX modules whose parameters have a leading layer axis."""

_EMBED = r"condition_embedder\."
_BLOCK = r"blocks\.(?P<layer>\d+)\."

# Targets may use the groups of their regex, numbered as {0}, {1}, ...
DIFFUSERS = (
    Rule(r"patch_embedding", "patch_embedding", "conv"),
    Rule(_EMBED + r"((?:time|text)_embedder\.linear_[12]|time_proj)", "condition_embedder.{0}", "linear"),
    Rule(_EMBED + r"image_embedder\.(norm[12])", "condition_embedder.image_embedder.{0}", "norm"),
    Rule(_EMBED + r"image_embedder\.ff\.net\.0\.proj", "condition_embedder.image_embedder.ff.proj_in", "linear"),
    Rule(_EMBED + r"image_embedder\.ff\.net\.2", "condition_embedder.image_embedder.ff.proj_out", "linear"),
    Rule(_EMBED + r"image_embedder\.pos_embed", "condition_embedder.image_embedder.pos_embed", "array"),
    Rule(_BLOCK + r"(attn[12])\.(to_[qkv]|add_[kv]_proj)", "blocks.{1}.{2}", "linear"),
    Rule(_BLOCK + r"(attn[12])\.to_out\.0", "blocks.{1}.to_out", "linear"),
    Rule(_BLOCK + r"(attn[12])\.(norm_q|norm_k|norm_added_k)", "blocks.{1}.{2}", "norm"),
    # In some published checkpoints; no computation uses it, here or in diffusers.
    Rule(_BLOCK + r"attn2\.norm_added_q", "", "unused"),
    Rule(_BLOCK + r"norm2", "blocks.norm2", "norm"),
    Rule(_BLOCK + r"ffn\.net\.0\.proj", "blocks.ffn.proj_in", "linear"),
    Rule(_BLOCK + r"ffn\.net\.2", "blocks.ffn.proj_out", "linear"),
    Rule(_BLOCK + r"scale_shift_table", "blocks.scale_shift_table", "array"),
    Rule(r"scale_shift_table", "scale_shift_table", "array"),
    Rule(r"proj_out", "proj_out", "linear"),
)

_CLASS = "WanTransformer3DModel"
_IMAGE_IN, _IMAGE_OUT = r"img_emb\.", "condition_embedder.image_embedder."
_BLOCK_IN, _BLOCK_OUT = r"blocks\.(\d+)\.", "blocks.{0}."

ORIGINAL = (
    rename(r"patch_embedding", "patch_embedding"),
    rename(r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    rename(r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    rename(r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    rename(r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    rename(r"time_projection\.1", "condition_embedder.time_proj"),
    rename(_IMAGE_IN + r"proj\.0", _IMAGE_OUT + "norm1"),
    rename(_IMAGE_IN + r"proj\.1", _IMAGE_OUT + "ff.net.0.proj"),
    rename(_IMAGE_IN + r"proj\.3", _IMAGE_OUT + "ff.net.2"),
    rename(_IMAGE_IN + r"proj\.4", _IMAGE_OUT + "norm2"),
    rename(_IMAGE_IN + r"emb_pos", _IMAGE_OUT + "pos_embed"),
    rename(_BLOCK_IN + r"self_attn\.([qkv])", _BLOCK_OUT + "attn1.to_{1}"),
    rename(_BLOCK_IN + r"self_attn\.o", _BLOCK_OUT + "attn1.to_out.0"),
    rename(_BLOCK_IN + r"self_attn\.norm_([qk])", _BLOCK_OUT + "attn1.norm_{1}"),
    rename(_BLOCK_IN + r"cross_attn\.([qkv])", _BLOCK_OUT + "attn2.to_{1}"),
    rename(_BLOCK_IN + r"cross_attn\.o", _BLOCK_OUT + "attn2.to_out.0"),
    rename(_BLOCK_IN + r"cross_attn\.([kv])_img", _BLOCK_OUT + "attn2.add_{1}_proj"),
    rename(_BLOCK_IN + r"cross_attn\.norm_([qk])", _BLOCK_OUT + "attn2.norm_{1}"),
    rename(_BLOCK_IN + r"cross_attn\.norm_k_img", _BLOCK_OUT + "attn2.norm_added_k"),
    rename(_BLOCK_IN + r"norm3", _BLOCK_OUT + "norm2"),  # before cross-attention; the other two have no weights
    rename(_BLOCK_IN + r"ffn\.0", _BLOCK_OUT + "ffn.net.0.proj"),
    rename(_BLOCK_IN + r"ffn\.2", _BLOCK_OUT + "ffn.net.2"),
    rename(_BLOCK_IN + r"modulation", _BLOCK_OUT + "scale_shift_table"),
    rename(r"head\.modulation", "scale_shift_table"),
    rename(r"head\.head", "proj_out"),
)

FORMATS = (
    Format("diffusers", _CLASS, ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight")),
    Format("Wan", _CLASS, ("blocks.0.self_attn.q.weight", "time_projection.1.weight"), ORIGINAL),
)
