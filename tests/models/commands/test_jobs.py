"""Several prompts and seeds: what is given, how runs are named, what OUT holds of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import decode, sample
from models.commands.encoders import given_prompts
from models.commands.jobs import MOST, make_jobs, parse_seeds, split
from models.pipeline.latents import read_latents
from models.pipeline.video import VideoPipeline
from tests.models.commands.fakes import WORDS, Fakes, call, latent_arguments

RUN = ["latents.safetensors", "report.json", "sheet.png", "video.gif", "video.mp4"]


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        (None, [0]),
        (["7"], [7]),
        (["0", "7"], [0, 7]),
        (["0-3"], [0, 1, 2, 3]),
        (["5-5", "2-3", "0"], [5, 2, 3, 0]),
        ([f"{2**64 - 2}-{2**64 - 1}"], [2**64 - 2, 2**64 - 1]),
    ],
)
def test_seeds_repeat_or_are_a_range(given: Any, seeds: list[int]) -> None:
    assert parse_seeds(given) == seeds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["-1"], r"seed=-1 must be a whole number in 0 .. 2\^64 - 1"),
        ([str(2**64)], f"seed={2**64}"),
        ([f"0-{2**64}"], f"seed={2**64}"),
        (["3-1"], "--seed 3-1: a range goes up"),
        ([f"0-{MOST}"], "by fewer than 10000"),
        (["x"], "--seed x is neither a whole number nor a range such as 0-3"),
        (["1.5"], "neither a whole number"),
        ([""], "neither a whole number"),
        (["1-"], "neither a whole number"),
        (["2", "0-3"], "--seed 2 is given twice"),
    ],
)
def test_what_is_no_seed_is_named(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_seeds(given)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n  une étoile 🌟\nx\x0by\n".encode())
    assert given_prompts(None, file) == ["a cat", "  une étoile 🌟", "x\x0by"]
    assert given_prompts(["a", "b"], None) == ["a", "b"]
    assert given_prompts(None, None) == []
    for content, message in (
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\n\n", "line 2 is empty"),
        (b"a\n \t\r\nb", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"\xff\xfe", "is no text in UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"--prompts .*prompts\.txt:? {message}"):
            given_prompts(None, file)
    for path, message in ((tmp_path / "no", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=rf"--prompts .* cannot be read \({message}"):
            given_prompts(None, path)
    with pytest.raises(ValueError, match="exclude each other"):
        given_prompts(["a"], file)


def test_runs_have_clear_names() -> None:
    x = np.arange(3.0)[:, None]
    names = lambda batches, seeds: [job.name for job in make_jobs([(b, {}) for b in batches], seeds)]
    assert names([["a cat", "a dog"]], [3]) == [""]
    assert names([["a cat"]], [3, 7]) == ["seed-3", "seed-7"]
    assert names([["A cat, on a roof!"], ["星"]], [3]) == ["01-a-cat-on-a-roof", "02"]
    assert names([["word " * 20], ["b"]], [0, 1])[:2] == [f"01-{'-'.join(['word'] * 8)}-seed-{s}" for s in (0, 1)]
    assert names([["a"]] * 100, [0])[0] == "001-a"
    with pytest.raises(ValueError, match="more than 10000 runs"):
        make_jobs([(["a"], {})] * 101, range(100))
    (one, two) = split({"x": x}, [["a", "b"], ["c"]])
    assert (one[0], one[1]["x"].tolist()) == (["a", "b"], [[0], [1]])
    assert (two[0], two[1]["x"].tolist()) == (["c"], [[2]])


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_each_run_has_a_folder_and_all_have_a_sheet(
    tiny_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    lines, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines.write_text("red circle moving left\ngreen ring moving down\n")
    given = ["--checkpoint", tiny_pipeline, *WORDS[2:], "--out", out]
    assert call(monkeypatch, sample.main, *given, "--prompts", lines, "--seed", "0-1") == 0
    folders = ["01-red-circle-moving-left", "02-green-ring-moving-down"]
    names = [f"{name}-seed-{seed}" for name in folders for seed in (0, 1)]
    assert listed(out) == sorted(["runs.json", "sheet.png", *(f"{name}/{file}" for name in names for file in RUN)])
    assert [run["folder"] for run in json.loads((out / "runs.json").read_text())] == names
    reports = [json.loads((out / name / "report.json").read_text()) for name in names]
    assert [(report["prompts"], report["seed"]) for report in reports] == [
        ([prompt], seed) for prompt in lines.read_text().splitlines() for seed in (0, 1)
    ]
    assert [report["adaspa_compile_seconds"] for report in reports] == [1, 0, 0, 0]
    assert read_latents(out / names[2] / RUN[0]).prompts == ["green ring moving down"]
    assert f"{names[3]}: AdaSpa: 2.0 s\n" in capsys.readouterr().err

    again = ["--checkpoint", tiny_pipeline, "--latents", out / names[0] / RUN[0], "--out"]
    assert call(monkeypatch, decode.main, *again, out) == 2
    assert "holds the results of several runs" in capsys.readouterr().err
    assert call(monkeypatch, decode.main, *again, out / names[0]) == 0

    (out / names[0] / "mine.txt").touch()
    assert call(monkeypatch, sample.main, *given, *WORDS[:2], "--seed", 5) == 0
    assert listed(out) == sorted([f"{names[0]}/mine.txt", *RUN])
    assert json.loads((out / "report.json").read_text())["seed"] == 5


def test_a_list_of_runs_leads_nowhere_else(tiny_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "other").mkdir()
    (out / "linked").symlink_to(tmp_path / "other")
    kept = [tmp_path / "report.json", tmp_path / "other/report.json"]
    for file in kept:
        file.touch()
    listing = [{"folder": name} for name in ("..", "../other", "linked", ".", "")]
    for text in (json.dumps(listing), "{", "[1]", '{"folder": "x"}'):
        (out / "runs.json").write_text(text)
        assert call(monkeypatch, sample.main, "--checkpoint", tiny_pipeline, *WORDS, "--out", out) == 0
        assert all(file.exists() for file in kept)
        assert not (out / "runs.json").exists()


def test_what_is_done_outlives_a_run_that_fails(
    wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    done: list[int] = []

    def latents(dense: bool, shape: tuple[int, ...]) -> np.ndarray:
        done.append(1)
        return np.full(shape, np.nan if len(done) == 2 else 0, np.float32)

    fakes.latents = latents
    given = ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", tmp_path / "out", "--seed", "0-2"]
    assert call(monkeypatch, sample.main, *given) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"kept in {tmp_path / 'out/seed-1'}: latents.safetensors, report.json" in line
    assert f"kept in {tmp_path / 'out'}: runs.json, seed-0/" in line
    assert len(done) == 2
    assert (tmp_path / "out/seed-0/video.mp4").exists()


def test_bad_input_among_many_is_found_before_weights_are_read(
    tiny_pipeline: Path, wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    lines = tmp_path / "prompts.txt"
    monkeypatch.setattr(VideoPipeline, "with_weights", None)
    monkeypatch.setattr(VideoPipeline, "compile", None)
    words = ["--checkpoint", tiny_pipeline, *WORDS[2:], "--prompts", lines]
    for content, given, message in (
        ("red circle moving left\nred dinosaur moving left\n", words, "unknown words 'dinosaur'"),
        ("red circle moving left\n\n", words, "line 2 is empty"),
        ("x", [*words, "--prompt", "red circle moving left"], "exclude each other"),
        ("x", ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--prompts", lines], "--embeddings FILE"),
    ):
        lines.write_text(content)
        assert call(monkeypatch, sample.main, *given, "--out", tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()
