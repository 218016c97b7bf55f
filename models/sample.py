"""Samples videos from a checkpoint, dense, with AdaSpa, or both side by side.

    python -m models.sample --checkpoint CKPT --prompt "red circle moving left" --compare --out out/run

Writes video.mp4, video.gif, sheet.png and report.json into OUT, and blocks.png for a sparse run.
"""

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adaspa_jax import SparseConfig, draw_blocks
from models.cli import run_cli
from models.media import grid_frames, psnr, ssim, to_pixels, write_gif, write_mp4, write_sheet

if TYPE_CHECKING:
    from models.pipeline import HunyuanVideoPipeline, Sample

console = Console(stderr=True)


def _nearest_folder(path: Path) -> Path:
    """The deepest existing ancestor of `path`, or itself."""
    return path if path.exists() or path == path.parent else _nearest_folder(path.parent)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; its files are moved into `out` when the block ends well, else dropped.

    Raises ValueError before any work if `out` cannot be written.
    """
    parent = _nearest_folder(out.absolute())
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file")
        stage = Path(tempfile.mkdtemp(prefix=".adaspa-", dir=parent))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}); name a folder you may write to") from error
    try:
        yield stage
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(stage.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sample(
    pipeline: "HunyuanVideoPipeline", prompts: list[str], config: SparseConfig, name: str, **options: Any
) -> "Sample":
    """One run with a progress bar over its steps."""
    columns = (TextColumn(name.ljust(7)), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=config.steps)
        # Callbacks may come out of order; the bar only ever moves forward.
        done = lambda step: bar.update(task, completed=max(step, bar.tasks[0].completed))
        sample = pipeline.sample(prompts, config, progress=done, **options)
    console.print(f"{name}: {sample.seconds:.1f} s, and {sample.compile_seconds:.1f} s to compile", highlight=False)
    return sample


def _report(prompts: list[str], seed: int, config: SparseConfig, runs: dict[str, "Sample"]) -> dict[str, Any]:
    """The content of report.json."""
    fields: dict[str, Any] = {"prompts": prompts, "seed": seed, "steps": config.steps}
    for name, run in runs.items():
        key = name.lower()
        fields |= {f"{key}_seconds": run.seconds, f"{key}_compile_seconds": run.compile_seconds}
        fields["implementation"] = run.implementation
    sparse = runs.get("AdaSpa")
    if sparse is not None and sparse.report is not None:
        fields |= {
            "search_steps": list(config.search),
            "sparsity": config.sparsity,
            "density": sparse.report.density,
            "recall": sparse.report.recall,
            "tokens": {"video": sparse.layout.video_tokens, "text": sparse.layout.text, "block": sparse.layout.block},
            "details": dataclasses.asdict(sparse.report),
        }
        if "dense" in runs:
            fields |= {
                "speedup": runs["dense"].seconds / sparse.seconds,
                "psnr_db": psnr(sparse.video, runs["dense"].video),
                "ssim": ssim(sparse.video, runs["dense"].video),
            }
    return fields


def _write(folder: Path, prompts: list[str], fps: int, runs: dict[str, "Sample"], report: dict[str, Any]) -> None:
    """All files of a run."""
    rows = {name: to_pixels(run.video) for name, run in runs.items()}
    frames = grid_frames(rows, prompts)
    write_mp4(folder / "video.mp4", frames, fps)
    write_gif(folder / "video.gif", frames, fps)
    write_sheet(folder / "sheet.png", rows, prompts)
    if "AdaSpa" in runs:
        draw_blocks(runs["AdaSpa"].state, runs["AdaSpa"].layout).savefig(folder / "blocks.png", dpi=110)
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def _summary(report: dict[str, Any]) -> str:
    """The lines a person reads at the end."""
    if "speedup" in report:
        return (
            f"speed-up {report['speedup']:.2f}x, PSNR {report['psnr_db']:.1f} dB, SSIM {report['ssim']:.3f}; "
            f"sparse steps compute {report['density']:.1%} of the block pairs, with {report['recall']:.0%} of the mass"
        )
    if "density" in report:
        return f"sparse steps compute {report['density']:.1%} of the block pairs"
    return "dense run, nothing skipped"


def main(
    checkpoint: Annotated[Path, typer.Option(help="converted folder, or a diffusers pipeline folder")],
    prompt: Annotated[list[str], typer.Option(help="what to show; repeat for a batch")],
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    seed: Annotated[int, typer.Option(help="seed of the initial noise")] = 0,
    sparsity: Annotated[float, typer.Option(help="share of block pairs to skip, in [0, 1)")] = 0.8,
    block_size: Annotated[int, typer.Option(help="tokens of a block, a power of two")] = 64,
    search_step: Annotated[
        list[int] | None, typer.Option(help="a step that searches, from 1; repeatable. Default: 20% and 60% of steps")
    ] = None,
    token_order: Annotated[str, typer.Option(help="cube or raster")] = "cube",
    dense: Annotated[bool, typer.Option("--dense", help="dense attention only")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="run dense and AdaSpa from the same noise")] = False,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/sample"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Samples one video for each --prompt."""
    if dense and compare:
        raise ValueError("--dense and --compare exclude each other; --compare runs dense too")
    config = SparseConfig(
        sparsity=sparsity,
        block_size=block_size,
        steps=steps,
        search_steps=tuple(search_step) if search_step else None,
        token_order=token_order,  # type: ignore[arg-type]
    )
    with staged(out) as stage:
        from models.pipeline import HunyuanVideoPipeline

        pipeline = HunyuanVideoPipeline.load(checkpoint)
        pipeline.encoder.encode(prompt)
        runs = {}
        if dense or compare:
            runs["dense"] = _sample(pipeline, prompt, config, "dense", seed=seed, dense=True)
        if not dense:
            runs["AdaSpa"] = _sample(pipeline, prompt, config, "AdaSpa", seed=seed, keep_mass=True)
        report = _report(prompt, seed, config, runs)
        _write(stage, prompt, pipeline.size.fps, runs, report)
    console.print(f"{_summary(report)}\nwrote {out}", highlight=False)


if __name__ == "__main__":
    logging.getLogger("jax").setLevel(logging.ERROR)
    run_cli(main)
