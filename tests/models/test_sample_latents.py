"""`models.sample` and `models.decode` on models of latents, from embeddings to video files."""

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from models import decode, sample
from models.commands.cli import run_cli
from models.pipeline.embeddings import write_tensors
from models.pipeline.latents import read_latents


def call(monkeypatch: pytest.MonkeyPatch, command: Any, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_cli(command.main)
    return int(end.value.code or 0)


def arguments(folder: Path, out: Path) -> list[Any]:
    size = ["--frames", 9, "--height", 48, "--width", 80, "--steps", 6, "--block-size", 16]
    return ["--checkpoint", folder, "--embeddings", folder / "prompts.safetensors", *size, "--out", out]


def test_from_embeddings_to_video_and_decoded_again(wan_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    flags = ["--compare", "--preset", "quality", "--dense-layer", 0, "--dense-last-steps", 1, "--share-cfg-indices"]
    assert call(monkeypatch, sample, *arguments(wan_pipeline, out), *flags) == 0
    files = ["blocks.png", "latents.safetensors", "report.json", "sheet.png", "video.mp4"]
    assert sorted(p.name for p in out.iterdir()) == files
    report = json.loads((out / "report.json").read_text())
    assert report["prompts"] == ["a cat"]
    assert (report["frames"], report["height"], report["width"], report["fps"]) == (9, 48, 80, 16)
    assert report["sparsity"] == 0.7
    assert report["details"]["density_by_layer"][0] == 1.0
    assert report["density"] == pytest.approx(report["details"]["density_by_layer"][1])
    assert report["details"]["step_kinds"]["dense"] == [1, 6]
    assert {"psnr_db", "ssim", "speedup"} <= set(report)
    with av.open(str(out / "video.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9
        assert video.streams.video[0].average_rate == 16
    saved = read_latents(out / "latents.safetensors")
    assert {name: x.shape for name, x in saved.runs.items()} == dict.fromkeys(("dense", "AdaSpa"), (1, 4, 3, 6, 10))

    again = tmp_path / "again"
    assert call(monkeypatch, decode, "--checkpoint", wan_pipeline, "--latents", out / files[1], "--out", again) == 0
    assert sorted(p.name for p in again.iterdir()) == ["sheet.png", "video.mp4"]
    assert (again / "sheet.png").read_bytes() == (out / "sheet.png").read_bytes()


def test_without_a_vae_latents_are_what_is_left(wan_pipeline: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("transformer", "scheduler", "model_index.json"):
        (bare / name).symlink_to(wan_pipeline / name)
    call_it = arguments(wan_pipeline, tmp_path / "out")
    assert call(monkeypatch, sample, *call_it[:1], bare, *call_it[2:], "--dense") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["latents.safetensors", "report.json"]
    assert "python -m models.decode" in capsys.readouterr().err


BAD: dict[str, tuple[list[Any], str]] = {
    "no embeddings": (["--embeddings"], "make it with python -m models.encode_prompt"),
    "size": (["--frames", 10], r"\(10, 48, 80\) is not one, the nearest is \(9, 48, 80\)"),
    "preset": (["--preset", "best"], "preset 'best' is unknown; choose one of quality"),
    "dtype": (["--dtype", "int8"], "--dtype int8 must be one of float32"),
    "vae": (["--vae", "no/vae"], "--vae no/vae is no folder"),
    "dense layer": (["--dense-layer", 7], r"dense_layers=\(7,\) must be below the model's 2 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, wan_pipeline: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    change, message = BAD[case]
    given = arguments(wan_pipeline, tmp_path / "out")
    if change == ["--embeddings"]:
        given[3] = tmp_path / "no.safetensors"
    elif change[0] == "--frames":
        given[given.index("--frames") + 1] = change[1]
    else:
        given += change
    assert call(monkeypatch, sample, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    import re

    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_no_latents(wan_pipeline: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "text").write_text("no")
    write_tensors(tmp_path / "foreign", {"x": np.zeros(3)})
    for name, message in (("absent", "does not exist"), ("text", "holds no latents"), ("foreign", "holds no latents")):
        given = ["--checkpoint", wan_pipeline, "--latents", tmp_path / name, "--out", tmp_path / "out"]
        assert call(monkeypatch, decode, *given) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
