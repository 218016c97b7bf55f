"""Key tables of CogVideoX checkpoints: diffusers' format, and that of SwissArmyTransformer (SAT) in front of it."""

from models.checkpoint.key_moves import Format, Move, drop, rename, split
from models.checkpoint.key_table import Rule

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

_CLASS = "CogVideoXTransformer3DModel"
_LAYER_IN, _LAYER_OUT = r"transformer\.layers\.(\d+)\.", "transformer_blocks.{0}."
_MODULATION = r"mixins\.adaln_layer\."
_FINAL = r"mixins\.final_layer\."
_ROTARY = "mixins.pos_embed.freqs_cos"

ORIGINAL = (
    rename(r"mixins\.patch_embed\.((?:text_)?proj)", "patch_embed.{0}"),
    drop(r"mixins\.pos_embed\.freqs_(?:sin|cos)"),
    drop(r"transformer\.(?:word|position|block_position)_embeddings"),
    rename(r"(time|ofs)_embed\.0", "{0}_embedding.linear_1"),
    rename(r"(time|ofs)_embed\.2", "{0}_embedding.linear_2"),
    Move(  # 12 chunks: shift, scale and gate of video before attention and MLP, then of text
        _MODULATION + r"adaLN_modulations\.(\d+)\.1",
        {_LAYER_OUT + "norm1.linear": (0, 1, 2, 6, 7, 8), _LAYER_OUT + "norm2.linear": (3, 4, 5, 9, 10, 11)},
        chunks=12,
    ),
    rename(_MODULATION + r"query_layernorm_list\.(\d+)", _LAYER_OUT + "attn1.norm_q"),
    rename(_MODULATION + r"key_layernorm_list\.(\d+)", _LAYER_OUT + "attn1.norm_k"),
    rename(_LAYER_IN + r"input_layernorm", _LAYER_OUT + "norm1.norm"),
    rename(_LAYER_IN + r"post_attention_layernorm", _LAYER_OUT + "norm2.norm"),
    split(_LAYER_IN + r"attention\.query_key_value", *(_LAYER_OUT + f"attn1.to_{n}" for n in "qkv")),
    rename(_LAYER_IN + r"attention\.dense", _LAYER_OUT + "attn1.to_out.0"),
    rename(_LAYER_IN + r"mlp\.dense_h_to_4h", _LAYER_OUT + "ff.net.0.proj"),
    rename(_LAYER_IN + r"mlp\.dense_4h_to_h", _LAYER_OUT + "ff.net.2"),
    rename(r"transformer\.final_layernorm", "norm_final"),
    rename(_FINAL + r"norm_final", "norm_out.norm"),
    rename(_FINAL + r"adaLN_modulation\.1", "norm_out.linear"),
    rename(_FINAL + r"linear", "proj_out"),
)
_POSITIONS = r"mixins\.pos_embed\.pos_embedding"
_MARKS = ("transformer.layers.0.attention.query_key_value.weight", "mixins.patch_embed.text_proj.weight")

FORMATS = (
    Format("diffusers", _CLASS, ("transformer_blocks.0.attn1.to_q.weight", "patch_embed.text_proj.weight")),
    Format(
        "SAT",
        _CLASS,
        (*_MARKS, _ROTARY),
        (*ORIGINAL, rename(_POSITIONS, "patch_embed.pos_embedding")),
        config={"use_rotary_positional_embeddings": True},
    ),
    Format(  # 2B: its positions are sinusoids, computed here
        "SAT",
        _CLASS,
        _MARKS,
        (*ORIGINAL, drop(_POSITIONS)),
        without=(_ROTARY,),
        config={"use_rotary_positional_embeddings": False},
    ),
)
