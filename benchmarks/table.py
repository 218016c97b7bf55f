"""Rows of figures to a terminal and to JSON."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adaspa_jax import json_values


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows, all with the same keys, as a table; floats with four significant digits."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=190).print(table)


def rows_of(module: str, *options: object) -> list[dict[str, Any]]:
    """The rows that `python -m MODULE OPTIONS --json FILE` writes, from a process of its own.

    Raises RuntimeError, with the end of what it said, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", module, *map(str, options), "--json", str(file)]
        # The compilers log what they miss of a machine that is not there.
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr[-4000:]}")
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return rows


def write_json(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Writes rows to `path`, as `json_values` spells them, whole or not at all; None writes nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(json_values(rows), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
