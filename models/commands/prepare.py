"""Everything before the first step of `python -m models.sample`: options checked, prompts encoded, weights loaded."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from adaspa_jax import AttentionSharding
from models.checkpoint.lora_file import Lora
from models.checkpoint.safetensors_folder import CheckpointError
from models.commands.encoders import check_frames, check_last_image, pipeline_class, read_pictures
from models.commands.encoding import Encoder, Wanted
from models.commands.fitting import cannot_fit, check_weights, device_limit, overflow, with_offload
from models.commands.hosts import stderr
from models.commands.jobs import Job, Texts, make_jobs, of_each_batch, split
from models.commands.media import require
from models.commands.runs import Runs, timing
from models.pipeline.embeddings import read_embeddings, read_prompts, stand_ins, takes_image
from models.pipeline.families import VideoSize
from models.pipeline.guidance import Guidance
from models.pipeline.mesh import Weights, parse_axes, parse_mesh
from models.pipeline.offload import Offload, check_offload
from models.pipeline.video import VideoPipeline
from models.pipeline.words import HunyuanVideoPipeline


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
    timesteps: tuple[float, ...] | None = None
    """Of a few steps, before the shift."""
    renoise: bool = False
    """Fresh noise in each of them."""
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    seeds: tuple[int, ...] = (0,)
    compare: bool = False
    dense: bool = False
    follow_links: bool = False
    """The files of checkpoint and VAE may be links out of their folders."""
    mesh: str | None = None
    """Of devices, see `models.pipeline.mesh.parse_mesh`; None: one device."""
    weights: Weights = "replicated"
    """On the mesh."""
    offload: Offload | None = None
    """None: experts take turns if both would fill the device."""
    loras: tuple[Lora, ...] = ()
    """Merged into the transformers."""
    debug: bool = False
    """Show what the process that encodes prints."""

    @property
    def kinds(self) -> list[bool]:
        """Of each run of a job whether it is dense."""
        return [True] * (self.dense or self.compare) + [False] * (not self.dense)


def of_words(checkpoint: Path, texts: Texts, options: Options) -> Runs:
    """The runs of a checkpoint of pixels with a word encoder. ValueError for what cannot be sampled."""
    if not any(texts.batches):
        raise ValueError("this checkpoint takes prompts; give at least one --prompt, or --prompts FILE")
    how: dict[str, Any] = {"follow_links": options.follow_links, "loras": options.loras}
    words = HunyuanVideoPipeline.load(checkpoint, options.dtype or "float32", **how)
    batches = [(batch, words.embed(batch)) for batch in texts.batches]
    runs = _checked(words.video_pipeline(), make_jobs(batches, options.seeds), options, pixels=True)
    runs.compile(options.kinds)
    return runs


def of_latents(checkpoint: Path, texts: Texts, embeddings: Path | None, vae: Path | None, options: Options) -> Runs:
    """The runs of a model of latents. ValueError for what cannot be sampled, before prompts are encoded if it can be.

    `embeddings`: of the prompts, in place of `texts`. No device is asked for until these are there: the encoders may
    need it whole.
    """
    read: dict[str, Any] = {"follow_links": options.follow_links, "loras": options.loras}
    described = VideoPipeline.describe(checkpoint, options.dtype, **read)
    if options.mesh is not None:
        parse_axes(options.mesh)
    check_offload(options.offload or "none", len(described.experts))
    if vae is None and (checkpoint / "vae/config.json").is_file():
        vae = checkpoint / "vae"
    if vae is not None and not vae.is_dir():
        raise CheckpointError(f"--vae {vae} is no folder; give a diffusers vae or pipeline folder")
    rest: dict[str, Any] = {"vae": vae, "encoded": embeddings is None, "follow_links": options.follow_links}
    if embeddings is None:
        jobs = _encoded(checkpoint, described, texts, options, rest)
    else:
        found = read_embeddings(embeddings)
        names = read_prompts(embeddings, *found.get("prompt_embeds", np.zeros(0)).shape[:1])
        jobs = make_jobs([(names, found)], options.seeds)
    runs = _on_mesh(_checked(described, jobs, options, **rest), options)
    return _loaded(runs, checkpoint, options, read)


def _encoded(
    checkpoint: Path, described: VideoPipeline, texts: Texts, options: Options, rest: dict[str, Any]
) -> list[Job]:
    """The jobs of prompts, encoded after all that can be checked without their embeddings."""
    if not any(texts.batches):
        raise ValueError("give at least one --prompt, or --prompts FILE, or --embeddings FILE of models.encode_prompt")
    image, last, family, model = texts.image, texts.last_image, described.family, described.experts[0]
    pipeline_class(checkpoint, image is not None)
    read_pictures(image, last)
    if image is not None:
        check_last_image(family, model, last is not None)
    elif takes_image(model):
        raise ValueError(f"this {family.name} animates an image; give --image")
    size = _size(described, options)
    check_frames(size, last is not None)
    grid = family.latent_shape(size, model)
    zeros = lambda n: stand_ins(model, grid, n, image=image is not None, first_frame=family.fixed_first_frame)
    checked = _checked(
        described, make_jobs([(b, zeros(len(b))) for b in texts.batches], options.seeds), options, **rest
    )
    negative, guided = texts.negative, checked.plan(checked.jobs[0]).guided
    if negative is not None and not guided:
        how = "--true-cfg above 1 turns it on" if family.embedded_guidance else "it is on above 1"
        raise ValueError(f"--negative-prompt {negative!r} has no effect without guidance: {how}; or leave it out")
    if negative is None and guided and family.embedded_guidance:
        negative = ""
    prompts = [prompt for batch in texts.batches for prompt in batch]
    wanted = Wanted(prompts, negative, image, last, None if image is None else size)
    with timing(rest.setdefault("phases", {}), "encode"):
        found = Encoder(checkpoint, options.debug).encode(wanted)
    return make_jobs(split(found, texts.batches), options.seeds)


def _size(pipeline: VideoPipeline, options: Options) -> VideoSize:
    """Of the video, with the model's own where nothing is given."""
    own = dataclasses.astuple(pipeline.family.size)
    return VideoSize(*(n if given is None else given for given, n in zip(options.size, own, strict=True)))


def _checked(pipeline: VideoPipeline, jobs: list[Job], options: Options, **rest: Any) -> Runs:
    """ValueError for what the pipeline cannot sample or would ignore, ImportError for what files will need."""
    family, guidance = pipeline.family, options.guidance
    if guidance.scale is not None and family.embedded_guidance and not pipeline.experts[0].config.guidance_embeds:
        raise ValueError(f"--guidance {guidance.scale}: this model embeds no guidance; leave it out, or --true-cfg")
    size = _size(pipeline, options)
    config = family.config(options.preset, **options.changes)
    pipeline = pipeline.with_shift(options.shift).with_timesteps(options.timesteps, options.renoise)
    runs = Runs(pipeline, jobs, config, size, guidance, loras=options.loras, **rest)
    for job in of_each_batch(jobs):
        runs.plan(job)
    if runs.shown:
        require("av", *["skimage.metrics"] * options.compare)
    require(*["matplotlib.figure"] * (not options.dense))
    return runs


def _on_mesh(runs: Runs, options: Options) -> Runs:
    """On the mesh of the options, if there is one. ValueError if the runs cannot be spread over it."""
    if options.mesh is None:
        return runs
    plan, heads = runs.plan(runs.jobs[0]), runs.pipeline.experts[0].config.num_attention_heads
    batch = plan.shape[0] * (1 + plan.guided)
    sharding = AttentionSharding(parse_mesh(options.mesh, heads, batch, runs.config))
    sharding.check(runs.config, batch, heads)
    return dataclasses.replace(runs, pipeline=dataclasses.replace(runs.pipeline, sharding=sharding))


def _loaded(runs: Runs, checkpoint: Path, options: Options, read: dict[str, Any]) -> Runs:
    """With weights, which are read while the programs compile."""
    if runs.vae is not None:
        from models.vae.decoding import check_decoder

        check_decoder(runs.vae, runs.pipeline.experts[0].config.out_channels, options.follow_links)
    limit = device_limit()
    runs = dataclasses.replace(runs, pipeline=with_offload(runs.pipeline, options.offload, limit))
    check_weights(runs.pipeline, options.weights, limit)
    runs.compile(options.kinds, options.weights)
    runs = runs if limit is None else runs.with_decoder()
    with Progress(console=stderr(), transient=True) as bar, timing(runs.phases, "load"):
        task = bar.add_task("loading", total=None)
        done = lambda loaded, total: bar.update(task, completed=loaded, total=total)
        try:
            loaded = runs.pipeline.with_weights(checkpoint, options.dtype, done, weights=options.weights, **read)
        except BaseException:
            runs.cancel()
            raise
    if limit is not None and (need := overflow(runs, limit)) is not None:
        del loaded  # so that there is room to look for what fits
        raise cannot_fit(runs, options.kinds, options.weights, need, limit)
    return dataclasses.replace(runs, pipeline=loaded)
