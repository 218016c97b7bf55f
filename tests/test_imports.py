"""Who may import whom (shared by all folders): pallas_kernels <- adaspa_jax <- models <- convert."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = {"pallas_kernels", "adaspa_jax", "models", "convert", "benchmarks", "tests"}
ALLOWED = {
    "pallas_kernels": set(),
    "adaspa_jax": {"pallas_kernels"},
    "models": {"pallas_kernels", "adaspa_jax"},
    "convert": {"pallas_kernels", "adaspa_jax", "models"},
}


def imports(source: str) -> list[tuple[int, str]]:
    """(line, top-level package) of every import in a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


def violations(folder: str, files: dict[str, str]) -> list[str]:
    """`file:line imports X` for every import that `folder` may not have."""
    forbidden = OURS - ALLOWED[folder] - {folder}
    return [
        f"{name}:{line} imports {package}"
        for name, source in files.items()
        for line, package in imports(source)
        if package in forbidden
    ]


def test_nobody_imports_upwards() -> None:
    found = []
    for folder in ALLOWED:
        files = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / folder).rglob("*.py")}
        assert files
        found += violations(folder, files)
    assert found == []


def test_a_planted_violation_is_named() -> None:
    source = "import jax\n\ndef f():\n    from models.layers import Linear\n"
    assert violations("adaspa_jax", {"x.py": source}) == ["x.py:4 imports models"]


def test_a_wheel_carries_the_method_and_the_kernels_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["adaspa_jax", "pallas_kernels"]
