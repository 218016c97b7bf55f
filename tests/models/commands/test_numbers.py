"""Every number of an option is checked for what it means before weights are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import decode, sample, schedulers
from models.pipeline.latents import SavedLatents, write_latents
from models.pipeline.video import VideoPipeline
from models.schedulers import CogVideoXDPM, FewStep
from tests.models.commands.fakes import Fakes, call, latent_arguments

SAMPLE: dict[str, list[tuple[Any, str]]] = {
    "frames": [(0, "frames=0 must be"), (-1, "frames=-1"), (10, "the nearest is")],
    "height": [(0, "height=0"), (-16, "height=-16"), (47, "the nearest is")],
    "width": [(0, "width=0"), (81, "the nearest is")],
    "steps": [(0, "steps=0 must be at least 1"), (-3, "steps=-3")],
    "seed": [(-1, "seed=-1 must be a whole number in 0 .. 2^64 - 1"), (2**64, f"seed={2**64}")],
    "sparsity": [(1, "must be in [0, 1)"), ("nan", "sparsity=nan"), (-0.1, "sparsity=-0.1"), ("inf", "sparsity=inf")],
    "block-size": [(0, "block_size=0"), (48, "a power of two"), (-16, "block_size=-16")],
    "query-block-size": [
        (8, "query_block_size=8 must be a power of two and at least block_size="),
        (192, "power of two"),
    ],
    "search-step": [(0, "must be in 1 .. steps=6"), (7, "must be in 1 .. steps=6"), (-1, "search_steps=(-1,)")],
    "dense-layer": [(-1, "must not be negative"), (2, "below the model's 2 layers")],
    "dense-last-steps": [(-1, "must be in 0 .. steps=6"), (7, "must be in 0 .. steps=6")],
    "guidance": [("nan", "scale=nan must be finite"), ("inf", "scale=inf"), (-1, "scale=-1.0")],
    "guidance-low-noise": [("nan", "low_noise=nan")],
    "true-cfg": [("nan", "true_cfg=nan"), (-2, "true_cfg=-2.0")],
    "timesteps": [
        ("x", "--timesteps x must be numbers with commas"),
        ("1000,,500", "must be numbers with commas"),
        ("500,1000", "timesteps=500,1000 must fall from at most 1000 and end above 0"),
        ("1001,1", "must fall from at most 1000"),
        ("1000,0", "end above 0"),
        ("1000,nan", "must fall"),
        ("inf,1", "must fall"),
    ],
    "shift": [(0, "shift=0.0 must be positive"), (-1, "shift=-1.0"), ("nan", "shift=nan"), ("inf", "shift=inf")],
}
DECODE: dict[str, list[tuple[Any, str]]] = {
    "fps": [(0, "--fps 0 must be in 1 .. 1000"), (-1, "--fps -1"), (10**6, "--fps 1000000")],
}


def refused(command: Any, arguments: list[Any], message: str, monkeypatch: Any, capsys: Any) -> None:
    assert call(monkeypatch, command.main, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(("option", "value", "message"), [(o, *case) for o, cases in SAMPLE.items() for case in cases])
def test_numbers_of_sample(
    option: str, value: Any, message: str, wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(VideoPipeline, "with_weights", None)
    given = ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", tmp_path / "out"]
    if option == "timesteps":  # they say how many steps there are
        del given[(steps := given.index("--steps")) : steps + 2]
    refused(sample, [*given, f"--{option}", value], message, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value", "message"), [(o, *case) for o, cases in DECODE.items() for case in cases])
def test_numbers_of_decode(option: str, value: Any, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    refused(decode, ["--checkpoint", "x", "--latents", "x", f"--{option}", value], message, monkeypatch, capsys)


def test_few_steps_are_of_flow_models_and_say_how_many(
    wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    given = ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", tmp_path / "out"]
    refused(sample, [*given, "--timesteps", "1000,500"], "--timesteps say how many there are", monkeypatch, capsys)
    del given[(steps := given.index("--steps")) : steps + 2]
    for flags in ((), ("--renoise",)):
        assert call(monkeypatch, sample.main, *given, "--timesteps", "1000,500", "--shift", 1, *flags) == 0
        scheduler, report = fakes.calls[-2][0], json.loads((tmp_path / "out/report.json").read_text())
        assert scheduler == FewStep((1000, 500), 1, bool(flags))
        assert (report["steps"], report["timesteps"], report["renoise"]) == (2, [1000, 500], bool(flags))
    capsys.readouterr()
    monkeypatch.setattr(schedulers, "from_config", lambda config: CogVideoXDPM())
    refused(sample, [*given, "--timesteps", "1000,500"], "CogVideoXDPM takes none", monkeypatch, capsys)


def test_search_steps_among_the_last_dense_ones_are_refused(
    wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    given = ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", tmp_path / "out"]
    options = ["--search-step", 1, "--search-step", 5, "--dense-last-steps", 2]
    refused(sample, [*given, *options], "the last 2 of 6 steps are dense", monkeypatch, capsys)


@pytest.mark.parametrize(
    ("field", "value"), [("fps", 0), ("fps", 2.5), ("skip_frames", -1), ("skip_frames", 9), ("prompts", ["a", "b"])]
)
def test_latents_that_say_nonsense_are_no_latents(field: str, value: Any, tmp_path: Path, monkeypatch, capsys) -> None:
    fields = {"prompts": ["a cat"], "fps": 8, "skip_frames": 4} | {field: value}
    write_latents(tmp_path / "x", SavedLatents({"dense": np.zeros((1, 4, 3, 4, 4), np.float32)}, **fields))
    given = ["--checkpoint", "x", "--latents", tmp_path / "x", "--out", tmp_path / "out"]
    refused(decode, given, f"--latents {tmp_path / 'x'}", monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
