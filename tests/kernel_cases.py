"""The one list of cases that every implementation runs, and what counts as right."""

import functools
import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels import pack_bits, reference
from pallas_kernels.blocks import block_count, expand_blocks, expand_valid, numbers
from pallas_kernels.calls import Request
from pallas_kernels.dispatch import backend

# Triton's interpreter has to be chosen before its first import: test_jax_triton starts a process that does.
IMPLEMENTATIONS = ("jax_triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ("xla", "triton", "mosaic_tpu")
"""Everything but the oracle that runs, or is interpreted, without an accelerator."""


def how(implementation: str) -> dict[str, Any]:
    """Keyword arguments of a kernel call that runs `implementation` on the CPU."""
    return {"implementation": implementation, "interpret": implementation not in ("xla", "reference")}


@dataclass(frozen=True)
class Case:
    """Shapes and what is odd about them."""

    name: str
    batch: int = 1
    heads: int = 2
    rows: int = 256
    keys: int = 256
    head_dim: int = 64
    block_q: int = 64
    block_k: int = 64
    dtype: str = "float32"
    density: float = 0.4
    """Mean share of key blocks a row uses; counts vary by row."""
    ragged: bool = False
    """Give every key block a random valid count, some of them 0."""
    index_dtype: str = "uint16"

    def served(self, implementation: str, kernel: str) -> bool:
        """Whether `implementation` says that it can serve the case."""
        blocks = {} if kernel == "flash_attention" else {"block_q": self.block_q, "block_k": self.block_k}
        if kernel == "pooled_attention":
            del blocks["block_k"]
        request = Request(kernel, jnp.dtype(self.dtype), self.head_dim, **blocks, interpret=True)
        return backend(implementation).unsupported(request) is None


CASES = (
    Case("plain"),
    Case("bfloat16", dtype="bfloat16"),
    Case("float16", dtype="float16"),
    Case("D 128", head_dim=128, batch=2),
    Case("D 128 bfloat16", head_dim=128, dtype="bfloat16", ragged=True),
    Case("odd D", head_dim=40, index_dtype="int32"),
    Case("ragged length", rows=333, keys=333, ragged=False),
    Case("ragged length and blocks", batch=2, rows=333, keys=333, ragged=True),
    Case("ragged bfloat16", batch=2, rows=200, keys=200, ragged=True, dtype="bfloat16"),
    Case("block 128", rows=500, keys=500, block_q=128, block_k=128, ragged=True),
    Case("unequal blocks", rows=320, keys=200, block_q=32, block_k=16, ragged=True),
    Case("more keys than rows", rows=70, keys=700, ragged=True),
    Case("one token", rows=1, keys=1),
    Case("many blocks", rows=512, keys=2048, block_q=16, block_k=16, density=0.3, index_dtype="uint32"),
    Case("density 0", density=0.0),
    Case("density 1", density=1.0, ragged=True),
    Case("one long head", heads=1, rows=3000, keys=3000, density=0.7),
)

REPRESENTATIVE = (
    "D 128 bfloat16",
    "odd D",
    "ragged length and blocks",
    "unequal blocks",
    "more keys than rows",
    "density 0",
    "128 rows, 64 keys",
    "full blocks of 64",
)
"""Cases that every `make test` interprets; the others are part of the matrix."""


def in_matrix(case: Case, *values: Any) -> Any:
    """The parameters of a test, marked unless the case is representative."""
    marks = () if case.name in REPRESENTATIVE else pytest.mark.matrix
    return pytest.param(case, *values, marks=marks, id=" ".join(map(str, (case.name, *values))))


FULL = Case("full blocks", rows=1024, keys=1024, head_dim=128, block_q=128, block_k=128)
GPU_CASES = (
    *CASES,
    FULL,
    replace(FULL, name="full blocks of 64", block_q=64, block_k=64, heads=3),
    replace(FULL, name="128 rows, 64 keys", block_k=64, ragged=True, batch=2),
    replace(FULL, name="blocks of 256", block_q=256, block_k=256, rows=1000, keys=900, ragged=True),
    replace(FULL, name="long", block_q=64, block_k=64, rows=5000, keys=9000, heads=1, density=0.2),
)
"""Also whole tiles of 128 x 128, which the small cases lack."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """Inputs of the first three kernels for a case."""

    q: Array
    k: Array
    v: Array
    block_valid: Array | None
    query_valid: Array | None
    indices: Array
    counts: Array


def operands(case: Case) -> Operands:
    """Random inputs, the same every time."""
    rng = np.random.default_rng(abs(hash((case.rows, case.keys, case.head_dim))) % 2**32)
    draw = lambda n: jnp.asarray(rng.standard_normal((case.batch, case.heads, n, case.head_dim)), case.dtype)
    nq, nk = block_count(case.rows, case.block_q), block_count(case.keys, case.block_k)
    counts = rng.binomial(nk, case.density, (case.batch, case.heads, nq))
    if case.density not in (0.0, 1.0):
        counts.flat[0] = 0  # an empty row
    order = np.argsort(rng.random((case.batch, case.heads, nq, nk)), axis=-1)
    valid = lambda n, block: jnp.asarray(rng.integers(0, block + 1, (case.batch, n)), jnp.int32)
    return Operands(
        q=draw(case.rows),
        k=draw(case.keys),
        v=draw(case.keys),
        block_valid=valid(nk, case.block_k) if case.ragged else None,
        query_valid=valid(nq, case.block_q) if case.ragged else None,
        indices=jnp.asarray(order[..., : max(1, counts.max())], case.index_dtype),
        counts=jnp.asarray(counts, jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PooledOperands:
    """What `pooled_attention` takes besides q, k and v of a case, whose keys are the pooled ones."""

    bias: Array
    kept: Array
    hidden: Array
    """bool [B, H, nq, nk]: what `kept` packs."""


def pooled_operands(case: Case) -> PooledOperands:
    """Random biases, some of them -inf, and kept keys; the first query block keeps all."""
    rng = np.random.default_rng(1)
    shape = (case.batch, case.heads, block_count(case.rows, case.block_q), case.keys)
    bias = rng.normal(2.0, 1.5, (case.batch, case.heads, case.keys))
    bias[rng.random(bias.shape) < (0.2 if case.ragged else 0.0)] = -np.inf
    hidden = rng.random(shape) < case.density
    hidden[:, :, 0] |= shape[2] > 1
    return PooledOperands(jnp.asarray(bias, jnp.float32), pack_bits(jnp.asarray(hidden)), jnp.asarray(hidden))


def naive(case: Case, x: Operands, keep: Array, bias: Array | None = None) -> Array:
    """Plain attention computed in the inputs' own dtype, the yardstick of the error."""
    s = jnp.einsum("bhqd,bhkd->bhqk", x.q, x.k) * jnp.asarray(case.head_dim**-0.5, x.q.dtype)
    s = s if bias is None else s + bias.astype(s.dtype)
    s = jnp.where(keep, s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1)
    return jnp.einsum("bhqk,bhkd->bhqd", jnp.where(keep.any(-1, keepdims=True), p, 0), x.v)


def kept(case: Case, x: Operands, selected: bool) -> Array:
    """bool [B, H, Nq, Nk]: the pairs that count, by valid keys and, if `selected`, by the chosen blocks."""
    columns = expand_valid(x.block_valid, case.batch, case.block_k, case.keys)[:, None, None]
    if not selected:
        return jnp.broadcast_to(columns, (*x.q.shape[:3], case.keys))
    nk = block_count(case.keys, case.block_k)
    used = numbers(x.indices.shape[-1], 4) < x.counts[..., None]
    hit = ((x.indices[..., None].astype(jnp.int32) == numbers(nk, 5)) & used[..., None]).any(-2)
    blocks = expand_blocks(expand_blocks(hit, case.block_k, case.keys, axis=3), case.block_q, case.rows, axis=2)
    return blocks & columns


@functools.cache
def _right(case: Case, selected: bool) -> Any:
    """One compiled function: operands -> (out, lse, error of plain same-dtype attention)."""

    def right(x: Operands, pooled: PooledOperands | None) -> tuple[Array, Array, Array]:
        keep, bias = kept(case, x, selected), None
        if pooled is not None:
            bias = pooled.bias[:, :, None]
            keep = ~expand_blocks(pooled.hidden, case.block_q, case.rows, axis=2) & jnp.isfinite(bias)
        with jax.default_matmul_precision("highest"):
            scores = reference.scores(x.q, x.k, case.head_dim**-0.5)
            scores = scores if bias is None else scores + bias
            expected, lse = reference.masked_attention(scores, keep, x.v, jnp.dtype(jnp.float32))
            return expected, lse, jnp.abs(naive(case, x, keep, bias).astype(jnp.float32) - expected).max()

    return jax.jit(right)


def assert_attention(
    case: Case,
    x: Operands,
    got: tuple[Array, Array],
    selected: bool,
    pooled: PooledOperands | None = None,
    epsilon: float = 4e-6,
) -> None:
    """Error of out at most twice that of plain same-dtype attention, plus epsilon; LSE to 1e-5, and exactly -inf."""
    with jax.default_device(jax.devices("cpu")[0]):
        expected, lse, yardstick = map(np.asarray, _right(case, selected)(*jax.device_get((x, pooled))))
    out, got_lse = map(np.asarray, got)
    assert out.dtype == x.q.dtype
    assert out.shape == x.q.shape
    out = out.astype(np.float32)
    assert not np.isnan(out).any()
    error = np.abs(out - expected).max()
    assert error <= 2 * yardstick + epsilon, f"{error} > 2 * {yardstick} + {epsilon}"
    assert got_lse.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(got_lse), np.isneginf(lse))
    finite = np.isfinite(lse)
    np.testing.assert_allclose(got_lse[finite], lse[finite], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(out[~finite], 0)
