"""Key table of Wan checkpoints in diffusers' format."""

from models.key_table import Rule

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
