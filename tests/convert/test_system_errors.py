"""Errors of the system while converting: one line, exit code 2, nothing half-written, no words of a library."""

import errno
import gc
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import models
from convert import writer
from convert.writer import convert
from models.checkpoint.loading import MARK, describe
from models.checkpoint.safetensors_folder import CheckpointError, Tensor

DEMO = Path(models.__file__).parent / "demo" / "checkpoint"


# Files of at most 100 kB, which stands for a full disk.
SMALL_DISK = """
import resource, runpy, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
runpy.run_module("convert", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SMALL_DISK, str(DEMO), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=DEMO.parents[2])
    assert ended.returncode == 2
    bar, line = ended.stderr.strip().splitlines()
    assert bar.startswith("converting")
    assert line.startswith(f"error: DST {tmp_path / 'out'} cannot be written (File too large); nothing is left behind")
    assert not list(tmp_path.iterdir())


def raising(error: Exception) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        raise error

    return call


PAGE = ValueError("OUT_OF_RANGE: Error writing: No space [os_error_code='28'] [source locations=\n" + "x" * 5000)
FAILURES: dict[str, tuple[Any, str, Exception]] = {
    "orbax, a page": (ocp.partial, "save", PAGE),
    "orbax, another class": (ocp.partial, "save", RuntimeError("")),
    "the end of orbax": (ocp.partial, "finalize", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "side files": (shutil, "copyfile", OSError(errno.EACCES, "Permission denied")),
    "the last rename": (os, "rename", OSError(errno.EXDEV, "Invalid cross-device link")),
    "reading": (Tensor, "read", OSError(errno.EIO, "Input/output error")),
}


@pytest.mark.parametrize("case", FAILURES)
def test_whatever_fails_nothing_is_left_behind(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, error = FAILURES[case]
    hook = sys.unraisablehook
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(error))
        with pytest.raises(OSError, match=r"^[^\n]{1,300}$"):
            convert(DEMO, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert sys.unraisablehook is hook


def test_a_disk_that_is_too_small_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, and its disk has 0\.0 free; choose another disk"):
        convert(DEMO, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        convert(DEMO, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


# orbax leaves the reads of the other arrays half done; what they raise when they are collected is nobody's.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("change", ["delete", "halve"])
def test_a_damaged_conversion_is_one_line(
    change: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    convert(DEMO, tmp_path / "out")
    largest = max((tmp_path / "out" / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    for file in (largest, tmp_path / "out" / "weights" / "state" / "_METADATA"):
        content = file.read_bytes()
        file.unlink() if change == "delete" else file.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=r"out/weights cannot be read \([^\n]{1,300}\); convert it again$"):
            models.from_pretrained(tmp_path / "out")
        file.write_bytes(content)
    gc.collect()  # in this test, not in one after it
    assert capfd.readouterr().err == ""
    assert np.isfinite(models.from_pretrained(tmp_path / "out").proj_out.kernel[...]).all()


@pytest.mark.parametrize("read", [describe, models.from_pretrained])
def test_a_damaged_mark_is_named_without_reading_weights(read: Any, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    config = json.loads((DEMO / "transformer" / "config.json").read_text(encoding="utf-8"))
    for mark, message in (
        ("1", "has format None, this version reads 1; convert it again"),
        ({"format": 2, "dtype": "float32"}, "has format 2"),
        ({"format": 1, "dtype": "int4.5"}, r"config\.json: 'int4\.5' is no dtype; convert it again"),
        ({"format": 1}, "None is no dtype"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {MARK: mark}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)
    (tmp_path / "weights").rmdir()
    (tmp_path / "config.json").write_text(json.dumps(config | {MARK: {"format": 1, "dtype": "float32"}}))
    with pytest.raises(CheckpointError, match="has no weights/; convert it again"):
        read(tmp_path)
