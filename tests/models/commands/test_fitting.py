"""A run that cannot fit says so before it samples, with the nearest that can. The limits are made up."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

from models import sample
from models.commands import prepare
from models.commands.fitting import device_limit, nearest_frames
from models.commands.runs import Runs
from models.pipeline.embeddings import write_tensors
from models.pipeline.program import bytes_of
from models.pipeline.video import VideoPipeline
from tests.models.commands.fakes import call, latent_arguments
from tests.models.pipeline.test_video import CASES

LONG = ("--frames", 41, "--steps", 2, "--dense")


@pytest.fixture
def run(wan_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Samples with a limit; the exit code and the last line."""

    def run(limit: int | None, *given: Any) -> tuple[int, str]:
        monkeypatch.setattr(prepare, "device_limit", lambda: limit)
        arguments = ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", tmp_path / "out"]
        code = call(monkeypatch, sample.main, *arguments, *given)
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    return run


def planned(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out/report.json").read_text())["memory"]


def test_a_run_that_cannot_fit_names_one_that_does(run: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Runs, "with_decoder", lambda self: self)  # the VAE is as large as the model here
    assert run(None, *LONG)[0] == 0
    need = planned(tmp_path)["planned_device_bytes"]
    assert run(need, *LONG)[0] == 0  # just so
    limit = int(0.85 * need)
    with monkeypatch.context() as patch:
        patch.setattr(VideoPipeline, "sample", None)
        code, line = run(limit, *LONG)
    assert code == 2
    assert re.search(
        r"to sample, this run needs .* MiB of a device \(weights .* MiB, latents and lists .*, work .*\) that has", line
    )
    assert "--offload layers" in line
    match = re.search(r"the nearest that fits is --frames (\d+)", line)
    assert match, line
    fits = int(match[1])
    assert 5 <= fits < 41
    assert run(limit, *LONG, "--frames", fits)[0] == 0
    assert limit - need / 4 < planned(tmp_path)["planned_device_bytes"] <= limit


def test_weights_that_do_not_fit_are_not_read(run: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(VideoPipeline, "with_weights", None)
    monkeypatch.setattr(VideoPipeline, "compile", None)
    code, line = run(100_000)
    assert code == 2
    assert "error: the weights take" in line
    assert "--offload layers" in line
    assert not (tmp_path / "out").exists()


def test_layers_that_wait_need_less(run: Any, tmp_path: Path) -> None:
    assert run(None, "--dense", "--steps", 2)[0] == 0
    whole = planned(tmp_path)
    assert run(None, "--dense", "--steps", 2, "--offload", "layers")[0] == 0
    layers = planned(tmp_path)
    assert (whole["offload"], layers["offload"]) == ("none", "layers")
    assert layers["planned_device_bytes"] < whole["planned_device_bytes"]


def test_nothing_fits(run: Any) -> None:
    code, line = run(1_000_000, *LONG)
    assert code == 2
    assert "the weights take" in line or "no length fits at this height and width" in line


@pytest.mark.parametrize(("given", "message"), [(["disk"], "must be one of"), (["experts"], "this one has one")])
def test_what_cannot_wait_is_named(given: list[str], message: str, run: Any, monkeypatch) -> None:
    monkeypatch.setattr(VideoPipeline, "with_weights", None)
    code, line = run(None, "--offload", *given)
    assert code == 2
    assert message in line
    code, line = run(None, "--offload", "layers", "--mesh", "heads=1")
    assert (code, "is for one device; on a mesh give --weights sharded" in line) == (2, True)


def test_experts_take_turns_where_both_would_fill_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder, embeddings, *_ = CASES["Wan 2.2 A14B"][0](tmp_path / "wan")
    write_tensors(folder / "prompts.safetensors", embeddings)
    arguments = ["--checkpoint", folder, *latent_arguments(folder), "--out", tmp_path / "out"]
    weights = bytes_of([nnx.state(expert) for expert in VideoPipeline.describe(folder).experts])
    needs = {}
    for limit, offload in ((None, "none"), (1 << 40, "none"), (int(1.6 * weights), "experts")):
        monkeypatch.setattr(prepare, "device_limit", lambda limit=limit: limit)
        assert call(monkeypatch, sample.main, *arguments) == 0, capsys.readouterr().err
        found = planned(tmp_path)
        assert found["offload"] == offload
        needs[offload] = found["planned_device_bytes"]
    assert needs["experts"] < needs["none"]


@pytest.mark.parametrize("limit", [*range(60, 1200, 37), 10_000])
@pytest.mark.parametrize("curve", [lambda n: 50 + 7 * n, lambda n: 50 + n * n // 20, lambda n: 50 + 40 * n**0.5])
def test_the_nearest_length(limit: int, curve: Any) -> None:
    asked: list[int] = []

    def need(frames: int) -> int:
        asked.append(frames)
        return int(curve(frames))

    found = nearest_frames(need, 129, need(129), 1, 4, limit)
    assert len(asked) <= 6
    if found is None:
        assert curve(1) > limit
    else:
        assert found in range(1, 129, 4)
        assert int(curve(found)) <= limit


def test_a_cpu_has_no_limit() -> None:
    assert device_limit() is None


def test_a_decoder_that_needs_more_than_the_sampler_counts(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("--frames", 5, "--steps", 2, "--dense")
    assert run(None, *short)[0] == 0
    sampling = planned(tmp_path)["planned_device_bytes"]
    assert run(1 << 40, *short)[0] == 0
    decoding = planned(tmp_path)["planned_device_bytes"]
    assert decoding > 1.01 * sampling
    with monkeypatch.context() as patch:
        patch.setattr(VideoPipeline, "sample", None)
        code, line = run((sampling + decoding) // 2, *short)
    assert code == 2
    assert re.search(r"to decode, this run needs .* the decoder .*; the nearest that fits is --frames 1;", line), line
    assert run((sampling + decoding) // 2, *short, "--frames", 1)[0] == 0


def test_a_failed_command_compiles_no_more(wan_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []

    def compiling(self: Any, *given: Any, dense: bool, **options: Any) -> None:
        begun.append(dense)
        time.sleep(1)

    def failing(*given: Any, **options: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(VideoPipeline, "compile", compiling)
    monkeypatch.setattr(VideoPipeline, "with_weights", failing)
    arguments = ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", tmp_path / "out", "--compare"]
    assert call(monkeypatch, sample.main, *arguments) == 2
    time.sleep(1.5)
    assert begun == [True]
