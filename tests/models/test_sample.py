"""`python -m models.sample` from end to end on a tiny pipeline, and every way it refuses bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from adaspa_jax import SparseConfig, draw_blocks
from convert.writer import convert
from models import sample as command
from models.commands.cli import run_cli
from models.commands.media import psnr, ssim, to_pixels
from models.pipeline.words import HunyuanVideoPipeline

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["red circle moving left", "green ring moving down"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["sample", *arguments])
    with pytest.raises(SystemExit) as end:
        run_cli(command.main)
    return int(end.value.code or 0)


@pytest.fixture
def arguments(tiny_pipeline: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "--checkpoint": str(tiny_pipeline),
        "--prompt": PROMPTS[0],
        "--block-size": "16",
        "--steps": "5",
        "--out": str(tmp_path / "out"),
    }


def flat(arguments: dict[str, str], *flags: str) -> list[str]:
    return [x for pair in arguments.items() for x in pair] + list(flags)


def test_compare_writes_everything(tiny_pipeline: Path, tmp_path: Path) -> None:
    converted = convert(tiny_pipeline, tmp_path / "converted")
    out = tmp_path / "deep" / "out"
    call = [sys.executable, "-m", "models.sample", "--checkpoint", str(converted), "--compare", "--out", str(out)]
    call += ["--steps", "6", "--search-step", "2", "--search-step", "4", "--block-size", "16", "--sparsity", "0.75"]
    call += [x for prompt in PROMPTS for x in ("--prompt", prompt)]
    kept = tmp_path / "kept"
    call += ["--compile-cache", str(kept)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len([file for file in kept.iterdir() if file.name.startswith("jit_step-")]) == 2  # dense and AdaSpa
    assert sorted(f.name for f in out.iterdir()) == [
        "blocks.png",
        "latents.safetensors",
        "report.json",
        "sheet.png",
        "video.gif",
        "video.mp4",
    ]
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []

    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 6
    assert report["implementation"] == "xla"
    assert report["search_steps"] == [2, 4]
    assert report["speedup"] == pytest.approx(report["dense_seconds"] / report["adaspa_seconds"])
    assert report["density"] == pytest.approx(5 / 17)  # ceil(0.25 * 17 blocks)
    assert 0 < report["recall"] <= 1
    assert report["psnr_db"] > 10
    assert 0 < report["ssim"] <= 1
    assert report["details"]["step_kinds"]["cached_search"] == [4]
    with av.open(str(out / "video.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 4
        assert video.streams.video[0].average_rate == 8
    with Image.open(out / "video.gif") as gif:
        assert gif.n_frames == 4  # type: ignore[attr-defined]
    for name in ("sheet.png", "blocks.png"):
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_dense_run_writes_no_block_picture(arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *flat(arguments, "--dense")) == 0
    out = Path(arguments["--out"])
    files = ["latents.safetensors", "report.json", "sheet.png", "video.gif", "video.mp4"]
    assert sorted(f.name for f in out.iterdir()) == files
    assert "density" not in json.loads((out / "report.json").read_text())


BAD = {
    "sparsity": ({"--sparsity": "1.0"}, r"sparsity=1.0 must be in \[0, 1\)"),
    "negative sparsity": ({"--sparsity": "-0.1"}, "sparsity=-0.1"),
    "block size": ({"--block-size": "48"}, "block_size=48 must be a power of two"),
    "steps": ({"--steps": "0"}, "steps=0 must be at least 1"),
    "search step": ({"--search-step": "6"}, r"search_steps=\(6,\) must be in 1 .. steps=5"),
    "token order": ({"--token-order": "hilbert"}, "token_order='hilbert' must be one of raster, cube"),
    "words": ({"--prompt": "red dinosaur"}, "unknown words 'dinosaur'.* knows: red, green"),
    "folder": ({"--checkpoint": "no/such/folder"}, "no/such/folder does not exist"),
    "not a checkpoint": ({"--checkpoint": str(ROOT / "tests")}, "no checkpoint|not a checkpoint"),
    "a file": ({"--checkpoint": str(ROOT / "Makefile")}, "file"),
    "unwritable": ({"--out": "/proc/adaspa/out"}, "--out /proc/adaspa/out cannot be written"),
    "out under a file": ({"--out": str(ROOT / "Makefile" / "out")}, "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_exit_code_2_and_writes_nothing(
    case: str,
    arguments: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, message = BAD[case]
    before = sorted(ROOT.iterdir())
    assert run(monkeypatch, *flat(arguments | change)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert re.search(message, error[0]), error[0]
    assert list(tmp_path.iterdir()) == []
    assert sorted(ROOT.iterdir()) == before


def test_dense_excludes_compare(
    arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *flat(arguments, "--dense", "--compare")) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_debug_shows_the_traceback(arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", *flat(arguments | {"--sparsity": "2"}, "--debug")])
    with pytest.raises(ValueError, match="sparsity=2"):
        run_cli(command.main)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline.load(tiny_pipeline)


def test_sparsity_0_samples_what_dense_samples(pipeline: HunyuanVideoPipeline) -> None:
    config = SparseConfig(sparsity=0.0, block_size=16, steps=5)
    sparse, dense = pipeline.sample(PROMPTS, config), pipeline.sample(PROMPTS, config, dense=True)
    np.testing.assert_allclose(sparse.video, dense.video, atol=2e-5)
    assert sparse.report is not None
    assert sparse.report.density == 1.0


@pytest.mark.parametrize("compensation", ["none", "pooled"])
def test_the_kernels_sample_what_dense_arithmetic_with_masks_samples(
    pipeline: HunyuanVideoPipeline, compensation: Any
) -> None:
    config = SparseConfig(sparsity=0.7, block_size=16, steps=6, search_steps=(2, 4), compensation=compensation)
    ours, oracle = (pipeline.sample(PROMPTS[:1], config, implementation=name) for name in ("xla", "reference"))
    np.testing.assert_allclose(ours.video, oracle.video, atol=1e-4)


def test_runs_repeat_exactly_and_seeds_differ(pipeline: HunyuanVideoPipeline) -> None:
    config = SparseConfig(sparsity=0.7, block_size=16, steps=4)
    first, again, other = (pipeline.sample(PROMPTS[:1], config, seed=seed, keep_mass=True) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.video, again.video)
    for a, b in zip(first.state, again.state, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
    assert np.abs(first.video - other.video).max() > 0.1


def test_progress_reports_every_step(pipeline: HunyuanVideoPipeline) -> None:
    seen: list[int] = []
    pipeline.sample(PROMPTS[:1], SparseConfig(block_size=16, steps=4), progress=seen.append)
    assert sorted(seen) == [1, 2, 3, 4]


def test_block_pictures_need_the_mass(pipeline: HunyuanVideoPipeline) -> None:
    run = pipeline.sample(PROMPTS[:1], SparseConfig(block_size=16, steps=3))
    with pytest.raises(ValueError, match="keep_mass=True"):
        draw_blocks(run.state, run.layout)


def test_report_measures_the_run(pipeline: HunyuanVideoPipeline) -> None:
    config = SparseConfig(sparsity=0.5, block_size=16, steps=10, search_steps=(2, 6), dense_layers=(1,))
    run = pipeline.sample(PROMPTS, config, keep_mass=True)
    assert run.report is not None
    assert run.report.density == pytest.approx(9 / 17)
    assert run.report.density_by_layer[1] == 1.0
    assert list(run.report.recall_by_search) == [2, 6]
    assert np.all(np.array(run.report.drift_by_search[2]) == 0)
    drift = np.array(run.report.drift_by_search[6])  # [layer, head]
    assert np.all(drift[1] == 0)
    assert np.all(np.delete(drift, 1, axis=0) > 0)
    dual = run.state[0]
    kept = np.zeros(dual.mass.shape[1:], bool)
    for spot in np.ndindex(*dual.counts.shape[1:]):
        kept[spot][np.asarray(dual.indices)[0][spot][: dual.counts[0][spot]]] = True
    recall = (np.asarray(dual.mass[0]) * kept).sum((2, 3)) / np.asarray(dual.mass[0]).sum((2, 3))
    assert recall.min() > 0.25  # the heavier half of the blocks, or a quarter in the lowest tier


def test_distances_of_videos() -> None:
    video = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 16, 16))
    assert psnr(video, video) == np.inf
    assert ssim(video, video) == pytest.approx(1)
    assert psnr(video, video + 0.02) == pytest.approx(10 * np.log10(4 / 0.02**2))
    pixels = to_pixels(np.stack([np.full((3, 1, 4, 5), x) for x in (-1.0, 0.0, 2.0)]))
    assert pixels.shape == (3, 1, 4, 5, 3)
    assert [int(p.flat[0]) for p in pixels] == [0, 128, 255]
