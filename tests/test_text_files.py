"""Text is read and written as UTF-8, whatever the locale: every call that opens a text file says so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("adaspa_jax", "pallas_kernels", "models", "convert", "benchmarks")
_OPENERS = {"open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
_BINARY_UNLESS_TOLD = {"NamedTemporaryFile", "TemporaryFile"}
_NO_FILES = {"av", "Image", "webbrowser", "os"}
"""Whose `open` is of no text."""


def _mode(call: ast.Call, name: str, method: bool) -> str:
    """The mode of an opening call, or what it is by default."""
    place = 0 if name in _BINARY_UNLESS_TOLD or (method and name == "open") else 1
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[place : place + 1]
    default = "w+b" if name in _BINARY_UNLESS_TOLD else "r"
    return str(given[0].value) if given and isinstance(given[0], ast.Constant) else default


def _calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each call that opens a file as text without an encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
        if name not in _OPENERS or (owner in _NO_FILES and name == "open"):
            continue
        mode = _mode(node, name, isinstance(function, ast.Attribute) and owner != "io")
        is_text = name in ("read_text", "write_text") or "b" not in mode
        if is_text and not any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            yield node.lineno, name


def _offenders(source: str) -> list[tuple[int, str]]:
    return list(_calls(ast.parse(source)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_file_has_an_encoding(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}() without encoding"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in _offenders(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_the_scan_sees_what_it_should() -> None:
    bad = [
        "open(p)",
        "open(p, 'w')",
        "p.open()",
        "p.open('w')",
        "p.read_text()",
        "p.write_text(x)",
        "os.fdopen(f, 'w')",
    ]
    bad += ["open(p, mode='a')", "tempfile.NamedTemporaryFile('w')", "p.read_text(errors='replace')", "io.open(p)"]
    good = ["open(p, 'rb')", "p.open('wb')", "p.open(mode='rb')", "p.read_bytes()", "open(p, encoding='utf-8')"]
    good += ["p.read_text(encoding='utf-8-sig')", "Image.open(p)", "tempfile.NamedTemporaryFile()", "av.open(p, 'w')"]
    assert all(_offenders(line) for line in bad)
    assert not any(_offenders(line) for line in good)
