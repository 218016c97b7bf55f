"""Samples videos from a checkpoint, dense, with AdaSpa, or both side by side.

    python -m models.sample --checkpoint CKPT --prompt "red circle moving left" --compare --out out/run
    python -m models.sample --checkpoint CKPT --embeddings prompts.safetensors --preset balanced --out out/run

A checkpoint with a word encoder, such as the embedded one, takes prompts; all others take the embeddings that
`python -m models.encode_prompt` writes. OUT gets video.mp4, sheet.png and report.json; of latents also
latents.safetensors, for `python -m models.decode`; of a small sparse run blocks.png.
"""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.commands.cli import run_cli
from models.commands.files import staged

console = Console(stderr=True)
_DTYPES = ("float32", "bfloat16")
MASS_LIMIT = 1 << 30
"""Of the block mass kept for blocks.png, in bytes."""


def timed(name: str, steps: int, sample: Any, **options: Any) -> Any:
    """One run with a progress bar over its steps."""
    columns = (TextColumn(name.ljust(7)), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps)
        # Callbacks may come out of order; the bar only ever moves forward.
        done = lambda step: bar.update(task, completed=max(step, bar.tasks[0].completed))
        run = sample(progress=done, **options)
    console.print(f"{name}: {run.seconds:.1f} s, and {run.compile_seconds:.1f} s to compile", highlight=False)
    return run


def _overrides(**options: Any) -> dict[str, Any]:
    """The options of SparseConfig that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def main(
    checkpoint: Annotated[Path, typer.Option(help="converted folder, or a diffusers pipeline folder")],
    prompt: Annotated[list[str] | None, typer.Option(help="what to show, with a word encoder; repeatable")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="file of models.encode_prompt")] = None,
    frames: Annotated[int | None, typer.Option(help="frames of the video; default: the model's")] = None,
    height: Annotated[int | None, typer.Option(help="pixels")] = None,
    width: Annotated[int | None, typer.Option(help="pixels")] = None,
    preset: Annotated[str, typer.Option(help="quality, balanced or fast")] = "balanced",
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: the model's")] = None,
    seed: Annotated[int, typer.Option(help="seed of the initial noise")] = 0,
    sparsity: Annotated[float | None, typer.Option(help="share of block pairs to skip, in [0, 1)")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a block, a power of two")] = None,
    search_step: Annotated[
        list[int] | None, typer.Option(help="a step that searches, from 1; repeatable. Default: 20% and 60% of steps")
    ] = None,
    token_order: Annotated[str | None, typer.Option(help="cube or raster")] = None,
    dense_layer: Annotated[list[int] | None, typer.Option(help="a layer that stays dense, from 0; repeatable")] = None,
    dense_last_steps: Annotated[int | None, typer.Option(help="steps at the end that are dense")] = None,
    share_cfg_indices: Annotated[
        bool, typer.Option("--share-cfg-indices", help="one search for both branches of guidance")
    ] = False,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; default: the model's")] = None,
    guidance_low_noise: Annotated[float | None, typer.Option(help="of Wan 2.2's second expert")] = None,
    true_cfg: Annotated[float, typer.Option(help="classifier-free guidance besides an embedded scale")] = 1.0,
    dynamic_guidance: Annotated[bool, typer.Option("--dynamic-guidance", help="CogVideoX's")] = False,
    shift: Annotated[
        float | None, typer.Option(help="time shift of a flow scheduler; default: the checkpoint's")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="folder of the VAE; default: that of CHECKPOINT, if any")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="dense attention only")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="run dense and AdaSpa from the same noise")] = False,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/sample"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Samples one video for each prompt."""
    if dense and compare:
        raise ValueError("--dense and --compare exclude each other; --compare runs dense too")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype} must be one of {', '.join(_DTYPES)}")
    from adaspa_jax import SparseConfig
    from models.commands.runs import LatentRuns, WordRuns, takes_words

    changes = _overrides(
        sparsity=sparsity,
        block_size=block_size,
        steps=steps,
        search_steps=tuple(search_step or ()),
        token_order=token_order,
        dense_layers=tuple(dense_layer or ()),
        dense_last_steps=dense_last_steps,
        share_cfg_indices=share_cfg_indices or None,
    )
    SparseConfig.preset(preset, **changes)  # refuses bad values before anything is loaded
    words = takes_words(checkpoint)
    with staged(out) as stage:
        runs: WordRuns | LatentRuns
        if words:
            runs = WordRuns.load(checkpoint, prompt, preset, changes, dtype)
        else:
            from models.pipeline.video import Guidance

            scales = Guidance(guidance, guidance_low_noise, true_cfg, dynamic_guidance)
            runs = LatentRuns.load(checkpoint, embeddings, preset, changes, dtype, shift, scales, vae)
            runs = runs.sized(frames, height, width)
        found = {}
        if dense or compare:
            found["dense"] = timed("dense", runs.config.steps, runs.sample, seed=seed, dense=True)
        if not dense:
            keep = runs.mass_bytes() <= MASS_LIMIT
            found["AdaSpa"] = timed("AdaSpa", runs.config.steps, runs.sample, seed=seed, keep_mass=keep)
        report = runs.write(stage, found, seed)
        (stage / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    console.print(f"{runs.summary(report)}\nwrote {out}", highlight=False)


if __name__ == "__main__":
    logging.getLogger("jax").setLevel(logging.ERROR)
    run_cli(main)
