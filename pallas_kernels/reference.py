"""The readable float32 oracle of the three kernels: the definition of right. Builds N x N arrays; small inputs only."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import block_count, expand_blocks, expand_valid
from pallas_kernels.dispatch import Request


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


def flash_attention(
    q: Array, k: Array, v: Array, *, block_valid: Array | None, block_k: int, scale: float, interpret: bool = False
) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    columns = expand_valid(block_valid, k.shape[0], block_k, k.shape[2])  # [B, Nk]
    return masked_attention(scores(q, k, scale), columns[:, None, None], v, q.dtype)


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
) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    batch, heads, rows, _ = q.shape
    columns = expand_valid(block_valid, batch, block_k, k.shape[2])
    # A row of LSE -inf has no valid column: no mass.
    p = jnp.exp(scores(q, k, scale) - jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None])
    p = jnp.where(columns[:, None, None], p, 0.0)
    row_sum = p.sum(-1)
    p = jnp.where(expand_valid(query_valid, batch, block_q, rows)[:, None, :, None], p, 0.0)
    nq, nk = block_count(rows, block_q), block_count(k.shape[2], block_k)
    pad = ((0, 0), (0, 0), (0, nq * block_q - rows), (0, nk * block_k - k.shape[2]))
    mass = jnp.pad(p, pad).reshape(batch, heads, nq, block_q, nk, block_k).sum((3, 5))
    return mass, row_sum


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    counts: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Attention over selected blocks; see `pallas_kernels.block_sparse_attention`."""
    batch, rows, cols = q.shape[0], q.shape[2], k.shape[2]
    nk = block_count(cols, block_k)
    used = jnp.arange(indices.shape[-1]) < counts[..., None]
    # [B, H, nq, kmax, nk] one-hot of the used entries; indices outside [0, nk) match nothing.
    hit = (indices.astype(jnp.int32)[..., None] == jnp.arange(nk)) & used[..., None]
    keep = expand_blocks(expand_blocks(hit.any(-2), block_k, cols, axis=3), block_q, rows, axis=2)
    columns = expand_valid(block_valid, batch, block_k, cols)
    return masked_attention(scores(q, k, scale), keep & columns[:, None, None], v, q.dtype)
