"""`@triton.jit` kernels called through jax-triton, the paper's own kind of kernel; imported only when asked for.

Needs the jax-triton package and a CUDA plugin of jax. For tests without a GPU, TRITON_INTERPRET=1 set before the first
import of triton makes `interpret=True` run the kernels in Triton's interpreter, in float16 and float32.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax import Array

from pallas_kernels.triton import kernels as pallas_triton
from pallas_kernels.blocks import block_count, expand_valid, key_bias, pad_tokens
from pallas_kernels.dispatch import Request
from pallas_kernels.triton.padding import padded_dense, padded_sparse
from pallas_kernels.tuning import TritonTuning, triton_tuning

_LOG2E = math.log2(math.e)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if request.interpret and not _INTERPRETED:
        return "interpret=True needs TRITON_INTERPRET=1 in the environment before triton is imported"
    if request.interpret and jnp.dtype(request.dtype) == jnp.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; test in float16 or float32"
    return pallas_triton.unsupported(request)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    indices_ptr,
    counts_ptr,
    out_ptr,
    lse_ptr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    LISTS: tl.constexpr,
    KMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SPARSE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    rows = i * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, D)
    q = tl.load(q_ptr + h * ROWS * D + rows[:, None] * D + dims[None, :])
    PARTS: tl.constexpr = BLOCK // TILE_K
    steps = KEYS // TILE_K
    row_list = h * LISTS + i // SPLIT
    if SPARSE:
        steps = tl.load(counts_ptr + row_list) * PARTS
    acc = tl.zeros((TILE_Q, D), tl.float32)
    m = tl.full((TILE_Q,), -1e30, tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    for j in range(steps):
        start = j * TILE_K
        shift = 0.0
        if SPARSE:
            block = tl.load(indices_ptr + row_list * KMAX + j // PARTS).to(tl.int32)
            inside = (block >= 0) & (block < KEYS // BLOCK)
            start = tl.where(inside, block, 0) * BLOCK + (j % PARTS) * TILE_K
            # A block out of range selects nothing: exp2(s - inf) = 0.
            shift = tl.where(inside, 0.0, float("inf"))
        keys = start + tl.arange(0, TILE_K)
        k = tl.load(k_ptr + h * KEYS * D + keys[:, None] * D + dims[None, :])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        if MASKED:
            s += tl.load(bias_ptr + (h // HEADS) * KEYS + keys)[None, :]
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - (m_new + shift)[:, None])
        shrink = tl.exp2(m - m_new)
        v = tl.load(v_ptr + h * KEYS * D + keys[:, None] * D + dims[None, :])
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        m = m_new
    safe = tl.where(total > 0, total, 1.0)
    out = (acc / safe[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + h * ROWS * D + rows[:, None] * D + dims[None, :], out)
    lse = tl.where(total > 0, (m + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + h * ROWS + rows, lse)


@triton.jit
def _mass_kernel(
    q_ptr,
    k_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mass_ptr,
    row_sum_ptr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    rows = i * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, D)
    q = tl.load(q_ptr + h * ROWS * D + rows[:, None] * D + dims[None, :])
    shift = tl.load(shift_ptr + h * ROWS + rows)
    weight = tl.load(weight_ptr + (h // HEADS) * ROWS + rows)
    row_sum = tl.zeros((TILE_Q,), tl.float32)
    for j in range(KEYS // TILE_K):
        keys = j * TILE_K + tl.arange(0, TILE_K)
        k = tl.load(k_ptr + h * KEYS * D + keys[:, None] * D + dims[None, :])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        if MASKED:
            s += tl.load(bias_ptr + (h // HEADS) * KEYS + keys)[None, :]
        seen = tl.sum(tl.exp2(s - shift[:, None]), 1)
        tl.store(mass_ptr + (h * (ROWS // TILE_Q) + i) * (KEYS // TILE_K) + j, tl.sum(seen * weight, 0))
        row_sum += seen
    tl.store(row_sum_ptr + h * ROWS + rows, row_sum)


class _HostTensor:
    """What Triton's interpreter needs of a torch tensor, over a numpy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_HostTensor":
        return self

    def cpu(self) -> "_HostTensor":
        return self

    def copy_(self, other: "_HostTensor") -> None:
        if other.array is not self.array:
            raise AssertionError("the interpreter shares host memory")

    def new_empty(self, length: int, device: str | None = None) -> "_HostTensor":
        return _HostTensor(self.array)

    def set_(self, storage: "_HostTensor", offset: int, size: Any, stride: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)


def _launch(
    kernel: Any,
    inputs: list[Array],
    outputs: list[jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    tuning: TritonTuning,
    interpret: bool,
    compute_capability: int | None,
    **constants: Any,
) -> list[Array]:
    """One launch; the kernel takes the inputs, the outputs and the constants."""
    if interpret:

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            # Poisoned, so that what a kernel does not write is seen.
            made = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
            tensors = [_HostTensor(np.ascontiguousarray(x)) for x in (*arrays, *made)]
            kernel[grid](*tensors, **constants)
            return [t.array for t in tensors[len(arrays) :]]

        return jax.pure_callback(run, outputs, *inputs)
    import jax_triton

    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        out_shape=outputs,
        grid=grid,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        compute_capability=compute_capability,
        **constants,
    )


def _kernel_precision(dtype: Any, interpret: bool) -> str:
    return "tf32x3" if jnp.dtype(dtype) == jnp.float32 and not interpret else "ieee"


def _attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    table: tuple[Array, Array] | None,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    tuning: TritonTuning,
    interpret: bool,
    compute_capability: int | None = None,
) -> tuple[Array, Array]:
    """Dense attention, or with a table of (indices, counts) block-sparse; tokens padded to whole blocks."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    tile_q, tile_k = min(block_q, tuning.tile_q), min(block_k, tuning.tile_k)
    none = jnp.zeros((1,), jnp.int32)
    indices, counts = (none.reshape(1, 1, 1, 1), none) if table is None else table
    out, lse = _launch(
        _attention_kernel,
        [q, k, v, jnp.zeros((1,), jnp.float32) if bias is None else bias, indices, counts],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)],
        (rows // tile_q, batch * heads),
        tuning,
        interpret,
        compute_capability,
        SCALE=scale * _LOG2E,
        HEADS=heads,
        ROWS=rows,
        KEYS=keys,
        D=dim,
        LISTS=rows // block_q,
        KMAX=indices.shape[3],
        BLOCK=block_k,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        SPLIT=block_q // tile_q,
        SPARSE=table is not None,
        MASKED=bias is not None,
        PRECISION=_kernel_precision(q.dtype, interpret),
    )
    return out, lse


flash_attention = functools.partial(padded_dense, _attention)
block_sparse_attention = functools.partial(padded_sparse, _attention)


def block_mass(
    q: Array,
    k: Array,
    lse: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None,
    query_valid: Array | None,
    scale: float,
    interpret: bool = False,
    tuning: TritonTuning | None = None,
    compute_capability: int | None = None,
) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    tuning = tuning or triton_tuning("block_mass", q.dtype, dim)
    tile_q, tile_k = min(block_q, tuning.tile_q), min(block_k, tuning.tile_k)
    nq, nk = block_count(rows, block_q), block_count(keys, block_k)
    weight = expand_valid(query_valid, batch, block_q, rows).astype(jnp.float32)
    bias = key_bias(block_valid, batch, block_k, keys, nk * block_k)
    # A row of LSE -inf has no valid key: exp2(s - inf) = 0.
    shift = pad_tokens(jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2E), block_q)
    q, k = pad_tokens(q, block_q), pad_tokens(k, block_k)
    padded = q.shape[2]
    shape = lambda *s: jax.ShapeDtypeStruct((batch, heads, *s), jnp.float32)
    mass, row_sum = _launch(
        _mass_kernel,
        [q, k, shift, jnp.pad(weight, ((0, 0), (0, padded - rows))), jnp.zeros((1,)) if bias is None else bias],
        [shape(padded // tile_q, nk * block_k // tile_k), shape(padded)],
        (padded // tile_q, batch * heads),
        tuning,
        interpret,
        compute_capability,
        SCALE=scale * _LOG2E,
        HEADS=heads,
        ROWS=padded,
        KEYS=nk * block_k,
        D=dim,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        MASKED=bias is not None,
        PRECISION=_kernel_precision(q.dtype, interpret),
    )
    # Tiles smaller than a block add up.
    mass = mass.reshape(batch, heads, nq, block_q // tile_q, nk, block_k // tile_k).sum((3, 5))
    return mass, row_sum[:, :, :rows]
