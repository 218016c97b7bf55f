"""What is ported: diffusers class name -> config, model and key table."""

from dataclasses import dataclass

from models.checkpoint import cogvideox_keys, hunyuan_keys, wan_keys
from models.checkpoint.key_table import Rule
from models.transformers.base import TransformerConfig, VideoTransformer
from models.transformers.cogvideox import CogVideoXConfig, CogVideoXTransformer
from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from models.transformers.wan import WanConfig, WanTransformer


@dataclass(frozen=True)
class Port:
    """One architecture."""

    config: type[TransformerConfig]
    model: type[VideoTransformer]
    rules: tuple[Rule, ...]
    """Key table of diffusers' format."""
    stacks: set[str]
    """NNX modules whose parameters have a leading layer axis."""


PORTS = {
    "HunyuanVideoTransformer3DModel": Port(
        HunyuanVideoConfig, HunyuanVideoTransformer, hunyuan_keys.DIFFUSERS, hunyuan_keys.STACKS
    ),
    "CogVideoXTransformer3DModel": Port(
        CogVideoXConfig, CogVideoXTransformer, cogvideox_keys.DIFFUSERS, cogvideox_keys.STACKS
    ),
    "WanTransformer3DModel": Port(WanConfig, WanTransformer, wan_keys.DIFFUSERS, wan_keys.STACKS),
}
