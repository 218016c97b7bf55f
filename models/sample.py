"""Samples videos from a checkpoint, dense, with AdaSpa, or both side by side.

    python -m models.sample --checkpoint PIPELINE --prompt "a cat on a roof" --out out/cat
    python -m models.sample --checkpoint PIPELINE --prompts prompts.txt --seed 0-3 --out out/many
    python -m models.sample --checkpoint CKPT --embeddings prompts.safetensors --compare --out out/run

Prompts are encoded by `python -m models.encode_prompt` in a process of its own, or were by that command before. OUT
gets latents.safetensors, for `python -m models.decode`, and report.json as soon as a run is done, and an earlier run's
files go; then video.mp4 and sheet.png, and of a small sparse run blocks.png. Of several runs each has a folder in OUT.
Exit code 1: the latents are not finite; 2: anything else that is no bug.
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.commands.cli import run_cli
from models.commands.files import results, sparing
from models.commands.hosts import is_first, join, stderr
from models.commands.jobs import Job, Texts, parse_seeds
from models.commands.options import CACHE_HELP, DENSE, EMBEDDED, FEW, HOSTS, WORDS, is_given, refuse

_DTYPES = ("float32", "bfloat16")
_WEIGHTS = ("replicated", "sharded")


def timed(console: Console, name: str, runs: Any, job: Job) -> Any:
    """One run with a progress bar over its steps."""
    dense, columns = name == "dense", (TextColumn((job.title + name).ljust(7)), BarColumn(), MofNCompleteColumn())
    with console.status("compiling"):
        runs.program(dense)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=runs.config.steps)
        run = runs.sample(job, dense=dense, progress=lambda step: bar.update(task, completed=step))
    compiled = f", and {run.compile_seconds:.1f} s to compile" if run.compile_seconds else ""
    console.print(f"{job.title}{name}: {run.seconds:.1f} s{compiled}", highlight=False, markup=False)
    return run


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """The options of SparseConfig that were given."""
    named = {"search_step": "search_steps", "dense_layer": "dense_layers"}
    same = ("sparsity", "block_size", "query_block_size", "steps", "token_order", "dense_last_steps")
    same += ("share_cfg_indices", "compensation", "score_precision")  # type: ignore[assignment]
    found = {named.get(name, name): given[name] for name in (*same, *named) if is_given(given[name])}
    few = _timesteps(given["timesteps"])
    return found if few is None else found | {"steps": len(few)}


def _timesteps(text: str | None) -> tuple[float, ...] | None:
    """Those of "1000,750". ValueError for what is no number."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--timesteps {text} must be numbers with commas, such as 1000,750,500,250") from error


def _check(given: dict[str, Any]) -> None:
    """ValueError for options that cannot be, or not together, whatever the checkpoint."""
    from adaspa_jax import SparseConfig
    from models.pipeline.families import VideoSize
    from models.pipeline.offload import Offload

    if given["dense"] and given["compare"]:
        raise ValueError("--dense and --compare exclude each other; --compare runs dense too")
    if given["dense"]:
        refuse(given, DENSE)
    if given["preset"] is not None and given["sparsity"] is not None:
        raise ValueError(
            f"--preset {given['preset']} and --sparsity {given['sparsity']} both set the sparsity; give one"
        )
    if given["dtype"] not in (None, *_DTYPES):
        raise ValueError(f"--dtype {given['dtype']} must be one of {', '.join(_DTYPES)}")
    if given["weights"] not in (None, *_WEIGHTS):
        raise ValueError(f"--weights {given['weights']} must be one of {', '.join(_WEIGHTS)}")
    if given["weights"] is not None and given["mesh"] is None:
        raise ValueError(f"--weights {given['weights']} is for several devices; give --mesh, or leave it out")
    if given["offload"] not in (None, *get_args(Offload)):
        raise ValueError(f"--offload {given['offload']} must be one of {', '.join(get_args(Offload))}")
    if given["offload"] is not None and given["mesh"] is not None:
        raise ValueError(f"--offload {given['offload']} is for one device; on a mesh give --weights sharded")
    if given["distributed"] and given["mesh"] is None:
        raise ValueError("--distributed is for several hosts, whose devices are one mesh: give --mesh, auto for all")
    if given["distributed"]:
        refuse(given, HOSTS)
    if given["timesteps"] is not None:
        refuse(given, FEW)
    elif given["renoise"]:
        raise ValueError("--renoise goes with --timesteps, those that the model was distilled to; give them too")
    VideoSize(*(1 if given[name] is None else given[name] for name in ("frames", "height", "width")))
    SparseConfig.preset(given["preset"] or "balanced", **_changes(given))


def main(
    checkpoint: Annotated[Path, typer.Option(help="diffusers pipeline folder, converted folder, or file of a model")],
    prompt: Annotated[list[str] | None, typer.Option(help="what to show; repeat for a batch")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="text file of prompts, one a line, each sampled by itself; in place of --prompt")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="what to avoid, with guidance; default: what the model takes for none")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="a picture to animate, for image-to-video models")] = None,
    last_image: Annotated[
        Path | None, typer.Option(help="the picture that the video ends with: Wan for first and last frame")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="file of models.encode_prompt, in place of prompts and pictures")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="frames of the video; default: the model's")] = None,
    height: Annotated[int | None, typer.Option(help="pixels")] = None,
    width: Annotated[int | None, typer.Option(help="pixels")] = None,
    preset: Annotated[str | None, typer.Option(help="quality, balanced or fast; default: balanced")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: the model's")] = None,
    seed: Annotated[
        list[str] | None,
        typer.Option(help="of the initial noise, 0 to 2^64 - 1, or several: 0-3; repeatable. Default: 0"),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="share of block pairs to skip, in [0, 1)")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a block, a power of two")] = None,
    query_block_size: Annotated[
        int | None, typer.Option(help="tokens whose rows share a list of blocks; default: --block-size")
    ] = None,
    search_step: Annotated[
        list[int] | None,
        typer.Option(help="a step that searches, from 1; repeatable. Default: at 12% of steps, from 2"),
    ] = None,
    token_order: Annotated[str | None, typer.Option(help="cube or raster")] = None,
    dense_layer: Annotated[list[int] | None, typer.Option(help="a layer that stays dense, from 0; repeatable")] = None,
    dense_last_steps: Annotated[int | None, typer.Option(help="steps at the end that are dense")] = None,
    share_cfg_indices: Annotated[
        bool, typer.Option("--share-cfg-indices", help="one search for both branches of guidance")
    ] = False,
    compensation: Annotated[
        str | None, typer.Option(help="what stands for skipped blocks: none or pooled; default: pooled")
    ] = None,
    score_precision: Annotated[
        str | None,
        typer.Option(
            help="of kept blocks' scores: input, int8, fp8, or auto: 8 bits where the device multiplies them faster "
            "(int8 on Hopper and TPU v5, v6; fp8 on TPU v7x); default: the preset's"
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="guidance scale, off at 1 and below; default: the model's")
    ] = None,
    guidance_low_noise: Annotated[float | None, typer.Option(help="of Wan 2.2's second expert")] = None,
    true_cfg: Annotated[
        float | None, typer.Option(help="classifier-free guidance besides an embedded scale; default: off")
    ] = None,
    dynamic_guidance: Annotated[bool, typer.Option("--dynamic-guidance", help="CogVideoX's")] = False,
    shift: Annotated[
        float | None, typer.Option(help="time shift of a flow scheduler; default: the checkpoint's")
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(help="of a distilled flow model, in place of --steps: 1000,750,500,250, before the time shift"),
    ] = None,
    renoise: Annotated[
        bool, typer.Option("--renoise", help="with --timesteps: fresh noise in each step, for models distilled by DMD")
    ] = False,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:SCALE, a LoRA to merge, into both experts of two; repeatable")
    ] = None,
    lora_high_noise: Annotated[
        list[str] | None, typer.Option(help="the same into Wan 2.2's first expert alone; repeatable")
    ] = None,
    lora_low_noise: Annotated[
        list[str] | None, typer.Option(help="the same into its second expert alone; repeatable")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="folder of the VAE; default: that of CHECKPOINT, if any")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="dense attention only")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="run dense and AdaSpa from the same noise")] = False,
    mesh: Annotated[
        str | None, typer.Option(help="of devices: data=2,heads=4, rows=N too, or auto for all; default: one device")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="on the mesh: replicated or sharded (less memory); default: replicated")
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="what waits in the memory of the host: layers, each fetched as it runs (slower), experts, which take "
            "turns (Wan 2.2 A14B), or none; default: experts where both would fill the device, else none"
        ),
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="the mesh is of several hosts, and all of them run this command")
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="files of checkpoint and VAE may be links to elsewhere")
    ] = False,
    compile_cache: Annotated[str | None, typer.Option(help=CACHE_HELP)] = None,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/sample"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Samples one video for each prompt and seed."""
    given = dict(locals())
    _check(given)
    seeds = tuple(parse_seeds(seed))
    from models.commands.caches import keep_compiled
    from models.commands.encoders import decoded, given_prompts
    from models.commands.loras import parse_loras
    from models.commands.prepare import Options, of_latents, of_words
    from models.commands.report import summary
    from models.pipeline.guidance import Guidance
    from models.pipeline.words import takes_words

    scales = Guidance(guidance, guidance_low_noise, true_cfg, dynamic_guidance)
    options = Options(
        preset,
        _changes(given),
        (frames, height, width),
        dtype,
        shift,
        _timesteps(timesteps),
        renoise,
        scales,
        seeds,
        compare,
        dense,
        follow_links,
        mesh,
        "sharded" if weights == "sharded" else "replicated",
        offload,  # type: ignore[arg-type]
        parse_loras(given),
        debug,
    )
    found = given_prompts(prompt, prompts)
    batches = [found] if prompts is None else [[line] for line in found]
    texts = Texts(batches, None if negative_prompt is None else decoded(negative_prompt), image, last_image)
    words = takes_words(checkpoint)
    if words:
        refuse(given, WORDS)
    elif embeddings is not None:
        refuse(given, EMBEDDED)
    uncached = keep_compiled(compile_cache)
    if distributed:
        join()
    with results(out, sparing(out, embeddings)) if is_first() else nullcontext() as written:
        if words:
            runs = of_words(checkpoint, texts, options)
        else:
            runs = of_latents(checkpoint, texts, embeddings, vae, options)
        console = stderr()
        if uncached:
            console.print(uncached, highlight=False, markup=False, soft_wrap=True)
        if (sharding := runs.pipeline.sharding) is not None:
            sizes = ", ".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
            console.print(f"sampling on {sharding.mesh.size} devices: {sizes}", highlight=False)
        runs.begin(written)
        for job in runs.jobs:
            with nullcontext() if written is None else written.of_run(job.name) as folder:
                samples: dict[str, Any] = {}
                for name in ("dense" if kind else "AdaSpa" for kind in options.kinds):
                    samples[name] = timed(console, name, runs, job)
                    runs.keep(folder, job, samples)
                report = runs.show(folder, job, samples)
            console.print(f"{job.title}{summary(report)}", highlight=False, markup=False)
        runs.end(written)
    console.print(f"wrote {out}", highlight=False, markup=False)
    if not runs.shown:
        console.print("no VAE here: decode with python -m models.decode --checkpoint PIPELINE --latents ...")


if __name__ == "__main__":
    logging.getLogger("jax").setLevel(logging.ERROR)
    run_cli(main)
