"""The folder of results: every file whole or not at all, and none of an earlier run."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LATENTS = "latents.safetensors"
REPORT = "report.json"
BLOCKS = "blocks.png"
SHEET = "sheet.png"
VIDEOS = ("video.mp4", "video.gif", SHEET)
EMBEDDINGS = "embeddings.safetensors"
RUNS = "runs.json"
"""Of several runs: their folders, prompts and seeds."""
ALL = (LATENTS, REPORT, BLOCKS, EMBEDDINGS, RUNS, *VIDEOS)
"""What `python -m models.sample` may write: in a folder that is used again these are an earlier run's."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
"""Of a run's folder."""
KEPT = "kept in"
"""How the note of an error begins that names what outlives it."""


@dataclass
class Results:
    """OUT, and the hidden folder in it where files are written before they appear."""

    out: Path
    stage: Path
    ours: tuple[str, ...]
    """Names that an earlier run may have left in OUT."""
    above: "Results | None" = None
    """Those of all runs, of which this is one."""
    kept: list[str] = field(default_factory=list)
    """What has appeared so far."""

    def publish(self) -> None:
        """Moves what is staged into OUT for good; the first time, an earlier run's files go. Raises OSError."""
        if self.above is not None:
            self.above.publish()
        staged = sorted(file.name for file in self.stage.iterdir())
        if not self.kept:
            for folder in earlier_runs(self.out) if RUNS in self.ours else ():
                _forget(folder, ALL)
                with contextlib.suppress(OSError):
                    folder.rmdir()
            _forget(self.out, set(self.ours) - set(staged))
        for name in staged:
            os.replace(self.stage / name, self.out / name)
            if name not in self.kept:
                self.kept.append(name)

    @contextmanager
    def of_run(self, name: str) -> "Iterator[Results]":
        """Those of one of several runs, in a folder of its own; "": of the only one, these."""
        if not name:
            yield self
            return
        with results(self.out / name, above=self) as found:
            yield found
        self.kept.append(f"{name}/")


def _forget(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def earlier_runs(out: Path) -> list[Path]:
    """The folders of the several runs that OUT holds; [] if it holds none, or its list of them is damaged."""
    try:
        names = [str(run["folder"]) for run in json.loads((out / RUNS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    # Nothing that leads out of OUT.
    return [out / name for name in names if _NAME.fullmatch(name) and not (out / name).is_symlink()]


def sparing(out: Path, embeddings: Path | None) -> tuple[str, ...]:
    """`ALL`, without the embeddings in OUT where the new run reads them."""
    file = out / EMBEDDINGS
    read = embeddings is not None and embeddings.exists() and file.exists() and file.samefile(embeddings)
    return tuple(name for name in ALL if name != EMBEDDINGS or not read)


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
def results(out: Path, ours: tuple[str, ...] = ALL, above: Results | None = None) -> Iterator[Results]:
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
    found = Results(out, stage, ours, above)
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
