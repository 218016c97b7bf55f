"""The `@triton.jit` kernels on the shared cases, in Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.calls import Request
from pallas_kernels.dispatch import choose

pytest.importorskip("jax_triton")


@pytest.mark.parametrize("which", ["not matrix", pytest.param("matrix", marks=pytest.mark.matrix)])
def test_parity_in_the_interpreter(which: str) -> None:
    fast = "jax_triton and not long and not many"
    if which == "not matrix":
        fast += " and not rows and not density"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-k", fast, "-m", which]
    ended = subprocess.run(
        [*command, str(Path(__file__).parents[1] / "test_parity.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert " passed" in ended.stdout


def test_interpreting_says_what_it_needs() -> None:
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        choose("jax_triton", Request("block_mass", "float32", 64, 64, 64, interpret=True))
