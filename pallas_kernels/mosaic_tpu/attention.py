"""TPU attention over lists of key tiles, dense and block-sparse alike: dense is the list of all tiles.

K and V of a head stay in VMEM where they fit and are gathered tile by tile from HBM where they do not. A softmax step
takes a group of tiles, its scores are multiplied while the group before goes through its softmax, and the running
maximum, the row sums and the accumulator live in VMEM: a loop carry would be copied. Scores of a tile that is not
whole get a bias row as they are written; in VMEM the whole tiles that a list ends with go without, turn by turn.

Where a number near each row's maximum is known beforehand, its shift, nothing is compared and nothing rescaled. A row
whose sum then leaves the range that float32 holds well gets LSE NaN, for the caller to compute it another way.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import varying
from pallas_kernels.blocks import FLOOR, LOG2E, block_count
from pallas_kernels.tuning import TpuAttentionTuning

_LANES = 128
HEADER = 3
"""Entries of a list before its tiles: where it begins, its pairs of groups, and the turns of whole tiles after them."""
SHIFT_RANGE = 2.0**64
"""Sums of exp(score - shift) between this and its inverse are good: terms of 2**-62 of the sum are still normal float32
numbers, and 2**64 leaves room for products with values and their sum over keys."""
DROPPED = 1 << 30
"""Added to the entry of a tile that is read but does not count: its bias is the row past the last."""


def contract(a: Array, b: Array, axis: int, dtype: Any) -> Array:
    """float32 a · b over the last axis of `a` and `axis` of `b`; float32 inputs at full precision."""
    exact = jnp.dtype(dtype) == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _start(table: Any, position: Any, tile: int) -> Any:
    """First key of the tile at `position` of a list."""
    return pl.multiple_of(table[0, HEADER + position] & (DROPPED - 1), tile)


class _Softmax:
    """The online softmax of one query block, its state in VMEM; with a shift [1, rows] in place of the maximum."""

    def __init__(self, scratch: tuple[Any, ...], bias: Any, table: Any, shift: Any, tile: int, scale: float):
        self.m, self.total, self.acc = scratch
        self.bias, self.table, self.tile, self.scale, self.shifted = bias, table, tile, scale, shift is not None
        if self.shifted:
            row = shift[...]
            self.m[...] = jnp.broadcast_to(row, (_LANES, row.shape[1])).T[:, :1]
        else:
            self.m[...] = jnp.full_like(self.m, FLOOR)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def _bias(self, position: Any) -> Array:
        """[1, keys], or [query blocks, 1, keys]."""
        row = lax.div(self.table[0, HEADER + position], np.int32(self.tile))
        return self.bias[..., pl.ds(jnp.minimum(row, self.bias.shape[-2] - 1), 1), :]

    def mask(self, scores: Any, products: Any, position: Any) -> None:
        """Writes `products` [rows, keys] of the group of tiles at `position` to `scores`, plus bias."""
        width = max(self.tile, _LANES)
        for i in range(0, scores.shape[1], width):
            first = position + i // self.tile
            row = self._bias(first)
            if self.tile < _LANES:
                # Two tiles of 64: the bias rows hold theirs twice.
                left = lax.broadcasted_iota(jnp.int32, (1, _LANES), 1) < self.tile
                row = jnp.where(left, row, self._bias(first + 1))
            part = products[:, i : i + width]
            by_block = part if row.ndim == 2 else part.reshape(row.shape[0], -1, width)
            scores[:, i : i + width] = (by_block + row).reshape(part.shape)

    def step(self, scores: Any, values: Array) -> None:
        """Takes in a group of tiles: `scores` [rows, keys] in VMEM, `values` [keys, D]."""
        width = max(self.tile, _LANES)
        part = lambda i: scores[:, i : i + width]
        parts = range(0, scores.shape[1], width)
        m, shrink = self.m[...], None
        if not self.shifted:
            top = functools.reduce(jnp.maximum, (part(i) for i in parts))
            before, m = m, jnp.maximum(m, top.max(1, keepdims=True) * self.scale)
            self.m[...] = m
            shrink = jnp.exp2(before - m)
        p = [jnp.exp2(part(i) * self.scale - m) for i in parts]
        dtype = values.dtype
        product = contract(jnp.concatenate([x.astype(dtype) for x in p], 1), values, 0, dtype)
        kept = lambda x: x if shrink is None else x * shrink
        self.total[...] = kept(self.total[...]) + functools.reduce(jnp.add, p)
        self.acc[...] = kept(self.acc[...]) + product

    def finish(self, out: Any, lse: Any) -> None:
        """Writes out [rows, D] and lse [1, rows]."""
        total = self.total[...].sum(1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = (self.acc[...] / safe).astype(out.dtype)
        column = jnp.where(total > 0, (self.m[...] + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)
        if self.shifted:
            good = (total >= 1 / SHIFT_RANGE) & (total <= SHIFT_RANGE)
            column = jnp.where(good, column, jnp.nan)
        lse[...] = jnp.broadcast_to(column, (column.shape[0], _LANES)).T[:1]


def _scratch(rows: int, dim: int, width: int) -> list[Any]:
    return [
        pltpu.VMEM((rows, 1), jnp.float32),
        pltpu.VMEM((rows, width), jnp.float32),
        pltpu.VMEM((rows, dim), jnp.float32),
    ]


def _resident_kernel(
    table: Any, q: Any, k: Any, v: Any, bias: Any, *rest: Any, tile: int, tuning: TpuAttentionTuning, scale: float
) -> None:
    """One query block; K and V of the head in VMEM. `rest` begins with the shift, if there is one."""
    *shift, out, lse, m, total, acc, even, odd = rest
    softmax = _Softmax((m, total, acc), bias, table, shift[0] if shift else None, tile, scale)
    group, unroll, buffers = tuning.group, tuning.unroll, (even, odd)
    turn = group * unroll

    def gather(ref: Any, position: Any) -> Array:
        return jnp.concatenate([ref[pl.ds(_start(table, position + i, tile), tile), :] for i in range(group)], 0)

    def multiply(position: Any, scores: Any, masked: bool) -> None:
        products = contract(q[...], gather(k, position), 1, k.dtype)
        if masked:
            softmax.mask(scores, products, position)
        else:
            scores[...] = products

    def steps(first: Any, count: int, masked: bool) -> None:
        for j in range(count):
            position = first + j * group
            # The scores of the next group, while this one goes through its softmax.
            multiply(position + group, buffers[(j + 1) % 2], masked)
            softmax.step(buffers[j % 2], gather(v, position))

    first, pairs, turns = table[0, 0], table[0, 1], table[0, 2]
    multiply(first, even, masked=True)
    lax.fori_loop(np.int32(0), pairs, lambda i, _: steps(first + i * 2 * group, 2, masked=True), None)
    first = first + pairs * 2 * group
    lax.fori_loop(np.int32(0), turns, lambda i, _: steps(first + i * turn, unroll, masked=False), None)
    softmax.finish(out, lse)


def _gathered_kernel(
    table: Any, q: Any, kv: Any, bias: Any, *rest: Any, tile: int, tuning: TpuAttentionTuning, scale: float
) -> None:
    """One query block; its K and V tiles come from HBM [heads, tiles, 2, tile, D], two groups a turn, a turn ahead."""
    *shift, out, lse, m, total, acc, even, odd, ring, arrived = rest
    softmax = _Softmax((m, total, acc), bias, table, shift[0] if shift else None, tile, scale)
    head, group = pl.program_id(0), tuning.group
    turn, first, turns = 2 * group, table[0, 0], table[0, 1]

    def start(i: Any, slot: Any) -> None:
        for j in range(turn):
            # Past the end of the list this reads one of its tiles once more: cheaper than a branch a tile.
            which = lax.div(_start(table, first + i * turn + j, tile), np.int32(tile))
            target = ring.at[slot, :, pl.ds(j * tile, tile)]
            pltpu.make_async_copy(kv.at[head, which], target, arrived.at[slot]).start()

    def wait(slot: Any) -> None:
        pltpu.make_async_copy(ring.at[slot], ring.at[slot], arrived.at[slot]).wait()

    def take(i: Any, carry: None) -> None:
        slot = lax.rem(i, np.int32(2))
        start(i + 1, 1 - slot)
        wait(slot)
        halves = [pl.ds(j * group * tile, group * tile) for j in range(2)]
        for j, (half, scores) in enumerate(zip(halves, (even, odd), strict=True)):
            softmax.mask(scores, contract(q[...], ring[slot, 0, half, :], 1, kv.dtype), first + i * turn + j * group)
        for half, scores in zip(halves, (even, odd), strict=True):
            softmax.step(scores, ring[slot, 1, half, :])

    start(np.int32(0), np.int32(0))
    lax.fori_loop(np.int32(0), turns, take, None)
    wait(lax.rem(turns, np.int32(2)))
    softmax.finish(out, lse)


def resident_bytes(keys: int, rows: int, dim: int, itemsize: int, tile: int, tuning: TpuAttentionTuning) -> int:
    """VMEM that the resident kernel needs, in bytes; rows of fewer than 128 lanes are padded to them."""
    lanes = max(dim, _LANES)
    heads = 2 * keys * lanes * itemsize
    bias = 4 * keys // tile * max(tile, _LANES)
    # Two buffers of scores, and registers spilled of about as many.
    state = 4 * rows * (4 * tuning.group * tile + 2 * _LANES + lanes)
    return heads + bias + state + 4 * rows * lanes * itemsize + (rows * 6 << 10)


def packed(k: Array, v: Array, tile: int) -> Array:
    """[B*H, tiles, 2, tile, D] of K and V [B*H, Nk, D]: a tile of both is one copy."""
    programs, _, dim = k.shape
    return jnp.stack([x.reshape(programs, -1, tile, dim) for x in (k, v)], 2)


def attention(
    q: Array,
    kv: tuple[Array, ...],
    table: Array,
    bias: Array,
    shift: Array | None = None,
    *,
    rows: int,
    tile: int,
    heads: int,
    scale: float,
    vmem_bytes: int,
    tuning: TpuAttentionTuning,
    interpret: Any,
) -> tuple[Array, Array]:
    """Attention of query blocks of `rows` rows over their lists of key tiles.

    Args:
      q: [B*H, Nq, D]; rows of the last block past its end are never written.
      kv: K and V, [B*H, Nk, D] each, Nk a multiple of `tile`, to lie in VMEM, a head at a time; or what `packed` makes
        of them, to be gathered from HBM.
      table: int32 [B*H or B, blocks of Nq or 1, L] of lists. Each says where its tiles begin among the entries, how
        many pairs of groups it has, and how many turns of `group * unroll` whole tiles follow, for the resident kernel
        alone. Then come the entries, the first key of a tile, plus DROPPED if it does not count; `tuning.slack` or more
        of those at the end.
      bias: float32 [B, Nk / tile + 1, max(tile, 128)] added to the scores of a tile; the last row masks all. With a
        bias of their own for smaller query blocks, an equal number in `rows` rows, and a tile of 128 or more keys:
        [B*H, query blocks, Nk / tile + 1, tile].
      shift: float32 [B*H, Nq], natural log, in place of each row's maximum.
      rows: of a query block.
      tile: keys of a tile.
      heads: H.
      scale: of the scores, for exp.
      vmem_bytes: limit for the compiler.
      tuning: groups.
      interpret: passed to pallas_call.

    Returns:
      out [B*H, Nq, D] in q's dtype and lse float32 [B*H, Nq], NaN for a row too far from its shift, whose out is wrong.
    """
    (programs, queries, dim), resident = q.shape, len(kv) == 2
    blocks = block_count(queries, rows)
    shared = table.shape[0] != programs or table.shape[1] != blocks
    lists = (lambda h, i: (lax.div(h, np.int32(heads)), 0, 0, 0)) if shared else (lambda h, i: (h, i, 0, 0))
    once: Callable[[], dict[str, Any]] = lambda: {"pipeline_mode": pl.Buffered(buffer_count=1)}
    width = max(tile, _LANES)
    operands: list[Array] = [table[:, :, None], q]
    specs = [
        pl.BlockSpec((None, None, 1, table.shape[2]), lists, memory_space=pltpu.SMEM),
        pl.BlockSpec((None, rows, dim), lambda h, i: (h, i, 0)),
    ]
    scratch = _scratch(rows, dim, width)
    scratch += [pltpu.VMEM((rows, tuning.group * tile), jnp.float32)] * 2
    operands += kv
    if resident:
        specs += [pl.BlockSpec((None, kv[0].shape[1], dim), lambda h, i: (h, 0, 0), **once())] * 2
    else:
        specs.append(pl.BlockSpec(memory_space=pl.ANY))
        scratch += [pltpu.VMEM((2, 2, 2 * tuning.group * tile, dim), q.dtype), pltpu.SemaphoreType.DMA((2,))]
    operands.append(bias)
    if bias.ndim == 3:
        of_batch = lambda h, i: (lax.div(h, np.int32(heads)), 0, 0)
        specs.append(pl.BlockSpec((None, *bias.shape[1:]), of_batch, **once()))
    else:
        specs.append(pl.BlockSpec((None, bias.shape[1] // blocks, *bias.shape[2:]), lambda h, i: (h, i, 0, 0)))
    if shift is not None:
        whole = jnp.pad(shift * jnp.float32(LOG2E), ((0, 0), (0, blocks * rows - queries)))
        operands.append(whole.reshape(programs, blocks, 1, rows))
        specs.append(pl.BlockSpec((None, None, 1, rows), lambda h, i: (h, i, 0, 0)))
    kernel = _resident_kernel if resident else _gathered_kernel
    out, lse = pl.pallas_call(
        functools.partial(kernel, tile=tile, tuning=tuning, scale=scale * LOG2E),
        grid=(programs, blocks),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, rows, dim), lambda h, i: (h, i, 0)),
            pl.BlockSpec((None, None, 1, rows), lambda h, i: (h, i, 0, 0)),
        ],
        out_shape=[
            varying.result(q.shape, q.dtype, *operands),
            varying.result((programs, blocks, 1, rows), jnp.float32, *operands),
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_bytes,
            dimension_semantics=("parallel", "arbitrary"),
            # Lists hold tiles of the array only, see `lists.tile_lists`.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name=f"adaspa_{'attention' if shift is None else 'shifted'}_{'resident' if resident else 'gathered'}",
    )(*operands)
    return out, lse.reshape(programs, -1)[:, :queries]
