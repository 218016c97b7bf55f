"""`python -m convert`: bit-exact, all or nothing, and one clear error for each kind of bad input."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import models
from convert.__main__ import main
from models.checkpoint.safetensors_folder import INDEX, SINGLE
from models.commands.cli import run_cli

DEMO = Path(models.__file__).parent / "demo" / "checkpoint"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_cli(main)
    return int(end.value.code or 0)


def shard(folder: Path) -> None:
    """Splits the weights of a transformer's folder into two shards with an index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in files.items() for k in keys}}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / SINGLE).unlink()


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(DEMO, tmp_path / "src")
    folder = tmp_path / "src" / "transformer"
    weights = {k: np.asarray(v, np.float32) for k, v in load_file(folder / SINGLE).items()}
    save_file(weights, folder / SINGLE)
    return tmp_path / "src"


def test_single_file_and_shards_convert_bit_for_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = nnx.to_pure_dict(nnx.state(models.from_pretrained(source)))
    assert run(monkeypatch, source, tmp_path / "one") == 0
    shard(source / "transformer")
    assert run(monkeypatch, source / "transformer", tmp_path / "two") == 0
    for name in ("one", "two"):
        converted = nnx.to_pure_dict(nnx.state(models.from_pretrained(tmp_path / name)))
        jax.tree.map(np.testing.assert_array_equal, converted, direct)
        assert (tmp_path / name / "text_encoder" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "src", "two"]
    assert run(monkeypatch, source, tmp_path / "one", "--overwrite", "--dtype", "bfloat16") == 0
    assert str(models.from_pretrained(tmp_path / "one").dtype) == "bfloat16"


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda t: (t / "config.json").unlink(), "no checkpoint"),
    "no weights": (lambda t: (t / SINGLE).unlink(), "holds neither"),
    "broken json": (lambda t: (t / "config.json").write_text("{"), "not valid JSON"),
    "class": (
        lambda t: edit_json(t / "config.json", _class_name="UNet"),
        "'UNet' is not supported",
    ),
    "truncated": (lambda t: (t / SINGLE).write_bytes((t / SINGLE).read_bytes()[:-100]), "truncated or corrupt"),
    "header": (lambda t: (t / SINGLE).write_bytes(b"\xff" * 64), "truncated or no safetensors"),
    "missing": (lambda t: edit_weights(t, lambda w: w.pop("proj_out.bias")), "1 missing keys: 'proj_out.bias'"),
    "unexpected": (lambda t: edit_weights(t, lambda w: w.update(x=np.ones(1, np.float32))), "unexpected keys: 'x'"),
    "misshapen": (
        lambda t: edit_weights(t, lambda w: w.update({"proj_out.bias": np.ones(3, np.float32)})),
        r"misshapen keys: .*proj_out.bias \[3\]",
    ),
    "non-finite": (
        lambda t: edit_weights(t, lambda w: w["proj_out.bias"].__setitem__(0, np.nan)),
        "NaN or infinite",
    ),
    "leaving": (
        lambda t: (shard(t), edit_json(t / INDEX, weight_map={"proj_out.bias": "../../secret.safetensors"})),
        "leaves the checkpoint's folder",
    ),
    "link": (
        lambda t: (
            (t / SINGLE).rename(t.parent / "secret"),
            (t / SINGLE).symlink_to(t.parent / "secret"),
        ),
        "leaves the checkpoint's folder",
    ),
    "quantised": (
        lambda t: edit_weights(t, lambda w: w.update({"proj_out.bias": w["proj_out.bias"].astype(np.int8)})),
        "is I8; supported are BF16, F16, F32",
    ),
    "index": (lambda t: (shard(t), edit_json(t / INDEX, weight_map={"proj_out.bias": "a.safetensors"})), "disagree"),
}


@pytest.mark.parametrize("case", BREAK)
def test_bad_input_gives_exit_code_2_and_leaves_nothing(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    change, message = BREAK[case]
    change(source / "transformer")
    assert run(monkeypatch, source, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_destinations_that_must_not_be_replaced(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    for extra in ((), ("--overwrite",)):
        assert run(monkeypatch, source, tmp_path / "mine", *extra) == 2
    assert (tmp_path / "mine" / "file").read_text() == "keep"
    assert run(monkeypatch, source, source / "transformer" / "inside") == 2
    assert run(monkeypatch, source, tmp_path / "no" / "parent") == 2
    assert run(monkeypatch, tmp_path / "absent", tmp_path / "out") == 2
