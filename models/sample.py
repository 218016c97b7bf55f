"""Samples videos from a checkpoint, dense, with AdaSpa, or both side by side.

    python -m models.sample --checkpoint CKPT --prompt "red circle moving left" --compare --out out/run
    python -m models.sample --checkpoint CKPT --embeddings prompts.safetensors --preset balanced --out out/run

A checkpoint with a word encoder, such as the embedded one, takes prompts; all others take the embeddings that
`python -m models.encode_prompt` writes. OUT gets latents.safetensors, for `python -m models.decode`, and report.json
as soon as a run is done, and an earlier run's files go; then video.mp4 and sheet.png, and of a small sparse run
blocks.png. Exit code 1: the latents are not finite; 2: anything else that is no bug.
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.commands.cli import run_cli
from models.commands.files import results
from models.commands.hosts import is_first, join, stderr
from models.commands.options import DENSE, WORDS, is_given, refuse

_DTYPES = ("float32", "bfloat16")
_WEIGHTS = ("replicated", "sharded")


def timed(console: Console, name: str, steps: int, sample: Any, **options: Any) -> Any:
    """One run with a progress bar over its steps."""
    columns = (TextColumn(name.ljust(7)), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps)
        # Callbacks may come out of order; the bar only ever moves forward.
        done = lambda step: bar.update(task, completed=max(step, bar.tasks[0].completed))
        run = sample(progress=done, **options)
    console.print(f"{name}: {run.seconds:.1f} s, and {run.compile_seconds:.1f} s to compile", highlight=False)
    return run


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """The options of SparseConfig that were given."""
    named = {"search_step": "search_steps", "dense_layer": "dense_layers"}
    same = ("sparsity", "block_size", "query_block_size", "steps", "token_order", "dense_last_steps")
    same += ("share_cfg_indices", "compensation")  # type: ignore[assignment]
    return {named.get(name, name): given[name] for name in (*same, *named) if is_given(given[name])}


def _check(given: dict[str, Any]) -> None:
    """ValueError for options that cannot be, or not together, whatever the checkpoint."""
    from adaspa_jax import SparseConfig
    from models.pipeline.families import VideoSize
    from models.schedulers.seeds import check_seed

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
    if given["distributed"] and given["mesh"] is None:
        raise ValueError("--distributed is for several hosts, whose devices are one mesh: give --mesh, auto for all")
    check_seed(given["seed"])
    VideoSize(*(1 if given[name] is None else given[name] for name in ("frames", "height", "width")))
    SparseConfig.preset(given["preset"] or "balanced", **_changes(given))


def main(
    checkpoint: Annotated[Path, typer.Option(help="diffusers pipeline folder, converted folder, or file of a model")],
    prompt: Annotated[list[str] | None, typer.Option(help="what to show, with a word encoder; repeatable")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="file of models.encode_prompt")] = None,
    frames: Annotated[int | None, typer.Option(help="frames of the video; default: the model's")] = None,
    height: Annotated[int | None, typer.Option(help="pixels")] = None,
    width: Annotated[int | None, typer.Option(help="pixels")] = None,
    preset: Annotated[str | None, typer.Option(help="quality, balanced or fast; default: balanced")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: the model's")] = None,
    seed: Annotated[int, typer.Option(help="of the initial noise, 0 to 2^64 - 1")] = 0,
    sparsity: Annotated[float | None, typer.Option(help="share of block pairs to skip, in [0, 1)")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a block, a power of two")] = None,
    query_block_size: Annotated[
        int | None, typer.Option(help="tokens whose rows share a list of blocks; default: --block-size")
    ] = None,
    search_step: Annotated[
        list[int] | None, typer.Option(help="a step that searches, from 1; repeatable. Default: 20% and 60% of steps")
    ] = None,
    token_order: Annotated[str | None, typer.Option(help="cube or raster")] = None,
    dense_layer: Annotated[list[int] | None, typer.Option(help="a layer that stays dense, from 0; repeatable")] = None,
    dense_last_steps: Annotated[int | None, typer.Option(help="steps at the end that are dense")] = None,
    share_cfg_indices: Annotated[
        bool, typer.Option("--share-cfg-indices", help="one search for both branches of guidance")
    ] = False,
    compensation: Annotated[
        str | None, typer.Option(help="what stands for skipped blocks: none or pooled; default: none")
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
    distributed: Annotated[
        bool, typer.Option("--distributed", help="the mesh is of several hosts, and all of them run this command")
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="files of checkpoint and VAE may be links to elsewhere")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/sample"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Samples one video for each prompt."""
    given = dict(locals())
    _check(given)
    from models.commands.loras import parse_loras
    from models.commands.report import summary
    from models.commands.runs import Options, Runs
    from models.pipeline.guidance import Guidance
    from models.pipeline.words import takes_words

    scales = Guidance(guidance, guidance_low_noise, true_cfg, dynamic_guidance)
    size = (frames, height, width)
    options = Options(
        preset,
        _changes(given),
        size,
        dtype,
        shift,
        scales,
        seed,
        compare,
        dense,
        follow_links,
        mesh,
        "sharded" if weights == "sharded" else "replicated",
        parse_loras(given),
    )
    words = takes_words(checkpoint)
    if words:
        refuse(given, WORDS)
    if distributed:
        join()
    console = stderr()
    with results(out) if is_first() else nullcontext() as found:
        if words:
            runs = Runs.of_words(checkpoint, prompt, options)
        else:
            runs = Runs.of_embeddings(checkpoint, prompt, embeddings, vae, options)
        if (sharding := runs.pipeline.sharding) is not None:
            sizes = ", ".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
            console.print(f"sampling on {sharding.mesh.size} devices: {sizes}", highlight=False)
        samples = {}
        for name in ["dense"] * (dense or compare) + ["AdaSpa"] * (not dense):
            samples[name] = timed(console, name, runs.config.steps, runs.sample, dense=name == "dense")
            runs.keep(found, samples)
        report = runs.show(found, samples)
    console.print(f"{summary(report)}\nwrote {out}", highlight=False)
    if not runs.shown:
        console.print("no VAE here: decode with python -m models.decode --checkpoint PIPELINE --latents ...")


if __name__ == "__main__":
    logging.getLogger("jax").setLevel(logging.ERROR)
    run_cli(main)
