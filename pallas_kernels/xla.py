"""Portable implementation in jnp and lax: memory linear in N, work proportional to what is kept; the CPU default.

Scores are held transposed, keys × rows: the CPU compiler vectorises reductions over the leading axis only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.blocks import MASKED, block_count, key_bias, pad_tokens, valid_counts
from pallas_kernels.dispatch import Request
from pallas_kernels.tuning import XLA, XlaTuning

# The floor of the running maximum: exp(MASKED - m) is 0 for every m above it.
_FLOOR = -1e30


def unsupported(request: Request) -> str | None:
    """None: serves every call."""
    return None


def _even_tile(length: int, target: int) -> int:
    """A tile of about `target` that cuts `length` into equal parts with little padding."""
    return block_count(length, max(1, round(length / target)))


def _contract(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """float32 dot of two matrices over one axis each."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dims, preferred_element_type=jnp.float32)


_Running = tuple[Array, Array, Array]  # max [R], sum [R], weighted values [D, R]


def _softmax_start(rows: int, head_dim: int) -> _Running:
    return jnp.full(rows, _FLOOR), jnp.zeros(rows), jnp.zeros((head_dim, rows))


def _softmax_step(running: _Running, q: Array, k: Array, v: Array, bias: Array | None) -> _Running:
    """One online-softmax step: rows q [R, D], already scaled, over keys k, v [K, D]; bias [K] masks keys."""
    m, total, acc = running
    s = _contract(k, q, (1, 1))  # [K, R]
    if bias is not None:
        s = s + bias[:, None]
    m_new = jnp.maximum(m, s.max(0))
    p = jnp.exp(s - m_new)
    shrink = jnp.exp(m - m_new)
    return m_new, total * shrink + p.sum(0), acc * shrink + _contract(v, p, (0, 0))


def _softmax_end(running: _Running, dtype: Any) -> tuple[Array, Array]:
    """(out [R, D], lse [R]); rows that saw no key give 0 and -inf."""
    m, total, acc = running
    safe = jnp.where(total > 0, total, 1.0)
    return (acc / safe).T.astype(dtype), jnp.where(total > 0, m + jnp.log(safe), -jnp.inf)


def _scaled(q: Array, scale: float) -> Array:
    return q.astype(jnp.float32) * scale


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_valid: Array | None,
    block_k: int,
    scale: float,
    interpret: bool = False,
    tuning: XlaTuning = XLA,
) -> tuple[Array, Array]:
    """Dense attention, tile by tile; see `pallas_kernels.flash_attention`."""
    batch, heads, rows, dim = q.shape
    tile_q, tile_k = _even_tile(rows, tuning.dense_q), _even_tile(k.shape[2], tuning.dense_k)
    bias = key_bias(block_valid, batch, block_k, k.shape[2], block_count(k.shape[2], tile_k) * tile_k)
    q_tiles, k_tiles, v_tiles = (
        pad_tokens(x, tile).reshape(batch * heads, -1, tile, dim) for x, tile in ((q, tile_q), (k, tile_k), (v, tile_k))
    )
    bias_tiles = None if bias is None else bias.reshape(batch, -1, tile_k)
    nq, nk = q_tiles.shape[1], k_tiles.shape[1]

    def query_tile(i: Array) -> tuple[Array, Array]:
        head, tile = i // nq, i % nq
        scaled = _scaled(q_tiles[head, tile], scale)

        def key_tile(j: Array, running: _Running) -> _Running:
            masked = None if bias_tiles is None else bias_tiles[head // heads, j]
            return _softmax_step(running, scaled, k_tiles[head, j], v_tiles[head, j], masked)

        return _softmax_end(lax.fori_loop(0, nk, key_tile, _softmax_start(tile_q, dim)), q.dtype)

    out, lse = lax.map(query_tile, jnp.arange(batch * heads * nq))
    return (
        out.reshape(batch, heads, -1, dim)[:, :, :rows],
        lse.reshape(batch, heads, -1)[:, :, :rows],
    )


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
    tuning: XlaTuning = XLA,
) -> tuple[Array, Array]:
    """Attention mass of block pairs, tile by tile; see `pallas_kernels.block_mass`."""
    batch, heads, rows, dim = q.shape
    nq, nk = block_count(rows, block_q), block_count(k.shape[2], block_k)
    group_q = _even_tile(nq, max(1, tuning.dense_q // block_q))
    group_k = _even_tile(nk, max(1, tuning.dense_k // block_k))
    tile_q, tile_k = group_q * block_q, group_k * block_k
    bias = key_bias(block_valid, batch, block_k, k.shape[2], block_count(nk, group_k) * tile_k)
    q_tiles = pad_tokens(q, tile_q).reshape(batch * heads, -1, tile_q, dim)
    k_tiles = pad_tokens(k, tile_k).reshape(batch * heads, -1, tile_k, dim)
    # A row of LSE -inf has no valid key: exp(s - inf) = 0.
    lse_tiles = pad_tokens(jnp.where(jnp.isneginf(lse), jnp.inf, lse), tile_q).reshape(batch * heads, -1, tile_q)
    bias_tiles = None if bias is None else bias.reshape(batch, -1, tile_k)
    row_valid = jnp.arange(block_q) < valid_counts(query_valid, batch, block_q, rows)[..., None]  # [B, nq, block_q]
    row_tiles = jnp.pad(row_valid, ((0, 0), (0, -nq % group_q), (0, 0))).reshape(batch, -1, group_q, block_q)
    tiles_q, tiles_k = q_tiles.shape[1], k_tiles.shape[1]

    def query_tile(i: Array) -> tuple[Array, Array]:
        head, tile = i // tiles_q, i % tiles_q
        scaled, row_lse = _scaled(q_tiles[head, tile], scale), lse_tiles[head, tile]

        def key_tile(j: Array) -> Array:
            s = _contract(k_tiles[head, j], scaled, (1, 1)) - row_lse
            if bias_tiles is not None:
                s = s + bias_tiles[head // heads, j][:, None]
            return jnp.exp(s).reshape(group_k, block_k, tile_q).sum(1)

        sums = lax.map(key_tile, jnp.arange(tiles_k)).reshape(tiles_k * group_k, group_q, block_q)[:nk]
        mass = jnp.where(row_tiles[head // heads, tile], sums, 0.0).sum(-1).T
        return mass, sums.sum(0).reshape(tile_q)  # [group_q, nk], [tile_q]

    mass, row_sum = lax.map(query_tile, jnp.arange(batch * heads * tiles_q))
    return (
        mass.reshape(batch, heads, -1, nk)[:, :, :nq],
        row_sum.reshape(batch, heads, -1)[:, :, :rows],
    )


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
    tuning: XlaTuning = XLA,
) -> tuple[Array, Array]:
    """Attention over gathered key blocks, a group a softmax step; see `pallas_kernels.block_sparse_attention`."""
    batch, heads, rows, dim = q.shape
    nq, nk, kmax = block_count(rows, block_q), block_count(k.shape[2], block_k), indices.shape[3]
    group = _group_blocks(kmax, block_k, tuning)
    together = _rows_together(nq, max(1, tuning.step_keys // (group * block_k)))
    extra = -nq % together
    q_blocks = pad_tokens(pad_tokens(q, block_q), (nq + extra) * block_q).reshape(-1, together, block_q, dim)
    k_blocks, v_blocks = (pad_tokens(x, block_k).reshape(batch * heads * nk, block_k, dim) for x in (k, v))
    blocks, keys = _gather_plan(indices, counts, valid_counts(block_valid, batch, block_k, k.shape[2]), group)
    blocks, keys, row_counts = (
        jnp.pad(x.reshape(batch * heads, nq, -1), ((0, 0), (0, extra), (0, 0))).reshape(len(q_blocks), together, -1)
        for x in (blocks, keys, jnp.clip(counts, 0, kmax))
    )

    def query_blocks(i: Array) -> tuple[Array, Array]:
        scaled = _scaled(q_blocks[i], scale)

        def key_group(g: Array, running: _Running) -> _Running:
            block, valid = (lax.dynamic_slice_in_dim(x[i], g * group, group, axis=1) for x in (blocks, keys))
            masked = jnp.arange(block_k) >= valid[..., None]
            bias = jnp.where(masked, MASKED, 0.0).reshape(together, -1)
            k_group, v_group = (
                x.at[block].get(mode="promise_in_bounds").reshape(together, group * block_k, dim)
                for x in (k_blocks, v_blocks)
            )
            return jax.vmap(_softmax_step)(running, scaled, k_group, v_group, bias)

        start = jax.tree.map(lambda x: jnp.tile(x, (together,) + (1,) * x.ndim), _softmax_start(block_q, dim))
        running = lax.fori_loop(0, block_count(row_counts[i].max(), group), key_group, start)
        out, lse = jax.vmap(lambda r: _softmax_end(r, q.dtype))(running)
        # A row without keys went along with its neighbours over a block that it did not select: drop what it saw.
        empty = keys[i].max(-1) == 0
        return jnp.where(empty[:, None, None], 0, out), jnp.where(empty[:, None], -jnp.inf, lse)

    out, lse = lax.map(query_blocks, jnp.arange(len(q_blocks)))
    return (
        out.reshape(batch, heads, -1, dim)[:, :, :rows],
        lse.reshape(batch, heads, -1)[:, :, :rows],
    )


def _group_blocks(kmax: int, block: int, tuning: XlaTuning) -> int:
    """Key blocks of one softmax step: even groups, long enough for fast dots.

    Short rows are cut in up to three, so that rows with smaller counts stop early.
    """
    keys = kmax * block
    if 2 * keys > 3 * tuning.group_keys:
        return block_count(kmax, block_count(keys, tuning.group_keys))
    return block_count(kmax, min(3, max(1, round(keys / tuning.short_group_keys))))


def _rows_together(rows: int, most: int) -> int:
    """About `most` query blocks, a number that divides `rows` with little remainder."""
    return min(range(min(most, rows), max(0, most // 2), -1), key=lambda n: -rows % n, default=1)


def _gather_plan(indices: Array, counts: Array, valid: Array, group: int) -> tuple[Array, Array]:
    """int32 [B, H, nq, slots] twice: the block to gather, numbered over all heads, and its valid keys.

    Slots past a row's count, and used indices out of range, have 0 valid keys and repeat the row's first selected
    block: what was not selected is not even read. A row that selects nothing repeats block 0.
    """
    (batch, heads, _, kmax), nk = indices.shape, valid.shape[1]
    slots = block_count(kmax, group) * group
    block = jnp.pad(indices.astype(jnp.int32), ((0, 0),) * 3 + ((0, slots - kmax),))
    selected = (jnp.arange(slots) < counts[..., None]) & (block >= 0) & (block < nk)
    first = jnp.take_along_axis(block, jnp.argmax(selected, axis=-1, keepdims=True), axis=-1)
    block = jnp.where(selected, block, jnp.where(selected.any(-1, keepdims=True), first, 0))
    keys = jnp.take_along_axis(valid[:, None, None], block, axis=-1, mode="clip")
    head = jnp.arange(batch * heads).reshape(batch, heads, 1, 1)
    return head * nk + block, jnp.where(selected, keys, 0)
