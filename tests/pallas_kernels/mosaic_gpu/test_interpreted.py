"""The bodies of the Hopper kernels in our interpreter, and the interpreter on bodies that are wrong."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import block_mass, block_sparse_attention, flash_attention, pooled_attention
from pallas_kernels.mosaic_gpu import interpret as mosaic_interpret
from pallas_kernels.mosaic_gpu.interpret import KernelError
from pallas_kernels.mosaic_gpu.machine import index_of
from tests.kernel_cases import CASES, FULL, GPU_CASES, Case, assert_attention, in_matrix, operands, pooled_operands

HOW: dict[str, Any] = {"implementation": "mosaic_gpu", "interpret": True}
SHORT = [case for case in GPU_CASES if case.rows <= 1024]
# Whole tiles under both orders of precedence of the warpgroups, a dtype each. Those that always run are cut short.
WHOLE = [case for case in SHORT if case not in CASES]
RUNS = [in_matrix(case, "bfloat16", False) for case in CASES if case in SHORT]
RUNS += [pytest.param(c, "bfloat16", False, marks=pytest.mark.matrix, id=f"{c.name}, all of it") for c in WHOLE]
RUNS += [
    in_matrix(dataclasses.replace(case, rows=512, keys=512, batch=1, heads=1), *how)
    for case in WHOLE
    for how in (("bfloat16", False), ("float16", True))
]
each = pytest.mark.parametrize(("case", "dtype", "first"), RUNS)


def prepare(case: Case, dtype: str, first: bool, kernel: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(mosaic_interpret, "PRODUCER_FIRST", first)
    case = dataclasses.replace(case, dtype=dtype)
    if not case.served("mosaic_gpu", kernel):
        pytest.skip(f"mosaic_gpu does not serve D = {case.head_dim}, blocks {case.block_q} x {case.block_k}")
    return case


@each
def test_flash_attention(case: Case, dtype: str, first: bool, monkeypatch) -> None:
    case = prepare(case, dtype, first, "flash_attention", monkeypatch)
    x = operands(case)
    x = dataclasses.replace(x, block_valid=None if case.keys % case.block_k else x.block_valid)
    got = flash_attention(x.q, x.k, x.v, block_valid=x.block_valid, return_lse=True, **HOW)
    assert_attention(case, x, got, selected=False)


@each
def test_block_sparse_attention(case: Case, dtype: str, first: bool, monkeypatch) -> None:
    case = prepare(case, dtype, first, "block_sparse_attention", monkeypatch)
    x = operands(case)
    past = np.arange(x.indices.shape[-1]) >= np.asarray(x.counts)[..., None]
    poisoned = np.where(past, np.iinfo(x.indices.dtype).max, np.asarray(x.indices))
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "block_valid": x.block_valid}
    got = block_sparse_attention(x.q, x.k, x.v, jnp.asarray(poisoned), x.counts, return_lse=True, **blocks, **HOW)
    assert_attention(case, x, got, selected=True)


@each
def test_block_mass(case: Case, dtype: str, first: bool, monkeypatch) -> None:
    case = prepare(case, dtype, first, "block_mass", monkeypatch)
    x = operands(case)
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "return_row_sum": True}
    blocks |= {"block_valid": x.block_valid, "query_valid": x.query_valid}
    lse = jnp.asarray(np.random.default_rng(0).normal(5.0, 0.1, x.q.shape[:3]), jnp.float32).at[0, 0, 0].set(-jnp.inf)
    right = jax.jit(lambda *a: block_mass(*a, **blocks, implementation="reference"))(x.q, x.k, lse)
    for got, expected in zip(block_mass(x.q, x.k, lse, **blocks, **HOW), right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@each
def test_pooled_attention(case: Case, dtype: str, first: bool, monkeypatch) -> None:
    case = prepare(case, dtype, first, "pooled_attention", monkeypatch)
    case = dataclasses.replace(case, keys=min(case.keys, 300))
    x, pooled = operands(case), pooled_operands(case)
    got = pooled_attention(x.q, x.k, x.v, pooled.bias, pooled.kept, block_q=case.block_q, return_lse=True, **HOW)
    assert_attention(case, x, got, selected=False, pooled=pooled)


@pytest.mark.parametrize("block", [64, 128])
def test_what_was_not_selected_is_not_read(block: int) -> None:
    x = operands(dataclasses.replace(FULL, rows=512, keys=512, block_q=block, block_k=block, dtype="bfloat16"))
    one = jnp.ones_like(x.counts)
    keys = jnp.where((jnp.arange(512) // block == 1)[:, None], x.k, jnp.nan)
    out = block_sparse_attention(x.q, keys, keys, jnp.full_like(x.indices, 1), one, block_q=block, block_k=block, **HOW)
    assert not jnp.isnan(out).any()


def test_used_indices_out_of_range_select_nothing() -> None:
    x = operands(dataclasses.replace(FULL, dtype="bfloat16", block_q=64, block_k=64, rows=256, keys=256))
    run = lambda i, c: block_sparse_attention(
        x.q, x.k, x.v, i, jnp.full_like(x.counts, c), block_q=64, block_k=64, **HOW
    )
    bad = jnp.broadcast_to(jnp.array([-1, 2, 4, 99]), (1, 2, 4, 4))
    np.testing.assert_array_equal(*(np.asarray(out, np.float32) for out in (run(bad, 4), run(bad[..., 1:2], 1))))


def test_it_does_not_run_inside_jit() -> None:
    q = jnp.zeros((1, 1, 128, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"outside jax\.jit"):
        jax.jit(lambda q: flash_attention(q, q, q, **HOW))(q)


def test_load_is_called_as_every_jax_wants_it() -> None:
    loads: list[Callable[..., Any]] = [lambda src, idx, *, layout: 0, lambda src, idx=0, *, layout: 0]
    loads.append(lambda src, *, layout: 0)  # jax 0.10, 0.11, 0.12
    assert [index_of(load) for load in loads] == [(None,), (), ()]


@pytest.mark.parametrize("block", [64, 128])
def test_a_kernel_that_does_not_wait_is_found_out(block: int, monkeypatch) -> None:
    monkeypatch.setattr(mosaic_interpret._Program, "barrier_wait", lambda self, barrier: None)
    x = operands(dataclasses.replace(FULL, dtype="bfloat16", block_q=block, block_k=block))
    with pytest.raises(KernelError):
        block_sparse_attention(x.q, x.k, x.v, x.indices, x.counts, block_q=block, block_k=block, **HOW)


def run(body: Callable[..., None], groups: int = 1, arrivals: int = 1) -> np.ndarray:
    """`out` of a body(gpu, refs, shared memory, barrier) with x = 0, 1, ... 7."""
    found = mosaic_interpret.run(
        lambda gpu, refs, memory: body(gpu, refs, *memory),
        [plgpu.SMEM((8,), jnp.float32), plgpu.Barrier(num_arrivals=arrivals)],
        groups,
        {"x": jnp.arange(8.0)},
        {"out": jax.ShapeDtypeStruct((8,), jnp.float32)},
        (1, 1),
    )
    return np.asarray(found["out"])


def double(gpu: Any, refs: Any, smem: Any, barrier: Any, wait: bool = True, commit: bool = True) -> None:
    gpu.copy_gmem_to_smem(refs["x"], smem, barrier)
    if wait:
        gpu.barrier_wait(barrier)
    smem[...] = smem[...] * 2
    if commit:
        gpu.commit_smem()
    gpu.copy_smem_to_gmem(smem, refs["out"])
    gpu.wait_smem_to_gmem(0)


def test_a_copy_lands_when_it_is_waited_for() -> None:
    np.testing.assert_array_equal(run(double), 2 * np.arange(8))
    with pytest.raises(KernelError, match="before a copy"):
        run(lambda *a: double(*a, wait=False))


def twice(gpu: Any, refs: Any, smem: Any, barrier: Any) -> None:
    gpu.copy_gmem_to_smem(refs["x"], smem, barrier)
    gpu.copy_gmem_to_smem(refs["x"], smem, barrier)


def overtaken(gpu: Any, refs: Any, smem: Any, barrier: Any) -> None:
    gpu.barrier_arrive(barrier)
    gpu.barrier_arrive(barrier)
    gpu.barrier_wait(barrier)


def outside(gpu: Any, refs: Any, smem: Any, barrier: Any) -> None:
    gpu.copy_gmem_to_smem(refs["x"].at[pl.ds(jnp.int32(1), 8)], smem, barrier)


def uncommitted_read(gpu: Any, refs: Any, smem: Any, barrier: Any) -> None:
    smem[...] = jnp.zeros(8)
    smem[...]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda *a: double(*a, commit=False), "copied before what was written is committed"),
        (uncommitted_read, "read before what was written is committed"),
        (twice, "second copy"),
        (overtaken, "missed a barrier phase"),
        (outside, "1:9 leaves an axis of 8"),
        (lambda gpu, refs, smem, barrier: gpu.barrier_wait(barrier), "deadlock"),
    ],
)
def test_undefined_behaviour_is_an_error(body: Callable[..., None], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        run(body)


def test_warpgroups_meet_at_a_barrier() -> None:
    def meet(gpu: Any, refs: Any, smem: Any, barrier: Any) -> None:
        if int(gpu.axis_index("group")) == 1:
            smem[...] = jnp.ones(8)
            gpu.commit_smem()
        gpu.barrier_arrive(barrier)
        gpu.barrier_wait(barrier)
        if int(gpu.axis_index("group")) == 0:
            gpu.copy_smem_to_gmem(smem, refs["out"])
            gpu.wait_smem_to_gmem(0)

    np.testing.assert_array_equal(run(meet, groups=2, arrivals=2), 1)
    with pytest.raises(KernelError, match="deadlock"):
        run(meet, groups=2, arrivals=3)
