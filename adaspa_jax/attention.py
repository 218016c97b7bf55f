"""adaspa_attention: one attention call of a video DiT, and the one switch over step kinds."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.schedule import StepKind
from adaspa_jax.search import select_blocks
from adaspa_jax.state import SparseState
from pallas_kernels import Implementation, block_mass, block_sparse_attention, flash_attention


class _Call(NamedTuple):
    """The operands of one call: q, k, v [B, H, L, D], valid counts [B, nk], the static rest."""

    q: Array
    k: Array
    v: Array
    block_valid: Array
    layout: TokenLayout
    config: SparseConfig
    implementation: Implementation | None

    def dense(self, q: Array) -> tuple[Array, Array]:
        """(out, LSE) of rows q over all keys."""
        return flash_attention(
            q, self.k, self.v, block_valid=self.block_valid, return_lse=True, implementation=self.implementation
        )

    def mass(self, lse: Array) -> tuple[Array, Array]:
        """(mass [B, H, nq, nk], row sums [B, H, video_length]) of the video rows under `lse` [B, H, L]."""
        video = self.layout.video_length
        return block_mass(
            self.q[:, :, :video],
            self.k,
            lse[:, :, :video],
            block_q=self.layout.block,
            block_k=self.layout.block,
            block_valid=self.block_valid,
            query_valid=self.block_valid[:, : self.layout.video_blocks],
            return_row_sum=True,
            implementation=self.implementation,
        )

    @property
    def searched(self) -> "_Call":
        """The part of the batch that searches: all of it, or its second half, the conditional branch."""
        if not self.config.share_cfg_indices:
            return self
        half = self.q.shape[0] // 2
        return self._replace(q=self.q[half:], k=self.k[half:], v=self.v[half:], block_valid=self.block_valid[half:])

    def sparse(self, state: SparseState) -> tuple[Array, Array]:
        """(out [B, H, L, D], LSE of the text rows): video rows over their blocks, text rows over everything."""
        video = self.layout.video_length
        everyone = (lambda x: jnp.concatenate([x, x])) if self.config.share_cfg_indices else (lambda x: x)
        out = block_sparse_attention(
            self.q[:, :, :video],
            self.k,
            self.v,
            everyone(state.indices),
            everyone(state.counts),
            block_q=self.layout.block,
            block_k=self.layout.block,
            block_valid=self.block_valid,
            implementation=self.implementation,
        )
        if not self.layout.text:
            return out, state.lse[:, :, :0]
        text, text_lse = self.dense(self.q[:, :, video:])
        return jnp.concatenate([out, text], axis=2), text_lse[-state.lse.shape[0] :]

    def search(self, mass: Array, lse: Array, drift: Array, state: SparseState) -> SparseState:
        """The state after a search that measured `mass`."""
        found = select_blocks(mass, self.layout, self.config)
        kept_mass = mass if state.mass.size else state.mass
        return SparseState(found.indices, found.counts, lse, found.recall, drift, kept_mass)

    def mean_over_rows(self, x: Array) -> Array:
        """[B, H] mean of x [B, H, video_length] over the valid video rows."""
        layout = self.layout
        rows = (np.arange(layout.block) < layout.video_valid[:, None]).reshape(1, 1, -1)
        return jnp.where(rows, x, 0.0).sum(-1) / layout.video_tokens


def _dense(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    return call.dense(call.q)[0], state


def _fused_search(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    out, lse = call.dense(call.q)
    searched, lse = call.searched, lse[-state.lse.shape[0] :]
    return out, searched.search(searched.mass(lse)[0], lse, jnp.zeros_like(state.drift), state)


def _cached_search(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    video, searched = call.layout.video_length, call.searched
    if call.config.lse_cache:
        mass, row_sum = searched.mass(state.lse)
        # A row without a valid key has LSE -inf and sum 0, and keeps both.
        change = jnp.where(row_sum > 0, jnp.log(jnp.where(row_sum > 0, row_sum, 1.0)), 0.0)
        lse = state.lse[:, :, :video] + change
    else:
        lse = searched.dense(searched.q[:, :, :video])[1]
        mass, _ = searched.mass(lse)
        change = jnp.where(jnp.isfinite(lse), lse - state.lse[:, :, :video], 0.0)
    found = call.search(mass, state.lse, call.mean_over_rows(jnp.abs(change)), state)
    out, text_lse = call.sparse(found)
    return out, found._replace(lse=jnp.concatenate([lse, text_lse], axis=2))


def _sparse(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    return call.sparse(state)[0], state


_BRANCHES: dict[StepKind, Callable[[_Call, SparseState], tuple[Array, SparseState]]] = {
    StepKind.DENSE: _dense,
    StepKind.FUSED_SEARCH: _fused_search,
    StepKind.CACHED_SEARCH: _cached_search,
    StepKind.SPARSE: _sparse,
}


def adaspa_attention(
    q: Array,
    k: Array,
    v: Array,
    state: SparseState | None,
    step_kind: StepKind | int | Array,
    *,
    layout: TokenLayout,
    config: SparseConfig,
    block_valid: Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, SparseState | None]:
    """Joint self-attention of one layer in one denoising step, dense or sparse by `step_kind`.

    Args:
      q: [B, L, H, D] in the layout's internal order [video | pad | text | pad], RoPE applied; L = layout.length.
      k: like q.
      v: like q.
      state: this layer's state, or None if every step is dense.
      step_kind: a StepKind; or a traced int32 scalar, then all four kinds are compiled and one runs.
      layout: the block partition.
      config: sparsity, tiers, cache; its block size must be the layout's.
      block_valid: int32 [B, layout.num_blocks] from `layout.block_valid`, may be traced; None: all text is real.
      implementation: which kernels run, see `pallas_kernels`.

    Returns:
      (out [B, L, H, D] in q's dtype, new state). Padding rows of out hold numbers that nobody should read.

    Raises:
      ValueError: shapes that do not fit each other, the layout or the state.
      NotImplementedError: the named implementation cannot serve the call.
    """
    _check_operands(q, k, v, layout, config)
    batch, _, heads, _ = q.shape
    valid = layout.block_valid(None, batch) if block_valid is None else block_valid
    if valid.shape != (batch, layout.num_blocks):
        raise ValueError(f"block_valid must be [B, blocks] = {[batch, layout.num_blocks]}; got {list(valid.shape)}")
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    call = _Call(heads_first[0], heads_first[1], heads_first[2], valid, layout, config, implementation)
    if state is None:
        if not isinstance(step_kind, int) or step_kind != StepKind.DENSE:
            raise ValueError(f"step_kind={step_kind!r} needs a state; without one every step is StepKind.DENSE")
        return call.dense(call.q)[0].swapaxes(1, 2), None
    state.check(layout, config, batch, heads)
    if isinstance(step_kind, int):
        out, state = _BRANCHES[StepKind(step_kind)](call, state)
    else:
        branches = [lambda state, run=run: run(call, state) for run in _BRANCHES.values()]
        out, state = lax.switch(step_kind, branches, state)
    return out.swapaxes(1, 2), state


def _check_operands(q: Array, k: Array, v: Array, layout: TokenLayout, config: SparseConfig) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or q.shape[1] != layout.length:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"q, k and v must be [B, L, H, D] with L = {layout.length} for this layout; got {shapes}")
    if config.block_size != layout.block:
        raise ValueError(f"block_size={config.block_size} of the config is not the layout's {layout.block}")
