"""TPU kernels and the sampler through the real compiler, with no TPU: they fit and take the recorded cycles at most.

One process a chip, two at a time; the rows of all chips are compiled once for the whole file.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
RECORDED = json.loads((ROOT / "benchmarks/results/tpu-static.json").read_text())
VMEM = {"v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "v7x": 64 << 20}
CHIPS = ("v5e", "v5p", "v6e", "v7x")
KEY = ("kernel", "chip", "block", "head_dim", "dtype", "tokens", "ragged")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 only")


whole = pytest.mark.parametrize("rows", [pytest.param("all", marks=pytest.mark.matrix)], indirect=True)
either = pytest.mark.parametrize("rows", ["few", pytest.param("all", marks=pytest.mark.matrix)], indirect=True)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def run(*command: str) -> str:
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("tpu") / "rows.json"
    which = ["--cases", "all"] if request.param == "all" else ["--cases", "few", "--chip", "v6e"]
    printed = run("-m", "benchmarks.tpu.static", *which, "--json", str(file))
    assert "NOTHING RAN ON A TPU" in printed
    # Block 64 on v6e and v7x is among the cases of "all", and is known to miss.
    met = "every other target is met" if request.param == "all" else "every target is met"
    assert met in printed, printed
    return json.loads(file.read_text())


@whole
def test_every_case_compiles_for_every_chip(rows: list[dict[str, Any]]) -> None:
    assert sorted(map(key, rows)) == sorted(map(key, RECORDED))


@either
def test_what_compiles_fits(rows: list[dict[str, Any]]) -> None:
    assert set(map(key, rows)) <= set(map(key, RECORDED))
    for row in rows:
        assert 0 < row["vmem_bytes"] <= VMEM[row["chip"]], row
        assert row["smem_bytes"] < 1 << 20, row
        # Copies of the operands, values of a block pair, the result once more while a shift may prove to be far off.
        # Scores of a block row of all heads, or N x N of one in bfloat16, would be 28 GB or more.
        assert row["hbm_temp_bytes"] < 14e9, row


@whole
def test_the_cases_are_those_that_users_run(rows: list[dict[str, Any]]) -> None:
    """Both head dims, dtypes and blocks, ragged, from VMEM and from HBM, at full scale."""
    for chip in CHIPS:
        mine = [row for row in rows if row["chip"] == chip]
        for kernel in ("dense", "block_sparse", "block_mass"):
            of_kernel = [row for row in mine if row["kernel"] == kernel]
            assert {(row["head_dim"], row["dtype"]) for row in of_kernel} >= {(128, "bfloat16"), (64, "bfloat16")}
            assert {row["dtype"] for row in of_kernel} == {"bfloat16", "float32"}
            assert {row["ragged"] for row in of_kernel} == {True, False}
        sparse = [row for row in mine if row["kernel"] in ("block_sparse", "gathered")]
        assert {row["block"] for row in sparse} == {64, 128, 256}
        # K and V of a head in VMEM, and past its limit not.
        heads = [row["vmem_bytes"] > 4 * row["tokens"] * row["head_dim"] for row in sparse]
        assert set(heads) == {True, False}


@either
def test_a_regression_of_static_cycles_fails(rows: list[dict[str, Any]]) -> None:
    recorded = {key(row): row for row in RECORDED}
    slower = [
        (key(row), figure, row[figure])
        for row in rows
        for figure in ("cycles_per_block", "masked_cycles_per_block", "all_in_cycles_per_block")
        if row[figure] > 1.05 * recorded[key(row)][figure]
    ]
    assert not slower


@either
def test_the_cycles_are_those_of_a_known_product(rows: list[dict[str, Any]]) -> None:
    """A plain matrix product keeps the matrix units busy: what the schedule says must come out at their peak."""
    peaks = [row["mxu_percent"] for row in rows if row["kernel"] == "matmul"]
    assert len(peaks) == len({row["chip"] for row in rows})
    # The 256-wide units of v6e and v7x wait a little for the accumulator.
    assert all(89 < peak <= 100 for peak in peaks), peaks


@either
def test_ours_need_fewer_cycles_a_block_than_splash(rows: list[dict[str, Any]]) -> None:
    splash = {row["chip"]: row["cycles_per_block"] for row in rows if row["kernel"] == "splash"}
    for row in rows:
        resident = row["vmem_bytes"] > 2 * row["tokens"] * row["head_dim"] * 2
        comparable = (row["block"], row["head_dim"], row["dtype"]) == (128, 128, "bfloat16") and resident
        if row["kernel"] in ("dense", "block_sparse") and comparable:
            assert row["cycles_per_block"] < splash[row["chip"]], row
            assert row["kernel"] != "dense" or row["all_in_cycles_per_block"] < splash[row["chip"]], row


SHARDED = """
import benchmarks.tpu.static as t
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec as P
from pallas_kernels import block_mass, block_sparse_attention, flash_attention

how = {"implementation": "mosaic_tpu"}

def attention(q, indices, counts):
    blocks = {"block_q": 128, "block_k": 128, **how}
    out, lse = flash_attention(q, q, q, return_lse=True, **how)
    return block_sparse_attention(q, q, q, indices, counts, **blocks) + out, block_mass(q, q, lse, **blocks)

devices = topologies.get_topology_desc(platform="tpu", topology_name=t.CHIPS["v6e"].topology).devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "heads"))
spec = P("data", "heads")
sharded = jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 2)
shapes = [((2, 8, 2000, 128), jnp.bfloat16), ((2, 8, 16, 4), jnp.uint16), ((2, 8, 16), jnp.int32)]
text = t.lower(sharded, [jax.ShapeDtypeStruct(*s) for s in shapes], mesh, spec).compile().as_text()
assert text.count("tpu_custom_call") >= 3
assert "all-gather" not in text and "all-to-all" not in text
with jax.enable_x64(True):
    t.lower(sharded, [jax.ShapeDtypeStruct(*s) for s in shapes], mesh, spec)
print("compiled")
"""


@pytest.mark.matrix
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_the_whole_sampler_compiles(chip: str) -> None:
    """HunyuanVideo at 13B sizes, 50 steps of all kinds, one layer of each sort, for one chip; its memory is printed."""
    printed = run("-m", "benchmarks.tpu.sampler", "--layers", "1", "1", "--chip", chip)
    print(printed)
    assert "NOTHING RAN" in printed
    assert chip in printed


def test_heads_and_batch_shard_over_four_chips() -> None:
    assert "compiled" in run("-c", SHARDED)
