"""What orbax and tensorstore do where a disk cannot be read or written, made one line that says so."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOOP_CLOSED = "Event loop is closed"
"""Of each read or write that ends after the first has failed."""
STILL = 0.3
"""Seconds after a failure in which the other threads end."""


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing is shown of what they print of an error besides raising it: pages, from many threads."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, show = [logger.level for logger in loggers], sys.unraisablehook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == _LOOP_CLOSED else show(args)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception:
        time.sleep(STILL)
        raise
    finally:
        sys.unraisablehook = show
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def reason_of(error: Exception) -> str:
    """One line of what may be a page: the system's own words, if they are in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    line = (str(error).splitlines() or [""])[0]
    return os.strerror(int(code[1])) if code else line[:200] or type(error).__name__
