"""What `python -m models.sample` does for its two kinds of checkpoint: runs, their files and their report."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from adaspa_jax import SparseConfig, draw_blocks
from models.checkpoint.loading import expert_folders, locate, open_source
from models.checkpoint.safetensors_folder import CheckpointError, read_json
from models.commands.media import grid_frames, psnr, ssim, to_pixels, write_gif, write_runs
from models.pipeline.embeddings import Embeddings, read_embeddings, read_prompts
from models.pipeline.families import VideoSize
from models.pipeline.latents import SavedLatents, write_latents
from models.pipeline.video import Guidance, LatentSample, VideoPipeline
from models.pipeline.words import HunyuanVideoPipeline, Sample


def takes_words(checkpoint: Path) -> bool:
    """Whether the checkpoint brings a word encoder, as the embedded one does."""
    config = checkpoint / "text_encoder/config.json"
    return config.is_file() and read_json(config).get("_class_name") == "WordEncoder"


def _report(prompts: list[str], seed: int, config: SparseConfig, runs: dict[str, Any], details: list[Any]) -> Any:
    """The content of report.json, but for the distance of the videos; `details` are the Reports of the sparse run."""
    fields: dict[str, Any] = {"prompts": prompts, "seed": seed, "steps": config.steps}
    for name, run in runs.items():
        key = name.lower()
        fields |= {f"{key}_seconds": run.seconds, f"{key}_compile_seconds": run.compile_seconds}
        fields["implementation"] = run.implementation
    if details:
        sparse = runs["AdaSpa"]
        tokens = {"video": sparse.layout.video_tokens, "text": sparse.layout.text, "block": sparse.layout.block}
        fields |= {
            "search_steps": list(config.search),
            "sparsity": config.sparsity,
            "density": float(np.mean([d.density for d in details])),
            "recall": float(np.mean([d.recall for d in details])),
            "tokens": tokens,
            "details": dataclasses.asdict(details[0]),
        }
        if len(details) > 1:
            fields["details_of_the_second_expert"] = dataclasses.asdict(details[1])
        if "dense" in runs:
            fields["speedup"] = runs["dense"].seconds / sparse.seconds
    return fields


def _distance(videos: dict[str, np.ndarray]) -> dict[str, float]:
    if set(videos) != {"dense", "AdaSpa"}:
        return {}
    return {
        "psnr_db": psnr(videos["AdaSpa"], videos["dense"]),
        "ssim": ssim(videos["AdaSpa"], videos["dense"]),
    }


def _draw(folder: Path, run: Any, states: Any) -> None:
    """blocks.png, if the run kept the mass of a search."""
    if all(state.mass.size and state.mass.any() for state in states):
        draw_blocks(states, run.layout).savefig(folder / "blocks.png", dpi=110)


def _summary(report: dict[str, Any]) -> str:
    """The lines a person reads at the end."""
    if "density" not in report:
        return "dense run, nothing skipped"
    line = f"sparse steps compute {report['density']:.1%} of the block pairs, with {report['recall']:.0%} of the mass"
    if "speedup" not in report:
        return line
    found = f"speed-up {report['speedup']:.2f}x"
    if "psnr_db" in report:
        found += f", PSNR {report['psnr_db']:.1f} dB, SSIM {report['ssim']:.3f}"
    return f"{found}; {line}"


@dataclass(frozen=True)
class WordRuns:
    """Runs of a checkpoint of pixels with a word encoder."""

    pipeline: HunyuanVideoPipeline
    prompts: list[str]
    config: SparseConfig

    @classmethod
    def load(
        cls, checkpoint: Path, prompts: list[str] | None, preset: str, changes: dict[str, Any], dtype: str | None
    ) -> "WordRuns":
        """Reads the checkpoint; ValueError for prompts that it does not know."""
        if not prompts:
            raise ValueError("this checkpoint takes prompts; give at least one --prompt")
        pipeline = HunyuanVideoPipeline.load(checkpoint, dtype or "float32")
        pipeline.encoder.encode(prompts)
        return cls(pipeline, prompts, SparseConfig.preset(preset, **changes))

    def sample(self, **options: Any) -> Sample:
        """One run."""
        return self.pipeline.sample(self.prompts, self.config, **options)

    def mass_bytes(self) -> int:
        """Small."""
        return 0

    def write(self, folder: Path, runs: dict[str, Sample], seed: int) -> dict[str, Any]:
        """Writes videos and pictures; returns the report."""
        videos = {name: run.video for name, run in runs.items()}
        write_runs(folder, videos, self.prompts, self.pipeline.size.fps)
        frames = grid_frames({name: to_pixels(video) for name, video in videos.items()}, self.prompts)
        write_gif(folder / "video.gif", frames, self.pipeline.size.fps)
        sparse = runs.get("AdaSpa")
        if sparse is not None:
            _draw(folder, sparse, sparse.state)
        details = [sparse.report] if sparse is not None and sparse.report is not None else []
        return _report(self.prompts, seed, self.config, runs, details) | _distance(videos)

    summary = staticmethod(_summary)


@dataclass(frozen=True)
class LatentRuns:
    """Runs of a model of latents on embeddings."""

    pipeline: VideoPipeline
    embeddings: Embeddings
    prompts: list[str]
    config: SparseConfig
    guidance: Guidance
    size: VideoSize
    vae: Path | None

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        embeddings: Path | None,
        preset: str,
        changes: dict[str, Any],
        dtype: str | None,
        shift: float | None,
        guidance: Guidance,
        vae: Path | None,
    ) -> "LatentRuns":
        """Reads embeddings, then weights. ValueError for what cannot be used."""
        for part in map(locate, expert_folders(checkpoint)):
            if not part.is_dir():
                open_source(part)
        if embeddings is None:
            raise ValueError(
                "this checkpoint has no word encoder: give --embeddings FILE, made with python -m models.encode_prompt"
            )
        found = read_embeddings(embeddings)
        if vae is None and (checkpoint / "vae/config.json").is_file():
            vae = checkpoint / "vae"
        if vae is not None and not vae.is_dir():
            raise CheckpointError(f"--vae {vae} is no folder; give a diffusers vae or pipeline folder")
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("loading", total=None)
            done = lambda loaded, total: bar.update(task, completed=loaded, total=total)
            pipeline = VideoPipeline.load(checkpoint, dtype, done).with_shift(shift)
        config = pipeline.family.config(preset, **changes)
        prompts = read_prompts(embeddings, len(found.get("prompt_embeds", ())))
        return cls(pipeline, found, prompts, config, guidance, pipeline.family.size, vae)

    def sized(self, frames: int | None, height: int | None, width: int | None) -> "LatentRuns":
        """With another size; None keeps the model's. ValueError if the model cannot make it."""
        own = self.size
        size = VideoSize(frames or own.frames, height or own.height, width or own.width)
        self.pipeline.family.latent_shape(size, self.pipeline.experts[0])
        return dataclasses.replace(self, size=size)

    def sample(self, **options: Any) -> LatentSample:
        """One run."""
        return self.pipeline.sample(self.embeddings, self.config, size=self.size, guidance=self.guidance, **options)

    def mass_bytes(self) -> int:
        """What keeping the block mass would take."""
        model, batch = self.pipeline.experts[0], 2 * len(self.prompts)
        grid = self.pipeline.family.latent_shape(self.size, model)
        text = self.embeddings["prompt_embeds"].shape[1]
        config = dataclasses.replace(self.config, share_cfg_indices=False)
        state = jax.eval_shape(lambda: model.init_state(config, batch, grid, text, keep_mass=True))
        return sum(x.mass.size * 4 for x in state)

    def write(self, folder: Path, runs: dict[str, LatentSample], seed: int) -> dict[str, Any]:
        """Writes latents, and videos if there is a VAE; returns the report."""
        family, fps = self.pipeline.family, self.pipeline.family.fps
        latents = {name: run.latents for name, run in runs.items()}
        saved = SavedLatents(latents, self.prompts, fps, family.skip_frames)
        write_latents(folder / "latents.safetensors", saved)
        videos = {}
        if self.vae is not None:
            videos = decode_runs(self.vae, saved)
            write_runs(folder, videos, self.prompts, fps)
        sparse = runs.get("AdaSpa")
        if sparse is not None and sparse.states[0]:
            _draw(folder, sparse, sparse.states[0])
        details = list(sparse.reports) if sparse is not None else []
        size = dataclasses.asdict(self.size) | {"fps": fps, "model": family.name}
        return _report(self.prompts, seed, self.config, runs, details) | size | _distance(videos)

    def summary(self, report: dict[str, Any]) -> str:
        """The lines a person reads at the end."""
        if self.vae is not None:
            return _summary(report)
        return (
            _summary(report) + "\nno VAE here: decode with python -m models.decode --checkpoint PIPELINE --latents ..."
        )


def decode_runs(vae: Path, saved: SavedLatents, dtype: str = "float32") -> dict[str, np.ndarray]:
    """float32 videos [B, 3, F, H, W] in [-1, 1] of each run, with a progress bar."""
    from models.vae.decoding import decode_latents

    videos = {}
    with Progress(console=Console(stderr=True)) as bar:
        for name, values in saved.runs.items():
            task = bar.add_task(f"decoding {name}", total=None)
            done = lambda count, total, task=task: bar.update(task, completed=count, total=total)
            videos[name] = decode_latents(vae, values, dtype=dtype, progress=done)[:, :, saved.skip_frames :]
    return videos
