"""Block mass -> which key blocks each row keeps: text sinks, row-wise top-k, head-adaptive tiers."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adaspa_jax.config import Budget, SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.sharding import ALONE, Spread
from adaspa_jax.state import index_dtype
from pallas_kernels import ascending, lookup, pack_bits, partial_first, varying


class Selection(NamedTuple):
    """The chosen blocks; shapes as in SparseState."""

    indices: Array
    counts: Array
    recall: Array
    budgets: Array
    """int32 [B, H], by head: blocks a row keeps, or its rows on the average."""
    kept: Array
    """uint32 bits of the kept blocks; [B, H, 0, 0] without compensation."""


def head_tiers(recall: Array, budget: Budget, threshold: float) -> Array:
    """int32 [..., H] blocks per row of each head from its recall [..., H].

    As many heads go up a tier as go down, so the sum over heads is H * budget.base whatever the recalls.
    Ties in recall go to the lower head.
    """
    heads = recall.shape[-1]
    easy = jnp.minimum((recall > threshold).sum(-1, keepdims=True, dtype=jnp.int32), heads // 2)
    rank = jnp.argsort(jnp.argsort(-recall, axis=-1, stable=True), axis=-1)
    tier = jnp.where(rank < easy, budget.low, jnp.where(rank >= heads - easy, budget.high, budget.base))
    return tier.astype(jnp.int32)


def _prefer_sinks(mass: Array, layout: TokenLayout) -> Array:
    """Mass with the text key blocks, the last ones, above all others."""
    is_text = np.arange(layout.num_blocks) >= layout.video_blocks
    return jnp.where(is_text.reshape(*[1] * (mass.ndim - 1), -1), jnp.inf, mass)


def _captured(mass: Array, heaviest: Array, counts: Array, layout: TokenLayout, spread: Spread) -> Array:
    """[B, H] share of `mass` in its sinks and in the first `counts` [B, H, nq] of `heaviest`, where sinks are inf."""
    kept = (np.arange(heaviest.shape[-1])[None, None, None] < counts[..., None]) & jnp.isfinite(heaviest)
    sinks = mass[..., layout.video_blocks :].sum((-2, -1))
    held = jnp.where(kept, heaviest, 0.0).sum((-2, -1)) + sinks
    held, total = spread.sum_rows(held), spread.sum_rows(mass.sum((-2, -1)))
    return held / jnp.where(total > 0, total, 1.0)


def select_blocks(
    mass: Array, layout: TokenLayout, config: SparseConfig, spread: Spread = ALONE, places: Array | None = None
) -> Selection:
    """Chooses key blocks from mass, float32 [B, H, nq, nk] of the video rows (AdaSpa, selection).

    Inside `shard_map` the mass is of a device's heads and rows; `spread` and `places`, int32 [B, H], say which.
    Deterministic: ties go to the lower block, then to the lower head. A row's indices are heaviest first, on a CPU.
    On a GPU those in use are ascending, so that rows side by side find each other's keys in the cache; on a TPU the
    partial blocks among them go before the others, so that its kernel masks one stretch of a list.
    """
    budget = config.budget(layout)
    ranked = _prefer_sinks(mass, layout)
    kmax = budget.high if config.row_wise else layout.num_blocks
    heaviest, indices = lax.top_k(ranked, kmax)
    base = varying.constant(budget.base, mass.shape[:3], jnp.int32, mass)
    if not config.row_wise:
        base = _spend_globally(ranked, base[..., 0])
    order = places if places is not None else jnp.zeros((0, 0), jnp.int32)
    recall = spread.by_head(_captured(mass, heaviest, base, layout, spread), order)
    counts, budgets = base, jnp.full_like(recall, budget.base, jnp.int32)
    if config.head_adaptive:
        budgets = head_tiers(recall, budget, config.recall_threshold)
        own = spread.mine(budgets, order)
        counts = jnp.broadcast_to(own[..., None], base.shape) if config.row_wise else _spend_globally(ranked, own)
    kept = jnp.zeros((*mass.shape[:2], 0, 0), jnp.uint32)
    if config.compensation == "pooled":
        kept = pack_bits(_in_prefix(ranked, heaviest, indices, counts))
    indices = _in_order(indices, counts, layout)
    return Selection(indices.astype(index_dtype(layout)), counts, recall, budgets, kept)


def _in_order(indices: Array, counts: Array, layout: TokenLayout) -> Array:
    """The lists as the kernels of the platform take them fastest."""
    first = lambda indices: indices
    if layout.video_valid.min() < layout.block:
        # The last block of the text may be partial, if only at run time.
        partial = np.append(layout.video_valid < layout.block, np.full(layout.text_blocks, True))
        first = lambda indices: partial_first(indices, counts, lookup(jnp.asarray(partial), indices))
    sort = lambda indices: ascending(indices, counts, layout.num_blocks)
    return lax.platform_dependent(indices, tpu=first, cuda=sort, default=lambda indices: indices)


def _in_prefix(ranked: Array, heaviest: Array, indices: Array, counts: Array) -> Array:
    """bool [B, H, nq, nk]: which blocks are among the first `counts` of top-k's lists.

    By comparing with the last of them, ties by number as top-k has it: one fusion, and no scatter.
    """
    last = np.arange(indices.shape[-1], dtype=np.int32).reshape(1, 1, 1, -1) == counts[..., None] - 1
    least = jnp.where(last, heaviest, -jnp.inf).max(-1, keepdims=True)
    number = jnp.where(last, indices, 0).sum(-1, keepdims=True, dtype=jnp.int32)
    block = np.arange(ranked.shape[-1], dtype=np.int32).reshape(1, 1, 1, -1)
    return (ranked > least) | ((ranked == least) & (block <= number))


def _spend_globally(ranked: Array, mean: Array) -> Array:
    """int32 [B, H, nq]: blocks per row when a head spends nq * mean [B, H] where its mass is.

    Every row keeps its sinks and its heaviest block.
    """
    *_, rows, cols = ranked.shape
    heaviest = jnp.argmax(jnp.where(jnp.isinf(ranked), -1.0, ranked), axis=-1)
    top = np.arange(cols)[None, None, None] == heaviest[..., None]
    flat = jnp.where(top, jnp.inf, ranked).reshape(*ranked.shape[:-2], rows * cols)
    rank = jnp.argsort(jnp.argsort(-flat, axis=-1, stable=True), axis=-1)
    chosen = rank < (rows * mean)[..., None]
    return chosen.reshape(ranked.shape).sum(-1, dtype=jnp.int32)
