"""Prompts to pixels with the embedded model, or one made like it: a word encoder, no VAE."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from adaspa_jax import Report, SparseConfig, TokenLayout
from models.checkpoint.loading import from_pretrained
from models.checkpoint.lora_file import LoraLike
from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.demo.words import WordEncoder
from models.pipeline.embeddings import Embeddings
from models.pipeline.families import PixelSize, VideoSize, pixel_family
from models.pipeline.video import Progress, VideoPipeline
from models.schedulers import FlowMatchEuler
from models.transformers.hunyuan_video import HunyuanVideoTransformer
from pallas_kernels import Implementation


@dataclass(frozen=True)
class Sample:
    """One finished run."""

    video: np.ndarray
    """float32 [B, 3, F, H, W] in [-1, 1]."""
    state: Any
    """The final sparse state, empty for a dense run."""
    layout: TokenLayout
    config: SparseConfig
    report: Report | None
    """None for a dense run."""
    seconds: float
    """The sampling scan, compile time apart."""
    compile_seconds: float
    implementation: Implementation
    """The kernels that attention ran on."""


def takes_words(checkpoint: Path) -> bool:
    """Whether the checkpoint brings a word encoder, as the embedded one does."""
    config = checkpoint / "text_encoder/config.json"
    return config.is_file() and read_json(config).get("_class_name") == "WordEncoder"


@dataclass(frozen=True)
class HunyuanVideoPipeline:
    """A transformer with what belongs to it; make it with `load`."""

    transformer: HunyuanVideoTransformer
    scheduler: FlowMatchEuler
    encoder: WordEncoder
    size: PixelSize

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: Any = jnp.float32,
        *,
        follow_links: bool = False,
        loras: Sequence[LoraLike] = (),
    ) -> "HunyuanVideoPipeline":
        """Reads a converted folder or a diffusers pipeline folder with scheduler and text encoder.

        `follow_links`: the transformer's files may be links out of their folder. `loras`: merged into the transformer.
        Raises ValueError for a checkpoint that cannot be read, and for one whose text encoder does not run here.
        """
        path = Path(path)
        transformer = from_pretrained(path, dtype=dtype, follow_links=follow_links, loras=loras)
        parts = {}
        for name in ("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
            if not (path / name).is_file():
                raise ValueError(
                    f"{path} has no {name}; sample from a whole converted pipeline, not a lone transformer"
                )
            parts[name] = read_json(path / name)
        size = parts["model_index.json"].get("sample_size")
        if not isinstance(transformer, HunyuanVideoTransformer) or size is None or transformer.config.in_channels != 3:
            raise ValueError(
                f"{path} samples latents of {transformer.config.in_channels} channels, which need a VAE and prompt "
                "embeddings; this version decodes pixel-space checkpoints such as models/demo/checkpoint"
            )
        scheduler = FlowMatchEuler.from_config(parts["scheduler/scheduler_config.json"])
        try:
            pixels = PixelSize(**size)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path / 'model_index.json'}: sample_size={size!r} ({error})") from error
        return cls(transformer, scheduler, WordEncoder.load(path / "text_encoder"), pixels)

    def embed(self, prompts: list[str]) -> Embeddings:
        """What `VideoPipeline.sample` reads of prompts. Raises ValueError for prompts the encoder does not know."""
        text = self.encoder.encode(prompts)
        return {
            "prompt_embeds": text.tokens,
            "prompt_attention_mask": text.mask,
            "pooled_prompt_embeds": text.pooled,
        }

    def video_pipeline(self) -> VideoPipeline:
        """The same as a pipeline of latents, which are the pixels."""
        return VideoPipeline((self.transformer,), self.scheduler, pixel_family(self.size, self.scheduler))

    def sample(
        self,
        prompts: list[str],
        config: SparseConfig,
        *,
        size: VideoSize | None = None,
        seed: int = 0,
        dense: bool = False,
        keep_mass: bool = False,
        progress: Progress | None = None,
        implementation: Implementation | None = None,
    ) -> Sample:
        """Samples one video a prompt, as one batch; arguments as for `VideoPipeline.sample`.

        Raises ValueError for prompts the encoder does not know, and as `VideoPipeline.plan` does.
        """
        run = self.video_pipeline().sample(
            self.embed(prompts),
            config,
            size=size,
            seed=seed,
            dense=dense,
            keep_mass=keep_mass,
            progress=progress,
            implementation=implementation,
        )
        return Sample(
            np.clip(run.latents, -1, 1),
            run.states[0],
            run.layout,
            run.config,
            run.reports[0] if run.reports else None,
            run.seconds,
            run.compile_seconds,
            run.implementation,
        )
