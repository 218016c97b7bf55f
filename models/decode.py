"""Decodes latents that `python -m models.sample` saved.

    python -m models.decode --checkpoint PIPELINE --latents out/run/latents.safetensors --out out/decoded

Writes, for each run in the file, its videos into OUT: video.mp4 and sheet.png with the runs side by side.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from models.commands.cli import run_cli
from models.commands.files import staged

console = Console(stderr=True)


def main(
    checkpoint: Annotated[Path, typer.Option(help="diffusers pipeline folder, or its vae/")],
    latents: Annotated[Path, typer.Option(help="latents.safetensors of models.sample")],
    dtype: Annotated[str, typer.Option(help="of the decoder: float32, bfloat16 or float16")] = "float32",
    fps: Annotated[int | None, typer.Option(help="playing speed; default: that of the model")] = None,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/decoded"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Decodes saved latents to video."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} must be float32, bfloat16 or float16")
    if fps is not None and fps < 1:
        raise ValueError(f"--fps {fps} must be at least 1")
    from models.pipeline.latents import read_latents

    saved = read_latents(latents)
    with staged(out) as stage:
        from models.commands.media import write_runs
        from models.commands.runs import decode_runs

        videos = decode_runs(checkpoint, saved, dtype)
        write_runs(stage, videos, saved.prompts, fps or saved.fps)
    console.print(f"wrote {out}", highlight=False)


if __name__ == "__main__":
    logging.getLogger("jax").setLevel(logging.ERROR)
    run_cli(main)
