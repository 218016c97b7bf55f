"""The `@triton.jit` kernels, one program a tile of query rows, scores in base 2 as in `pallas_kernels.triton`."""

import functools
from typing import Any

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from pallas_kernels.blocks import LOG2E
from pallas_kernels.calls import MassCall
from pallas_kernels.jax_triton.launch import launch
from pallas_kernels.triton_calls import padded_dense, padded_mass, padded_pooled, padded_sparse
from pallas_kernels.tuning import TritonTuning, triton_tuning


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
    OF_BLOCKS: tl.constexpr,
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
    bias_row = row_list if OF_BLOCKS else h // HEADS
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
            s += tl.load(bias_ptr + bias_row * KEYS + keys)[None, :]
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
    """Dense attention, or with a table of (indices, counts) block-sparse; tokens padded to whole blocks.

    The bias is [B, Nk], or [B, H, query blocks, Nk].
    """
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    tile_q, tile_k = min(block_q, tuning.tile_q), min(block_k, tuning.tile_k)
    none = jnp.zeros((1,), jnp.int32)
    indices, counts = (none.reshape(1, 1, 1, 1), none) if table is None else table
    out, lse = launch(
        _attention_kernel,
        [q, k, v, jnp.zeros((1,), jnp.float32) if bias is None else bias, indices, counts],
        [(q.shape, q.dtype), (q.shape[:3], jnp.float32)],
        (rows // tile_q, batch * heads),
        tuning,
        interpret,
        compute_capability,
        SCALE=scale * LOG2E,
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
        OF_BLOCKS=bias is not None and bias.ndim == 4,
        PRECISION=_kernel_precision(q.dtype, interpret),
    )
    return out, lse


def _mass(
    q: Array,
    k: Array,
    shift: Array,
    weight: Array,
    bias: Array | None,
    *,
    tile_q: int,
    tile_k: int,
    block_q: int,
    scale: float,
    tuning: TritonTuning,
    interpret: bool,
    compute_capability: int | None = None,
) -> tuple[Array, Array]:
    """Mass of tiles, none larger than a block; row sums."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    mass, row_sum = launch(
        _mass_kernel,
        [q, k, shift, weight, jnp.zeros((1,), jnp.float32) if bias is None else bias],
        [((batch * heads, rows // tile_q, keys // tile_k), jnp.float32), ((batch, heads, rows), jnp.float32)],
        (rows // tile_q, batch * heads),
        tuning,
        interpret,
        compute_capability,
        SCALE=scale * LOG2E,
        HEADS=heads,
        ROWS=rows,
        KEYS=keys,
        D=dim,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        MASKED=bias is not None,
        PRECISION=_kernel_precision(q.dtype, interpret),
    )
    return mass, row_sum


flash_attention = functools.partial(padded_dense, _attention)
block_sparse_attention = functools.partial(padded_sparse, _attention)
pooled_attention = functools.partial(padded_pooled, _attention)


def block_mass(call: MassCall, tuning: TritonTuning | None = None, **options: Any) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    tuning = tuning or triton_tuning("block_mass", call.q.dtype, call.q.shape[3])
    return padded_mass(_mass, call, tuning, min(call.block_q, tuning.tile_q), **options)
