"""How the commands of this project start and how they fail."""

import errno
import os
import sys
from collections.abc import Callable

import typer

from models.commands.files import KEPT

BAD_INPUT = (ValueError, NotImplementedError, OSError, ImportError, MemoryError, OverflowError)
"""What the person at the keyboard can mend: input, disk, memory, packages that are not installed."""
_LIBRARIES = ("av", "safetensors")
"""Whose errors are of files, though their classes do not say so."""
_TORCH_EXTRA = ("diffusers", "ftfy", "sentencepiece", "torch", "transformers")
"""What the extra `torch` installs; everything else that can be missing is of `demo`."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST = 600
"""Characters of a message that are shown without --debug."""


def exit_code(error: Exception) -> int | None:
    """2 for bad input and errors of the system, 1 for a run whose numbers are not finite, None for a bug."""
    if isinstance(error, FloatingPointError):
        return 1
    library = type(error).__module__.split(".")[0] in _LIBRARIES
    return 2 if isinstance(error, BAD_INPUT) or library or _out_of_memory(error) else None


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)


def one_line(error: Exception) -> str:
    """What is printed of an error: its message without line breaks, what to do, what is kept."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError) and "pip install" not in text:
        extra = "torch" if (error.name or "").split(".")[0] in _TORCH_EXTRA else "demo"
        text += f": pip install 'adaspa_jax[{extra}]'"
    elif _out_of_memory(error) or isinstance(error, MemoryError):
        text = f"out of memory ({text[: LONGEST // 2]}); make a smaller or shorter video, or give fewer prompts"
    elif any(os.strerror(number) in text for number in _FULL):
        text += "; make room and run again"
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... (all of it with --debug)"
    kept = [note for note in getattr(error, "__notes__", ()) if note.startswith(KEPT)]  # JAX adds notes of its own
    return "; ".join((text, *kept))


def run_cli(main: Callable[..., None]) -> None:
    """Runs a typer command; an error that is no bug ends it with one clear line on standard error.

    Exit code 2: bad input and errors of the system, see BAD_INPUT. 1: FloatingPointError, a run whose numbers are not
    finite. With --debug among the arguments they show a traceback.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except Exception as error:
        code = exit_code(error)
        if code is None or "--debug" in sys.argv[1:]:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(code)
