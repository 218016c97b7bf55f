"""Who may import whom: folders and the wings of models/ downwards only, no circle between files, no outgrown file."""

import ast
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pallas_kernels", "adaspa_jax", "models", "convert", "benchmarks", "tests")
ALLOWED = {
    "pallas_kernels": set(),
    "adaspa_jax": {"pallas_kernels"},
    "models": {"pallas_kernels", "adaspa_jax"},
    "convert": {"pallas_kernels", "adaspa_jax", "models"},
}
FLOORS = {"demo": 0, "transformers": 0, "schedulers": 0, "checkpoint": 1, "vae": 2, "pipeline": 3, "commands": 4}
"""Of the wings of models/; the commands themselves stand above them all."""
TOP = 5
MOST_LINES = 450

Imports = Mapping[str, list[tuple[int, str]]]
"""Of each module, (line, module) for every import of ours."""


def imports(source: str, modules: set[str]) -> list[tuple[int, str]]:
    """(line, module) of every import in a source file of a module among `modules`, or of a name inside one."""
    named = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            named += [(node.lineno, name if name in modules else node.module) for name in submodules]
    return [(line, name) for line, name in dict.fromkeys(named) if name in modules]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def tree() -> Imports:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    modules = {module_name(file) for file in files}
    assert len(modules) > 100
    return {module_name(file): imports(file.read_text("utf-8"), modules) for file in files}


def floor(module: str) -> int:
    wing = module.split(".")[1] if "." in module else ""
    return FLOORS.get(wing, TOP)


def violations(found: Imports) -> list[str]:
    """`module:line imports X` for what climbs from folder to folder or, inside models/, from wing to wing."""
    wrong = []
    for module, names in found.items():
        folder = module.split(".")[0]
        for line, name in names:
            other = name.split(".")[0]
            climbs = folder == other == "models" and module != "models" and floor(name) > floor(module)
            if climbs or (folder in ALLOWED and other != folder and other not in ALLOWED[folder]):
                wrong.append(f"{module}:{line} imports {name}")
    return wrong


def circle(found: Imports) -> list[str]:
    """Modules that import each other round in a ring; [] if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        ring: list[str] = []
        for _, name in found.get(module, []):
            # A package's index imports its own files, and importing one of them runs it: no circle.
            ring = ring or (walk(name, [*path, module]) if not module.startswith(name + ".") else [])
        done.add(module)
        return ring

    rings = [walk(module, []) for module in found]
    return next((ring for ring in rings if ring), [])


def test_nobody_imports_upwards(tree: Imports) -> None:
    assert violations(tree) == []


def test_no_files_import_each_other(tree: Imports) -> None:
    assert circle(tree) == []


PLANTED = {
    "adaspa_jax.x": "import jax\n\ndef f():\n    from models.transformers.layers import Linear\n",
    "models.checkpoint.x": "from models.pipeline import video\n",
    "models.vae.x": "import models.decode\n",
    "convert.x": "from benchmarks.table import show\n",
}


@pytest.mark.parametrize("module", PLANTED)
def test_a_planted_violation_is_named(tree: Imports, module: str) -> None:
    ((line, name),) = imports(PLANTED[module], set(tree))
    assert violations({module: [(line, name)]}) == [f"{module}:{line} imports {name}"]


def test_a_planted_circle_is_found(tree: Imports) -> None:
    planted = dict(tree) | {"pallas_kernels.blocks": [(1, "pallas_kernels.api")]}
    assert {"pallas_kernels.api", "pallas_kernels.blocks"} <= set(circle(planted))
    assert len(circle({"a": [(1, "b")], "b": [(1, "c")], "c": [(1, "a")]})) == 3


def test_no_file_of_code_outgrows_its_purpose() -> None:
    lengths = {
        str(f): len(f.read_text("utf-8").splitlines()) for folder in FOLDERS for f in (ROOT / folder).rglob("*.py")
    }
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def test_a_wheel_carries_the_method_and_the_kernels_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["adaspa_jax", "pallas_kernels"]
