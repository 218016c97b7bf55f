"""The GPU kernels through the real compilers, with no GPU: no spills, the right units, whole functions ahead of time.

One process an architecture, since Mosaic does not compile for a second one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import compiled
from benchmarks.gpu.compiled import TARGETS, cuda_root, served
from tests.matrix import in_matrix

ROOT = Path(__file__).parents[2]


def toolkit_missing() -> bool:
    try:
        cuda_root()
    except FileNotFoundError:
        return True
    return False


pytestmark = pytest.mark.skipif(toolkit_missing(), reason="the CUDA compilers' wheels are for Linux on x86-64 only")


def run(*command: str) -> str:
    ended = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


CASES = [(arch, few) for arch in sorted(TARGETS) for few in (True, False)]


@pytest.fixture(scope="module", params=[pytest.param(c, marks=() if c[1] else pytest.mark.matrix) for c in CASES])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("compiled") / "rows.json"
    arch, few = request.param
    run("-m", "benchmarks.gpu.compiled", "--arch", arch, *["--few"] * few, "--json", str(file))
    return json.loads(file.read_text())


def test_every_default_configuration_compiles_without_spills_or_serialized_products(rows: list[dict[str, Any]]) -> None:
    arch = rows[0]["arch"]
    assert sorted({(row["implementation"], row["kernel"]) for row in rows}) == sorted(served(arch))
    for row in rows:
        assert row["spill_bytes"] == 0, row
        # Triton schedules its own products; ours must overlap.
        assert row["serialized"] == 0 or row["implementation"] != "mosaic_gpu", row
        assert row["local_memory"] == 0, row
        assert row["stale"] == 0, row
        assert row["smem_bytes"] <= TARGETS[arch]["shared_memory_per_block_optin"], row


def test_every_kernel_uses_the_matrix_units_it_should(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        narrow = row["dtype"] != "float32"
        if row["arch"] == "8.0" or not narrow:
            assert row["mma_sync"] + row["wgmma"] > 0, row
        else:
            assert row["wgmma"] > 0, row
            assert row["mma_sync"] == 0, row
        # Q, and K, and V where there is one.
        assert (row["tma_loads"] >= 3) == (row["implementation"] == "mosaic_gpu"), row


LOG = """
ptxas info    : 8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma
ptxas info    : Used 168 registers, used 16 barriers
"""


def test_what_ptxas_says_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 0, "", LOG)
    monkeypatch.setattr(compiled.subprocess, "run", lambda *given, **options: ended)
    found = compiled.run_ptxas(".target sm_90a", Path("ptxas"))
    assert found == {"registers": 168, "spill_bytes": 16, "serialized": 1, "stale": 0}


# Whole functions through XLA, ptxas spills being errors; the last one for eight GPUs.
AHEAD_OF_TIME = """
import functools, sys
import benchmarks.gpu.compiled as g
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels import block_mass, block_sparse_attention, flash_attention, pooled_attention

implementation, arch = sys.argv[1:]
g.os.environ["PATH"] += g.os.pathsep + str(g.cuda_root() / "bin")

def attention(q, indices, counts, lse):
    blocks = {"block_q": 64, "block_k": 64, "implementation": implementation}
    out, lse = flash_attention(q, q, q, return_lse=True, implementation=implementation)
    mass = block_mass(q, q, lse, **blocks)
    kept = jnp.zeros((*q.shape[:2], 16, 32), jnp.uint32)
    out += pooled_attention(q, q, q, lse, kept, block_q=64, implementation=implementation)
    return block_sparse_attention(q, q, q, indices, counts, **blocks) + out, mass

shape = lambda batch: [
    jax.ShapeDtypeStruct((batch, 8, 1000, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((batch, 8, 16, 4), jnp.uint16),
    jax.ShapeDtypeStruct((batch, 8, 16), jnp.int32),
    jax.ShapeDtypeStruct((batch, 8, 1000), jnp.float32),
]
options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
text = g.lower(attention, shape(2), arch).compile(compiler_options=options).as_text()
assert "custom-call" in text or "custom_call" in text

mesh = Mesh(np.array(g.devices(arch, 8)).reshape(2, 4), ("data", "heads"))
spec = P("data", "heads")
sharded = jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 2)
arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for x in shape(2)]
with jax.enable_x64(True):
    g.lower(attention, shape(2), arch)
with g.as_device(arch, data=2, heads=4):
    lowered = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("cuda",))
text = lowered.compile(compiler_options=options).as_text()
assert "all-gather" not in text and "all-to-all" not in text
print("compiled")
"""


FUNCTIONS = [("mosaic_gpu", "9.0"), *in_matrix(("triton", "8.0"), ("triton", "9.0"))]


@pytest.mark.parametrize(("implementation", "arch"), FUNCTIONS)
def test_whole_functions_compile_for_one_and_for_eight_gpus(implementation: str, arch: str) -> None:
    assert "compiled" in run("-c", AHEAD_OF_TIME, implementation, arch)
