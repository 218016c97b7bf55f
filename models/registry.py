"""What is ported: diffusers class name -> config, model and key table."""

from dataclasses import dataclass

from models import cogvideox_keys, hunyuan_keys, wan_keys
from models.cogvideox import CogVideoXConfig, CogVideoXTransformer
from models.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from models.key_table import Rule
from models.transformer import TransformerConfig, VideoTransformer
from models.wan import WanConfig, WanTransformer


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
