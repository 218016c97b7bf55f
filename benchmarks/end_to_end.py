"""A published model at its full size, from a folder to an mp4, on one device or all of them: seconds by phase, memory.

    python -m benchmarks.end_to_end [--model "Wan 2.2 A14B"] [--mesh auto] [--steps 4] [--runs 2] [--json FILE]

A synthetic checkpoint (`benchmarks.synthetic`, 26 GB on disk, Wan's 57 GB) goes through `python -m models.sample`, as a
user runs it at the size that the model has by default. Random weights: the video is noise, the work is that of a real
one. Of several runs the first compiles, the others find its programs in a cache that is theirs alone.
"""

import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.synthetic import EMBEDDINGS, PIPELINES
from benchmarks.table import show, write_json
from models.checkpoint.safetensors_folder import read_json
from models.commands.cli import run_cli
from models.pipeline.mesh import parse_axes
from models.pipeline.offload import check_offload


def written(model: str, folder: Path) -> Path:
    """The pipeline of a model in `folder`, written unless it is there.

    Raises ValueError if what is there is another one, or was not written to its end.
    """
    pipeline = folder / model.lower().replace(" ", "-")
    if pipeline.exists():
        index, last = pipeline / "model_index.json", pipeline / EMBEDDINGS
        if not last.is_file() or read_json(index) != PIPELINES[model].index:
            raise ValueError(f"{pipeline} is no whole {model} of this benchmark; delete it, or give another --folder")
    else:
        begun = time.perf_counter()
        PIPELINES[model].write(pipeline)
        size = sum(file.stat().st_size for file in pipeline.rglob("*") if file.is_file())
        print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - begun:.0f} s", flush=True)
    return pipeline


def sampled(pipeline: Path, out: Path, *options: Any) -> dict[str, Any]:
    """The row of one call of `models.sample`: its phases and memory."""
    command = [sys.executable, "-m", "models.sample", "--checkpoint", pipeline, "--out", out]
    command += ["--embeddings", pipeline / EMBEDDINGS, *options]
    begun = time.perf_counter()
    if ended := subprocess.run([str(part) for part in command]).returncode:
        raise ValueError(f"models.sample ended with {ended}: what it said is above")
    total = time.perf_counter() - begun
    report = read_json(out / "report.json")
    names = ("frames", "height", "width", "steps", "implementation", "density")
    row = {name: report[name] for name in names if name in report} | {"total_seconds": total} | report["phases"]
    row |= {name: x for name, x in report.items() if name.endswith("_seconds")} | report["memory"]
    return row | {"mp4_bytes": (out / "video.mp4").stat().st_size}


def main(
    model: Annotated[str, typer.Option(help=f"of {', '.join(PIPELINES)}")] = "HunyuanVideo 13B",
    mesh: Annotated[str | None, typer.Option(help="as for models.sample; default: one device")] = None,
    weights: Annotated[str | None, typer.Option(help="as for models.sample")] = None,
    offload: Annotated[str | None, typer.Option(help="as for models.sample")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps", min=1)] = 4,
    runs: Annotated[int, typer.Option(help="of the same command, one after the other", min=1)] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="keep the checkpoint here, and take it if it is here; default: a temporary one")
    ] = None,
    write_only: Annotated[bool, typer.Option("--write-only", help="write the checkpoint to FOLDER, no more")] = False,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Writes the checkpoint, samples from it, and says where the seconds went."""
    if model not in PIPELINES:
        raise ValueError(f"--model {model!r} must be one of {', '.join(PIPELINES)}")
    if write_only and folder is None:
        raise ValueError("--write-only needs --folder, where the checkpoint stays")
    if mesh is not None:
        parse_axes(mesh)
    elif weights is not None:
        raise ValueError(f"--weights {weights} is for several devices; give --mesh, or leave it out")
    check_offload(offload or "none", PIPELINES[model].experts)  # type: ignore[arg-type]
    write_json(json, [])  # if it cannot be, then now
    with tempfile.TemporaryDirectory(prefix="adaspa-full-") as temporary, nullcontext(folder or temporary) as place:
        pipeline = written(model, Path(place))
        if write_only:
            return
        given = {"--mesh": mesh, "--weights": weights, "--offload": offload}
        options = ["--steps", steps, "--compile-cache", Path(temporary) / "compiled"]
        options += [part for name, value in given.items() if value is not None for part in (name, value)]
        about = {"model": model, **{name[2:]: value for name, value in given.items() if value is not None}}
        rows = []
        for run in range(1, runs + 1):
            rows.append(about | {"run": run} | sampled(pipeline, Path(temporary) / f"out{run}", *options))
            print(rows[-1], flush=True)
            write_json(json, rows)
    show(f"{model} from folder to mp4, random weights", rows)


if __name__ == "__main__":
    run_cli(main)
