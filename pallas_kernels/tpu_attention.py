"""TPU attention over lists of key tiles, dense and block-sparse alike: dense is the list of all tiles.

K and V of a head stay in VMEM where they fit and are gathered tile by tile from HBM where they do not. A softmax step
takes a group of tiles, its scores are multiplied while the group before goes through its softmax, and the running
maximum, the row sums and the accumulator live in VMEM: a loop carry would be copied. A list has the whole tiles first,
so that only what is left over after the unrolled loop pays for a mask.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import MASKED
from pallas_kernels.tuning import TpuAttentionTuning

_LANES = 128
_LOG2E = 1.4426950408889634
# Floor of the running maximum: exp2(MASKED - m) is 0 for every m above it.
_FLOOR = -1e30
HEADER = 2
"""Entries of a list before its tiles: the number of whole tiles, and of all."""


def contract(a: Array, b: Array, axis: int, dtype: Any) -> Array:
    """float32 a · b over the last axis of `a` and `axis` of `b`; float32 inputs at full precision."""
    exact = jnp.dtype(dtype) == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


class _Softmax:
    """The online softmax of one query block, its state in VMEM."""

    def __init__(self, scratch: tuple[Any, ...], bias: Any, table: Any, tile: int, scale: float):
        self.m, self.total, self.acc = scratch
        self.bias, self.table, self.tile, self.scale = bias, table, tile, scale
        self.m[...] = jnp.full_like(self.m, _FLOOR)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def _mask(self, position: Any) -> Array:
        """Bias row of the tile at `position` of the list; past the end of the list nothing counts."""
        inside = position < self.table[0, 1]
        if self.bias is None:
            return jnp.where(inside, 0.0, MASKED)
        row = lax.div(self.table[0, HEADER + position], self.tile)
        return jnp.where(inside, self.bias[pl.ds(row, 1), :], MASKED)

    def _masked(self, s: Array, position: Any) -> Array:
        """Scores of `_LANES` or more keys whose first tile is at `position`, plus bias."""
        if s.shape[1] == self.tile:
            return s + self._mask(position)
        # Two tiles of 64: the bias rows hold theirs twice.
        first = lax.broadcasted_iota(jnp.int32, (1, s.shape[1]), 1) < self.tile
        return s + jnp.where(first, self._mask(position), self._mask(position + 1))

    def step(self, scores: Any, values: Array, position: Any, masked: bool) -> None:
        """Takes in the group of tiles at `position`: `scores` [rows, keys] in VMEM, `values` [keys, D]."""
        keys = scores.shape[1]
        width = max(self.tile, min(_LANES, keys))
        parts = range(keys // width)

        def part(i: int) -> Array:
            s = scores[:, i * width : (i + 1) * width]
            return self._masked(s, position + i * width // self.tile) if masked else s

        top = functools.reduce(jnp.maximum, (part(i) for i in parts))
        m = self.m[...]
        m_new = jnp.maximum(m, top.max(1, keepdims=True) * self.scale)
        self.m[...] = m_new
        shrink = jnp.exp2(m - m_new)
        p = [jnp.exp2(part(i) * self.scale - m_new) for i in parts]
        dtype = values.dtype
        product = contract(jnp.concatenate([x.astype(dtype) for x in p], 1), values, 0, dtype)
        self.total[...] = self.total[...] * shrink + functools.reduce(jnp.add, p)
        self.acc[...] = self.acc[...] * shrink + product

    def finish(self, out: Any, lse: Any) -> None:
        """Writes out [rows, D] and lse [1, rows]."""
        total = self.total[...].sum(1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = (self.acc[...] / safe).astype(out.dtype)
        column = jnp.where(total > 0, (self.m[...] + jnp.log2(safe)) * (1 / _LOG2E), -jnp.inf)
        lse[...] = jnp.broadcast_to(column, (column.shape[0], _LANES)).T[:1]


def _scratch(rows: int, dim: int, width: int) -> list[Any]:
    return [
        pltpu.VMEM((rows, 1), jnp.float32),
        pltpu.VMEM((rows, width), jnp.float32),
        pltpu.VMEM((rows, dim), jnp.float32),
    ]


def _resident_kernel(table: Any, q: Any, k: Any, v: Any, *rest: Any, tile: int, tuning: Any, scale: float) -> None:
    """One query block; K and V of the head in VMEM."""
    *bias, out, lse, m, total, acc, even, odd = rest
    softmax = _Softmax((m, total, acc), bias[0] if bias else None, table, tile, scale)
    group, unroll, buffers = tuning.group, tuning.unroll, (even, odd)
    step = group * unroll

    def gather(ref: Any, position: Any) -> Array:
        start = lambda i: pl.multiple_of(table[0, HEADER + position + i], tile)
        return jnp.concatenate([ref[pl.ds(start(i), tile), :] for i in range(group)], 0)

    def multiply(position: Any, scores: Any) -> None:
        scores[...] = contract(q[...], gather(k, position), 1, k.dtype)

    def whole(i: Array, carry: None) -> None:
        for j in range(unroll):
            position = i * step + j * group
            # The scores of the next group, while this one goes through its softmax.
            multiply(position + group, buffers[(j + 1) % 2])
            softmax.step(buffers[j % 2], gather(v, position), position, masked=False)

    def rest_of_list(i: Array, carry: None) -> None:
        position = whole_steps * step + i * group
        multiply(position, even)
        softmax.step(even, gather(v, position), position, masked=True)

    whole_steps = lax.div(table[0, 0], step)
    multiply(0, even)
    lax.fori_loop(0, whole_steps, whole, None)
    left = table[0, 1] - whole_steps * step
    lax.fori_loop(0, lax.div(left + group - 1, group), rest_of_list, None)
    softmax.finish(out, lse)


def _gathered_kernel(table: Any, q: Any, kv: Any, *rest: Any, tile: int, tuning: Any, scale: float) -> None:
    """One query block; its K and V tiles come from HBM [heads, tiles, 2, tile, D], two groups a step, a step ahead."""
    *bias, out, lse, m, total, acc, even, odd, ring, arrived = rest
    softmax = _Softmax((m, total, acc), bias[0] if bias else None, table, tile, scale)
    head, group = pl.program_id(0), tuning.group
    step = 2 * group
    steps = lax.div(table[0, 1] + step - 1, step)

    def start(i: Any, slot: Any) -> None:
        for j in range(step):
            # Past the end of the list this reads tile 0 once more: cheaper than a branch a tile.
            which = lax.div(table[0, HEADER + i * step + j], tile)
            target = ring.at[slot, :, pl.ds(j * tile, tile)]
            pltpu.make_async_copy(kv.at[head, which], target, arrived.at[slot]).start()

    def wait(slot: Any) -> None:
        pltpu.make_async_copy(ring.at[slot], ring.at[slot], arrived.at[slot]).wait()

    def take(i: Any, masked: bool) -> None:
        slot = lax.rem(i, 2)
        start(i + 1, 1 - slot)
        wait(slot)
        for j, scores in enumerate((even, odd)):
            keys = ring[slot, 0, pl.ds(j * group * tile, group * tile), :]
            scores[...] = contract(q[...], keys, 1, keys.dtype)
        for j, scores in enumerate((even, odd)):
            values = ring[slot, 1, pl.ds(j * group * tile, group * tile), :]
            softmax.step(scores, values, i * step + j * group, masked)

    whole_steps = lax.div(table[0, 0], step)
    start(0, 0)
    lax.fori_loop(0, whole_steps, lambda i, _: take(i, masked=False), None)
    lax.fori_loop(whole_steps, steps, lambda i, _: take(i, masked=True), None)
    wait(lax.rem(steps, 2))
    softmax.finish(out, lse)


def resident_bytes(keys: int, rows: int, dim: int, itemsize: int, tile: int, tuning: TpuAttentionTuning) -> int:
    """VMEM that the resident kernel needs, in bytes; rows of fewer than 128 lanes are padded to them."""
    lanes = max(dim, _LANES)
    heads = 2 * keys * lanes * itemsize
    bias = 4 * keys // tile * max(tile, _LANES)
    state = 4 * rows * (2 * tuning.group * tile + 2 * _LANES + lanes)
    return heads + bias + state + 4 * rows * lanes * itemsize + (3 << 20)


def attention(
    q: Array,
    k: Array,
    v: Array,
    table: Array,
    bias: Array | None,
    *,
    rows: int,
    tile: int,
    heads: int,
    scale: float,
    resident: bool,
    vmem_bytes: int,
    tuning: TpuAttentionTuning,
    interpret: Any,
) -> tuple[Array, Array]:
    """Attention of query blocks of `rows` rows over their lists of key tiles.

    Args:
      q: [B*H, Nq, D], Nq a multiple of `rows`.
      k: [B*H, Nk, D], Nk a multiple of `tile`.
      v: as k.
      table: int32 [B*H or B, Nq / rows or 1, L]: of a list the number of whole tiles, the number of all tiles, and the
        first key of each, whole ones first. At least two unrolled steps of readable entries follow the last.
      bias: float32 [B, Nk / tile, max(tile, 128)] added to the scores of a tile that is not whole, or None.
      rows: of a query block.
      tile: keys of a tile.
      heads: H.
      scale: of the scores, for exp.
      resident: keep K and V of a head in VMEM.
      vmem_bytes: limit for the compiler.
      tuning: groups.
      interpret: passed to pallas_call.

    Returns:
      out [B*H, Nq, D] in q's dtype and lse float32 [B*H, Nq].
    """
    (programs, queries, dim), keys = q.shape, k.shape[1]
    shared = table.shape[0] != programs or table.shape[1] != queries // rows
    lists = (lambda h, i: (lax.div(h, heads), 0, 0, 0)) if shared else (lambda h, i: (h, i, 0, 0))
    once: Callable[[], dict[str, Any]] = lambda: {"pipeline_mode": pl.Buffered(buffer_count=1)}
    width = max(tile, _LANES)
    operands: list[Array] = [table[:, :, None], q]
    specs = [
        pl.BlockSpec((None, None, 1, table.shape[2]), lists, memory_space=pltpu.SMEM),
        pl.BlockSpec((None, rows, dim), lambda h, i: (h, i, 0)),
    ]
    scratch = _scratch(rows, dim, width)
    scratch += [pltpu.VMEM((rows, tuning.group * tile), jnp.float32)] * 2
    if resident:
        operands += [k, v]
        specs += [pl.BlockSpec((None, keys, dim), lambda h, i: (h, 0, 0), **once())] * 2
    else:
        operands.append(jnp.stack([x.reshape(programs, -1, tile, dim) for x in (k, v)], 2))
        specs.append(pl.BlockSpec(memory_space=pl.ANY))
        scratch += [pltpu.VMEM((2, 2, 2 * tuning.group * tile, dim), k.dtype), pltpu.SemaphoreType.DMA((2,))]
    if bias is not None:
        operands.append(bias)
        specs.append(pl.BlockSpec((None, *bias.shape[1:]), lambda h, i: (lax.div(h, heads), 0, 0), **once()))
    kernel = _resident_kernel if resident else _gathered_kernel
    out, lse = pl.pallas_call(
        functools.partial(kernel, tile=tile, tuning=tuning, scale=scale * _LOG2E),
        grid=(programs, queries // rows),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, rows, dim), lambda h, i: (h, i, 0)),
            pl.BlockSpec((None, None, 1, rows), lambda h, i: (h, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((programs, queries // rows, 1, rows), jnp.float32),
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_bytes,
            dimension_semantics=("parallel", "arbitrary"),
            # Lists hold tiles of the array only, see `tpu._table`.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name=f"adaspa_attention_{'resident' if resident else 'gathered'}",
    )(*operands)
    return out, lse.reshape(programs, queries)
