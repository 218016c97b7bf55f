"""Streams a PyTorch checkpoint into a converted folder: an orbax checkpoint with config.json and small side files.

The folder is written under a temporary name and renamed when complete: killed at any moment, it is absent or whole.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from models.checkpoint.key_table import Leaf
from models.checkpoint.loading import FORMAT_VERSION, MARK, WEIGHTS, Source, nested, open_source
from models.checkpoint.orbax_errors import STILL, reason_of, silenced
from models.checkpoint.safetensors_folder import CheckpointError, inside, read_json

SMALL = 32 * 1024 * 1024
"""Parameters below this many bytes are written together: a call of orbax costs about as much as they do."""
SIDE_FILES = ("model_index.json", "scheduler/scheduler_config.json")

Progress = Callable[[int, int], None]


def _check_space(source: Source, dst: Path, dtype: np.dtype) -> None:
    """CheckpointError for a disk that is surely too small: orbax compresses, but not to a half."""
    needed, free = sum(leaf.size for leaf in source.leaves) * dtype.itemsize // 2, shutil.disk_usage(dst.parent).free
    if free < needed:
        raise CheckpointError(
            f"DST {dst} needs {2 * needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} free; choose another disk"
        )


def _check_destination(source: Source, dst: Path, overwrite: bool) -> None:
    folder = source.path.resolve()
    if dst.resolve() == folder or folder in dst.resolve().parents or dst.resolve() in folder.parents:
        raise CheckpointError(f"DST {dst} and SRC {source.path} contain each other; choose another DST")
    if not dst.parent.is_dir():
        raise CheckpointError(f"the parent folder of DST {dst} does not exist; make it first")
    if not os.access(dst.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{dst.parent} is not writable; choose another DST")
    if not dst.exists() and not dst.is_symlink():
        return
    if not overwrite:
        raise CheckpointError(f"DST {dst} exists; remove it or pass --overwrite")
    converted = (dst / "config.json").is_file() and MARK in read_json(dst / "config.json")
    if dst.is_symlink() or not dst.is_dir() or (any(dst.iterdir()) and not converted):
        raise CheckpointError(f"DST {dst} exists and is no converted checkpoint; --overwrite does not replace it")


def _remove(folder: Path) -> None:
    """Removes a folder that threads of a failed orbax may still write to: until none does."""
    deadline = time.monotonic() + 20 * STILL
    quiet = time.monotonic() + STILL
    while time.monotonic() < min(quiet, deadline):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            quiet = time.monotonic() + STILL
        time.sleep(STILL / 10)


@contextmanager
def _one_error(dst: Path) -> Iterator[None]:
    """Whatever orbax raises becomes an OSError of one line."""
    try:
        yield
    except Exception as error:  # tensorstore's are ValueErrors
        raise OSError(f"DST {dst} cannot be written ({reason_of(error)}); nothing is left behind") from error


@contextmanager
def _staged(dst: Path) -> Iterator[Path]:
    """A folder beside DST that becomes DST when the block ends well; one conversion to a DST at a time."""
    stage, old = (dst.with_name(f".{dst.name}.{suffix}") for suffix in ("partial", "replaced"))
    try:
        lock = os.open(dst.with_name(f".{dst.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise CheckpointError(f"{dst.parent} cannot be written ({error}); choose another DST") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another conversion to {dst} is running; wait for it or choose another DST"
            ) from error
        for leftover in (stage, old):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        stage.mkdir()
        yield stage
        if dst.exists():
            os.rename(dst, old)
        os.rename(stage, dst)
    except OSError:
        _remove(stage)
        raise
    finally:
        for leftover in (stage, old):
            shutil.rmtree(leftover, ignore_errors=True)
        dst.with_name(f".{dst.name}.lock").unlink(missing_ok=True)
        os.close(lock)


def _groups(leaves: list[Leaf], itemsize: int) -> Iterator[list[Leaf]]:
    """Large parameters one by one, small ones together up to SMALL bytes."""
    group: list[Leaf] = []
    total = 0
    for leaf in sorted(leaves, key=lambda leaf: leaf.size):
        if group and total + leaf.size * itemsize > SMALL:
            yield group
            group, total = [], 0
        group.append(leaf)
        total += leaf.size * itemsize
    yield group


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    for key, value in other.items():
        tree[key] = _merge(tree[key], value) if key in tree and isinstance(value, dict) else value
    return tree


def _write_weights(source: Source, stage: Path, dst: Path, dtype: np.dtype, progress: Progress) -> None:
    """All parameters, a group at a time; holds one group in memory."""
    folder = (stage / WEIGHTS).absolute()
    total, written = sum(leaf.size for leaf in source.leaves), 0
    dtypes = source.dtypes(dtype)
    for group in _groups(source.leaves, dtype.itemsize):
        tree: dict[str, Any] = {}
        for leaf in group:
            _merge(tree, nested(leaf.path, leaf.read(source.tensors, dtypes[leaf.path])))
        with _one_error(dst):
            ocp.partial.save(folder, tree)
        del tree
        written += sum(leaf.size for leaf in group)
        progress(written, total)
    with _one_error(dst):
        ocp.partial.finalize(folder)


def _copy_side_files(source: Source, stage: Path, follow_links: bool) -> None:
    """Scheduler, pipeline index and, for the demo, the text encoder: what sampling needs besides the transformer."""
    root = source.path.parent
    if not (root / "model_index.json").is_file():
        return
    names = list(SIDE_FILES)
    encoder = root / "text_encoder"
    if (encoder / "config.json").is_file() and read_json(encoder / "config.json").get("_class_name") == "WordEncoder":
        names += ["text_encoder/config.json", "text_encoder/model.safetensors"]
    for name in names:
        path = root / name
        if path.is_file():
            inside(path.parent, path.name, follow_links)
            (stage / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, stage / name)


def convert(
    src: Path,
    dst: Path,
    *,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> Path:
    """Converts the checkpoint `src` to the folder `dst`.

    Args:
      src: a diffusers folder, a transformer's or a pipeline's, or original weights, as in `from_pretrained`.
      dst: must not exist, unless `overwrite` and it is a converted checkpoint or an empty folder.
      dtype: of the written weights, but of those that the architecture holds in float32; None keeps the checkpoint's.
      overwrite: replace an earlier conversion.
      progress: called with the numbers of parameters written so far and in all.
      follow_links: the files of `src` may be links out of its folder; else only to the blobs of its own hub cache.

    Returns:
      `dst`.

    Raises:
      CheckpointError: bad input; nothing is left behind.
      OSError: a disk that cannot be read or written; nothing is left behind.
    """
    source = open_source(src, follow_links)
    _check_destination(source, dst, overwrite)
    source.say_beside()
    dtype = np.dtype(dtype or source.dtype)
    _check_space(source, dst, dtype)
    with silenced(), _staged(dst) as stage:
        _write_weights(source, stage, dst, dtype, progress or (lambda written, total: None))
        _copy_side_files(source, stage, follow_links)
        mark = {"format": FORMAT_VERSION, "dtype": dtype.name, "source": source.format}
        config = {k: v for k, v in source.config.items() if k != "_name_or_path"}
        (stage / "config.json").write_text(json.dumps(config | {MARK: mark}, indent=2) + "\n", encoding="utf-8")
    return dst
