"""The folder of results: every file whole or not at all, and none of an earlier run."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LATENTS = "latents.safetensors"
REPORT = "report.json"
BLOCKS = "blocks.png"
VIDEOS = ("video.mp4", "video.gif", "sheet.png")
ALL = (LATENTS, REPORT, BLOCKS, *VIDEOS)
"""What `python -m models.sample` may write: in a folder that is used again these are an earlier run's."""

KEPT = "kept in"
"""How the note of an error begins that names what outlives it."""


@dataclass
class Results:
    """OUT, and the hidden folder in it where files are written before they appear."""

    out: Path
    stage: Path
    ours: tuple[str, ...]
    """Names that an earlier run may have left in OUT."""
    kept: list[str] = field(default_factory=list)
    """What has appeared so far."""

    def publish(self) -> None:
        """Moves what is staged into OUT for good; the first time, an earlier run's files go. Raises OSError."""
        staged = sorted(file.name for file in self.stage.iterdir())
        if not self.kept:
            for name in set(self.ours) - set(staged):
                (self.out / name).unlink(missing_ok=True)
        for name in staged:
            os.replace(self.stage / name, self.out / name)
            if name not in self.kept:
                self.kept.append(name)


def _make(folder: Path) -> list[Path]:
    """Makes a folder; those that were not there, deepest first."""
    made = []
    for path in (folder, *folder.parents):
        if path.is_dir():
            break
        made.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return made


@contextmanager
def results(out: Path, ours: tuple[str, ...] = ALL) -> Iterator[Results]:
    """OUT to write to; what was staged appears when the block ends well, or earlier with `publish`.

    If it fails, what was published stays and is named in a note of the error; all else is as before. Raises ValueError
    before any work if OUT cannot be written.
    """
    made: list[Path] = []
    try:
        made = _make(out.absolute())
        for name in ours:
            if (out / name).is_dir():
                raise IsADirectoryError(f"{out / name} is a folder")
        stage = Path(tempfile.mkdtemp(prefix=".adaspa-", dir=out))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}); name a folder you may write to") from error
    found = Results(out, stage, ours)
    try:
        yield found
        found.publish()
    except Exception as error:
        if found.kept:
            error.add_note(f"{KEPT} {out}: {', '.join(found.kept)}")
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:  # empty ones alone
            with contextlib.suppress(OSError):
                folder.rmdir()
