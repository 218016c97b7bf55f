"""Key table of HunyuanVideo checkpoints in diffusers' format."""

from models.key_table import Rule

STACKS = {"transformer_blocks", "single_transformer_blocks", "refiner_blocks"}
"""NNX modules whose parameters have a leading layer axis."""

_EMBED = r"((?:context_embedder\.)?time_text_embed\.(?:timestep|text|guidance)_embedder\.linear_[12])"
_REFINER = r"context_embedder\.token_refiner\.refiner_blocks\.(?P<layer>\d+)\."
_DUAL = r"transformer_blocks\.(?P<layer>\d+)\."
_SINGLE = r"single_transformer_blocks\.(?P<layer>\d+)\."

# Targets may use the groups of their regex, numbered as {0}, {1}, ...
DIFFUSERS = (
    Rule(r"x_embedder\.proj", "x_embedder.proj", "conv"),
    Rule(_EMBED, "{0}", "linear"),
    Rule(r"context_embedder\.proj_in", "context_embedder.proj_in", "linear"),
    Rule(_REFINER + r"(norm[12])", "context_embedder.refiner_blocks.{1}", "norm"),
    Rule(_REFINER + r"attn\.(to_[qkv])", "context_embedder.refiner_blocks.attn.{1}", "linear"),
    Rule(_REFINER + r"attn\.to_out\.0", "context_embedder.refiner_blocks.attn.to_out", "linear"),
    Rule(_REFINER + r"ff\.net\.0\.proj", "context_embedder.refiner_blocks.ff.proj_in", "linear"),
    Rule(_REFINER + r"ff\.net\.2", "context_embedder.refiner_blocks.ff.proj_out", "linear"),
    Rule(_REFINER + r"norm_out\.linear", "context_embedder.refiner_blocks.norm_out.linear", "linear"),
    Rule(_DUAL + r"(norm1|norm1_context)\.linear", "transformer_blocks.{1}.linear", "linear"),
    Rule(_DUAL + r"attn\.(norm_q|norm_k|norm_added_q|norm_added_k)", "transformer_blocks.attn.{1}", "norm"),
    Rule(_DUAL + r"attn\.(to_[qkv]|add_[qkv]_proj|to_add_out)", "transformer_blocks.attn.{1}", "linear"),
    Rule(_DUAL + r"attn\.to_out\.0", "transformer_blocks.attn.to_out", "linear"),
    Rule(_DUAL + r"(ff|ff_context)\.net\.0\.proj", "transformer_blocks.{1}.proj_in", "linear"),
    Rule(_DUAL + r"(ff|ff_context)\.net\.2", "transformer_blocks.{1}.proj_out", "linear"),
    Rule(_SINGLE + r"norm\.linear", "single_transformer_blocks.norm.linear", "linear"),
    Rule(_SINGLE + r"attn\.(norm_q|norm_k)", "single_transformer_blocks.attn.{1}", "norm"),
    Rule(_SINGLE + r"attn\.(to_[qkv])", "single_transformer_blocks.attn.{1}", "linear"),
    Rule(_SINGLE + r"(proj_mlp|proj_out)", "single_transformer_blocks.{1}", "linear"),
    Rule(r"norm_out\.linear", "norm_out.linear", "linear"),
    Rule(r"proj_out", "proj_out", "linear"),
)
