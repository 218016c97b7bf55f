"""Two hosts of four virtual devices run one command over gloo: one device's latents, files from the first alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.commands import hosts
from models.pipeline.latents import read_latents
from tests.models.test_sample_latents import arguments


def run(host: int | None, port: int, *options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    if host is not None:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", hosts.COUNT: "2", hosts.OWN: str(host)}
        environment |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, "-m", "models.sample", *map(str, options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def test_two_hosts_sample_what_one_device_does(wan_pipeline: Path, tmp_path: Path, port: int) -> None:
    given = [*arguments(wan_pipeline, tmp_path / "out")[:-2], "--seed", 3, "--steps", 5]
    mesh = ["--mesh", "data=2,heads=2,rows=2", "--weights", "sharded", "--distributed"]
    both = [run(host, port, *given, *mesh, "--out", tmp_path / f"host{host}") for host in (0, 1)]
    ended = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert "sampling on 8 devices: data=2, rows=2, heads=2" in ended[0][1]
    assert not ended[1][1]
    assert not (tmp_path / "host1").exists()
    written = {file.name for file in (tmp_path / "host0").iterdir()}
    assert written == {"latents.safetensors", "report.json", "sheet.png", "video.mp4"}
    alone = run(None, port, *given, "--out", tmp_path / "alone")
    said = alone.communicate()
    assert alone.returncode == 0, said
    latents = lambda out: read_latents(tmp_path / out / "latents.safetensors").runs["AdaSpa"]
    got, expected = latents("host0"), latents("alone")
    assert np.linalg.norm(got - expected) < 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({hosts.COUNT: "two", hosts.OWN: "0"}, "JAX_NUM_PROCESSES='two' is no number"),
        ({hosts.COUNT: "2"}, "go together; set both, or neither"),
        ({}, "do not find each other .* set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_hosts_that_cannot_find_each_other(environment: dict[str, str], message: str, monkeypatch: Any) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        hosts.join()
