"""`python -m models.sample` from a prompt to an mp4, with encoders, transformer and VAE made here, tiny and random."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from models import encode_prompt, sample
from models.commands.encoding import Encoder
from models.pipeline.embeddings import read_embeddings, read_prompts
from models.pipeline.latents import read_latents
from tests.models.commands.fakes import call
from tests.models.test_encode_inputs import ROOT, image_pipeline
from tests.models.test_encode_prompt import text_pipeline, vae

__all__ = ["image_pipeline"]
OPTIONS = ("--frames", 9, "--height", 48, "--width", 80, "--steps", 3, "--block-size", 16, "--dtype", "float32")
NEVER = lambda *given: 1 / 0


@pytest.fixture(scope="module", params=["wan", "hunyuan"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UMT5 or LLaMA with CLIP, a transformer, a VAE."""
    folder = tmp_path_factory.mktemp(request.param)
    text_pipeline(request.param).save_pretrained(folder)
    vae("wan2.1" if request.param == "wan" else "hunyuan").save_pretrained(folder / "vae")
    return folder


def frames(out: Path) -> int:
    with av.open(str(out / "video.mp4")) as video:
        return sum(1 for _ in video.decode(video=0))


def test_a_prompt_becomes_a_video(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = lambda out, *given: call(monkeypatch, sample.main, "--checkpoint", whole, *OPTIONS, *given, "--out", out)
    out = tmp_path / "out"
    assert run(out, "--prompt", "a cat on a roof", "--prompt", "a dog") == 0
    assert frames(out) == 9
    file = out / "embeddings.safetensors"
    assert read_prompts(file, 2) == ["a cat on a roof", "a dog"]
    found, size = read_embeddings(file), (None, None, None)
    expected = encode_prompt.encode(whole, ["a cat on a roof", "a dog"], None, None, size, "bfloat16")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=1e-6)

    # A second time nothing is encoded, nor if the file is given.
    monkeypatch.setattr(Encoder, "_encode_apart", NEVER)
    lines = tmp_path / "prompts.txt"
    lines.write_text("a dog\na cat on a roof\n")
    assert run(tmp_path / "many", "--prompts", lines) == 0
    assert run(tmp_path / "again", "--embeddings", file) == 0
    assert not (tmp_path / "again/embeddings.safetensors").exists()
    latents = lambda path: read_latents(tmp_path / path / "latents.safetensors").runs["AdaSpa"]
    np.testing.assert_array_equal(latents("again"), latents("out"))
    assert not np.array_equal(latents("many/01-a-dog"), latents("many/02-a-cat-on-a-roof"))
    assert frames(tmp_path / "many/01-a-dog") == 9
    # In OUT the file that is read outlives the run.
    assert run(out, "--embeddings", file) == 0
    assert file.exists()
    assert "encoding: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--negative-prompt", "a dog"], "has no effect without guidance"),
        (["--image", "no.png"], "takes no --image"),
        (["--last-image", "no.png"], "no.png goes with --image"),
        (["--frames", 10], "the nearest is"),
        (["--search-step", 9], "must be in 1 .. steps=3"),
        (["--mesh", "columns=2"], "'columns=2' is no axis"),
        (["--vae", "no/vae"], "is no folder"),
        (["--distributed", "--mesh", "auto"], "several hosts read one file of models.encode_prompt"),
    ],
)
def test_bad_input_is_found_before_anything_is_encoded(
    given: list[Any], message: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(Encoder, "encode", NEVER)
    off = [] if (whole / "text_encoder_2").exists() else ["--guidance", 1]
    arguments = ["--checkpoint", whole, *OPTIONS, "--prompt", "a cat", *off, *given, "--out", tmp_path / "out"]
    assert call(monkeypatch, sample.main, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_pipelines_that_encode_nothing(wan_pipeline: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Encoder, "encode", NEVER)
    arguments = [*OPTIONS, "--out", tmp_path / "out"]
    for checkpoint, given, message in (
        (wan_pipeline, ["--prompt", "a cat"], "has no text_encoder/; give a whole"),
        (wan_pipeline / "transformer", ["--prompt", "a cat"], "has no model_index.json; give a whole"),
        (wan_pipeline, [], "give at least one --prompt, or --prompts FILE, or --embeddings FILE"),
    ):
        assert call(monkeypatch, sample.main, "--checkpoint", checkpoint, *given, *arguments) == 2
        assert message in capsys.readouterr().err


def test_an_image_becomes_a_video(image_pipeline: Any, tmp_path: Path, monkeypatch, capsys) -> None:
    _, folder = image_pipeline
    run = lambda *given: call(
        monkeypatch,
        sample.main,
        "--checkpoint",
        folder,
        *OPTIONS,
        "--prompt",
        "a cat",
        *given,
        "--out",
        tmp_path / "out",
    )
    with monkeypatch.context() as without:
        without.setattr(Encoder, "encode", NEVER)
        for given, message in (
            ([], "this Wan 2.1 I2V animates an image; give --image"),
            (["--image", folder / "model_index.json"], "cannot be read as a picture"),
            (["--image", folder / "no.png"], "does not exist"),
            (["--image", folder / "cat.png", "--last-image", folder / "cat.png"], "no place for a --last-image"),
        ):
            assert run(*given) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert message in line
    assert run("--image", folder / "cat.png", "--negative-prompt", "a dog") == 0
    assert frames(tmp_path / "out") == 9
    found = read_embeddings(tmp_path / "out/embeddings.safetensors")
    expected = encode_prompt.encode(folder, ["a cat"], "a dog", folder / "cat.png", (9, 48, 80), "bfloat16")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=1e-6)


ASLEEP = """
import jax, sys
from jax._src import xla_bridge
from models import sample
from models.commands.cli import run_cli
from models.commands.encoding import Encoder

def encode(self, wanted):
    assert not xla_bridge.backends_are_initialized()
    raise ValueError("asleep")

Encoder.encode = encode
run_cli(sample.main)
"""


def test_the_encoders_have_the_device_for_themselves(whole: Path, tmp_path: Path) -> None:
    given = ["--checkpoint", whole, *OPTIONS, "--mesh", "auto", "--prompt", "a cat", "--out", tmp_path / "out"]
    command = [sys.executable, "-c", ASLEEP, *map(str, given)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr.strip() == "error: asleep"
