"""Settings of other people's programs change nothing: jax_enable_x64 bit for bit, shard_map with check_vma=True.

Rank promotion is set to "raise" for all tests, see conftest.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from adaspa_jax import SparseConfig, SparseState, StepKind, adaspa_attention, denoise
from models.schedulers import FlowMatchEuler
from pallas_kernels import block_mass, block_sparse_attention, flash_attention, pooled_attention
from tests.kernel_cases import Case, Operands, operands, pooled_operands

EVERY = ("reference", "xla", "triton", "mosaic_tpu", "mosaic_gpu")
every = pytest.mark.parametrize("implementation", EVERY)
CASE = Case("settings", rows=130, keys=200, ragged=True, dtype="bfloat16")
MESH = Mesh(np.array(jax.devices("cpu")[:1]), ("devices",))


def kernels(x: Operands, implementation: Any) -> dict[str, Any]:
    """All results of the kernels."""
    how: dict[str, Any] = {"implementation": implementation, "interpret": implementation not in ("xla", "reference")}
    blocks = {"block_q": CASE.block_q, "block_k": CASE.block_k, "block_valid": x.block_valid} | how
    out, lse = flash_attention(x.q, x.k, x.v, return_lse=True, **how)
    sparse = block_sparse_attention(x.q, x.k, x.v, x.indices, x.counts, return_lse=True, **blocks)
    mass = block_mass(x.q, x.k, lse, query_valid=x.query_valid, return_row_sum=True, **blocks)
    given = pooled_operands(CASE)
    means = x.q, x.k, x.v, given.bias, given.kept
    pooled = pooled_attention(*means, block_q=CASE.block_q, return_lse=True, **how)
    return {"dense": (out, lse), "sparse": sparse, "mass": mass, "pooled": pooled}


def compiled(implementation: str, run: Callable[..., Any]) -> Callable[..., Any]:
    return run if implementation == "mosaic_gpu" else jax.jit(run)  # its interpreter is eager


def check_equal(got: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@every
def test_kernels_under_x64(implementation: str) -> None:
    x = operands(CASE)
    run = functools.partial(kernels, implementation=implementation)
    expected = compiled(implementation, run)(x)
    with jax.enable_x64(True):
        check_equal(compiled(implementation, run)(x), expected)


CONFIG = SparseConfig(block_size=16, steps=5, sparsity=0.5, token_order="cube", compensation="pooled")
LAYOUT = CONFIG.layout((1, 7, 9), text=5)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, LAYOUT.length, 4, 8)).astype(np.float32)


def test_sampling_under_x64() -> None:
    x, scheduler = tokens(), FlowMatchEuler()

    def predict(latents: Any, row: Any, state: Any, kind: Any) -> Any:
        out, state = adaspa_attention(latents, latents, latents + x, state, kind, layout=LAYOUT, config=CONFIG)
        return out * row["timestep"] / 1000, state

    def sample(noise: Any) -> Any:
        state = SparseState.create(LAYOUT, CONFIG, 1, 4)
        return denoise(predict, scheduler, scheduler.tables(CONFIG.steps), noise, state, CONFIG)

    expected = jax.jit(sample)(x)
    with jax.enable_x64(True):
        check_equal(jax.jit(sample)(x), expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_kernels_inside_shard_map(implementation: str) -> None:
    """Those of Pallas are compiled for several GPUs and TPUs in test_gpu_compile and mosaic_tpu/test_compiled."""
    x, run = operands(CASE), functools.partial(kernels, implementation=implementation)
    spec = PartitionSpec("devices")
    sharded = jax.shard_map(run, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=True)
    check_equal(jax.jit(sharded)(x), jax.jit(run)(x))


@pytest.mark.parametrize("config", [CONFIG, SparseConfig.paper(5, block_size=16, token_order="cube", sparsity=0.5)])
def test_a_step_inside_shard_map(config: SparseConfig) -> None:
    q, state, spec = jnp.asarray(tokens()), SparseState.create(LAYOUT, config, 1, 4), PartitionSpec("devices")
    step = lambda q, state, kind: adaspa_attention(q, q, q, state, kind, layout=LAYOUT, config=config)
    sharded = jax.shard_map(step, mesh=MESH, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    sharded, alone = jax.jit(sharded), jax.jit(step)
    for kind in StepKind:
        check_equal(sharded(q, state, jnp.int32(kind)), alone(q, state, jnp.int32(kind)))
