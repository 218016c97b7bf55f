"""Prompts to embeddings for `models.sample`: out of the cache, or by `models.encode_prompt` in a process of its own.

When that process ends, the encoders' memory is free again, on the host and on the device. What it made is kept in the
user's cache folder, a file a prompt, under a key of all that it depends on.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from models.checkpoint.safetensors_folder import read_json
from models.commands.caches import cache_folder, trim
from models.commands.encoders import OF_IMAGES, OF_SAMPLING
from models.pipeline.embeddings import Embeddings, read_embeddings, write_tensors
from models.pipeline.families import VideoSize

_ROOT = Path(__file__).parents[2]
_HASHED = 1 << 20
"""Bytes up to which a file of an encoder is known by its content, beyond by its size and time."""
_FORMAT = 1
"""Of the cache: another number forgets what is in it."""


@dataclass(frozen=True)
class Wanted:
    """What is to be encoded."""

    prompts: list[str]
    negative: str | None = None
    """None: what the pipeline takes for none."""
    image: Path | None = None
    last_image: Path | None = None
    size: VideoSize | None = None
    """Of the video, with an image; without one embeddings do not depend on it."""

    def keys(self, checkpoint: Path) -> list[str]:
        """Of each prompt the name of its file in the cache."""
        encoder = _encoder_key(checkpoint, self.image is not None)
        pictures = [None if x is None else _sha(x.read_bytes()) for x in (self.image, self.last_image)]
        size = None if self.size is None else [self.size.frames, self.size.height, self.size.width]
        of = lambda prompt: json.dumps([_FORMAT, encoder, prompt, self.negative, pictures, size])
        return [_sha(of(prompt).encode()) for prompt in self.prompts]


@dataclass
class Encoder:
    """Encodes with a pipeline's own encoders; `debug` shows what its process prints."""

    checkpoint: Path
    debug: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def encode(self, wanted: Wanted) -> Embeddings:
        """Embeddings of all prompts, in their order; what the cache has is not encoded again.

        Raises ValueError for what cannot be encoded, MemoryError and OSError as that process ends.
        """
        folder, keys = cache_folder("embeddings"), wanted.keys(self.checkpoint)
        found = {} if folder is None else {key: x for key in keys if (x := _read(folder / key)) is not None}
        missing = {key: prompt for key, prompt in zip(keys, wanted.prompts, strict=True) if key not in found}
        if missing:
            made = self._encode_apart(wanted, list(missing.values()))
            new = {key: {name: x[i : i + 1] for name, x in made.items()} for i, key in enumerate(missing)}
            found |= new
            if folder is not None:
                self._keep(folder, new)
        return {name: np.concatenate([found[key][name] for key in keys]) for name in found[keys[0]]}

    def _keep(self, folder: Path, embeddings: dict[str, Embeddings]) -> None:
        """Writes to the cache by key; where that fails, it is said once: the run goes on."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for key, one in embeddings.items():
                write_tensors(folder / key, one)
            trim(folder)
        except OSError as error:
            self.console.print(f"embeddings are not cached: {error}", highlight=False, markup=False, soft_wrap=True)

    def _encode_apart(self, wanted: Wanted, prompts: list[str]) -> Embeddings:
        """In a process of its own, which leaves the device to PyTorch."""
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="adaspa-encode-") as name:
            out = Path(name) / "out.safetensors"
            command: list[str | bytes] = [
                sys.executable,
                "-P",
                "-m",
                "models.encode_prompt",
                *self._arguments(wanted, prompts, out),
            ]
            path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            # In UTF-8 mode prompts arrive whole in any locale.
            environment = os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1", "JAX_PLATFORMS": "cpu"}
            ended = subprocess.run(command, env=environment, stderr=None if self.debug else subprocess.PIPE)
            if ended.returncode:
                _fail(ended.returncode, (ended.stderr or b"").decode(errors="replace"))
            self.console.print(
                f"encoding: {time.perf_counter() - begun:.1f} s for {len(prompts)} prompts", highlight=False
            )
            return read_embeddings(out)

    def _arguments(self, wanted: Wanted, prompts: list[str], out: Path) -> list[bytes]:
        given: list[Any] = ["--checkpoint", self.checkpoint, "--out", out]
        if any(set("\r\n") & set(prompt) or not prompt.strip() for prompt in prompts):
            given += [x for prompt in prompts for x in ("--prompt", prompt)]
        else:  # of any number
            file = out.with_name("prompts.txt")
            file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
            given += ["--prompts", file]
        given += [] if wanted.negative is None else ["--negative", wanted.negative]
        for option, picture in (("--image", wanted.image), ("--last-image", wanted.last_image)):
            given += [] if picture is None else [option, picture]
        if wanted.size is not None:
            size = wanted.size
            given += ["--frames", size.frames, "--height", size.height, "--width", size.width]
        given += ["--debug"] * self.debug
        return [os.fsencode(x) if isinstance(x, Path) else str(x).encode() for x in given]


def _fail(code: int, text: str) -> None:
    """Raises what ended the process."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if code < 0:
        raise MemoryError(f"the process that encodes was ended by signal {-code}, as when memory is short")
    if code == 2 and lines:
        raise ValueError(lines[-1].removeprefix("error: "))
    raise RuntimeError(f"python -m models.encode_prompt ended with {code}:\n{text}")


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(file: Path) -> Embeddings | None:
    """None for what is not there or damaged."""
    try:
        return read_embeddings(file)
    except (OSError, ValueError):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _encoder_key(checkpoint: Path, image: bool) -> str:
    """What tells a pipeline's encoders from others: their files, not where they lie, and the libraries that run them.

    Of configs and vocabularies the content counts; of weights size and time of change: to read 10 GB would take as long
    as to encode. So a copy that has not kept its times is encoded again, and one that was moved is not.
    """
    index = read_json(checkpoint / "model_index.json")
    left_out = (*OF_SAMPLING, "scheduler", *(() if image else OF_IMAGES))
    parts = sorted(name for name, value in index.items() if isinstance(value, list) and name not in left_out)
    files = [file for name in parts for file in sorted((checkpoint / name).rglob("*")) if file.is_file()]
    files += [checkpoint / "model_index.json", checkpoint / "transformer/config.json"]
    told = []
    for file in files:
        stat = file.stat()
        content = _sha(file.read_bytes()) if stat.st_size <= _HASHED else stat.st_mtime_ns
        told.append([file.relative_to(checkpoint).as_posix(), stat.st_size, content])
    return _sha(json.dumps([told, [_version(name) for name in ("diffusers", "transformers")]]).encode())
