"""The readable float32 oracle of the kernels: the definition of right. Builds N x N arrays; small inputs only."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import block_count, expand_blocks, expand_valid, numbers, unpack_bits
from pallas_kernels.calls import DenseCall, MassCall, PooledCall, Request, SparseCall
from pallas_kernels.quantized import emulated


def unsupported(request: Request) -> str | None:
    """None: serves every call."""
    return None


def scores(q: Array, k: Array, scale: float) -> Array:
    """float32 [B, H, Nq, Nk] scaled scores."""
    with jax.default_matmul_precision("highest"):
        return scale * jnp.einsum("bhqd,bhkd->bhqk", q.astype(jnp.float32), k.astype(jnp.float32))


def masked_attention(s: Array, keep: Array, v: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Softmax of scores s [B, H, Nq, Nk] over the kept columns, times v. A row without any gives 0 and LSE -inf."""
    s = jnp.where(keep, s, -jnp.inf)
    m = s.max(-1, keepdims=True)
    p = jnp.exp(s - jnp.where(jnp.isneginf(m), 0.0, m))
    total = p.sum(-1, keepdims=True)
    with jax.default_matmul_precision("highest"):
        out = jnp.einsum("bhqk,bhkd->bhqd", p / jnp.where(total == 0, 1.0, total), v.astype(jnp.float32))
    lse = jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return out.astype(dtype), lse[..., 0]


def flash_attention(call: DenseCall) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    if call.score_precision != "input":
        return emulated(call, flash_attention)
    q, k = call.q, call.k
    columns = expand_valid(call.block_valid, k.shape[0], call.block_k, k.shape[2])  # [B, Nk]
    return masked_attention(scores(q, k, call.scale), columns[:, None, None], call.v, q.dtype)


def block_mass(call: MassCall) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    (batch, heads, rows, _), keys = call.q.shape, call.k.shape[2]
    columns = expand_valid(call.block_valid, batch, call.block_k, keys)
    # A row of LSE -inf has no valid column: no mass.
    lse = jnp.where(jnp.isneginf(call.lse), jnp.inf, call.lse)
    p = jnp.exp(scores(call.q, call.k, call.scale) - lse[..., None])
    p = jnp.where(columns[:, None, None], p, 0.0)
    row_sum = p.sum(-1)
    p = jnp.where(expand_valid(call.query_valid, batch, call.block_q, rows)[:, None, :, None], p, 0.0)
    nq, nk = call.blocks
    pad = ((0, 0), (0, 0), (0, nq * call.block_q - rows), (0, nk * call.block_k - keys))
    mass = jnp.pad(p, pad).reshape(batch, heads, nq, call.block_q, nk, call.block_k).sum((3, 5))
    return mass, row_sum


def block_sparse_attention(call: SparseCall) -> tuple[Array, Array]:
    """Attention over selected blocks; see `pallas_kernels.block_sparse_attention`."""
    if call.score_precision != "input":
        return emulated(call, block_sparse_attention)
    q, k = call.q, call.k
    batch, rows, cols = q.shape[0], q.shape[2], k.shape[2]
    nk, kmax = block_count(cols, call.block_k), call.indices.shape[-1]
    used = numbers(kmax, 4) < call.counts[..., None]
    # [B, H, nq, kmax, nk] one-hot of the used entries; indices outside [0, nk) match nothing.
    hit = (call.indices.astype(jnp.int32)[..., None] == numbers(nk, 5)) & used[..., None]
    keep = expand_blocks(expand_blocks(hit.any(-2), call.block_k, cols, axis=3), call.block_q, rows, axis=2)
    columns = expand_valid(call.block_valid, batch, call.block_k, cols)
    return masked_attention(scores(q, k, call.scale), keep & columns[:, None, None], call.v, q.dtype)


def pooled_attention(call: PooledCall) -> tuple[Array, Array]:
    """Attention over pooled keys; see `pallas_kernels.pooled_attention`."""
    rows, nk = call.q.shape[2], call.k.shape[2]
    kept = expand_blocks(unpack_bits(call.kept, nk), call.block_q, rows, axis=2)
    bias = call.bias[:, :, None]
    s = scores(call.q, call.k, call.scale) + jnp.where(jnp.isneginf(bias), 0.0, bias)
    return masked_attention(s, ~kept & ~jnp.isneginf(bias), call.v, call.q.dtype)
