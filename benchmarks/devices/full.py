"""HunyuanVideo 13B, all 60 layers, from a folder to an mp4 on all devices of this machine: seconds by phase.

    python -m benchmarks.devices.full [--mesh auto] [--steps 4] [--json FILE]

A synthetic checkpoint (`benchmarks.synthetic`, 26 GB on disk) goes through `python -m models.sample`, as a user runs it
at 720p x 129 frames. Random weights: the video is noise, the work is that of a real one.
"""

import json as json_module
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.synthetic import write_hunyuan_video
from benchmarks.table import show, write_json
from models.commands.cli import run_cli


def main(
    mesh: Annotated[str, typer.Option(help="as for models.sample")] = "auto",
    weights: Annotated[str, typer.Option(help="as for models.sample")] = "replicated",
    steps: Annotated[int, typer.Option(help="denoising steps")] = 4,
    block_size: Annotated[int, typer.Option(help="tokens of a block")] = 64,
    json: Annotated[Path | None, typer.Option(help="write the row to this file")] = None,
) -> None:
    """Writes the checkpoint, samples from it, and says where the seconds went."""
    with tempfile.TemporaryDirectory(prefix="adaspa-full-") as name:
        folder, out = Path(name) / "pipeline", Path(name) / "out"
        begun = time.perf_counter()
        size, embeddings = write_hunyuan_video(folder)
        print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - begun:.0f} s", flush=True)
        options = ["--checkpoint", folder, "--embeddings", embeddings, "--steps", steps, "--block-size", block_size]
        options += ["--mesh", mesh, "--weights", weights, "--out", out]
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "models.sample", *map(str, options)], check=True)
        total = time.perf_counter() - begun
        report = json_module.loads((out / "report.json").read_text(encoding="utf-8"))
        row = {"what": f"720p x 129 frames, {steps} steps, mesh {mesh}, {weights} weights", "total_seconds": total}
        row |= report["phases"] | {name: x for name, x in report.items() if name.endswith("_seconds")}
        row |= report["memory"] | {"mp4_bytes": (out / "video.mp4").stat().st_size}
    show("HunyuanVideo 13B from folder to mp4, random weights", [row])
    write_json(json, [row])


if __name__ == "__main__":
    run_cli(main)
