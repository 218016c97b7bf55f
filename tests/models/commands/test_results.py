"""What was sampled is never lost, an OUT holds one run's files, and nothing is half-written."""

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models import decode, sample
from models.commands import media, report, runs
from models.commands.files import ALL, results
from models.pipeline.embeddings import write_tensors
from models.pipeline.latents import SavedLatents, read_latents, write_latents
from models.pipeline.video import VideoPipeline
from models.vae import decoding
from tests.models.commands.fakes import WORDS, Fakes, call, latent_arguments

KEPT = ["latents.safetensors", "report.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_json_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(), parse_constant=no_json_constant)


def given(wan_pipeline: Path, out: Path, *flags: Any) -> list[Any]:
    return ["--checkpoint", wan_pipeline, *latent_arguments(wan_pipeline), "--out", out, *flags]


LATER: dict[str, tuple[Any, str, Exception]] = {
    "the VAE": (decoding, "decode_latents", RuntimeError("decoding broke")),
    "memory for the VAE": (decoding, "decode_latents", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")),
    "a full disk": (media, "write_mp4", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "the sheet": (media, "write_sheet", ValueError("no font")),
    "the distance": (runs, "distance", ValueError("win_size exceeds image extent")),
}


@pytest.mark.parametrize("case", LATER)
def test_what_was_sampled_outlives_what_fails_after(
    case: str, wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    where, name, error = LATER[case]

    def fail(*given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(where, name, fail)
    out = tmp_path / "out"
    if type(error) is RuntimeError:  # a bug: its traceback is shown
        with pytest.raises(RuntimeError, match="decoding broke"):
            call(monkeypatch, sample.main, *given(wan_pipeline, out, "--compare"))
    else:
        assert call(monkeypatch, sample.main, *given(wan_pipeline, out, "--compare")) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert f"kept in {out}: latents.safetensors, report.json" in last
    assert set(KEPT) <= set(names(out)) <= set(ALL)
    assert list(read_latents(out / KEPT[0]).runs) == ["dense", "AdaSpa"]
    assert read_report(out)["speedup"] == 1
    assert names(tmp_path) == ["out"]


def test_a_second_run_that_fails_leaves_the_first(
    wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    def latents(dense: bool, shape: tuple[int, ...]) -> np.ndarray:
        if dense:
            return np.ones(shape, np.float32)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")

    fakes.latents = latents
    out = tmp_path / "out"
    assert call(monkeypatch, sample.main, *given(wan_pipeline, out, "--compare")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: out of memory (RESOURCE_EXHAUSTED")
    assert names(out) == KEPT
    assert list(read_latents(out / KEPT[0]).runs) == ["dense"]


@pytest.mark.parametrize("broken", ["dense", "AdaSpa"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latents_that_are_not_finite_end_with_1_and_are_kept(
    value: float, broken: str, wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    fakes.latents = lambda dense, shape: np.full(shape, value if dense == (broken == "dense") else 0, np.float32)
    out = tmp_path / "out"
    assert call(monkeypatch, sample.main, *given(wan_pipeline, out, "--compare")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"100% of the latents of the {broken} run are NaN or infinite" in error
    assert names(out) == KEPT
    assert list(read_latents(out / KEPT[0]).runs) == ["dense", "AdaSpa"][: 1 if broken == "dense" else 2]
    again = ["--checkpoint", wan_pipeline, "--latents", out / KEPT[0], "--out", tmp_path / "decoded"]
    assert call(monkeypatch, decode.main, *again) == 2
    assert f"latents of the {broken} run have NaN or infinite values" in capsys.readouterr().err
    assert names(tmp_path) == ["out"]


def test_pixels_that_are_not_finite_are_no_black_video(
    tiny_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch
) -> None:
    fakes.latents = lambda dense, shape: np.full(shape, np.inf, np.float32)
    assert call(monkeypatch, sample.main, "--checkpoint", tiny_pipeline, *WORDS, "--out", tmp_path / "out") == 1
    assert names(tmp_path / "out") == KEPT


def test_a_decoder_that_overflows_ends_with_1(wan_pipeline: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    write_latents(tmp_path / "x", SavedLatents({"dense": np.zeros((1, 4, 1, 4, 4), np.float32)}, ["a cat"], 8))
    monkeypatch.setattr(decoding, "decode_latents", lambda *given, **options: np.full((1, 3, 1, 32, 32), np.nan))
    call_it = ["--checkpoint", wan_pipeline, "--latents", tmp_path / "x", "--out", tmp_path / "out"]
    assert call(monkeypatch, decode.main, *call_it, "--dtype", "float16") == 1
    assert "decoded in float16 has NaN" in capsys.readouterr().err
    assert names(tmp_path) == ["x"]


def test_equal_videos_have_a_report(wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys) -> None:
    assert call(monkeypatch, sample.main, *given(wan_pipeline, tmp_path, "--compare")) == 0
    found = read_report(tmp_path)
    assert (found["psnr_db"], found["ssim"]) == ("Infinity", 1)
    assert "the same video" in capsys.readouterr().err


def test_a_video_smaller_than_the_window_of_ssim_has_none() -> None:
    small = np.zeros((1, 3, 1, 6, 6), np.float32)
    found = report.distance({"dense": small, "AdaSpa": small + 1})
    assert np.isnan(found["ssim"])
    assert np.isfinite(found["psnr_db"])


def test_an_out_that_is_used_again_holds_one_run(wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch) -> None:
    for name in (*ALL, "mine.txt"):
        (tmp_path / name).write_text("old")
    assert call(monkeypatch, sample.main, *given(wan_pipeline, tmp_path, "--seed", -1)) == 2
    fakes.latents = lambda dense, shape: 1 / 0  # type: ignore[return-value]
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, sample.main, *given(wan_pipeline, tmp_path))
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}  # nothing was sampled, nothing is lost

    fakes.latents = lambda dense, shape: np.zeros(shape, np.float32)
    assert call(monkeypatch, sample.main, *given(wan_pipeline, tmp_path, "--dense")) == 0
    assert names(tmp_path) == [*KEPT[:1], "mine.txt", *KEPT[1:], "sheet.png", "video.mp4"]
    assert (tmp_path / "mine.txt").read_text() == "old"
    assert all((tmp_path / name).read_bytes() != b"old" for name in (*KEPT, "video.mp4"))


def test_decode_keeps_the_run_it_decodes_and_spares_another(
    wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for out in (one, other):
        assert call(monkeypatch, sample.main, *given(wan_pipeline, out, "--dense")) == 0
    arguments = ["--checkpoint", wan_pipeline, "--latents", one / KEPT[0], "--fps", 3, "--out"]
    assert call(monkeypatch, decode.main, *arguments, one) == 0
    assert names(one) == [*KEPT, "sheet.png", "video.mp4"]
    assert (one / "video.mp4").read_text() == "9 frames at 3"
    assert call(monkeypatch, decode.main, *arguments, other) == 2
    assert "holds the results of another run" in capsys.readouterr().err
    assert (other / "video.mp4").read_text() == "9 frames at 16"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(
    umask: int, mode: int, wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch
) -> None:
    before = os.umask(umask)
    try:
        assert call(monkeypatch, sample.main, *given(wan_pipeline, tmp_path / "a" / "out", "--dense")) == 0
        write_tensors(tmp_path / "p.safetensors", {"x": np.zeros(1)})
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {mode}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o777 & ~umask}


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch) -> None:
    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"p.safetensors cannot be written .*No space left on device"):
        write_tensors(tmp_path / "p.safetensors", {"x": np.zeros(1)})
    assert names(tmp_path) == []


def test_an_out_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out/video.mp4").mkdir(parents=True)
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "else")
    for out, why in (("out", "video.mp4 is a folder"), ("lost", "exists")):
        with pytest.raises(ValueError, match=why), results(tmp_path / out):
            raise AssertionError
    assert names(tmp_path) == ["lost", "out"]


def test_a_package_that_is_not_there_is_named_before_weights_are_read(
    wan_pipeline: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(VideoPipeline, "with_weights", None)
    for module, flags in (("av", ()), ("skimage.metrics", ("--compare",)), ("matplotlib.figure", ())):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            assert call(monkeypatch, sample.main, *given(wan_pipeline, tmp_path / "out", *flags)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {module} cannot be imported")
    assert names(tmp_path) == []
