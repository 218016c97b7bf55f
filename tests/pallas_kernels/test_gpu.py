"""The kernels compiled and run on a GPU: `pytest -m gpu`. The same cases as everywhere, in each dtype they serve."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    block_mass,
    block_sparse_attention,
    flash_attention,
    pooled_attention,
    resolve_implementation,
)
from pallas_kernels.calls import Request
from pallas_kernels.dispatch import choose
from tests.adaspa_jax.test_text import call_of
from tests.kernel_cases import FULL, GPU_CASES, Case, assert_attention, operands, pooled_operands
from tests.pallas_kernels import test_bounds, test_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
each = pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
every = pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu", "jax_triton"])


def prepare(case: Case, dtype: str, implementation: str, kernel: str) -> Case:
    """The case in `dtype`, or a skip; memory that outputs may get is filled with NaN before."""
    case = dataclasses.replace(case, dtype=dtype)
    blocks = {} if kernel == "flash_attention" else {"block_q": case.block_q, "block_k": case.block_k}
    if kernel == "pooled_attention":
        del blocks["block_k"]
    try:
        choose(implementation, Request(kernel, jnp.dtype(dtype), case.head_dim, **blocks))  # type: ignore[arg-type]
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    jax.block_until_ready([jnp.full((1 << 20,), jnp.nan) for _ in range(16)])
    return case


@each
@dtypes
@every
def test_flash_attention(case: Case, dtype: str, implementation) -> None:
    case = prepare(case, dtype, implementation, "flash_attention")
    x = operands(case)
    valid = None if case.keys % case.block_k else x.block_valid
    run = jax.jit(
        lambda q, k, v, b: flash_attention(q, k, v, block_valid=b, return_lse=True, implementation=implementation)
    )
    whole = dataclasses.replace(x, block_valid=valid)
    assert_attention(case, whole, run(x.q, x.k, x.v, valid), selected=False)


@each
@dtypes
@every
def test_block_sparse_attention(case: Case, dtype: str, implementation) -> None:
    case = prepare(case, dtype, implementation, "block_sparse_attention")
    x = operands(case)
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "return_lse": True, "implementation": implementation}
    run = jax.jit(lambda *a, b: block_sparse_attention(*a, block_valid=b, **blocks))
    # Entries past the counts hold what would fault or read elsewhere.
    indices, counts = np.array(x.indices), np.asarray(x.counts)
    past = np.arange(indices.shape[-1]) >= counts[..., None]
    poisoned = np.where(past, np.iinfo(indices.dtype).max, indices)
    got = run(x.q, x.k, x.v, poisoned, x.counts, b=x.block_valid)
    assert_attention(case, x, got, selected=True)
    clean = run(x.q, x.k, x.v, np.where(past, 0, indices).astype(indices.dtype), x.counts, b=x.block_valid)
    jax.tree.map(np.testing.assert_array_equal, got, clean)


@each
@dtypes
@every
def test_block_mass(case: Case, dtype: str, implementation) -> None:
    case = prepare(case, dtype, implementation, "block_mass")
    x = operands(case)
    valid = jax.device_get({"block_valid": x.block_valid, "query_valid": x.query_valid})
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "return_row_sum": True}
    lse = np.random.default_rng(0).normal(5.0, 0.1, x.q.shape[:3]).astype(np.float32)
    lse[0, 0, 0] = -np.inf
    run = lambda name: jax.jit(lambda q, k, s: block_mass(q, k, s, **blocks, **valid, implementation=name))
    # The inputs are exact in every dtype here, so that only sums and exponentials round.
    with jax.default_device(jax.devices("cpu")[0]):
        right = run("reference")(*jax.device_get((x.q, x.k, lse)))
    for got, expected in zip(run(implementation)(x.q, x.k, lse), right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)


@each
@dtypes
@every
def test_pooled_attention(case: Case, dtype: str, implementation) -> None:
    case = prepare(case, dtype, implementation, "pooled_attention")
    x, pooled = operands(case), pooled_operands(case)
    options = {"block_q": case.block_q, "return_lse": True, "implementation": implementation}
    run = jax.jit(lambda *a: pooled_attention(*a, **options))
    assert_attention(case, x, run(x.q, x.k, x.v, pooled.bias, pooled.kept), selected=False, pooled=pooled)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
def test_used_indices_out_of_range_select_nothing(implementation) -> None:
    case = dataclasses.replace(FULL, dtype="bfloat16", block_q=64, block_k=64, rows=256, keys=256)
    case = prepare(case, case.dtype, implementation, "block_sparse_attention")
    x = operands(case)
    run = lambda i, c: block_sparse_attention(
        x.q, x.k, x.v, i, jnp.full_like(x.counts, c), block_q=64, block_k=64, implementation=implementation
    )
    bad = jnp.broadcast_to(jnp.array([-1, 2, 4, 99]), (1, 2, 4, 4))
    got, expected = (np.asarray(out, np.float32) for out in (run(bad, 4), run(bad[..., 1:2], 1)))
    np.testing.assert_allclose(got, expected, atol=0.02)  # a rounding of bfloat16


def test_the_best_implementation_is_the_default() -> None:
    best = "mosaic_gpu" if getattr(jax.devices()[0], "compute_capability", "") == "9.0" else "triton"
    assert resolve_implementation() == best
    assert resolve_implementation(dtype="float32") == "triton"
    assert resolve_implementation(head_dim=40) == "xla"


@pytest.mark.parametrize("block_q", [64, 128])
@every
def test_only_the_first_rows_attend(block_q: int, implementation) -> None:
    test_rows.check(block_q, jnp.bfloat16, implementation=implementation)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kernel", test_bounds.KERNELS)
@every
def test_programs_of_both_kinds(kernel: str, block: int, implementation) -> None:
    test_bounds.check(kernel, block, implementation=implementation)


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (128, 128)])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_scores_in_8_bits(block_q: int, block_k: int, precision: Any) -> None:
    case = dataclasses.replace(
        FULL, rows=512, keys=640, block_q=block_q, block_k=block_k, dtype="bfloat16", ragged=True
    )
    case = prepare(case, "bfloat16", "mosaic_gpu", "block_sparse_attention")
    x = operands(case)
    how = {"score_precision": precision, "return_lse": True}
    blocks = {"block_q": block_q, "block_k": block_k, "block_valid": x.block_valid} | how
    sparse = lambda implementation: block_sparse_attention(
        x.q, x.k, x.v, x.indices, x.counts, implementation=implementation, **blocks
    )
    dense = lambda implementation: flash_attention(x.q, x.k, x.v, implementation=implementation, **how)
    for run in (sparse, dense):
        (out, lse), (expected, expected_lse) = run("mosaic_gpu"), run("reference")
        np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2)
        np.testing.assert_allclose(lse, expected_lse, atol=2e-3)  # a GPU's sums of e4m3 products are short of bits


@pytest.mark.parametrize(("block", "text"), [(64, 190), (128, 200)])
@every
def test_text_in_parts_is_the_same(block: int, text: int, implementation) -> None:
    call = call_of(block, text, implementation=implementation)
    call = call._replace(**{name: getattr(call, name).astype(jnp.bfloat16) for name in "qkv"})
    assert call.text_parts > 1
    expected = call._replace(implementation="reference").text(0).astype(jnp.float32)
    np.testing.assert_allclose(call.text().astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)
