"""Results that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _nearest_folder(path: Path) -> Path:
    """The deepest existing ancestor of `path`, or itself."""
    return path if path.exists() or path == path.parent else _nearest_folder(path.parent)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; its files are moved into `out` when the block ends well, else dropped.

    Raises ValueError before any work if `out` cannot be written.
    """
    parent = _nearest_folder(out.absolute())
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file")
        stage = Path(tempfile.mkdtemp(prefix=".adaspa-", dir=parent))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}); name a folder you may write to") from error
    try:
        yield stage
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(stage.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
