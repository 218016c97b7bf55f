"""TokenLayout: how video and text tokens are ordered and cut into blocks.

Every model uses one internal order, [video | pad | text | pad], both parts padded to whole blocks. The video part is
in raster order, as in the paper, or in 3D cubes of one block each: neighbours in space and time share a block, so the
attention mass sits in fewer blocks. What a grid leaves past its whole cubes is tiled with flatter ones and comes last,
so that the last block alone has padding. Blocks of queries may be larger than those of keys: they are the cubes then,
cut into smaller ones. Attention does not care about order once RoPE is applied, so a model packs its tokens and RoPE
tables once and unpacks its output.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

TokenOrder = Literal["raster", "cube"]


def best_cube(grid: tuple[int, ...], block: int) -> tuple[int, int, int] | None:
    """The most compact cube of `block` tokens in `grid`, sides powers of two, that leaves least; None: none fits."""
    sides = [2**i for i in range(block.bit_length())]
    cubes = [c for c in itertools.product(sides, repeat=3) if math.prod(c) == block]
    fits = [c for c in cubes if all(s <= n for s, n in zip(c, grid, strict=True))]
    whole = lambda c: math.prod(n // s for s, n in zip(c, grid, strict=True))
    return min(fits, key=lambda c: (sum(c), -whole(c), c), default=None)


def _tiles(cells: np.ndarray, block: int) -> list[np.ndarray]:
    """`cells` [F, R, C] as cubes [N, t, h, w]: of `block` tokens as long as one fits, then of half as many."""
    if not cells.size:
        return []
    cube = best_cube(cells.shape, block)
    if cube is None:
        return _tiles(cells, block // 2)
    (t, h, w), (a, b, c) = cube, (n // s for n, s in zip(cells.shape, cube, strict=True))
    f, r, k = a * t, b * h, c * w
    cubes = cells[:f, :r, :k].reshape(a, t, b, h, c, w).transpose(0, 2, 4, 1, 3, 5).reshape(-1, t, h, w)
    slabs = cells[f:], cells[:f, r:], cells[:f, :r, k:]
    return [cubes, *itertools.chain.from_iterable(_tiles(slab, block) for slab in slabs)]


def _cut(cubes: np.ndarray, parts: int) -> np.ndarray:
    """Cubes [N, t, h, w] as [N, t * h * w], `parts` equal cubes one after the other, by halves of the longest side."""
    if parts == 1:
        return cubes.reshape(len(cubes), -1)
    axis = 1 + int(np.argmax(cubes.shape[1:]))
    return np.concatenate([_cut(half, parts // 2) for half in np.split(cubes, 2, axis)], axis=1)


@dataclass(frozen=True)
class TokenLayout:
    """Block partition of a sequence; static and hashable. Make it with `create`."""

    grid: tuple[int, int, int]
    """Video tokens by frame, row and column (after patching)."""
    text: int
    """Text tokens, 0 for none."""
    block: int
    """Tokens of a block, a power of two."""
    order: TokenOrder
    """Of the video tokens."""
    query_block: int
    """Video tokens whose rows share a list of blocks, one block or a power of two of them."""

    @classmethod
    def create(
        cls,
        grid: tuple[int, int, int],
        text: int = 0,
        block_size: int = 64,
        order: TokenOrder = "raster",
        query_block_size: int | None = None,
    ) -> "TokenLayout":
        """Checks its arguments (ValueError)."""
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"{grid=} must be three positive numbers of tokens: frames, rows, columns")
        if text < 0:
            raise ValueError(f"{text=} must not be negative")
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(f"{block_size=} must be a power of two")
        query_block = block_size if query_block_size is None else query_block_size
        if query_block < block_size or query_block & (query_block - 1):
            raise ValueError(f"{query_block_size=} must be a power of two and at least {block_size=}")
        if order not in get_args(TokenOrder):
            raise ValueError(f"{order=} must be one of {', '.join(get_args(TokenOrder))}")
        return cls((grid[0], grid[1], grid[2]), text, block_size, order, query_block)

    @property
    def video_tokens(self) -> int:
        """Video tokens without padding."""
        return math.prod(self.grid)

    @property
    def query_blocks(self) -> int:
        """Blocks of the video's queries."""
        return -(-self.video_tokens // self.query_block)

    @property
    def video_blocks(self) -> int:
        """Blocks of the video part, as keys."""
        return self.query_blocks * (self.query_block // self.block)

    @property
    def text_blocks(self) -> int:
        """Blocks of the text part; they come last."""
        return -(-self.text // self.block)

    @property
    def num_blocks(self) -> int:
        """All blocks of the sequence."""
        return self.video_blocks + self.text_blocks

    @property
    def video_length(self) -> int:
        """Length of the video part with padding."""
        return self.query_blocks * self.query_block

    @property
    def text_length(self) -> int:
        """Length of the text part with padding."""
        return self.text_blocks * self.block

    @property
    def length(self) -> int:
        """Length of the whole internal sequence."""
        return self.video_length + self.text_length

    @cached_property
    def video_valid(self) -> np.ndarray:
        """int32 [video_blocks]: tokens of each video block; they come first in their block."""
        starts = np.arange(0, self.query_block, self.block, dtype=np.int32)
        return np.clip(self._order[1][:, None] - starts, 0, self.block).reshape(-1)

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """(raster token at each packed place [video_length], tokens per block of queries, where they come first).

        Padding repeats the first of the block of queries.
        """
        tokens = np.arange(self.video_tokens, dtype=np.int32)
        if self.order == "cube":
            tiles, parts = _tiles(tokens.reshape(self.grid), self.query_block), self.query_block // self.block
            whole = [_cut(cubes, parts).reshape(-1) for cubes in tiles if cubes[0].size == self.query_block]
            tokens = np.concatenate(whole + [cubes.reshape(-1) for cubes in tiles if cubes[0].size < self.query_block])
        blocks = np.pad(tokens, (0, self.video_length - len(tokens)), constant_values=-1).reshape(-1, self.query_block)
        packed = np.where(blocks >= 0, blocks, blocks[:, :1])
        return packed.reshape(-1), (blocks >= 0).sum(1, dtype=np.int32)

    @cached_property
    def _inverse(self) -> np.ndarray:
        """int32 [video_tokens]: packed place of each raster token."""
        source, valid = self._order
        real = (np.arange(self.query_block) < valid[:, None]).reshape(-1)
        inverse = np.empty(self.video_tokens, np.int32)
        inverse[source[real]] = np.flatnonzero(real)
        return inverse

    @property
    def _is_identity(self) -> bool:
        return self.order == "raster" and self.video_length == self.video_tokens

    def pack_video(self, x: Array) -> Array:
        """[B, video_tokens, ...] in raster order to [B, video_length, ...]; padding repeats real tokens."""
        self._check("pack_video", x, self.video_tokens)
        return x if self._is_identity else jnp.take(x, self._order[0], axis=1)

    def unpack_video(self, x: Array) -> Array:
        """[B, video_length, ...] back to raster order, [B, video_tokens, ...]."""
        self._check("unpack_video", x, self.video_length)
        return x if self._is_identity else jnp.take(x, self._inverse, axis=1)

    def pack_text(self, x: Array) -> Array:
        """[B, text, ...] to [B, text_length, ...], padded with zeros."""
        self._check("pack_text", x, self.text)
        return jnp.pad(x, ((0, 0), (0, self.text_length - self.text)) + ((0, 0),) * (x.ndim - 2))

    def unpack_text(self, x: Array) -> Array:
        """[B, text_length, ...] to [B, text, ...]."""
        self._check("unpack_text", x, self.text_length)
        return x[:, : self.text]

    def block_valid(self, text_valid: Array | None = None, batch: int = 1) -> Array:
        """int32 [B, num_blocks]: valid tokens of each block.

        `text_valid`, int32 [B], may be traced: the first so many text tokens are real; None: all `text` of them.
        """
        if text_valid is not None and text_valid.shape != (batch,):
            raise ValueError(f"text_valid must be [B] = [{batch}]; got {list(text_valid.shape)}")
        count = jnp.full(batch, self.text, jnp.int32) if text_valid is None else text_valid.astype(jnp.int32)
        starts = self.block * np.arange(self.text_blocks, dtype=np.int32)[None]
        text = jnp.clip(jnp.clip(count, 0, self.text)[:, None] - starts, 0, self.block)
        return jnp.concatenate([jnp.broadcast_to(self.video_valid, (batch, self.video_blocks)), text], axis=1)

    def _check(self, name: str, x: Array, length: int) -> None:
        if x.ndim < 2 or x.shape[1] != length:
            raise ValueError(f"{name} of {self} takes [B, {length}, ...]; got {list(x.shape)}")
