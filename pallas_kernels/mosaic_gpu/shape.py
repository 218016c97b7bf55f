"""What the Hopper kernels share: what they are specialised on, their lists of key tiles, registers, shared memory.

Every step reads one int32 of a list: `2 * tile + partial`. A partial tile adds a bias row to its scores, all other
tiles skip that at the price of a branch. A tile past the last is clamped for the load and has nothing but masked keys.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import LOG2E, bias_of, expand_valid, numbers

ROWS = 64
"""Of a warpgroup: the M of wgmma."""


@dataclass(frozen=True)
class Shape:
    """What a kernel is specialised on."""

    heads: int
    """Of one batch row; programs are numbered over batch and heads."""
    head_dim: int
    dtype: Any
    """Of v and out."""
    score_dtype: Any
    """Of q and k."""
    rows: int
    """Of a program: 128 (two consumer warpgroups) or 64."""
    tile: int
    """Keys of a step."""
    tiles: int
    """Key tiles of a head."""
    stages: int
    scale: float
    """Of the scores, in base 2."""
    masked: bool
    """Whether any tile may be partial."""
    split: int = 1
    """Programs that share one list."""
    bias_rows: int = 0
    """Query rows that share a row of the bias [B * H, query blocks, Nk]; 0: it is [B, Nk], for partial tiles alone."""
    sparse: bool = False
    """Lists are of a query block, counts vary; else one list a batch row serves all, and every tile is on it."""

    @classmethod
    def of(cls, q: Array, tile: int, tiles: int, scale: float, **options: Any) -> "Shape":
        """For padded q [B, H, N, D], key tiles and the natural scale of the scores; `options` are the other fields."""
        options = {"dtype": q.dtype, "score_dtype": q.dtype} | options
        return cls(q.shape[1], q.shape[3], tile=tile, tiles=tiles, scale=scale * LOG2E, **options)


def loop(begin: Any, end: Any, body: Any, start: Any) -> Any:
    """`lax.fori_loop` that counts in int32 whatever jax_enable_x64 says; the bounds may be Python numbers."""
    return lax.fori_loop(begin, end, lambda j, carry: body(jnp.asarray(j, jnp.int32), carry), start)


def row_vector(gpu: Any, value: float) -> Array:
    """float32 [64] full of `value`, one number a row of a warpgroup."""
    return gpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def over_columns(x: Array, columns: int) -> Array:
    """[64, columns] of one number a row."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def over_rows(x: Array, rows: int) -> Array:
    """[rows, columns] of one number a column."""
    return lax.broadcast_in_dim(x, (rows, *x.shape), [1])


class TileList:
    """The key tiles of one program, read from device memory an entry ahead of their use."""

    def __init__(self, gpu: Any, shape: Shape, entries: Any, counts: Any, head: Array, row: Array):
        self.gpu, self.shape, self.entries = gpu, shape, entries
        self.head, self.batch = head, lax.div(head, np.int32(shape.heads))
        self.key = (head, lax.div(row, np.int32(shape.split))) if shape.sparse else (self.batch,)
        self.length: Any = counts[self.key] if shape.sparse else shape.tiles

    def __getitem__(self, j: Any) -> Array:
        if not self.shape.sparse and not self.shape.masked:
            return 2 * j
        last = self.entries.shape[-1] - 1
        return self.entries[(*self.key, jnp.minimum(j, last))]

    def start(self, entry: Array) -> Array:
        """First key to load."""
        return jnp.minimum(lax.shift_right_logical(entry, np.int32(1)), self.shape.tiles - 1) * self.shape.tile

    def load(self, which: tuple[Any, Any, Any], slot: Any, entry: Array) -> None:
        """Starts to load a tile; `which`: keys or values, their buffers in shared memory, the barriers of those."""
        ref, smem, ready = which
        keys = pl.ds(self.start(entry), self.shape.tile)
        self.gpu.copy_gmem_to_smem(ref.at[self.head, keys], smem.at[slot], ready.at[slot])

    def _bias(self, bias: Any, row: tuple[Any, ...], entry: Array, part: int = 0, parts: int = 1) -> Array:
        size = self.shape.tile // parts
        first = lax.shift_right_logical(entry, np.int32(1)) * self.shape.tile + part * size
        return self.gpu.load(bias.at[(*row, pl.ds(first, size))], layout=plgpu.Layout.WGMMA.reduce(0))

    def pair_bias(self, bias: Any, first: Array, entry: Array, part: int = 0, parts: int = 1) -> Array:
        """That of a query block's own, for the rows from `first` on and one of the `parts` of a tile's keys."""
        row = self.head, lax.div(first, np.int32(self.shape.bias_rows))
        return over_rows(self._bias(bias, row, entry, part, parts), ROWS)

    def mask(self, s: Array, entry: Array, bias: Any) -> Array:
        """Adds the bias row if the tile is partial."""
        if bias is None:
            return s
        partial = lambda s: s + over_rows(self._bias(bias, (self.batch,), entry), s.shape[0])
        return lax.cond((entry & 1) == 1, partial, lambda s: s, s)


def slot_of(step: Any, stages: int) -> Array:
    """Which of the `stages` buffers a step uses."""
    return lax.rem(jnp.asarray(step, jnp.int32), np.int32(stages))


def tile_memory(shape: Shape, leading: tuple[int, ...], rows: int, dtype: Any = None) -> Any:
    """Shared memory for [*leading, rows, D], of `shape.dtype` or `dtype`, in the layout of TMA and wgmma."""
    dtype = dtype or shape.dtype
    swizzle = min(128, shape.head_dim * jnp.dtype(dtype).itemsize)
    transforms = (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((*leading, rows, shape.head_dim), dtype, transforms=transforms)


def tile_bias(
    block_valid: Array | None, batch: int, block: int, keys: int, padded: int, tile: int
) -> tuple[Array, Array]:
    """(bias float32 [B, keys of tiles + 1], partial bool [B, tiles + 1]); a tile past the last masks all."""
    valid = expand_valid(block_valid, batch, block, keys)
    valid = jnp.pad(valid, ((0, 0), (0, padded - keys + tile)))
    return bias_of(valid), ~valid.reshape(batch, -1, tile).all(-1)


def every_tile(
    block_valid: Array | None, batch: int, block: int, keys: int, padded: int, tile: int
) -> dict[str, Array]:
    """The list of all key tiles, one for each batch row, and the bias; neither if every key is valid."""
    if block_valid is None and keys == padded:
        return {}
    bias, partial = tile_bias(block_valid, batch, block, keys, padded, tile)
    return {"entries": 2 * numbers(partial.shape[1], 2) + partial, "bias": bias}
