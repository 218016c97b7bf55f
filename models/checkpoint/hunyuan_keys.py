"""Key tables of HunyuanVideo checkpoints: diffusers' format, and Tencent's in front of it."""

from models.checkpoint.key_moves import Format, Move, rename, split
from models.checkpoint.key_table import Rule

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

_CLASS = "HunyuanVideoTransformer3DModel"
_TXT = r"txt_in\."
_REFINER_IN = _TXT + r"individual_token_refiner\.blocks\.(\d+)\."
_REFINER_OUT = "context_embedder.token_refiner.refiner_blocks.{0}."
_DUAL_IN, _DUAL_OUT = r"double_blocks\.(\d+)\.", "transformer_blocks.{0}."
_SINGLE_IN, _SINGLE_OUT = r"single_blocks\.(\d+)\.", "single_transformer_blocks.{0}."
_QKV = ("to_q", "to_k", "to_v")

ORIGINAL = (
    rename(r"img_in\.proj", "x_embedder.proj"),
    rename(r"time_in\.mlp\.0", "time_text_embed.timestep_embedder.linear_1"),
    rename(r"time_in\.mlp\.2", "time_text_embed.timestep_embedder.linear_2"),
    rename(r"guidance_in\.mlp\.0", "time_text_embed.guidance_embedder.linear_1"),
    rename(r"guidance_in\.mlp\.2", "time_text_embed.guidance_embedder.linear_2"),
    rename(r"vector_in\.in_layer", "time_text_embed.text_embedder.linear_1"),
    rename(r"vector_in\.out_layer", "time_text_embed.text_embedder.linear_2"),
    rename(_TXT + r"t_embedder\.mlp\.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    rename(_TXT + r"t_embedder\.mlp\.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    rename(_TXT + r"c_embedder\.(linear_[12])", "context_embedder.time_text_embed.text_embedder.{0}"),
    rename(_TXT + r"input_embedder", "context_embedder.proj_in"),
    rename(_REFINER_IN + r"(norm[12])", _REFINER_OUT + "{1}"),
    split(_REFINER_IN + r"self_attn_qkv", *(_REFINER_OUT + f"attn.{n}" for n in _QKV)),
    rename(_REFINER_IN + r"self_attn_proj", _REFINER_OUT + "attn.to_out.0"),
    rename(_REFINER_IN + r"mlp\.fc1", _REFINER_OUT + "ff.net.0.proj"),
    rename(_REFINER_IN + r"mlp\.fc2", _REFINER_OUT + "ff.net.2"),
    rename(_REFINER_IN + r"adaLN_modulation\.1", _REFINER_OUT + "norm_out.linear"),
    rename(_DUAL_IN + r"img_mod\.linear", _DUAL_OUT + "norm1.linear"),
    rename(_DUAL_IN + r"txt_mod\.linear", _DUAL_OUT + "norm1_context.linear"),
    split(_DUAL_IN + r"img_attn_qkv", *(_DUAL_OUT + f"attn.{n}" for n in _QKV)),
    split(_DUAL_IN + r"txt_attn_qkv", *(_DUAL_OUT + f"attn.add_{n}_proj" for n in "qkv")),
    rename(_DUAL_IN + r"img_attn_([qk])_norm", _DUAL_OUT + "attn.norm_{1}"),
    rename(_DUAL_IN + r"txt_attn_([qk])_norm", _DUAL_OUT + "attn.norm_added_{1}"),
    rename(_DUAL_IN + r"img_attn_proj", _DUAL_OUT + "attn.to_out.0"),
    rename(_DUAL_IN + r"txt_attn_proj", _DUAL_OUT + "attn.to_add_out"),
    rename(_DUAL_IN + r"img_mlp\.fc1", _DUAL_OUT + "ff.net.0.proj"),
    rename(_DUAL_IN + r"img_mlp\.fc2", _DUAL_OUT + "ff.net.2"),
    rename(_DUAL_IN + r"txt_mlp\.fc1", _DUAL_OUT + "ff_context.net.0.proj"),
    rename(_DUAL_IN + r"txt_mlp\.fc2", _DUAL_OUT + "ff_context.net.2"),
    rename(_SINGLE_IN + r"modulation\.linear", _SINGLE_OUT + "norm.linear"),
    Move(  # q, k, v and the four times wider MLP in one
        _SINGLE_IN + r"linear1",
        {_SINGLE_OUT + f"attn.{n}": (i,) for i, n in enumerate(_QKV)} | {_SINGLE_OUT + "proj_mlp": (3, 4, 5, 6)},
        chunks=7,
    ),
    rename(_SINGLE_IN + r"linear2", _SINGLE_OUT + "proj_out"),
    rename(_SINGLE_IN + r"([qk])_norm", _SINGLE_OUT + "attn.norm_{1}"),
    Move(r"final_layer\.adaLN_modulation\.1", {"norm_out.linear": (1, 0)}, chunks=2),  # shift, scale -> scale, shift
    rename(r"final_layer\.linear", "proj_out"),
)

FORMATS = (
    Format("diffusers", _CLASS, ("transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.proj_in.weight")),
    Format("Tencent", _CLASS, ("double_blocks.0.img_attn_qkv.weight", "txt_in.input_embedder.weight"), ORIGINAL),
)
