"""The command: `python -m convert SRC DST [--dtype float32|bfloat16] [--overwrite] [--follow-links]`."""

import logging
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from models.commands.cli import run_cli

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def main(
    src: Annotated[Path, typer.Argument(help="folder of a transformer or pipeline, or a file of weights")],
    dst: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's own")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier conversion")] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="the files of SRC may be links to elsewhere")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Converts a PyTorch video DiT checkpoint for the Flax ports."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} must be one of {', '.join(DTYPES)}")
    from convert.writer import convert

    console = Console(stderr=True)
    columns = (TextColumn("converting"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("converting", total=None)
        done = lambda written, total: bar.update(task, completed=written, total=total)
        stored = DTYPES[dtype] if dtype else None
        convert(src, dst, dtype=stored, overwrite=overwrite, progress=done, follow_links=follow_links)
    console.print(f"wrote {dst}: {bar.tasks[0].total:,} parameters", highlight=False)


if __name__ == "__main__":
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # names at exit what failed beside the first error
    run_cli(main)
