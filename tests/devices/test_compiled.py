"""HunyuanVideo-13B's sampler through the real compilers for machines that are not there: what is sent, what fits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.devices.compiled import MACHINES, SMALL_MB, collectives
from benchmarks.table import rows_of


def row(machine: str, folder: Path) -> dict[str, Any]:
    file = folder / "rows.json"
    command = [sys.executable, "-m", "benchmarks.devices.compiled", "--machine", machine, "--json", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "NOTHING RAN" in ended.stdout
    return json.loads(file.read_text())[0]


@pytest.mark.parametrize(
    "machine", ["h100-8", *(pytest.param(m, marks=pytest.mark.matrix) for m in MACHINES if m[0] == "v")]
)
def test_two_layers_for_a_machine(machine: str, tmp_path: Path) -> None:
    """Four all-to-alls a layer, q, k, v and out; nothing large gathered; all 60 layers fit."""
    found = row(machine, tmp_path)
    assert found["all_60_gib"] < 0.9 * found["of_gib"], found
    if machine.startswith("h100"):  # a TPU's program cannot be printed
        assert found["all_to_alls"] == 8, found
        assert found["largest_gather_mb"] < SMALL_MB, found


@pytest.mark.matrix
def test_two_experts_fit_one_gpu_in_turns() -> None:
    """Within the three quarters of 80 GB that JAX takes; both at once do not."""
    (found,) = rows_of("benchmarks.gpu.memory", "--model", "Wan 2.2 A14B")
    assert found["layers_gib"] < found["experts_gib"] < 0.75 * 79 < found["one_gib"], found


def test_collectives_are_read_from_hlo() -> None:
    text = """
      %a = bf16[1,8,4]{2,1,0} all-gather(bf16[1,1,4]{2,1,0} %x), dimensions={1}
      %b = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(f32[2,4]{1,0} %y), dimensions={0}
      %c = (bf16[4]{0}, bf16[4]{0}) all-to-all(bf16[4]{0} %p, bf16[4]{0} %q)
      %d = f32[4]{0} add(f32[4]{0} %all-gather, f32[4]{0} %all-to-all)
    """
    assert collectives(text) == [("all-gather", 64), ("all-gather", 256), ("all-to-all", 16)]
