"""What `python -m models.sample` does for its two kinds of checkpoint: what is checked, loaded, sampled and written."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from adaspa_jax import AttentionSharding, SparseConfig, draw_blocks
from models.checkpoint.lora_file import Lora
from models.checkpoint.safetensors_folder import CheckpointError
from models.commands import files
from models.commands.files import Results
from models.commands.hosts import stderr
from models.commands.media import require, write_runs
from models.commands.options import LATENTS, refuse
from models.commands.report import distance, fields_of, memory, write_report
from models.pipeline.embeddings import Embeddings, read_embeddings, read_prompts
from models.pipeline.families import VideoSize
from models.pipeline.guidance import Guidance
from models.pipeline.latents import SavedLatents, broken_runs, write_latents
from models.pipeline.mesh import Weights, parse_mesh
from models.pipeline.video import LatentSample, VideoPipeline
from models.pipeline.words import HunyuanVideoPipeline

MASS_LIMIT = 1 << 30
"""Of the block mass kept for blocks.png, in bytes."""


@dataclass(frozen=True)
class Options:
    """How to sample, for both kinds of checkpoint; None: the model's own."""

    preset: str | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the preset."""
    size: tuple[int | None, int | None, int | None] = (None, None, None)
    """Frames, height, width."""
    dtype: str | None = None
    shift: float | None = None
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    seed: int = 0
    compare: bool = False
    dense: bool = False
    follow_links: bool = False
    """The files of checkpoint and VAE may be links out of their folders."""
    mesh: str | None = None
    """Of devices, see `models.pipeline.mesh.parse_mesh`; None: one device."""
    weights: Weights = "replicated"
    """On the mesh."""
    loras: tuple[Lora, ...] = ()
    """Merged into the transformers."""


@dataclass(frozen=True)
class Runs:
    """The runs of one call, ready to sample; make it with `of_words` or `of_embeddings`."""

    pipeline: VideoPipeline
    embeddings: Embeddings
    prompts: list[str]
    config: SparseConfig
    size: VideoSize
    guidance: Guidance
    seed: int
    vae: Path | None = None
    follow_links: bool = False
    """Those of the VAE's folder."""
    pixels: bool = False
    """What is sampled are pixels, which need no VAE."""
    loras: tuple[Lora, ...] = ()
    """That are in the pipeline's weights, for the report."""
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of what is done so far, but for the runs themselves."""

    @classmethod
    def of_words(cls, checkpoint: Path, prompts: list[str] | None, options: Options) -> "Runs":
        """Of a checkpoint of pixels with a word encoder. ValueError for what cannot be sampled."""
        if not prompts:
            raise ValueError("this checkpoint takes prompts; give at least one --prompt")
        how: dict[str, Any] = {"follow_links": options.follow_links, "loras": options.loras}
        words = HunyuanVideoPipeline.load(checkpoint, options.dtype or "float32", **how)
        return cls._checked(words.video_pipeline(), words.embed(prompts), prompts, options, pixels=True)

    @classmethod
    def of_embeddings(
        cls, checkpoint: Path, prompts: list[str] | None, embeddings: Path | None, vae: Path | None, options: Options
    ) -> "Runs":
        """Of a model of latents on embeddings. ValueError for what cannot be sampled, before weights are read.

        `prompts` are refused: the embeddings are of others.
        """
        read: dict[str, Any] = {"follow_links": options.follow_links, "loras": options.loras}
        described = VideoPipeline.describe(checkpoint, options.dtype, **read)
        refuse({"prompt": prompts}, LATENTS)
        if embeddings is None:
            raise ValueError(
                "this checkpoint has no word encoder: give --embeddings FILE, made with python -m models.encode_prompt"
            )
        found = read_embeddings(embeddings)
        names = read_prompts(embeddings, *found.get("prompt_embeds", np.zeros(0)).shape[:1])
        if vae is None and (checkpoint / "vae/config.json").is_file():
            vae = checkpoint / "vae"
        if vae is not None and not vae.is_dir():
            raise CheckpointError(f"--vae {vae} is no folder; give a diffusers vae or pipeline folder")
        runs = cls._checked(described, found, names, options, vae=vae)
        if vae is not None:
            from models.vae.decoding import check_decoder

            check_decoder(vae, described.experts[0].config.out_channels, options.follow_links)
        with Progress(console=stderr(), transient=True) as bar, runs._timed("load"):
            task = bar.add_task("loading", total=None)
            done = lambda loaded, total: bar.update(task, completed=loaded, total=total)
            loaded = runs.pipeline.with_weights(checkpoint, options.dtype, done, weights=options.weights, **read)
            return dataclasses.replace(runs, pipeline=loaded, follow_links=options.follow_links)

    @classmethod
    def _checked(
        cls, pipeline: VideoPipeline, embeddings: Embeddings, prompts: list[str], options: Options, **rest: Any
    ) -> "Runs":
        """ValueError for what the pipeline cannot sample or would ignore, ImportError for what files will need."""
        family, guidance = pipeline.family, options.guidance
        if guidance.scale is not None and family.embedded_guidance and not pipeline.experts[0].config.guidance_embeds:
            raise ValueError(f"--guidance {guidance.scale}: this model embeds no guidance; leave it out, or --true-cfg")
        own = dataclasses.astuple(family.size)
        size = VideoSize(*(n if given is None else given for given, n in zip(options.size, own, strict=True)))
        config = family.config(options.preset, **options.changes)
        pipeline = pipeline.with_shift(options.shift)
        plan = pipeline.plan(embeddings, config, size=size, guidance=guidance, seed=options.seed)
        if options.mesh is not None:
            batch, heads = plan.shape[0] * (1 + plan.guided), pipeline.experts[0].config.num_attention_heads
            sharding = AttentionSharding(parse_mesh(options.mesh, heads, batch, config))
            sharding.check(config, batch, heads)
            pipeline = dataclasses.replace(pipeline, sharding=sharding)
        runs = cls(pipeline, embeddings, prompts, config, size, guidance, options.seed, loras=options.loras, **rest)
        if runs.shown:
            require("av", *["skimage.metrics"] * options.compare)
        require(*["matplotlib.figure"] * (not options.dense))
        return runs

    @property
    def shown(self) -> bool:
        """Whether there will be videos, not latents alone."""
        return self.pixels or self.vae is not None

    def sample(self, *, dense: bool, **options: Any) -> LatentSample:
        """One run."""
        keep = not dense and self.pipeline.sharding is None and self._mass_bytes() <= MASS_LIMIT
        options |= {"size": self.size, "guidance": self.guidance, "seed": self.seed}
        return self.pipeline.sample(self.embeddings, self.config, dense=dense, keep_mass=keep, **options)

    def _mass_bytes(self) -> int:
        """What keeping the block mass would take."""
        model, batch = self.pipeline.experts[0], 2 * len(self.prompts)
        grid = self.pipeline.family.latent_shape(self.size, model)
        text = self.embeddings["prompt_embeds"].shape[1]
        config = dataclasses.replace(self.config, share_cfg_indices=False)
        state = jax.eval_shape(lambda: model.init_state(config, batch, grid, text, keep_mass=True))
        return sum(x.mass.size * 4 for x in state)

    def fields(self, runs: dict[str, LatentSample]) -> dict[str, Any]:
        """report.json, but for the distance of the videos."""
        family = self.pipeline.family
        size = dataclasses.asdict(self.size) | {"fps": family.fps, "model": family.name}
        fields = fields_of(self.prompts, self.seed, self.config, runs) | size
        if self.loras:
            fields["loras"] = [{"file": str(x.path), "scale": x.scale, "expert": x.expert} for x in self.loras]
        return fields | {"phases": {f"{name}_seconds": s for name, s in self.phases.items()}, "memory": memory()}

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Keeps the seconds of a phase."""
        begun = time.perf_counter()
        yield
        self.phases[phase] = time.perf_counter() - begun

    def keep(self, results: Results | None, runs: dict[str, LatentSample]) -> None:
        """Latents and report of the runs so far, in OUT for good: whatever fails later, they are not sampled again.

        `results` None: on a host that writes nothing. Raises FloatingPointError if the latents of one are not finite.
        """
        saved = self.saved(runs)
        if results is not None:
            write_latents(results.stage / files.LATENTS, saved)
            write_report(results.stage / files.REPORT, self.fields(runs))
            results.publish()
        if broken := broken_runs(saved.runs):
            share = 1 - np.isfinite(saved.runs[broken[0]]).mean()
            raise FloatingPointError(
                f"{share:.0%} of the latents of the {broken[0]} run are NaN or infinite: no video can be made of them; "
                "try --dtype float32, and check the checkpoint"
            )

    def saved(self, runs: dict[str, LatentSample]) -> SavedLatents:
        """What latents.safetensors holds."""
        family = self.pipeline.family
        latents = {name: run.latents for name, run in runs.items()}
        return SavedLatents(latents, self.prompts, family.fps, family.skip_frames)

    def show(self, results: Results | None, runs: dict[str, LatentSample]) -> dict[str, Any]:
        """Videos, if there is a VAE, and pictures, each in OUT as soon as it is whole; returns the report.

        `results` as for `keep`: all hosts decode.
        """
        fields, saved, videos = self.fields(runs), self.saved(runs), {}
        sharding = self.pipeline.sharding
        if self.shown:
            mesh = None if sharding is None else sharding.mesh
            with self._timed("decode"):
                videos = decode_runs(self.vae, saved, follow_links=self.follow_links, mesh=mesh)
        if results is None:
            return fields
        if videos:
            with self._timed("video"):
                write_runs(results.stage, videos, self.prompts, saved.fps, gif=self.pixels)
            results.publish()
            fields = self.fields(runs) | distance(videos)
            write_report(results.stage / files.REPORT, fields)
            results.publish()
        sparse = runs.get("AdaSpa")
        states = sparse.states[0] if sparse is not None else ()
        if sparse is not None and states and all(state.mass.size and state.mass.any() for state in states):
            draw_blocks(states, sparse.layout).savefig(results.stage / files.BLOCKS, dpi=110)
        return fields


def decode_runs(
    vae: Path | None,
    saved: SavedLatents,
    dtype: str = "float32",
    *,
    follow_links: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """float32 videos [B, 3, F, H, W] in [-1, 1] of each run, with a progress bar; `vae` None: the latents are pixels.

    All devices of `mesh` decode.

    Raises ValueError for latents that are not finite, FloatingPointError for such videos.
    """
    if broken := broken_runs(saved.runs):
        raise ValueError(f"the latents of the {broken[0]} run have NaN or infinite values; sample them again")
    if vae is None:
        if (channels := next(iter(saved.runs.values())).shape[1]) != 3:
            raise ValueError(f"this checkpoint samples pixels of 3 channels; the latents have {channels}")
        return {name: np.clip(values, -1, 1) for name, values in saved.runs.items()}
    from models.vae.decoding import decode_latents

    videos = {}
    with Progress(console=stderr()) as bar:
        for name, values in saved.runs.items():
            task = bar.add_task(f"decoding {name}", total=None)
            done = lambda count, total, task=task: bar.update(task, completed=count, total=total)
            video = decode_latents(vae, values, dtype=dtype, progress=done, follow_links=follow_links, mesh=mesh)
            videos[name] = video[:, :, saved.skip_frames :]
    if broken := broken_runs(videos):
        raise FloatingPointError(
            f"the {broken[0]} video decoded in {dtype} has NaN or infinite values; decode in float32, check the VAE"
        )
    return videos
