"""TPU attention over lists of key tiles, dense and block-sparse alike: dense is the list of all tiles.

K and V of a head stay in VMEM where they fit and are gathered tile by tile from HBM where they do not. A softmax step
takes a group of tiles, its scores are multiplied while the group before goes through its softmax, and the running
maximum, the row sums and the accumulator live in VMEM: a loop carry would be copied. A program has several query
blocks, whose groups follow one another without a break: first those with tiles that are not whole, whose scores get a
bias row as they are read, then, turn by turn, those without.

Where a number near each row's maximum is known beforehand, its shift, nothing is compared and nothing rescaled. A row
whose sum then leaves the range that float32 holds well gets LSE NaN, for the caller to compute it another way.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import varying
from pallas_kernels.blocks import FLOOR, LOG2E, block_count
from pallas_kernels.tuning import TpuAttentionTuning

_LANES = 128
HEADER = 2
"""Numbers of a program's table before its slots: its pairs of groups, and the turns of whole tiles after them."""
ENTRY_BITS = 20
"""Of a slot, that say where in the table the entries of its group are; the bits above say of which query block."""
SHIFT_RANGE = 2.0**64
"""Sums of exp(score - shift) between this and its inverse are good: terms of 2**-62 of the sum are still normal float32
numbers, and 2**64 leaves room for products with values and their sum over keys."""
_SEEKING_BYTES = 2 << 20
"""Of VMEM, that the resident kernel spills into if it seeks maxima in four groups of tiles at a time."""
DROPPED = 1 << 30
"""Added to the entry of a tile that is read but does not count: its bias is the row past the last."""


def contract(a: Array, b: Array, axis: int, dtype: Any) -> Array:
    """float32 a · b over the last axis of `a` and `axis` of `b`, of `dtype` both; float32 at full precision."""
    if jnp.dtype(dtype) == jnp.int8:
        whole = lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.int32)
        return whole.astype(jnp.float32)
    exact = jnp.dtype(dtype) == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


class _Softmax:
    """The online softmax of a program's query blocks, its state in VMEM.

    With a shift in place of the maximum, and scores that are to be multiplied by one scale, or each row's by its own.

    Refs hold the blocks one below the other: m [blocks * rows, 1], total [blocks * rows, keys of a tile], acc
    [blocks * rows, D], scales like m. `by_row` may have "shift" and "row_scale", [blocks, rows].
    """

    def __init__(
        self,
        scratch: tuple[Any, ...],
        bias: Any,
        table: Any,
        by_row: dict[str, Any],
        tile: int,
        scale: float,
    ):
        self.m, self.total, self.acc, *scales = scratch
        self.bias, self.table, self.tile, self.scale, self.shifted = bias, table, tile, scale, "shift" in by_row
        self.scales = scales[0] if scales else None
        if self.scales is not None:
            _below_one_another(by_row["row_scale"][...] * np.float32(scale), self.scales)
        if self.shifted:
            _below_one_another(by_row["shift"][...], self.m)
        else:
            self.m[...] = jnp.full_like(self.m, FLOOR)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def _bias(self, entry: Any) -> Array:
        """[1, keys], or [query blocks, 1, keys], of the tile at `entry` of the table."""
        row = lax.div(self.table[0, entry], np.int32(self.tile))
        return self.bias[..., pl.ds(jnp.minimum(row, self.bias.shape[-2] - 1), 1), :]

    def biased(self, part: Array, first: Any) -> Array:
        """Scores `part` [rows, keys] of one tile, or of two of 64 keys, plus bias."""
        row = self._bias(first)
        if self.tile < _LANES:
            # Two tiles of 64: the bias rows hold theirs twice.
            left = lax.broadcasted_iota(jnp.int32, (1, _LANES), 1) < self.tile
            row = jnp.where(left, row, self._bias(first + 1))
        by_block = part if row.ndim == 2 else part.reshape(row.shape[0], -1, part.shape[1])
        return (by_block + row).reshape(part.shape)

    def step(self, here: Any, scores: Any, values: Array, entry: Any = None) -> None:
        """Takes in a group of tiles: `scores` [rows, keys] in VMEM of the rows at `here`, `values` [keys, D].

        With their place `entry` in the table where they need bias.
        """
        width = max(self.tile, _LANES)
        starts = range(0, scores.shape[1], width)
        part = lambda i: scores[:, i : i + width]
        score = part if entry is None else lambda i: self.biased(part(i), entry + i // self.tile)
        m, shrink = self.m[here], None
        scale = self.scale if self.scales is None else self.scales[here]
        if not self.shifted:
            top = functools.reduce(jnp.maximum, (score(i) for i in starts))
            before, m = m, jnp.maximum(m, top.max(1, keepdims=True) * scale)
            self.m[here] = m
            shrink = jnp.exp2(before - m)
        p = [jnp.exp2(score(i) * scale - m) for i in starts]
        dtype = values.dtype
        product = contract(jnp.concatenate([x.astype(dtype) for x in p], 1), values, 0, dtype)
        kept = lambda x: x if shrink is None else x * shrink
        self.total[here] = kept(self.total[here]) + functools.reduce(jnp.add, p)
        self.acc[here] = kept(self.acc[here]) + product

    def finish(self, out: Any, lse: Any) -> None:
        """Writes out [blocks * rows, D] and lse [blocks, rows]."""
        total = self.total[...].sum(1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = (self.acc[...] / safe).astype(out.dtype)
        column = jnp.where(total > 0, (self.m[...] + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)
        if self.shifted:
            good = (total >= 1 / SHIFT_RANGE) & (total <= SHIFT_RANGE)
            column = jnp.where(good, column, jnp.nan)
        count, rows = lse.shape
        lse[...] = jnp.concatenate([column[i * rows : (i + 1) * rows] for i in range(count)], 1).T


def _below_one_another(rows: Array, column: Any) -> None:
    """Writes [blocks, rows] to a ref [blocks * rows, 1]."""
    (count, length), columns = rows.shape, rows.T
    for i in range(count):
        column[i * length : (i + 1) * length] = columns[:, i : i + 1]


class _Steps:
    """Where the groups of tiles that a program works through lie: a slot of its table each, whatever list it is of."""

    def __init__(self, table: Any, rows: int, tile: int, group: int):
        self.table, self.rows, self.tile, self.group = table, rows, tile, group
        self.pairs, self.turns = table[0, 0], table[0, 1]

    def __call__(self, step: Any) -> tuple[Any, Any]:
        """Rows of the program, and first entry of the table."""
        slot = self.table[0, HEADER + step]
        block = lax.shift_right_logical(slot, np.int32(ENTRY_BITS))
        return pl.ds(pl.multiple_of(block * self.rows, self.rows), self.rows), slot & ((1 << ENTRY_BITS) - 1)

    def key(self, entry: Any) -> Any:
        """The first key of a tile."""
        return pl.multiple_of(self.table[0, entry] & (DROPPED - 1), self.tile)

    def gather(self, ref: Any, entry: Any) -> Array:
        """Keys or values [keys, D] of a group."""
        return jnp.concatenate([ref[pl.ds(self.key(entry + i), self.tile), :] for i in range(self.group)], 0)


def _kernel(
    table: Any,
    q: Any,
    kv: tuple[Any, ...],
    bias: Any,
    by_row: dict[str, Any],
    out: Any,
    lse: Any,
    state: tuple[Any, ...],
    scores: tuple[Any, ...],
    copies: tuple[Any, ...],
    *,
    work: Callable[..., None],
    rows: int,
    tile: int,
    tuning: TpuAttentionTuning,
    scale: float,
) -> None:
    """Some query blocks: `work` takes the groups of their lists through the softmax."""
    softmax = _Softmax(state, bias, table, by_row, tile, scale)
    work(softmax, _Steps(table, rows, tile, tuning.group), q, kv, scores, *copies)
    softmax.finish(out, lse)


def _resident(
    softmax: _Softmax,
    place: _Steps,
    q: Any,
    kv: tuple[Any, ...],
    buffers: tuple[Any, ...],
    *,
    turn: int,
    unroll: int,
) -> None:
    """K and V of the head in VMEM. A turn of `turn` whole groups is run in parts of `unroll`."""
    k, v = kv

    def multiply(step: Any, scores: Any) -> None:
        here, entry = place(step)
        scores[...] = contract(q[here, :], place.gather(k, entry), 1, k.dtype)

    def steps(first: Any, count: int, masked: bool) -> None:
        for j in range(count):
            # The scores of the next group, of this list or another, while this one goes through its softmax.
            multiply(first + j + 1, buffers[(j + 1) % 2])
            here, entry = place(first + j)
            softmax.step(here, buffers[j % 2], place.gather(v, entry), entry if masked else None)

    multiply(0, buffers[0])
    lax.fori_loop(np.int32(0), place.pairs, lambda i, _: steps(i * 2, 2, masked=True), None)
    whole = place.pairs * 2
    part = lambda i, _: steps(whole + i * unroll, unroll, masked=False)
    lax.fori_loop(np.int32(0), place.turns * (turn // unroll), part, None)


def _gathered(
    softmax: _Softmax,
    place: _Steps,
    q: Any,
    kv: tuple[Any, ...],
    buffers: tuple[Any, ...],
    ring: Any,
    arrived: Any,
) -> None:
    """K and V tiles come from HBM [heads, tiles, 2, tile, D], two groups a turn, a turn ahead."""
    (both,), head, group, tile = kv, pl.program_id(0), place.group, place.tile
    halves = [pl.ds(j * group * tile, group * tile) for j in range(2)]

    def start(turn: Any, slot: Any) -> None:
        for j in range(2):
            # Past the last group this reads a dropped one: cheaper than a branch.
            _, entry = place(2 * turn + j)
            for i in range(group):
                which = lax.div(place.key(entry + i), np.int32(tile))
                target = ring.at[slot, :, pl.ds((j * group + i) * tile, tile)]
                pltpu.make_async_copy(both.at[head, which], target, arrived.at[slot]).start()

    def wait(slot: Any) -> None:
        pltpu.make_async_copy(ring.at[slot], ring.at[slot], arrived.at[slot]).wait()

    def take(turn: Any, carry: None) -> None:
        slot = lax.rem(turn, np.int32(2))
        start(turn + 1, 1 - slot)
        wait(slot)
        groups = [(place(2 * turn + j), halves[j], scores) for j, scores in enumerate(buffers)]
        for (here, _), half, scores in groups:
            scores[...] = contract(q[here, :], ring[slot, 0, half, :], 1, both.dtype)
        for (here, entry), half, scores in groups:
            softmax.step(here, scores, ring[slot, 1, half, :], entry)

    start(np.int32(0), np.int32(0))
    lax.fori_loop(np.int32(0), place.pairs, take, None)
    wait(lax.rem(place.pairs, np.int32(2)))


def resident_bytes(
    keys: int,
    rows: int,
    together: int,
    dim: int,
    itemsizes: tuple[int, int],
    tile: int,
    tuning: TpuAttentionTuning,
) -> int:
    """VMEM that the resident kernel needs, in bytes; rows of fewer than 128 lanes are padded to them.

    `itemsizes` are those of K and of V.
    """
    lanes, width, itemsize = max(dim, _LANES), max(tile, _LANES), itemsizes[1]
    heads = sum(itemsizes) * keys * lanes
    bias = 4 * keys // tile * width
    # Two buffers of scores, and registers spilled of three quarters as many, or more of float32 and of longer groups.
    scores = 2 * 4 * rows * tuning.group * tile * 7 // 4 + ((itemsize == 4 or tuning.group * tile > 2048) << 20)
    state = 4 * rows * together * (_LANES * (1 + (itemsizes[0] == 1)) + width + lanes)
    return heads + bias + scores + state + 4 * rows * together * lanes * itemsize


def packed(k: Array, v: Array, tile: int) -> Array:
    """[B*H, tiles, 2, tile, D] of K and V [B*H, Nk, D]: a tile of both is one copy."""
    programs, _, dim = k.shape
    # Joined along rows: XLA would lay a stack out with K and V apart, and copy it for each kernel.
    both = jnp.concatenate([x.reshape(programs, -1, tile, dim) for x in (k, v)], 2)
    return both.reshape(programs, -1, 2, tile, dim)


def attention(
    q: Array,
    kv: tuple[Array, ...],
    table: Array,
    bias: Array,
    shift: Array | None = None,
    row_scale: Array | None = None,
    *,
    rows: int,
    together: int,
    tile: int,
    heads: int,
    scale: float,
    vmem_bytes: int,
    tuning: TpuAttentionTuning,
    interpret: Any,
) -> tuple[Array, Array]:
    """Attention of query blocks of `rows` rows over their lists of key tiles, `together` of them in a program.

    Args:
      q: [B*H, Nq, D]; rows of the last block past its end are never written.
      kv: K, of q's dtype, and V, [B*H, Nk, D] each, Nk a multiple of `tile`, to lie in VMEM, a head at a time; or what
        `packed` makes of them, of one dtype, to be gathered from HBM.
      table: int32 [B*H or B, programs or 1, L], of `lists.tables`.
      bias: float32 [B, Nk / tile + 1, max(tile, 128)] added to the scores of a tile; the last row masks all. With a
        bias of their own for smaller query blocks, an equal number in `rows` rows, one of which is a program, and a
        tile of 128 or more keys: [B*H, query blocks, Nk / tile + 1, tile].
      shift: float32 [B*H, Nq], natural log, in place of each row's maximum.
      row_scale: float32 [B*H, Nq], times the scores besides `scale`.
      rows: of a query block.
      together: query blocks of a program.
      tile: keys of a tile.
      heads: H.
      scale: of the scores, for exp.
      vmem_bytes: limit for the compiler.
      tuning: groups.
      interpret: passed to pallas_call.

    Returns:
      out [B*H, Nq, D] in V's dtype and lse float32 [B*H, Nq], NaN for a row too far from its shift, whose out is wrong.
    """
    (heads_all, queries, dim), resident, all_rows = q.shape, len(kv) == 2, rows * together
    programs = block_count(queries, all_rows)
    shared = table.shape[0] != heads_all or table.shape[1] != programs
    lists = (lambda h, i: (lax.div(h, np.int32(heads)), 0, 0, 0)) if shared else (lambda h, i: (h, i, 0, 0))
    once: Callable[[], dict[str, Any]] = lambda: {"pipeline_mode": pl.Buffered(buffer_count=1)}
    column = lambda width: pltpu.VMEM((all_rows, width), jnp.float32)
    state = [column(1), column(max(tile, _LANES)), column(dim)] + [column(1)] * (row_scale is not None)
    scores = [pltpu.VMEM((rows, tuning.group * tile), jnp.float32)] * 2
    work: Callable[..., None]
    if resident:
        of_head = [pl.BlockSpec((None, kv[0].shape[1], dim), lambda h, i: (h, 0, 0), **once())] * 2
        itemsizes, copies = (kv[0].dtype.itemsize, kv[1].dtype.itemsize), []
        used = resident_bytes(kv[0].shape[1], rows, together, dim, itemsizes, tile, tuning)
        # To seek maxima takes more registers.
        most = tuning.unroll if shift is not None else 4 if used + _SEEKING_BYTES <= vmem_bytes else 2
        work = functools.partial(_resident, turn=tuning.unroll, unroll=min(most, tuning.unroll))
    else:
        of_head, work = [pl.BlockSpec(memory_space=pl.ANY)], _gathered
        copies = [pltpu.VMEM((2, 2, 2 * tuning.group * tile, dim), q.dtype), pltpu.SemaphoreType.DMA((2,))]
    if bias.ndim == 3:
        of_batch = lambda h, i: (lax.div(h, np.int32(heads)), 0, 0)
        of_bias = pl.BlockSpec((None, *bias.shape[1:]), of_batch, **once())
    else:
        of_bias = pl.BlockSpec((None, bias.shape[1] // programs, *bias.shape[2:]), lambda h, i: (h, i, 0, 0))
    of_rows = pl.BlockSpec((None, all_rows, dim), lambda h, i: (h, i, 0))
    of_blocks = pl.BlockSpec((None, None, together, rows), lambda h, i: (h, i, 0, 0))
    cut = lambda x: jnp.pad(x, ((0, 0), (0, programs * all_rows - queries))).reshape(-1, programs, together, rows)
    by_row = {} if shift is None else {"shift": cut(shift * jnp.float32(LOG2E))}
    by_row |= {} if row_scale is None else {"row_scale": cut(row_scale)}
    of_table = pl.BlockSpec((None, None, 1, table.shape[2]), lists, memory_space=pltpu.SMEM)
    operands = table[:, :, None], q, kv, bias, by_row
    out, lse = pl.pallas_call(
        functools.partial(_kernel, work=work, rows=rows, tile=tile, tuning=tuning, scale=scale * LOG2E),
        grid=(heads_all, programs),
        in_specs=[of_table, of_rows, tuple(of_head), of_bias, dict.fromkeys(by_row, of_blocks)],
        out_specs=[of_rows, of_blocks],
        out_shape=[
            varying.result(q.shape, kv[-1].dtype, *jax.tree.leaves(operands)),
            varying.result((heads_all, programs, together, rows), jnp.float32, *jax.tree.leaves(operands)),
        ],
        scratch_shapes=[tuple(state), tuple(scores), tuple(copies)],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_bytes,
            dimension_semantics=("parallel", "arbitrary"),
            # Lists hold tiles of the array only, see `lists.tables`.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name=f"adaspa_{'attention' if shift is None else 'shifted'}_{'resident' if resident else 'gathered'}",
    )(*operands)
    return out, lse.reshape(heads_all, -1)[:, :queries]
