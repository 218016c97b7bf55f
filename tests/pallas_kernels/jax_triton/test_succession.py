"""Who serves Ampere when JAX has no Pallas Triton backend any more."""

import importlib.util
import logging
import subprocess
import sys

import jax
import pytest

from pallas_kernels import dispatch, triton_calls
from pallas_kernels.calls import Request

REQUEST = Request("block_sparse_attention", "bfloat16", 128, 64, 64)
WITHOUT = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import jax
from pallas_kernels import dispatch, triton_calls
from pallas_kernels.calls import Request
jax.default_backend = lambda: "gpu"
for place in (triton_calls, dispatch.backend("mosaic_gpu")):
    place.gpu_capability = lambda: "8.0"
print(dispatch.choose(None, Request("block_sparse_attention", "bfloat16", 128, 64, 64))[0])
"""


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for place in (triton_calls, dispatch.backend("mosaic_gpu")):
        monkeypatch.setattr(place, "gpu_capability", lambda: "8.0")


def test_pallas_triton_while_it_is_there(ampere: None) -> None:
    assert dispatch.choose(None, REQUEST)[0] == "triton"


def test_jax_triton_when_it_is_gone() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["jax_triton"]


def test_xla_without_both_says_why(
    ampere: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load, find = importlib.import_module, importlib.util.find_spec

    def gone(name: str) -> object:
        if name == "pallas_kernels.triton":
            raise ImportError("no Pallas Triton")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", gone)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax_triton" else find(name))
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert dispatch.choose(None, REQUEST)[0] == "xla"
    assert "no Pallas Triton" in caplog.text
    assert "the package jax-triton is not installed" in caplog.text
