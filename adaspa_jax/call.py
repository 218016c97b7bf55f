"""What the steps of an attention call are made of, on a device: dense and sparse attention, mass, lists, stand-ins."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adaspa_jax.compensation import Pooled, StandIns, calibrate, pool, strength, towards
from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.search import Selection, select_blocks
from adaspa_jax.sharding import ALONE, Spread
from adaspa_jax.state import SparseState, index_dtype
from pallas_kernels import (
    Implementation,
    block_mass,
    block_sparse_attention,
    flash_attention,
    merge_attention,
    pooled_attention,
    resolve_implementation,
)

T = TypeVar("T")
_ON_GPUS = ("mosaic_gpu", "triton", "jax_triton")
_PROGRAMS, _TEXT_PARTS = 400, 32
"""Programs that keep a GPU busy; most parts that the keys of text rows are cut into for it."""


class Call(NamedTuple):
    """The operands of one call on one device, and the static rest."""

    q: Array
    """[B, H, rows + Nt, D]: this device's video rows, then text."""
    k: Array
    """[B, H, L, D]"""
    v: Array
    """[B, H, L, D]"""
    rows: int
    block_valid: Array
    """int32 [B, nk]"""
    query_valid: Array
    """int32 [B, blocks of rows]"""
    layout: TokenLayout
    config: SparseConfig
    implementation: Implementation | None
    spread: Spread = ALONE

    def dense(self, q: Array) -> tuple[Array, Array]:
        """(out, LSE) of rows q over all keys."""
        return flash_attention(
            q, self.k, self.v, block_valid=self.block_valid, return_lse=True, implementation=self.implementation
        )

    @property
    def text_parts(self) -> int:
        """Into how many parts a GPU cuts the keys of text rows, which are few; 0: none, dense attention serves."""
        dim, block = self.q.shape[3], self.layout.block
        name = resolve_implementation(self.implementation, dtype=self.q.dtype, head_dim=dim, block_size=block)
        if name not in _ON_GPUS:
            return 0
        programs = self.q.shape[0] * self.q.shape[1] * self.layout.text_blocks
        return min(-(-_PROGRAMS // programs), _TEXT_PARTS, self.layout.num_blocks)

    def text(self, parts: int | None = None) -> Array:
        """[B, H, Nt, D] of the text rows over all keys, in `parts` parts side by side, merged by LSE."""
        q = self.q[:, :, self.rows :]
        parts = self.text_parts if parts is None else parts
        if not q.shape[2] or not parts:
            return self.dense(q)[0] if q.shape[2] else q
        (batch, heads, rows, dim), block = q.shape, self.layout.block
        blocks = self.layout.num_blocks
        starts = np.arange(parts + 1) * blocks // parts
        counts = np.repeat(np.diff(starts), rows // block).astype(np.int32)
        lists = np.repeat(starts[:-1], rows // block)[:, None] + np.arange(counts.max())
        every = lambda x: jnp.broadcast_to(x, (batch, heads, *x.shape))
        out, lse = block_sparse_attention(
            jnp.tile(q, (1, 1, parts, 1)),
            self.k,
            self.v,
            every(np.minimum(lists, blocks - 1).astype(index_dtype(self.layout))),
            every(counts),
            block_q=block,
            block_k=block,
            block_valid=self.block_valid,
            return_lse=True,
            implementation=self.implementation,
        )
        weights = jax.nn.softmax(lse.reshape(batch, heads, parts, rows, 1), axis=2)
        out = (out.reshape(batch, heads, parts, rows, dim).astype(jnp.float32) * weights).sum(2)
        return out.astype(q.dtype)

    def mass(self, lse: Array) -> tuple[Array, Array]:
        """(mass [B, H, nq, nk], row sums [B, H, rows]) of the video rows under `lse` [B, H, rows]."""
        return block_mass(
            self.q[:, :, : self.rows],
            self.k,
            lse,
            block_q=self.layout.query_block,
            block_k=self.layout.block,
            block_valid=self.block_valid,
            query_valid=self.query_valid,
            return_row_sum=True,
            implementation=self.implementation,
        )

    @property
    def searched(self) -> "Call":
        """The part of the batch that searches: all of it, or its second half, the conditional branch."""
        if not self.config.share_cfg_indices:
            return self
        half = self.q.shape[0] // 2
        arrays = {name: getattr(self, name)[half:] for name in ("q", "k", "v", "block_valid", "query_valid")}
        return self._replace(**arrays)

    def sparse(self, indices: Array, counts: Array, stand_ins: StandIns, lse: Array) -> Array:
        """[B, H, rows + Nt, D]: video rows over their blocks and stand-ins of the others, text rows over everything.

        `lse` [B, H, rows] of the last search, a number near each row's largest score.
        """
        if self.config.compensation == "none":
            return self.with_text(self.kept(indices, counts, lse))
        return self.with_text(towards(*self.both(indices, counts, stand_ins, lse), stand_ins.strength))

    def kept(self, indices: Array, counts: Array, lse: Array, return_lse: bool = False) -> Any:
        """The video rows over their blocks, with the LSE if asked for."""
        return block_sparse_attention(
            self.q,
            self.k,
            self.v,
            indices,
            counts,
            block_q=self.layout.query_block,
            block_k=self.layout.block,
            block_valid=self.block_valid,
            shift=lse,
            score_precision=self.config.score_precision,
            rows=self.rows,
            return_lse=return_lse,
            implementation=self.implementation,
        )

    def both(self, indices: Array, counts: Array, stand_ins: StandIns, lse: Array) -> tuple[Array, Array]:
        """Outputs of the video rows over their blocks alone, and with full stand-ins of the others."""
        kept = self.kept(indices, counts, lse, return_lse=True)
        return kept[0], merge_attention(kept, self.compensate(stand_ins))[0]

    def with_text(self, video: Array) -> Array:
        """The video rows' output and that of the text rows."""
        return jnp.concatenate([video, self.text()], axis=2) if self.layout.text else video

    def pooled(self) -> Pooled:
        """The key blocks of this step."""
        return pool(self.k, self.v, self.block_valid)

    def compensate(self, stand_ins: StandIns) -> tuple[Array, Array]:
        """(out, LSE) of the video rows over the stand-ins of the blocks that they dropped."""
        row, col, kept, _ = stand_ins
        blocks = self.pooled()
        out, lse = pooled_attention(
            self.q,
            blocks.k,
            blocks.v,
            blocks.log_count[:, None] + col,
            kept,
            block_q=self.layout.query_block,
            rows=self.rows,
            return_lse=True,
            implementation=self.implementation,
        )
        by_block = lse.reshape(*row.shape, self.layout.query_block) + row[..., None]
        return out, by_block.reshape(lse.shape)

    def calibrate(self, found: Selection, mass: Array, lse: Array, state: SparseState) -> tuple[StandIns, Array]:
        """(StandIns, share of the mass that they hold [B, H] by head) of what a search under `lse` found."""
        if self.config.compensation == "none":
            return stand_ins_of(state), state.stand_ins
        rows = self.q[:, :, : self.rows]
        made, share = calibrate(rows, self.pooled(), lse, mass, found.kept, self.query_valid, self.spread)
        return made, self.spread.by_head(share, state.places)

    def fitted(self, made: StandIns, exact: Array, kept: Array, both: Array, every: int = 1) -> StandIns:
        """`made` of the strength that brings its output nearest to `exact`, in every `every`-th row of a block.

        kept and both as `both` gives them, exact [B, H, rows / every, D].
        """
        some = lambda x: self.rows_of_blocks(x, every)
        place = np.arange(0, self.layout.query_block, every, dtype=np.int32)
        inside = (self.query_valid[..., None] > place[None, None]).reshape(len(exact), -1)
        return made._replace(strength=strength(exact, some(kept), some(both), inside, self.spread))

    def rows_of_blocks(self, x: Array, every: int) -> Array:
        """[B, H, rows / every, D]: every `every`-th row of each query block of x [B, H, rows, D]."""
        by_block = x.reshape(*x.shape[:2], -1, self.layout.query_block, x.shape[3])
        return by_block[:, :, :, ::every].reshape(*x.shape[:2], -1, x.shape[3])

    def select(self, mass: Array, state: SparseState) -> Selection:
        """Blocks for the heads in their old places."""
        return select_blocks(mass, self.layout, self.config, self.spread, state.places)

    def keep(
        self,
        found: Selection,
        mass: Array,
        lse: Array,
        drift: Array,
        calibrated: tuple[StandIns, Array],
        state: SparseState,
    ) -> SparseState:
        """The state after a search, heads dealt anew to the devices."""
        places, move = state.places, lambda x: x
        if self.spread.heads is not None and self.config.head_adaptive:
            places = self.spread.deal(found.budgets)
            move = lambda x: self.spread.move(x, state.places, places)
        kept_mass = mass if state.mass.size else state.mass
        lists = move(found.indices), move(found.counts), move(lse)
        stand_ins, share = calibrated
        if self.config.compensation == "pooled":
            stand_ins = StandIns(*map(move, stand_ins))
        return SparseState(*lists, found.recall, drift, kept_mass, *stand_ins, share, places)

    def drift(self, change: Array, state: SparseState) -> Array:
        """[B, H] by head, the mean of |change| [B, H, rows] over the valid video rows."""
        inside = np.arange(self.layout.query_block, dtype=np.int32)[None, None] < self.query_valid[..., None]
        total = jnp.where(inside.reshape(len(change), 1, -1), jnp.abs(change), 0.0).sum(-1)
        return self.spread.by_head(self.spread.sum_rows(total), state.places) / self.layout.video_tokens


def stand_ins_of(state: SparseState) -> StandIns:
    """As the last search calibrated them."""
    return StandIns(state.row_bias, state.col_bias, state.kept, state.strength)


def everyone(found: T, config: SparseConfig) -> T:
    """What was found for the conditional branch, any arrays [B, ...], for both; else as it is."""
    twice = lambda x: jnp.concatenate([x, x])
    return jax.tree.map(twice, found) if config.share_cfg_indices else found
