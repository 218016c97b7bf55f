"""The runs of one call of `python -m models.sample`: what is sampled, and what is written of it."""

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from adaspa_jax import SparseConfig, draw_blocks
from models.checkpoint.lora_file import Lora
from models.commands import files
from models.commands.files import Results
from models.commands.hosts import stderr
from models.commands.jobs import Job, of_each_batch
from models.commands.media import Strip, shrunk, write_runs, write_sheet
from models.commands.report import distance, fields_of, memory, write_json
from models.pipeline.embeddings import write_tensors
from models.pipeline.families import VideoSize
from models.pipeline.guidance import Guidance
from models.pipeline.latents import SavedLatents, broken_runs, write_latents
from models.pipeline.mesh import Weights
from models.pipeline.plan import Plan
from models.pipeline.program import Need, Program
from models.pipeline.video import LatentSample, VideoPipeline
from models.schedulers import FewStep

MASS_LIMIT = 1 << 30
"""Of the block mass kept for blocks.png, in bytes."""


@dataclass(frozen=True)
class Runs:
    """The runs of one call, ready to sample; `models.commands.prepare` makes them."""

    pipeline: VideoPipeline
    jobs: list[Job]
    """Of the same shapes."""
    config: SparseConfig
    size: VideoSize
    guidance: Guidance
    vae: Path | None = None
    follow_links: bool = False
    """Those of the VAE's folder."""
    pixels: bool = False
    """What is sampled are pixels, which need no VAE."""
    encoded: bool = False
    """The embeddings were made for these runs, and are kept with them."""
    loras: tuple[Lora, ...] = ()
    """That are in the pipeline's weights, for the report."""
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of what is done so far, but for the runs themselves."""
    programs: dict[bool, Future[Program]] = dataclasses.field(default_factory=dict)
    """Whether it is dense -> what is being compiled, for all jobs."""
    decoder: Future[int] | None = None
    """Bytes of a device that decoding takes, as it is compiled; None: no limit is known, or nothing is decoded."""
    strips: list[Strip] = dataclasses.field(default_factory=list)
    """Of the videos so far, where there are several runs."""

    @property
    def shown(self) -> bool:
        """Whether there will be videos, not latents alone."""
        return self.pixels or self.vae is not None

    @property
    def mesh(self) -> Mesh | None:
        """Of the devices that sample and decode; None: one."""
        sharding = self.pipeline.sharding
        return None if sharding is None else sharding.mesh

    def plan(self, job: Job) -> Plan:
        """What the run of a job is. ValueError for what cannot be sampled."""
        options: dict[str, Any] = {"size": self.size, "guidance": self.guidance, "seed": job.seed}
        return self.pipeline.plan(job.embeddings, self.config, **options)

    def compile(self, kinds: list[bool], weights: Weights = "replicated") -> None:
        """Begins to compile, in a thread, for each kind: whether it is dense. Weights need not be there."""
        pool, plan = ThreadPoolExecutor(1), self.plan(self.jobs[0])
        for dense in kinds:
            options: dict[str, Any] = {"keep_mass": self._keeps_mass(dense), "weights": weights}
            self.programs[dense] = pool.submit(self.pipeline.compile, plan, self.config, dense=dense, **options)
        pool.shutdown(wait=False)

    def program(self, dense: bool) -> Program:
        """Waits for what `compile` began."""
        begun = time.perf_counter()
        program = self.programs[dense].result()
        self.phases["compile"] = self.phases.get("compile", 0.0) + time.perf_counter() - begun
        return program

    def cancel(self) -> None:
        """Whatever is not being compiled yet never will be, so that a failed command ends."""
        for program in self.programs.values():
            program.cancel()

    def with_decoder(self) -> "Runs":
        """Begins to compile the VAE's decoder, in a thread, to know what it needs; the same if nothing is decoded."""
        if self.vae is None:
            return self
        from models.vae.decoding import decoding_need

        pool, shape = ThreadPoolExecutor(1), self.plan(self.jobs[0]).shape
        decoder = pool.submit(decoding_need, self.vae, shape, mesh=self.mesh)
        pool.shutdown(wait=False)
        return dataclasses.replace(self, decoder=decoder)

    def need(self) -> Need:
        """Waits for what is being compiled: the most that a device must hold, to sample or to decode."""
        programs = [self.program(dense) for dense in self.programs]
        needs = [program.need for program in programs]
        if self.decoder is not None:
            # Experts that take turns are not there while it runs.
            resident = [0 if program.turns else program.need.weights for program in programs]
            needs += [
                Need(own, need.operands, self.decoder.result(), "decode")
                for own, need in zip(resident, needs, strict=True)
            ]
        return max(needs, key=lambda need: need.total)

    def sample(self, job: Job, *, dense: bool, **options: Any) -> LatentSample:
        """One run."""
        program = self.program(dense)
        options |= {"size": self.size, "guidance": self.guidance, "seed": job.seed, "program": program}
        keep = self._keeps_mass(dense)
        run = self.pipeline.sample(job.embeddings, self.config, dense=dense, keep_mass=keep, **options)
        return dataclasses.replace(run, compile_seconds=program.seconds if job is self.jobs[0] else 0.0)

    def _keeps_mass(self, dense: bool) -> bool:
        """Whether a run keeps the block mass."""
        return not dense and self.pipeline.sharding is None and self._mass_bytes() <= MASS_LIMIT

    def _mass_bytes(self) -> int:
        """What keeping the block mass would take."""
        model, job = self.pipeline.experts[0], self.jobs[0]
        grid = self.pipeline.family.latent_shape(self.size, model)
        text = job.embeddings["prompt_embeds"].shape[1]
        config = dataclasses.replace(self.config, share_cfg_indices=False)
        state = jax.eval_shape(lambda: model.init_state(config, 2 * len(job.prompts), grid, text, keep_mass=True))
        return sum(x.mass.size * 4 for x in state)

    def fields(self, job: Job, runs: dict[str, LatentSample]) -> dict[str, Any]:
        """report.json, but for the distance of the videos."""
        family = self.pipeline.family
        size = dataclasses.asdict(self.size) | {"fps": family.fps, "model": family.name}
        fields = fields_of(job.prompts, job.seed, self.config, runs) | size
        if self.loras:
            fields["loras"] = [{"file": str(x.path), "scale": x.scale, "expert": x.expert} for x in self.loras]
        scheduler = self.pipeline.scheduler
        if isinstance(scheduler, FewStep):
            timesteps = scheduler.tables(self.config.steps)["timestep"].tolist()
            fields |= {"timesteps": timesteps, "shift": scheduler.shift, "renoise": scheduler.renoise}
        phases = self.phases | job.phases
        used = memory() | {"planned_device_bytes": self.need().total, "offload": self.pipeline.offload}
        return fields | {"phases": {f"{name}_seconds": s for name, s in phases.items()}, "memory": used}

    def begin(self, results: Results | None) -> None:
        """Stages what is of all jobs; see `keep` for `results`."""
        if results is None:
            return
        if self.encoded:
            first = of_each_batch(self.jobs)
            prompts = [prompt for job in first for prompt in job.prompts]
            joined = {name: np.concatenate([job.embeddings[name] for job in first]) for name in first[0].embeddings}
            write_tensors(results.stage / files.EMBEDDINGS, joined, {"prompts": json.dumps(prompts)})
        if len(self.jobs) > 1:
            listed = [{"folder": job.name, "prompts": job.prompts, "seed": job.seed} for job in self.jobs]
            write_json(results.stage / files.RUNS, listed)

    def keep(self, results: Results | None, job: Job, runs: dict[str, LatentSample]) -> None:
        """Latents and report of a job's runs so far, in OUT for good: whatever fails later, they are not sampled again.

        `results` None: on a host that writes nothing. Raises FloatingPointError if the latents of one are not finite.
        """
        saved = self.saved(job, runs)
        if results is not None:
            write_latents(results.stage / files.LATENTS, saved)
            write_json(results.stage / files.REPORT, self.fields(job, runs))
            results.publish()
        if broken := broken_runs(saved.runs):
            share = 1 - np.isfinite(saved.runs[broken[0]]).mean()
            raise FloatingPointError(
                f"{share:.0%} of the latents of the {broken[0]} run are NaN or infinite: no video can be made of them; "
                "try --dtype float32, and check the checkpoint"
            )

    def saved(self, job: Job, runs: dict[str, LatentSample]) -> SavedLatents:
        """What latents.safetensors holds."""
        family = self.pipeline.family
        latents = {name: run.latents for name, run in runs.items()}
        return SavedLatents(latents, job.prompts, family.fps, family.skip_frames)

    def show(self, results: Results | None, job: Job, runs: dict[str, LatentSample]) -> dict[str, Any]:
        """Videos, if there is a VAE, and pictures, each in OUT as soon as it is whole; returns the report.

        `results` as for `keep`: all hosts decode.
        """
        fields, saved, videos = self.fields(job, runs), self.saved(job, runs), {}
        if self.shown:
            with timing(job.phases, "decode"):
                videos = decode_runs(self.vae, saved, follow_links=self.follow_links, mesh=self.mesh)
        if results is None:
            return fields
        if videos:
            with timing(job.phases, "video"):
                strips = write_runs(results.stage, videos, job.prompts, saved.fps, gif=self.pixels)
            results.publish()
            if len(self.jobs) > 1:
                self.strips.extend(shrunk((f"{caption} (seed {job.seed})", frames)) for caption, frames in strips)
            fields = self.fields(job, runs) | distance(videos)
            write_json(results.stage / files.REPORT, fields)
            results.publish()
        sparse = runs.get("AdaSpa")
        states = sparse.states[0] if sparse is not None else ()
        if sparse is not None and states and all(state.mass.size and state.mass.any() for state in states):
            draw_blocks(states, sparse.layout).savefig(results.stage / files.BLOCKS, dpi=110)
        return fields

    def end(self, results: Results | None) -> None:
        """The contact sheet of several runs; `results` as for `keep`."""
        if results is not None and self.strips:
            write_sheet(results.stage / files.SHEET, self.strips)


@contextmanager
def timing(phases: dict[str, float], name: str) -> Iterator[None]:
    """Keeps the seconds of a phase."""
    begun = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - begun


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
