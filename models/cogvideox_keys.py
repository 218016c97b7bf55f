"""Key table of CogVideoX checkpoints in diffusers' format."""

from models.key_table import Rule

STACKS = {"transformer_blocks"}
"""NNX modules whose parameters have a leading layer axis."""

_BLOCK = r"transformer_blocks\.(?P<layer>\d+)\."

# Targets may use the groups of their regex, numbered as {0}, {1}, ...
DIFFUSERS = (
    Rule(r"patch_embed\.proj", "patch_embed.proj", "conv"),
    Rule(r"patch_embed\.text_proj", "patch_embed.text_proj", "linear"),
    Rule(r"patch_embed\.pos_embedding", "patch_embed.pos_embedding", "array"),
    Rule(r"(time|ofs)_embedding\.(linear_[12])", "{0}_embedding.{1}", "linear"),
    Rule(_BLOCK + r"(norm[12])\.linear", "transformer_blocks.{1}.linear", "linear"),
    Rule(_BLOCK + r"(norm[12])\.norm", "transformer_blocks.{1}.norm", "norm"),
    Rule(_BLOCK + r"attn1\.(norm_[qk])", "transformer_blocks.attn1.{1}", "norm"),
    Rule(_BLOCK + r"attn1\.(to_[qkv])", "transformer_blocks.attn1.{1}", "linear"),
    Rule(_BLOCK + r"attn1\.to_out\.0", "transformer_blocks.attn1.to_out", "linear"),
    Rule(_BLOCK + r"ff\.net\.0\.proj", "transformer_blocks.ff.proj_in", "linear"),
    Rule(_BLOCK + r"ff\.net\.2", "transformer_blocks.ff.proj_out", "linear"),
    Rule(r"norm_final", "norm_final", "norm"),
    Rule(r"norm_out\.linear", "norm_out.linear", "linear"),
    Rule(r"norm_out\.norm", "norm_out.norm", "norm"),
    Rule(r"proj_out", "proj_out", "linear"),
)
