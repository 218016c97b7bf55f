"""Compensation: every dropped block pair keeps a pooled stand-in, its mass calibrated at a search.

Video row i of row block p sees a dropped key block j, of n_j valid keys, as one key: the mean of its keys, with score
scale * q_i·k_mean_j + log n_j + row_p + col_j and the mean of its values, in one softmax with the kept blocks. The mean
of a block's scores says less than the block weighs (Jensen), so a search fits row + col, nq + nk numbers a head, to the
ratio of the block mass that it measured to that of the stand-ins.

What the dropped keys of a block would have added is nearer to what the kept ones say, the more a head looks for single
tokens, and nearer to the block's mean, the less. So a search also fits how far to go from the kept blocks' output
towards that with stand-ins, a number a head, by least squares to dense attention: `strength`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adaspa_jax.sharding import ALONE, Spread
from pallas_kernels import unpack_bits

_ITERATIONS = 4
"""Of the alternating fit: rows, then columns."""
_LEAST = 1e-6
"""Added to masses, of at most a block's rows, before their logarithm."""
_CLIP = 6.0
"""Largest |log ratio| that is fitted."""
_ROW_BLOCKS = 64
"""Whose scores are held at a time."""
SAMPLE = 16
"""Rows of a row block for one that strengths are fitted to where dense attention costs extra."""


class StandIns(NamedTuple):
    """How the dropped blocks are seen; of one layer, shapes as in SparseState."""

    row_bias: Array
    """float32 [B, H, nq]"""
    col_bias: Array
    """float32 [B, H, nk]"""
    kept: Array
    """uint32 [B, H, nq, ceil(nk / 32)]: bits of the blocks that have none."""
    strength: Array
    """float32 [B, H], 0 to 1."""


class Pooled(NamedTuple):
    """The key blocks of one step and layer, pooled."""

    k: Array
    """[B, H, nk, D], means over the valid keys, dtype of k; 0 for a block without any."""
    v: Array
    """[B, H, nk, D]"""
    log_count: Array
    """float32 [B, nk]: log of the number of valid keys, -inf for none."""


def pool(k: Array, v: Array, block_valid: Array) -> Pooled:
    """Means of k and v, [B, H, nk * block, D], over the first `block_valid` int [B, nk] tokens of each block."""
    batch, heads, _, dim = k.shape
    nk = block_valid.shape[1]
    cut = lambda x: x.reshape(batch, heads, nk, -1, dim)
    inside = np.arange(k.shape[2] // nk, dtype=np.int32).reshape(1, 1, 1, -1) < block_valid[:, None, :, None]
    count = jnp.maximum(block_valid, 1)[:, None, :, None].astype(jnp.float32)
    mean = lambda x: (jnp.where(inside[..., None], cut(x), 0).sum(3, dtype=jnp.float32) / count).astype(x.dtype)
    log_count = jnp.where(block_valid > 0, jnp.log(jnp.maximum(block_valid, 1).astype(jnp.float32)), -jnp.inf)
    return Pooled(mean(k), mean(v), log_count)


def pooled_mass(q: Array, k: Array, log_count: Array, lse: Array, query_valid: Array) -> Array:
    """float32 [nq, nk]: mass of one head's stand-ins without calibration, summed over the valid rows of each block.

    q [rows, D] whole blocks, k [nk, D] pooled, log_count [nk], lse float32 [rows], query_valid int [nq].
    """
    nq, dim = query_valid.shape[0], q.shape[-1]
    blocks = q.reshape(nq, -1, dim)
    # A row of LSE -inf has no valid key, and no mass.
    shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse).reshape(nq, -1)
    shift = jnp.where(np.arange(blocks.shape[1], dtype=np.int32)[None] < query_valid[:, None], shift, jnp.inf)

    def of_block(x: tuple[Array, Array]) -> Array:
        rows, shift = x
        s = lax.dot_general(rows, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return jnp.exp(s * jnp.float32(dim**-0.5) + log_count[None] - shift[:, None]).sum(0)

    return lax.map(of_block, (blocks, shift), batch_size=min(nq, _ROW_BLOCKS))


def fit(measured: Array, pooled: Array, dropped: Array, spread: Spread = ALONE) -> tuple[Array, Array]:
    """(row [nq], col [nk]) such that pooled * exp(row + col) is the measured mass, by least squares over dropped pairs.

    Of the log ratio, weighted by the measured mass [nq, nk] float32; `dropped` bool [nq, nk]. A row or column with
    nothing dropped gets 0. The rows may be those of a device, see `spread`.
    """
    ratio = jnp.clip(jnp.log(measured + _LEAST) - jnp.log(pooled + _LEAST), -_CLIP, _CLIP)
    weight = jnp.where(dropped, measured, 0.0)
    mean = lambda total, weight: jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
    of_row, of_col = weight.sum(1), spread.sum_rows(weight.sum(0))
    col = jnp.zeros_like(of_col)
    for _ in range(_ITERATIONS):
        row = mean((weight * (ratio - col[None])).sum(1), of_row)
        col = mean(spread.sum_rows((weight * (ratio - row[:, None])).sum(0)), of_col)
    return row, col


def strength(exact: Array, kept: Array, both: Array, inside: Array, spread: Spread = ALONE) -> Array:
    """float32 [B, H], 0 to 1: kept + strength * (both - kept) is nearest to `exact`; 0 where they do not differ.

    Outputs [B, H, rows, D] of dense attention, of the kept blocks alone and with stand-ins of the others; of the rows
    `inside`, bool [B, rows], alone.
    """
    real = lambda x: jnp.where(inside[:, None, :, None], x.astype(jnp.float32), 0.0)
    kept = real(kept)
    change, missing = real(both) - kept, real(exact) - kept
    along, length = spread.sum_rows(jnp.stack([(change * missing).sum((2, 3)), jnp.square(change).sum((2, 3))]))
    return jnp.clip(along / jnp.where(length > 0, length, 1.0), 0.0, 1.0)


def towards(kept: Array, both: Array, strength: Array) -> Array:
    """kept + strength * (both - kept), of [B, H, rows, D] by strength [B, H]."""
    here = kept.astype(jnp.float32)
    return (here + strength[..., None, None] * (both.astype(jnp.float32) - here)).astype(kept.dtype)


def calibrate(
    q: Array,
    pooled: Pooled,
    lse: Array,
    mass: Array,
    kept: Array,
    query_valid: Array,
    spread: Spread = ALONE,
) -> tuple[StandIns, Array]:
    """(StandIns, share of the mass that they hold [B, H]) for the blocks that a search did not keep; a head at a time.

    Of full strength.

    Args:
      q: [B, H, rows, D], the video rows of a device, whole blocks.
      pooled: the key blocks.
      lse: float32 [B, H, rows], under which the mass was measured.
      mass: float32 [B, H, nq, nk].
      kept: uint32 [B, H, nq, ceil(nk / 32)].
      query_valid: int32 [B, nq].
      spread: says which rows; sums run over all of them, so that columns do not depend on the number of devices.
    """
    (batch, heads), nk = q.shape[:2], mass.shape[-1]
    of_heads = lambda x: jnp.broadcast_to(x[:, None], (batch, heads, *x.shape[1:]))
    operands = (q, pooled.k, of_heads(pooled.log_count), lse, of_heads(query_valid), mass, kept)

    def one(x: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        *of_pooled, mass, kept = x
        without = pooled_mass(*of_pooled)
        dropped = ~unpack_bits(kept, nk)
        row, col = fit(mass, without, dropped, spread)
        held = jnp.where(dropped, without * jnp.exp(row[:, None] + col[None]), 0.0).sum()
        held, total = spread.sum_rows(jnp.stack([held, mass.sum()]))
        return row, col, held / jnp.where(total > 0, total, 1.0)

    with jax.named_scope("calibrate"):
        flat = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), operands)
        row, col, share = (x.reshape(batch, heads, *x.shape[1:]) for x in lax.map(one, flat))
    return StandIns(row, col, kept, jnp.ones_like(share)), share
