"""Commands in this process, with sampling, decoding and reading of weights replaced by what takes no time."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.checkpoint import loading
from models.commands import media
from models.commands.cli import run_cli
from models.pipeline import video, words
from models.pipeline.program import Need
from models.pipeline.video import LatentSample, VideoPipeline
from models.vae import decoding
from models.vae.load import vae_folder

WORDS = ("--prompt", "red circle moving left", "--block-size", 16, "--steps", 5)


def latent_arguments(folder: Path) -> tuple[Any, ...]:
    size = ("--frames", 9, "--height", 48, "--width", 80, "--steps", 6, "--block-size", 16)
    return ("--embeddings", folder / "prompts.safetensors", *size)


def call(monkeypatch: pytest.MonkeyPatch, main: Callable[..., None], *arguments: Any) -> int:
    """Runs a command; its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_cli(main)
    return int(end.value.code or 0)


@functools.cache
def describe(path: Path, dtype: Any = None) -> Any:
    """The transformer of a folder without weights."""
    return loading.describe(path, dtype)


class Fakes:
    """What was asked of the pipeline and of the decoder; `latents` says what a run gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.latents: Callable[[bool, tuple[int, ...]], np.ndarray] = lambda dense, shape: np.zeros(shape, np.float32)
        monkeypatch.setattr(video, "describe", self.describe)
        monkeypatch.setattr(words, "from_pretrained", self.describe)
        monkeypatch.setattr(VideoPipeline, "with_weights", lambda self, *rest, **options: self)
        program = SimpleNamespace(seconds=1.0, need=Need(0, 0, 0))
        monkeypatch.setattr(VideoPipeline, "compile", lambda self, *rest, **options: program)
        monkeypatch.setattr(VideoPipeline, "sample", lambda *given, **options: self.sample(*given, **options))
        monkeypatch.setattr(decoding, "check_decoder", lambda *given: None)
        monkeypatch.setattr(decoding, "decode_latents", self.decode)
        stub = lambda path, frames, fps: path.write_text(f"{len(frames)} frames at {fps}")
        monkeypatch.setattr(media, "write_mp4", stub)
        monkeypatch.setattr(media, "write_gif", stub)

    def describe(self, path: Path, dtype: Any = None, follow_links: bool = False, loras: Any = ()) -> Any:
        if follow_links:
            self.calls.append("follow_links")
        if loras:
            self.calls.append(loras)
        return describe(path, dtype)

    def sample(self, pipe: Any, embeddings: Any, config: Any, **options: Any) -> LatentSample:
        for name in ("progress", "program"):
            options.pop(name)
        given = {name: x.tobytes() for name, x in embeddings.items()}
        mesh = pipe.sharding and dict(pipe.sharding.mesh.shape)
        self.calls.append((pipe.scheduler, str(pipe.experts[0].dtype), config, options, given, mesh, pipe.offload))
        asked = {name: options[name] for name in ("size", "guidance", "seed")}
        plan = pipe.plan(embeddings, config, **asked)
        layout = pipe.experts[0].layout(plan.shape[2:], 11, config)
        latents = self.latents(options["dense"], plan.shape)
        return LatentSample(latents, ((),), layout, config, (), 2.0, 1.0, "xla", "input")

    def encode(self, wanted: Any) -> dict[str, np.ndarray]:
        self.calls.append(wanted)
        names = ("prompt_embeds", "negative_prompt_embeds")
        return {name: np.zeros((len(wanted.prompts), 11, 24), np.float32) for name in names}

    def decode(
        self, path: Path, latents: np.ndarray, *, dtype: str, progress: Any, follow_links: bool, mesh: Any
    ) -> np.ndarray:
        self.calls.append((str(vae_folder(Path(path))), dtype, follow_links))
        frames = 4 * (latents.shape[2] - 1) + 1
        video = np.resize(latents, (len(latents), 3, frames, *latents.shape[3:])).repeat(8, 3).repeat(8, 4)
        return video.astype(np.float32)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)
