"""Portable implementation in jnp and lax: memory linear in N, work proportional to what is kept; the CPU default.

Scores are held transposed, keys × rows: the CPU compiler vectorises reductions over the leading axis only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import varying
from pallas_kernels.blocks import (
    FLOOR,
    MASKED,
    bias_of,
    block_count,
    key_bias,
    merge_heads,
    numbers,
    pad_tokens,
    unpack_bits,
    valid_counts,
)
from pallas_kernels.calls import DenseCall, MassCall, PooledCall, Request, SparseCall
from pallas_kernels.quantized import emulated
from pallas_kernels.tuning import XLA, XlaTuning


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


def _softmax_start(leading: tuple[int, ...], rows: int, *operands: Array) -> _Running:
    """For [*leading] query tiles of `rows` rows; `operands` are q, k, v and whatever else the loop reads."""
    full = lambda value, *shape: varying.constant(value, (*leading, *shape), jnp.float32, *operands)
    return full(FLOOR, rows), full(0, rows), full(0, operands[0].shape[-1], rows)


def _softmax_step(running: _Running, q: Array, k: Array, v: Array, bias: Array | None) -> _Running:
    """One online-softmax step: rows q [R, D], already scaled, over keys k, v [K, D]; bias [K, 1] or [K, R] is added."""
    m, total, acc = running
    s = _contract(k, q, (1, 1))  # [K, R]
    if bias is not None:
        s = s + bias
    m_new = jnp.maximum(m, s.max(0))
    p = jnp.exp(s - m_new[None])
    shrink = jnp.exp(m - m_new)
    return m_new, total * shrink + p.sum(0), acc * shrink[None] + _contract(v, p, (0, 0))


def _softmax_end(running: _Running, dtype: Any) -> tuple[Array, Array]:
    """(out [R, D], lse [R]); rows that saw no key give 0 and -inf."""
    m, total, acc = running
    safe = jnp.where(total > 0, total, 1.0)
    return (acc / safe[None]).T.astype(dtype), jnp.where(total > 0, m + jnp.log(safe), -jnp.inf)


def _scaled(q: Array, scale: float) -> Array:
    return q.astype(jnp.float32) * scale


def flash_attention(call: DenseCall, tuning: XlaTuning = XLA) -> tuple[Array, Array]:
    """Dense attention, tile by tile; see `pallas_kernels.flash_attention`."""
    if call.score_precision != "input":
        return emulated(call, lambda plain: flash_attention(plain, tuning))
    (batch, heads, rows, dim), keys = call.q.shape, call.k.shape[2]
    tile_q, tile_k = _even_tile(rows, tuning.dense_q), _even_tile(keys, tuning.dense_k)
    q, k, v = (
        merge_heads(pad_tokens(x, tile)).reshape(batch * heads, -1, tile, dim)
        for x, tile in ((call.q, tile_q), (call.k, tile_k), (call.v, tile_k))
    )
    nq, nk = q.shape[1], k.shape[1]
    bias = key_bias(call.block_valid, batch, call.block_k, keys, nk * tile_k)
    bias_tiles = None if bias is None else bias.reshape(batch, nk, tile_k)
    start = _softmax_start((), tile_q, q, k, v, *([] if bias is None else [bias]))

    def query_tile(i: Array) -> tuple[Array, Array]:
        head, tile = i // nq, i % nq
        scaled = _scaled(q[head, tile], call.scale)

        def key_tile(j: Array, running: _Running) -> _Running:
            masked = None if bias_tiles is None else bias_tiles[head // heads, j][:, None]
            return _softmax_step(running, scaled, k[head, j], v[head, j], masked)

        return _softmax_end(lax.fori_loop(0, nk, key_tile, start), q.dtype)

    out, lse = lax.map(query_tile, numbers(batch * heads * nq))
    return out.reshape(batch, heads, -1, dim)[:, :, :rows], lse.reshape(batch, heads, -1)[:, :, :rows]


def block_mass(call: MassCall, tuning: XlaTuning = XLA) -> tuple[Array, Array]:
    """Attention mass of block pairs, tile by tile; see `pallas_kernels.block_mass`."""
    (batch, heads, rows, dim), keys, (nq, nk) = call.q.shape, call.k.shape[2], call.blocks
    block_q, block_k = call.block_q, call.block_k
    group_q = _even_tile(nq, max(1, tuning.dense_q // block_q))
    group_k = _even_tile(nk, max(1, tuning.dense_k // block_k))
    tile_q, tile_k = group_q * block_q, group_k * block_k
    q, k = (
        merge_heads(pad_tokens(x, tile)).reshape(batch * heads, -1, tile, dim)
        for x, tile in ((call.q, tile_q), (call.k, tile_k))
    )
    tiles_q, tiles_k = q.shape[1], k.shape[1]
    shift = call.shift(tiles_q * tile_q).reshape(batch * heads, tiles_q, tile_q)
    weight = call.weight(tiles_q * tile_q).reshape(batch, tiles_q, group_q, block_q)
    bias = key_bias(call.block_valid, batch, block_k, keys, tiles_k * tile_k)
    bias_tiles = None if bias is None else bias.reshape(batch, tiles_k, tile_k)

    def query_tile(i: Array) -> tuple[Array, Array]:
        head, tile = i // tiles_q, i % tiles_q
        scaled, row_shift = _scaled(q[head, tile], call.scale), shift[head, tile]

        def key_tile(j: Array) -> Array:
            s = _contract(k[head, j], scaled, (1, 1)) - row_shift[None]
            if bias_tiles is not None:
                s = s + bias_tiles[head // heads, j][:, None]
            return jnp.exp(s).reshape(group_k, block_k, tile_q).sum(1)

        sums = lax.map(key_tile, numbers(tiles_k))
        sums = sums.reshape(tiles_k * group_k, group_q, block_q)[:nk]
        return (sums * weight[head // heads, tile][None]).sum(-1).T, sums.sum(0).reshape(
            tile_q
        )  # [group_q, nk], [tile_q]

    mass, row_sum = lax.map(query_tile, numbers(batch * heads * tiles_q))
    mass = mass.reshape(batch, heads, -1, nk)[:, :, :nq]
    return mass, row_sum.reshape(batch, heads, -1)[:, :, :rows]


def block_sparse_attention(call: SparseCall, tuning: XlaTuning = XLA) -> tuple[Array, Array]:
    """Attention over gathered key blocks, a group a softmax step; see `pallas_kernels.block_sparse_attention`."""
    if call.score_precision != "input":
        return emulated(call, lambda plain: block_sparse_attention(plain, tuning))
    (batch, heads, rows, dim), keys, kmax = call.q.shape, call.k.shape[2], call.indices.shape[3]
    block_q, block_k = call.block_q, call.block_k
    nq, nk = block_count(rows, block_q), block_count(keys, block_k)
    group = _group_blocks(kmax, block_k, tuning)
    together = _rows_together(nq, max(1, tuning.step_keys // (group * block_k)))
    extra = -nq % together
    q_blocks = pad_tokens(pad_tokens(call.q, block_q), (nq + extra) * block_q).reshape(-1, together, block_q, dim)
    k_blocks, v_blocks = (pad_tokens(x, block_k).reshape(batch * heads * nk, block_k, dim) for x in (call.k, call.v))
    valid = valid_counts(call.block_valid, batch, block_k, keys)
    blocks, block_keys, row_counts = (
        jnp.pad(x.reshape(batch * heads, nq, -1), ((0, 0), (0, extra), (0, 0))).reshape(len(q_blocks), together, -1)
        for x in (*_gather_plan(call.indices, call.counts, valid, group), jnp.clip(call.counts, 0, kmax))
    )
    start = _softmax_start((together,), block_q, q_blocks, k_blocks, v_blocks, blocks, block_keys)

    def query_blocks(i: Array) -> tuple[Array, Array]:
        scaled = _scaled(q_blocks[i], call.scale)

        def key_group(g: Array, running: _Running) -> _Running:
            block, valid = (lax.dynamic_slice_in_dim(x[i], g * group, group, axis=1) for x in (blocks, block_keys))
            inside = numbers(block_k, 3) < valid[..., None]
            bias = bias_of(inside).reshape(together, -1, 1)
            k_group, v_group = (
                x.at[block].get(mode="promise_in_bounds").reshape(together, group * block_k, dim)
                for x in (k_blocks, v_blocks)
            )
            return jax.vmap(_softmax_step)(running, scaled, k_group, v_group, bias)

        groups = block_count(row_counts[i].max(), group)
        running = lax.fori_loop(0, groups, key_group, start)
        out, lse = jax.vmap(lambda r: _softmax_end(r, call.q.dtype))(running)
        # A row without keys went along with its neighbours over a block that it did not select: drop what it saw.
        empty = block_keys[i].max(-1) == 0
        return jnp.where(empty[:, None, None], 0, out), jnp.where(empty[:, None], -jnp.inf, lse)

    out, lse = lax.map(query_blocks, numbers(len(q_blocks)))
    return out.reshape(batch, heads, -1, dim)[:, :, :rows], lse.reshape(batch, heads, -1)[:, :, :rows]


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
    selected = (numbers(slots, 4) < counts[..., None]) & (block >= 0) & (block < nk)
    first = jnp.take_along_axis(block, lax.argmax(selected, 3, jnp.int32)[..., None], axis=-1)
    block = jnp.where(selected, block, jnp.where(selected.any(-1, keepdims=True), first, 0))
    keys = jnp.take_along_axis(valid[:, None, None], block, axis=-1, mode="clip")
    head = numbers(batch * heads).reshape(batch, heads, 1, 1)
    return head * nk + block, jnp.where(selected, keys, 0)


def pooled_attention(call: PooledCall, tuning: XlaTuning = XLA) -> tuple[Array, Array]:
    """Attention over pooled keys, tile by tile; see `pallas_kernels.pooled_attention`."""
    (batch, heads, rows, dim), nk, block = call.q.shape, call.k.shape[2], call.block_q
    nq = block_count(rows, block)
    group = _even_tile(nq, max(1, tuning.dense_q // block))
    tiles, tile_k = block_count(nq, group), _even_tile(nk, tuning.dense_k)
    cut = lambda x, rows: merge_heads(pad_tokens(x, rows)).reshape(batch * heads, -1, rows, x.shape[-1])
    q, k, v, kept = cut(call.q, group * block), cut(call.k, tile_k), cut(call.v, tile_k), cut(call.kept, group)
    bias = merge_heads(call.bias)
    start = _softmax_start((), group * block, q, k, v, bias, kept)

    def query_tile(i: Array) -> tuple[Array, Array]:
        head, tile = i // tiles, i % tiles
        scaled = _scaled(q[head, tile], call.scale)
        seen = ~unpack_bits(kept[head, tile], nk) & ~jnp.isneginf(bias[head])[None]
        of_blocks = jnp.where(seen, bias[head][None], jnp.float32(MASKED))
        of_blocks = jnp.pad(of_blocks, ((0, 0), (0, k.shape[1] * tile_k - nk)), constant_values=MASKED).T

        def key_tile(j: Array, running: _Running) -> _Running:
            here = lax.dynamic_slice_in_dim(of_blocks, j * tile_k, tile_k)[..., None]
            of_rows = jnp.broadcast_to(here, (tile_k, group, block)).reshape(tile_k, -1)
            return _softmax_step(running, scaled, k[head, j], v[head, j], of_rows)

        return _softmax_end(lax.fori_loop(0, k.shape[1], key_tile, start), q.dtype)

    out, lse = lax.map(query_tile, numbers(batch * heads * tiles))
    return out.reshape(batch, heads, -1, dim)[:, :, :rows], lse.reshape(batch, heads, -1)[:, :, :rows]
