"""Prompts to video with a HunyuanVideo checkpoint: text encoder, scheduler and transformer in one jitted program."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import models
from adaspa_jax import History, Report, SparseConfig, StepKind, TokenLayout, denoise, summarize
from models.demo.words import WordEncoder
from models.hunyuan_video import HunyuanVideoTransformer
from models.schedulers import FlowMatchEuler
from pallas_kernels import Implementation, resolve_implementation

Progress = Callable[[int], None]


@dataclass(frozen=True)
class VideoSize:
    """Frames, height and width in pixels, and the playing speed."""

    frames: int
    height: int
    width: int
    fps: int


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


@dataclass(frozen=True)
class HunyuanVideoPipeline:
    """A transformer with what belongs to it; make it with `load`."""

    transformer: HunyuanVideoTransformer
    scheduler: FlowMatchEuler
    encoder: WordEncoder
    size: VideoSize

    @classmethod
    def load(cls, path: str | Path, dtype: Any = jnp.float32) -> "HunyuanVideoPipeline":
        """Reads a converted folder or a diffusers pipeline folder with scheduler and text encoder.

        Raises ValueError for a checkpoint that cannot be read, and for one whose text encoder does not run here.
        """
        path = Path(path)
        transformer = models.from_pretrained(path, dtype=dtype)
        parts = {}
        for name in ("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
            if not (path / name).is_file():
                raise ValueError(
                    f"{path} has no {name}; sample from a whole converted pipeline, not a lone transformer"
                )
            parts[name] = json.loads((path / name).read_text())
        size = parts["model_index.json"].get("sample_size")
        if not isinstance(transformer, HunyuanVideoTransformer) or size is None or transformer.config.in_channels != 3:
            raise ValueError(
                f"{path} samples latents of {transformer.config.in_channels} channels, which need a VAE and prompt "
                "embeddings; this version decodes pixel-space checkpoints such as models/demo/checkpoint"
            )
        scheduler = FlowMatchEuler.from_config(parts["scheduler/scheduler_config.json"])
        return cls(transformer, scheduler, WordEncoder.load(path / "text_encoder"), VideoSize(**size))

    def sample(
        self,
        prompts: list[str],
        config: SparseConfig,
        *,
        seed: int = 0,
        dense: bool = False,
        keep_mass: bool = False,
        progress: Progress | None = None,
        implementation: Implementation | None = None,
    ) -> Sample:
        """Samples one video a prompt, as one batch. The same seed gives the same noise, dense or sparse.

        Raises ValueError for prompts the encoder does not know. `progress` is called with each finished step.
        """
        text = self.encoder.encode(prompts)
        size, channels = self.size, self.transformer.config.in_channels
        shape = (len(prompts), channels, size.frames, size.height, size.width)
        noise = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        layout = self.transformer.layout(shape[2:], text.tokens.shape[1], config)
        state: Any = ()
        if not dense:
            state = self.transformer.init_state(
                config, len(prompts), shape[2:], text.tokens.shape[1], keep_mass=keep_mass
            )
        run = self._program(config, dense, progress, implementation)
        operands = (nnx.state(self.transformer), noise, text.tokens, text.mask, text.pooled, state)
        begun = time.perf_counter()
        compiled = jax.jit(run).lower(*operands).compile()
        compile_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        latents, state, history = jax.block_until_ready(compiled(*operands))
        seconds = time.perf_counter() - begun
        jax.effects_barrier()
        report = None if dense else summarize(state, history, layout, config)
        video = np.clip(np.asarray(latents, np.float32), -1, 1)
        ran = resolve_implementation(
            implementation,
            dtype=self.transformer.dtype,
            head_dim=self.transformer.config.attention_head_dim,
            block_size=config.block_size,
        )
        return Sample(video, state, layout, config, report, seconds, compile_seconds, ran)

    def _program(
        self, config: SparseConfig, dense: bool, progress: Progress | None, implementation: Implementation | None
    ) -> Callable[..., tuple[Array, Any, History]]:
        """The whole run as one function of arrays, for `jax.jit`; weights are arguments."""
        graph = nnx.graphdef(self.transformer)
        tables = self.scheduler.tables(config.steps)
        report = None if progress is None else lambda step: progress(int(step))

        def run(
            weights: Any, noise: Array, tokens: Array, mask: Array, pooled: Array, state: Any
        ) -> tuple[Array, Any, History]:
            transformer = nnx.merge(graph, weights)

            def predict(latents: Array, row: dict[str, Array], state: Any, kind: Array) -> tuple[Array, Any]:
                result = transformer(
                    hidden_states=latents.astype(transformer.dtype),
                    timestep=jnp.broadcast_to(row["timestep"], latents.shape[:1]),
                    encoder_hidden_states=tokens.astype(transformer.dtype),
                    encoder_attention_mask=mask,
                    pooled_projections=pooled.astype(transformer.dtype),
                    config=config,
                    state=None if dense else state,
                    step_kind=StepKind.DENSE if dense else kind,
                    implementation=implementation,
                )
                return (result, state) if dense else result

            return denoise(predict, self.scheduler, tables, noise, state, config, progress=report)

        return run
