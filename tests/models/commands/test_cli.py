"""How commands end: exit codes, one line, and the advice in it."""

import errno
import os
import re
from typing import Annotated

import av
import jax
import pytest
import typer
from safetensors import SafetensorError

from models.commands.cli import LONGEST
from models.commands.media import require
from tests.models.commands.fakes import call

ENDS: dict[str, tuple[Exception, int, str]] = {
    "bad input": (ValueError("size=3 is odd"), 2, "size=3 is odd"),
    "two lines": (ValueError("a\n  b"), 2, "a b"),
    "no words": (ValueError(), 2, "ValueError"),
    "the disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), 2, "No space left on device.*; make room"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "Permission denied: 'x'"),
    "safetensors": (SafetensorError("header too large"), 2, "header too large"),
    "av": (av.error.FFmpegError(-5, "muxer"), 2, "muxer"),
    "a package": (ModuleNotFoundError("No module named 'av'"), 2, "'av': pip install 'adaspa_jax\\[demo\\]'"),
    "torch's": (ModuleNotFoundError("no torch", name="torch.nn"), 2, "no torch: pip install 'adaspa_jax\\[torch\\]'"),
    "memory": (MemoryError(), 2, "out of memory .*smaller or shorter video"),
    "the device": (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), 2, "out of memory .*9 bytes"),
    "a library that talks": (ValueError("x" * 5000), 2, "^error: x{600}... .all of it with --debug.$"),
    "numbers": (FloatingPointError("latents are NaN"), 1, "latents are NaN"),
}


@pytest.mark.parametrize("case", ENDS)
def test_errors_are_one_line(case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, message = ENDS[case]
    error.add_note("For simplicity,\nJAX has removed its frames.")

    def main(debug: Annotated[bool, typer.Option("--debug")] = False) -> None:
        raise error

    assert call(monkeypatch, main) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert len(line) < LONGEST + 100
    assert re.search(message, line), line
    with pytest.raises(type(error)):
        call(monkeypatch, main, "--debug")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        call(monkeypatch, main)


def test_packages_are_asked_for_before_the_work() -> None:
    with pytest.raises(ImportError, match=r"no_such_package cannot be imported .*pip install 'adaspa_jax"):
        require("json", "no_such_package")
