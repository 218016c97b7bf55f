"""Decodes latents that `python -m models.sample` saved.

    python -m models.decode --checkpoint PIPELINE --latents out/run/latents.safetensors --out out/decoded

Writes the videos of all runs in the file into OUT: video.mp4 and sheet.png with the runs side by side. OUT may be the
folder of the latents; of another run's results it is refused.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from models.commands.cli import run_cli
from models.commands.files import ALL, LATENTS, VIDEOS, earlier_runs, results
from models.commands.options import CACHE_HELP, PIXELS, refuse

console = Console(stderr=True)
MAX_FPS = 1000


def _replaced(out: Path, latents: Path) -> tuple[str, ...]:
    """The files in OUT that the new ones take the place of. ValueError if OUT holds the latents of another run."""
    if earlier_runs(out):
        raise ValueError(f"--out {out} holds the results of several runs; name the folder of one, or another")
    there = out / LATENTS
    if not there.is_file():
        return ALL
    if not there.samefile(latents):
        raise ValueError(f"--out {out} holds the results of another run, with its latents; name another folder")
    return VIDEOS


def main(
    checkpoint: Annotated[Path, typer.Option(help="diffusers pipeline folder, or its vae/")],
    latents: Annotated[Path, typer.Option(help="latents.safetensors of models.sample")],
    dtype: Annotated[
        str | None, typer.Option(help="of the decoder: float32, bfloat16 or float16; default: float32")
    ] = None,
    fps: Annotated[int | None, typer.Option(help="playing speed; default: that of the model")] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="files of the VAE may be links to elsewhere")
    ] = False,
    compile_cache: Annotated[str | None, typer.Option(help=CACHE_HELP)] = None,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/decoded"),
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Decodes saved latents to video."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} must be float32, bfloat16 or float16")
    if fps is not None and not 1 <= fps <= MAX_FPS:
        raise ValueError(f"--fps {fps} must be in 1 .. {MAX_FPS}")
    from models.commands.caches import keep_compiled
    from models.commands.media import require, write_runs
    from models.commands.runs import decode_runs
    from models.pipeline.latents import read_latents
    from models.pipeline.words import takes_words

    pixels = takes_words(checkpoint)
    if pixels:
        refuse({"dtype": dtype, "follow_links": follow_links, "compile_cache": compile_cache}, PIXELS)
    saved = read_latents(latents)
    require("av")
    if not pixels and (uncached := keep_compiled(compile_cache)):
        console.print(uncached, highlight=False, markup=False, soft_wrap=True)
    with results(out, _replaced(out, latents)) as found:
        vae = None if pixels else checkpoint
        videos = decode_runs(vae, saved, dtype or "float32", follow_links=follow_links)
        write_runs(found.stage, videos, saved.prompts, fps or saved.fps, gif=pixels)
    console.print(f"wrote {out}", highlight=False)


if __name__ == "__main__":
    logging.getLogger("jax").setLevel(logging.ERROR)
    run_cli(main)
