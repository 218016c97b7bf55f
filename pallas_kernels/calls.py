"""What an implementation is asked for: the operands and sizes of one call of each kernel, checked by `api`."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import MASKED, block_count, expand_valid, unpack_bits

ScorePrecision = Literal["input", "int8", "fp8", "auto"]
"""What scores are multiplied in: the dtype of q and k, int8 or float8_e4m3fn, see `quantized`. "auto": see `dispatch`;
no implementation is asked for it."""
Kernel = Literal["flash_attention", "block_mass", "block_sparse_attention", "pooled_attention"]


@dataclass(frozen=True)
class Request:
    """What an implementation needs to know of a call to say whether it can serve it."""

    kernel: Kernel
    dtype: Any
    head_dim: int
    block_q: int | None = None
    block_k: int | None = None
    interpret: bool = False
    score_precision: ScorePrecision = "input"


@dataclass(frozen=True)
class DenseCall:
    """One call of `pallas_kernels.flash_attention`."""

    q: Array
    """[B, H, Nq, D]"""
    k: Array
    """[B, H, Nk, D]"""
    v: Array
    """[B, H, Nk, D]"""
    scale: float
    """Of the scores."""
    block_k: int
    """Keys of a block of `block_valid`; divides Nk."""
    block_valid: Array | None = None
    """integers [B, nk]: valid keys of each block, the first ones; None: all."""
    interpret: bool = False
    shift: Array | None = None
    """float32 [B, H, Nq], near each row's largest score, natural log; a hint that changes speed alone."""
    score_precision: ScorePrecision = "input"

    @property
    def request(self) -> Request:
        """What decides who can serve it."""
        how: dict[str, Any] = {"interpret": self.interpret, "score_precision": self.score_precision}
        return Request("flash_attention", self.q.dtype, self.q.shape[3], **how)


TAKES_MORE_ROWS = ("mosaic_gpu",)
"""Implementations whose kernels leave rows of q alone that have no list; for all others q is cut, which copies it."""


@dataclass(frozen=True)
class SparseCall:
    """One call of `pallas_kernels.block_sparse_attention`."""

    q: Array
    """[B, H, Nq, D]"""
    k: Array
    """[B, H, Nk, D]"""
    v: Array
    """[B, H, Nk, D]"""
    indices: Array
    """integers [B, H, nq, kmax]: key blocks of each query block."""
    counts: Array
    """integers [B, H, nq]: how many of them are in use."""
    scale: float
    """Of the scores."""
    block_q: int
    block_k: int
    block_valid: Array | None = None
    """integers [B, nk]: valid keys of each block, the first ones; None: all."""
    interpret: bool = False
    shift: Array | None = None
    """float32 [B, H, Nq], near each row's largest score, natural log; a hint that changes speed alone."""
    score_precision: ScorePrecision = "input"
    rows: int | None = None
    """Of q, the first ones, that attend; None: all. Only `TAKES_MORE_ROWS` are given q with more."""

    @property
    def request(self) -> Request:
        """What decides who can serve it."""
        dim, blocks = self.q.shape[3], (self.block_q, self.block_k)
        return Request("block_sparse_attention", self.q.dtype, dim, *blocks, self.interpret, self.score_precision)


@dataclass(frozen=True)
class MassCall:
    """One call of `pallas_kernels.block_mass`."""

    q: Array
    """[B, H, Nq, D]"""
    k: Array
    """[B, H, Nk, D]"""
    lse: Array
    """float32 [B, H, Nq]: row normalisers, natural log."""
    scale: float
    """Of the scores."""
    block_q: int
    block_k: int
    block_valid: Array | None = None
    """integers [B, nk]: valid keys of each block, the first ones; None: all."""
    query_valid: Array | None = None
    """integers [B, nq]: valid rows of each block, the first ones; None: all."""
    interpret: bool = False

    @property
    def request(self) -> Request:
        """What decides who can serve it."""
        return Request("block_mass", self.q.dtype, self.q.shape[3], self.block_q, self.block_k, self.interpret)

    @property
    def blocks(self) -> tuple[int, int]:
        """(nq, nk)."""
        return block_count(self.q.shape[2], self.block_q), block_count(self.k.shape[2], self.block_k)

    def shift(self, rows: int) -> Array:
        """float32 [B, H, rows]: the LSE, to subtract from scores; inf for a row without mass."""
        # A row of LSE -inf has no valid key: exp(s - inf) = 0. Nor have the rows of the padding.
        shift = jnp.where(jnp.isneginf(self.lse), jnp.inf, self.lse)
        return jnp.pad(shift, ((0, 0), (0, 0), (0, rows - shift.shape[2])), constant_values=jnp.inf)

    def weight(self, rows: int) -> Array:
        """float32 [B, rows]: 1 for the rows that count in the mass of their block."""
        length = self.q.shape[2]
        weight = expand_valid(self.query_valid, self.q.shape[0], self.block_q, length).astype(jnp.float32)
        return jnp.pad(weight, ((0, 0), (0, rows - length)))

    def of_blocks(self, mass: Array, split: int) -> Array:
        """float32 [B, H, nq, nk] of the mass of tiles [B * H, nq * split or more, nk * n]: those of a block add up."""
        (batch, heads), (nq, nk) = self.q.shape[:2], self.blocks
        tiles = mass.reshape(batch, heads, -1, split, nk, mass.shape[-1] // nk)
        return tiles.sum((3, 5))[:, :, :nq]


@dataclass(frozen=True)
class PooledCall:
    """One call of `pallas_kernels.pooled_attention`."""

    q: Array
    """[B, H, Nq, D]"""
    k: Array
    """[B, H, nk, D], one a block."""
    v: Array
    """[B, H, nk, D]"""
    bias: Array
    """float32 [B, H, nk], added to the scaled scores, natural log; -inf for a key that nobody sees."""
    kept: Array
    """uint32 [B, H, nq, ceil(nk / 32)]: bits of `pack_bits`, set for a key that the query block does not see."""
    scale: float
    """Of the scores."""
    block_q: int
    interpret: bool = False
    rows: int | None = None
    """As in SparseCall."""

    @property
    def request(self) -> Request:
        """What decides who can serve it."""
        return Request("pooled_attention", self.q.dtype, self.q.shape[3], self.block_q, interpret=self.interpret)

    @property
    def hidden(self) -> Array:
        """bool [B, H, nq, nk]: keys that a query block does not see."""
        return unpack_bits(self.kept, self.k.shape[2]) | jnp.isneginf(self.bias)[:, :, None]

    def pair_bias(self, rows: int, keys: int, unit: float) -> Array:
        """float32 [B, H, rows, keys]: `unit` times the bias of a key for a query block, MASKED where it sees none.

        `rows` and `keys` are nq and nk or, padded, more.
        """
        nq, nk = self.kept.shape[2], self.k.shape[2]
        bias = jnp.where(self.hidden, jnp.float32(MASKED), self.bias[:, :, None] * jnp.float32(unit))
        return jnp.pad(bias, ((0, 0), (0, 0), (0, rows - nq), (0, keys - nk)), constant_values=MASKED)
