"""The cache of embeddings, and how the process that encodes may end. The encoding itself is left out."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.commands import encoding
from models.commands.caches import cache_folder
from models.commands.encoding import Encoder, Wanted
from models.pipeline.embeddings import read_embeddings, write_tensors
from models.pipeline.families import VideoSize

SIZE = VideoSize(9, 48, 80)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.9, "scheduler": ["diffusers", "UniPC"]}
    for name in ("text_encoder", "tokenizer", "transformer", "vae", "scheduler"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        index[name] = ["transformers", "X"]
    (folder / "text_encoder/model.safetensors").write_bytes(bytes(encoding._HASHED + 1))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The prompts that were encoded, one list a process; each embedding is the prompt's length."""
    found: list[list[str]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def encode(self: Encoder, wanted: Wanted, prompts: list[str]) -> dict[str, np.ndarray]:
        found.append(prompts)
        return {"prompt_embeds": np.array([[[len(prompt)]] for prompt in prompts], np.float32)}

    monkeypatch.setattr(Encoder, "_encode_apart", encode)
    return found


def test_what_was_encoded_is_not_encoded_again(pipeline: Path, asked: list[list[str]]) -> None:
    encode = lambda *prompts: Encoder(pipeline).encode(Wanted(list(prompts)))["prompt_embeds"][:, 0, 0].tolist()
    assert encode("a", "bb", "a") == [1, 2, 1]
    assert encode("ccc", "bb", "a") == [3, 2, 1]
    assert asked == [["a", "bb"], ["ccc"]]
    folder = cache_folder("embeddings")
    assert folder is not None
    assert len(list(folder.iterdir())) == 3
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert encode("a") == [1]
    assert asked[2:] == [["a"]]


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


CHANGES: dict[str, tuple[Any, bool]] = {
    "nothing": (lambda folder: None, False),
    "the place": (lambda folder: folder.rename(folder.with_name("elsewhere")), False),
    "the transformer's weights": (lambda folder: (folder / "transformer/x.safetensors").touch(), False),
    "the scheduler": (lambda folder: (folder / "scheduler/config.json").write_text("{ }"), False),
    "the VAE": (lambda folder: (folder / "vae/config.json").write_text("{ }"), False),
    "the time of a config": (lambda folder: touch(folder / "tokenizer/config.json"), False),
    "a config": (lambda folder: (folder / "tokenizer/config.json").write_text("[]"), True),
    "the time of weights": (lambda folder: touch(folder / "text_encoder/model.safetensors"), True),
    "the transformer's config": (lambda folder: (folder / "transformer/config.json").write_text("[]"), True),
    "a new file": (lambda folder: (folder / "text_encoder/x.json").touch(), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_encoders_are_known_by_their_files(change: str, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alter, other = CHANGES[change]
    before = Wanted(["a"]).keys(pipeline)
    folder = alter(pipeline)
    assert (Wanted(["a"]).keys(folder if isinstance(folder, Path) else pipeline) != before) == other
    monkeypatch.setattr(encoding, "_version", lambda package: "another")
    assert not set(Wanted(["a"]).keys(folder if isinstance(folder, Path) else pipeline)) & set(before)


def test_all_that_matters_is_in_the_key(pipeline: Path, cat: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "dog.png")
    wanted = [
        Wanted(["a"]),
        Wanted(["b"]),
        Wanted(["a"], ""),
        Wanted(["a"], "b"),
        Wanted(["a"], None, cat, None, SIZE),
        Wanted(["a"], None, tmp_path / "dog.png", None, SIZE),
        Wanted(["a"], None, cat, cat, SIZE),
        Wanted(["a"], None, cat, None, VideoSize(13, 48, 80)),
    ]
    assert len({key for x in wanted for key in x.keys(pipeline)}) == len(wanted)
    with_image = wanted[4].keys(pipeline)
    (pipeline / "vae/config.json").write_text("{ }")
    assert wanted[4].keys(pipeline) != with_image


@pytest.mark.parametrize("base", ["/proc/no/cache", None])
def test_a_cache_that_cannot_be_written_stops_nothing(
    base: str | None, pipeline: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if base is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        assert cache_folder("x") is None
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert Encoder(pipeline).encode(Wanted(["a", "bb"]))["prompt_embeds"].shape == (2, 1, 1)
    said = capsys.readouterr().err
    assert said.count("embeddings are not cached") == (0 if base is None else 1)


def test_a_relative_cache_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder("x") == Path.home() / ".cache/adaspa_jax/x"


ENDS: dict[str, tuple[int, bytes, type[Exception], str]] = {
    "bad input": (2, b"warning\nerror: it has no text_encoder\n", ValueError, "^it has no text_encoder$"),
    "killed": (-9, b"", MemoryError, "ended by signal 9"),
    "a bug": (1, b"Traceback\nKeyError: 'x'", RuntimeError, "ended with 1:\nTraceback"),
}


@pytest.mark.parametrize("case", ENDS)
def test_how_the_process_ends(case: str, pipeline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, said, error, message = ENDS[case]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ended = SimpleNamespace(returncode=code, stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: ended)
    with pytest.raises(error, match=message):
        Encoder(pipeline).encode(Wanted(["a"]))
    assert not (tmp_path / "cache").exists()


def test_what_the_process_is_told(pipeline: Path, cat: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []

    def run(command: list[Any], env: dict[str, str], stderr: Any) -> Any:
        text = [x if isinstance(x, str) else x.decode() for x in command]
        told.append((text[4:], env, stderr))
        if "--prompts" in text:
            told.append(Path(text[text.index("--prompts") + 1]).read_text("utf-8"))
        write_tensors(Path(text[text.index("--out") + 1]), {"prompt_embeds": np.zeros((2, 1, 1), np.float32)})
        return SimpleNamespace(returncode=0, stderr=b"")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wanted = Wanted(["é", "b"], "schlecht 星", cat, cat, SIZE)
    Encoder(pipeline, debug=True).encode(wanted)
    (options, environment, stderr), lines = told
    assert lines == "é\nb\n"
    pairs = dict(zip(options[:-1:2], options[1:-1:2], strict=True))
    assert pairs["--negative"] == "schlecht 星"
    assert (pairs["--image"], pairs["--last-image"]) == (str(cat), str(cat))
    assert [pairs[f"--{name}"] for name in ("frames", "height", "width")] == ["9", "48", "80"]
    assert (options[-1], stderr) == ("--debug", None)
    assert (environment["JAX_PLATFORMS"], environment["PYTHONUTF8"]) == ("cpu", "1")
    assert Path(environment["PYTHONPATH"].split(os.pathsep)[0], "models/encode_prompt.py").is_file()
    Encoder(pipeline).encode(Wanted(["two\nlines", "c"]))
    assert told[2][0][-4:] == ["--prompt", "two\nlines", "--prompt", "c"]
    folder = cache_folder("embeddings")
    assert folder is not None
    assert all(read_embeddings(file)["prompt_embeds"].shape == (1, 1, 1) for file in folder.iterdir())
