"""A conversion killed at any moment leaves DST absent or complete; its memory does not grow with the checkpoint."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from flax import nnx
from safetensors.numpy import save_file

import models
from convert.writer import convert
from models.checkpoint.loading import open_source
from models.checkpoint.safetensors_folder import SINGLE
from tests.matrix import only

DEMO = Path(models.__file__).parent / "demo" / "checkpoint"

# Runs the command, and kills it without warning at the n-th call of one function that changes the disk.
KILLED = """
import os, signal, sys
from unittest import mock
from convert import __main__, writer
from models.commands.cli import run_cli
from tests.matrix import only

name, calls, when = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
owner = {"save": writer.ocp.partial, "finalize": writer.ocp.partial, "rename": writer.os, "copyfile": writer.shutil}
function, seen = getattr(owner[name], name), 0

def kill(*args, **kwargs):
    global seen
    seen += name != "rename" or str(args[0]).endswith(("/out", "/.out.partial"))  # not orbax's own renames
    if seen == calls and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    function(*args, **kwargs)
    if seen == calls and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)

with mock.patch.object(owner[name], name, kill):
    run_cli(__main__.main)
"""


def values(folder: Path) -> dict:
    return {
        ".".join(map(str, path)): np.asarray(leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(models.from_pretrained(folder)))
    }


@pytest.mark.parametrize(
    ("function", "call", "when"),
    only(
        {("save", 1, "after"), ("finalize", 1, "before"), ("rename", 1, "after"), ("rename", 2, "before")},
        [("save", 1, "before"), ("save", 1, "after"), ("finalize", 1, "before"), ("copyfile", 2, "after")]
        + [("rename", call, when) for call in (1, 2) for when in ("before", "after")],
    ),
)
def test_killed_at_any_moment_the_destination_is_absent_or_complete(
    function: str, call: int, when: str, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    convert(DEMO, target)  # so that an overwriting run is killed, which has one more moment
    before = values(target)
    command = [sys.executable, "-c", KILLED, function, str(call), when, str(DEMO), str(target), "--overwrite"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=DEMO.parents[2])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    for _ in range(2):  # as the killed run left it, then run again
        if target.exists():
            found = values(target)
            assert found.keys() == before.keys()
            for key, value in found.items():
                np.testing.assert_array_equal(value, before[key])
        convert(DEMO, target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Peak of private memory over what imports take, read while the conversion runs.
MEASURED = """
import sys, threading, time
from pathlib import Path
from convert.writer import convert
from tests.matrix import only

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

start, peak = anonymous(), 0.0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak - start)
"""


def large_checkpoint(folder: Path) -> None:
    """A bfloat16 checkpoint of about 800 MB in the architecture of HunyuanVideo."""
    options = json.loads((DEMO / "transformer" / "config.json").read_text()) | {
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "rope_axes_dim": [16, 24, 24],
        "num_layers": 24,
        "num_single_layers": 48,
        "mlp_ratio": 4.0,
    }
    ignored = {key: value for key, value in options.items() if not key.startswith("_")}
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in HunyuanVideoTransformer3DModel(**ignored).state_dict().items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options))
    save_file({k: np.full(shape, 0.5, ml_dtypes.bfloat16) for k, shape in shapes.items()}, folder / SINGLE)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_bounded_by_the_largest_parameter(tmp_path: Path) -> None:
    large_checkpoint(tmp_path / "src")
    source = open_source(tmp_path / "src")
    sizes = [leaf.size * source.dtype.itemsize / 2**20 for leaf in source.leaves]
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "src"), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=DEMO.parents[2])
    assert ended.returncode == 0, ended.stderr
    peak = float(ended.stdout.split()[-1])
    print(f"peak {peak:.0f} MiB, largest {max(sizes):.0f}, all {sum(sizes):.0f}")
    assert sum(sizes) > 6 * max(sizes)
    # The parameter, orbax's copies of it, and its buffers.
    assert peak < 3 * max(sizes) + 100
