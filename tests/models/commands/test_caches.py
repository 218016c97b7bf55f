"""What is compiled is kept, where it can be."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from models import decode, sample
from models.commands import caches
from models.commands.caches import keep_compiled
from models.pipeline.latents import SavedLatents, write_latents
from models.pipeline.video import VideoPipeline
from models.vae import decoding
from tests.models.commands.fakes import WORDS, Fakes, call

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """JAX as it is when nobody has told it to keep anything, and a cache folder of the user's; afterwards as it was."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update(NAMES[0], None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "_LEAST_SECONDS", 0.0)
    yield tmp_path / "cache/adaspa_jax/compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_something(factor: float) -> None:
    jax.jit(lambda x: jnp.sin(x) * factor).lower(jnp.ones(3)).compile()


def entries(folder: Path) -> int:
    return len(list(folder.glob("jit__lambda*"))) if folder.exists() else 0


def test_programs_are_kept_in_the_cache_of_the_user(unset: Path) -> None:
    assert keep_compiled(None) is None
    for _ in range(2):
        compile_something(2.5)
        jax.clear_caches()
    assert entries(unset) == 1


def test_what_was_longest_out_of_use_goes(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unset.mkdir(parents=True)
    for age, name in enumerate("dbca"):
        (unset / name).write_bytes(bytes(100))
        os.utime(unset / name, (1e9 - age, 1e9 - age))
    (unset / "a folder").mkdir()
    (unset / "link").symlink_to("a")
    monkeypatch.setattr(caches, "MOST_BYTES", 250)
    assert keep_compiled(None) is None
    assert {path.name for path in unset.iterdir()} == {"d", "b", "a folder", "link"}


def test_programs_are_kept_where_it_is_said(unset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert keep_compiled("a/b") is None
    compile_something(3.5)
    assert (entries(tmp_path / "a/b"), entries(unset)) == (1, 0)


def test_a_setting_of_jax_counts(unset: Path, tmp_path: Path) -> None:
    jax.config.update(NAMES[0], str(tmp_path / "own"))
    assert keep_compiled(None) is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not unset.exists()


def test_an_empty_name_is_refused(unset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--compile-cache is empty; name a folder, or off"):
        keep_compiled("")
    assert not list(tmp_path.iterdir())


def test_off_is_off(unset: Path) -> None:
    assert keep_compiled("off") is None
    compile_something(4.5)
    assert not unset.exists()


@pytest.fixture
def given(tiny_pipeline: Path, tmp_path: Path) -> list[Any]:
    return ["--checkpoint", tiny_pipeline, *WORDS, "--out", tmp_path / "out"]


def test_a_folder_that_cannot_be_written_is_refused(
    given: list[Any], unset: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(VideoPipeline, "with_weights", None)
    (tmp_path / "file").touch()
    for folder in ("/proc/adaspa", tmp_path / "file", tmp_path / "file/in"):
        assert call(monkeypatch, sample.main, *given, "--compile-cache", folder) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: --compile-cache {folder} cannot be written (")
        assert line.endswith("name another folder, or off")
    assert not (tmp_path / "out").exists()


def test_decoders_are_kept_too(
    wan_pipeline: Path, unset: Path, tmp_path: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    write_latents(tmp_path / "x", SavedLatents({"dense": np.zeros((1, 4, 1, 4, 4), np.float32)}, ["a cat"], 8))
    arguments = ["--checkpoint", wan_pipeline, "--latents", tmp_path / "x", "--out", tmp_path / "out"]
    assert call(monkeypatch, decode.main, *arguments, "--compile-cache", "/proc/adaspa") == 2
    assert capsys.readouterr().err.startswith("error: --compile-cache /proc/adaspa cannot be written (")
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, decode.main, *arguments, "--compile-cache", tmp_path / "kept") == 0
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
    monkeypatch.setattr(decoding, "decode_latents", lambda *given, **options: compile_something(5.5) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, decode.main, *arguments)
    assert (entries(tmp_path / "kept"), entries(unset)) == (1, 0)  # a setting counts


def test_the_folder_of_the_user_is_done_without(
    given: list[Any], unset: Path, fakes: Fakes, monkeypatch, capsys
) -> None:
    unset.parent.mkdir(parents=True)
    unset.touch()
    assert call(monkeypatch, sample.main, *given) == 0
    assert f"compiled programs are not kept: {unset} cannot be written (File exists)" in capsys.readouterr().err
