"""The TPU kernels compiled and run on a TPU: `pytest -m tpu`. The shared cases, in each dtype they serve."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_mass, block_sparse_attention, flash_attention, resolve_implementation
from pallas_kernels.mosaic_tpu import calls as tpu
from pallas_kernels.tuning import TpuAttentionTuning
from tests.kernel_cases import GPU_CASES, Case, assert_attention, operands

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU"),
]
HOW: dict[str, Any] = {"implementation": "mosaic_tpu"}
each = pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])


def prepare(case: Case, dtype: str, kernel: str) -> Case:
    """The case in `dtype`, or a skip; memory that outputs may get is filled with NaN before."""
    case = dataclasses.replace(case, dtype=dtype)
    if not case.served("mosaic_tpu", kernel):
        pytest.skip(f"mosaic_tpu does not serve D = {case.head_dim}, blocks {case.block_q} x {case.block_k}")
    jax.block_until_ready([jnp.full((1 << 20,), jnp.nan) for _ in range(16)])
    return case


@each
@dtypes
def test_flash_attention(case: Case, dtype: str) -> None:
    case = prepare(case, dtype, "flash_attention")
    x = operands(case)
    x = dataclasses.replace(x, block_valid=None if case.keys % case.block_k else x.block_valid)
    run = jax.jit(lambda q, k, v, b: flash_attention(q, k, v, block_valid=b, return_lse=True, **HOW))
    assert_attention(case, x, run(x.q, x.k, x.v, x.block_valid), selected=False)


@each
@dtypes
@pytest.mark.parametrize("resident", [True, False])
def test_block_sparse_attention(case: Case, dtype: str, resident: bool, monkeypatch) -> None:
    case = prepare(case, dtype, "block_sparse_attention")
    monkeypatch.setattr(tpu, "tpu_attention_tuning", lambda *_: TpuAttentionTuning(4, 2, resident=resident))
    x = operands(case)
    past = np.arange(x.indices.shape[-1]) >= np.asarray(x.counts)[..., None]
    poisoned = np.where(past, np.iinfo(x.indices.dtype).max, np.asarray(x.indices))
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "return_lse": True}
    run = jax.jit(lambda *a, b: block_sparse_attention(*a, block_valid=b, **blocks, **HOW))
    assert_attention(case, x, run(x.q, x.k, x.v, poisoned, x.counts, b=x.block_valid), selected=True)


@each
@dtypes
def test_block_mass(case: Case, dtype: str) -> None:
    case = prepare(case, dtype, "block_mass")
    x = operands(case)
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "return_row_sum": True}
    blocks |= jax.device_get({"block_valid": x.block_valid, "query_valid": x.query_valid})
    lse = np.random.default_rng(0).normal(5.0, 0.1, x.q.shape[:3]).astype(np.float32)
    lse[0, 0, 0] = -np.inf
    with jax.default_device(jax.devices("cpu")[0]):
        right = block_mass(*jax.device_get((x.q, x.k)), jnp.asarray(lse), **blocks, implementation="reference")
    got = jax.jit(lambda q, k, s: block_mass(q, k, s, **blocks, **HOW))(x.q, x.k, lse)
    for a, b in zip(got, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_it_is_the_default() -> None:
    assert resolve_implementation() == "mosaic_tpu"
    assert resolve_implementation(head_dim=40) == "xla"
