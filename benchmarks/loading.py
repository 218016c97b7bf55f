"""How fast does a checkpoint load, and in how much memory: straight onto the device, or converted first?

    python -m benchmarks.loading [--layers N] [--json FILE]

A synthetic Wan 2.1 1.3B in bfloat16 (30 layers: 2.8 GB), in a temporary folder, loaded on the CPU backend. Every row is
a process of its own; its peak resident memory counts the pages of the file that are mapped at the moment. The pages are
in the system's cache, so that MB/s is the work of reading, transposing and checking, not of the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.synthetic import write_transformer
from benchmarks.table import show, write_json
from models.commands.cli import run_cli

ROOT = Path(__file__).parent.parent
CLASS = "WanTransformer3DModel"
OPTIONS = {"num_attention_heads": 12, "ffn_dim": 8960}

# One process of the benchmark: JSON on its last line.
WORK = """
import json, sys, time
from pathlib import Path
import jax
from flax import nnx
import models
from convert.writer import convert

task, source, target = sys.argv[1:]

def memory(name):
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

jax.block_until_ready(jax.numpy.zeros(1))
idle, begun = memory("VmRSS"), time.perf_counter()
if task == "convert":
    convert(Path(source), Path(target))
else:
    model = models.from_pretrained(source)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
seconds = time.perf_counter() - begun
print(json.dumps({"seconds": seconds, "peak": memory("VmHWM"), "idle": idle}))
"""


def work(task: str, source: Path, target: Path) -> dict[str, float]:
    """Runs one task in a fresh process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WORK, task, str(source), str(target)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if ended.returncode:
        raise ValueError(f"{task} failed: {ended.stderr.strip()[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def run(layers: int) -> list[dict[str, Any]]:
    """One row for each way."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="adaspa-loading-") as name:
        source, converted = Path(name) / "source", Path(name) / "converted"
        payload = write_transformer(source, CLASS, OPTIONS | {"num_layers": layers})
        tasks = {
            "direct": ("load", source),
            "convert": ("convert", source),
            "load converted": ("load", converted),
        }
        for title, (task, path) in tasks.items():
            result = work(task, path, converted)
            rows.append(
                {
                    "way": title,
                    "payload_GB": payload / 1e9,
                    "seconds": result["seconds"],
                    "MB_per_second": payload / 1e6 / result["seconds"],
                    "peak_GB": result["peak"] / 1e9,
                    "before_GB": result["idle"] / 1e9,
                    "peak_over_payload_GB": (result["peak"] - payload) / 1e9,
                }
            )
    return rows


def main(
    layers: Annotated[int, typer.Option(help="blocks of the model; 30 are the published ones")] = 30,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> None:
    """Times loading a Wan 2.1 1.3B checkpoint, directly and converted, and takes its peak memory."""
    if layers < 1:
        raise ValueError(f"--layers {layers} must be at least 1")
    rows = run(layers)
    show("Loading a checkpoint (Linux, CPU backend)", rows)
    write_json(json_file, rows)


if __name__ == "__main__":
    run_cli(main)
