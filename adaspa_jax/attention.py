"""adaspa_attention: one attention call of a video DiT, and the one switch over step kinds, on one device or a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adaspa_jax.compensation import Pooled, StandIns, calibrate, pool
from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.schedule import StepKind
from adaspa_jax.search import Selection, select_blocks
from adaspa_jax.sharding import ALONE, DATA, ROWS, AttentionSharding, Spread, inverse, take_heads
from adaspa_jax.state import SparseState
from pallas_kernels import (
    Implementation,
    block_mass,
    block_sparse_attention,
    flash_attention,
    merge_attention,
    pooled_attention,
)

Parts = tuple[Array, Array]
"""Video [B, N, H, D] in the layout's order and text [B, Nt, H, D]; Nt = 0 where there is none."""
_TEXT_KEYS = 8
"""At most so many parts of the keys of text rows, on a mesh: a few rows of a few heads would leave a chip idle."""


class _Call(NamedTuple):
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

    def text(self) -> Array:
        """[B, H, Nt, D] of the text rows over all keys, a part of the keys after the other merged by LSE."""
        q, blocks = self.q[:, :, self.rows :], self.layout.num_blocks
        parts = max(n for n in range(1, _TEXT_KEYS + 1) if blocks % n == 0) if self.spread.heads else 1
        if parts == 1 or not q.shape[2]:
            return self.dense(q)[0] if q.shape[2] else q
        batch, heads, count, dim = q.shape
        apart = lambda x: x.reshape(batch * heads * parts, 1, -1, dim)
        every = jnp.broadcast_to(q[:, :, None], (batch, heads, parts, count, dim))
        valid = jnp.broadcast_to(self.block_valid.reshape(batch, 1, parts, -1), (batch, heads, parts, blocks // parts))
        out, lse = flash_attention(
            apart(every),
            apart(self.k),
            apart(self.v),
            block_valid=valid.reshape(-1, blocks // parts),
            return_lse=True,
            implementation=self.implementation,
        )
        weights = jax.nn.softmax(lse.reshape(batch, heads, parts, count, 1), axis=2)
        out = (out.reshape(batch, heads, parts, count, dim).astype(jnp.float32) * weights).sum(2)
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
    def searched(self) -> "_Call":
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
        pooled = self.config.compensation == "pooled"
        found = block_sparse_attention(
            self.q[:, :, : self.rows],
            self.k,
            self.v,
            everyone(indices, self.config),
            everyone(counts, self.config),
            block_q=self.layout.query_block,
            block_k=self.layout.block,
            block_valid=self.block_valid,
            shift=everyone(lse, self.config),
            return_lse=pooled,
            implementation=self.implementation,
        )
        out = merge_attention(found, self.compensate(stand_ins))[0] if pooled else found
        return jnp.concatenate([out, self.text()], axis=2) if self.layout.text else out

    def pooled(self) -> Pooled:
        """The key blocks of this step."""
        return pool(self.k, self.v, self.block_valid)

    def compensate(self, stand_ins: StandIns) -> tuple[Array, Array]:
        """(out, LSE) of the video rows over the stand-ins of the blocks that they dropped."""
        row, col, kept = (everyone(x, self.config) for x in stand_ins)
        blocks = self.pooled()
        out, lse = pooled_attention(
            self.q[:, :, : self.rows],
            blocks.k,
            blocks.v,
            blocks.log_count[:, None] + col,
            kept,
            block_q=self.layout.query_block,
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
    return StandIns(state.row_bias, state.col_bias, state.kept)


def everyone(x: Array, config: SparseConfig) -> Array:
    """What was found for the conditional branch, for both; else x."""
    return jnp.concatenate([x, x]) if config.share_cfg_indices else x


def _dense(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    return call.dense(call.q)[0], state


def _fused_search(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    out, lse = call.dense(call.q)
    searched, lse = call.searched, lse[-state.lse.shape[0] :, :, : call.rows]
    mass = searched.mass(lse)[0]
    found = searched.select(mass, state)
    calibrated = searched.calibrate(found, mass, lse, state)
    return out, searched.keep(found, mass, lse, jnp.zeros_like(state.drift), calibrated, state)


def _cached_search(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    searched = call.searched
    if call.config.lse_cache:
        norm = state.lse
        mass, row_sum = searched.mass(norm)
        # A row without a valid key has LSE -inf and sum 0, and keeps both.
        change = jnp.where(row_sum > 0, jnp.log(jnp.where(row_sum > 0, row_sum, 1.0)), 0.0)
        lse = state.lse + change
    else:
        norm = lse = searched.dense(searched.q[:, :, : call.rows])[1]
        mass, _ = searched.mass(lse)
        change = jnp.where(jnp.isfinite(lse), lse - state.lse, 0.0)
    found = searched.select(mass, state)
    calibrated = searched.calibrate(found, mass, norm, state)
    out = call.sparse(found.indices, found.counts, calibrated[0], lse)
    return out, searched.keep(found, mass, lse, searched.drift(change, state), calibrated, state)


def _sparse(call: _Call, state: SparseState) -> tuple[Array, SparseState]:
    return call.sparse(state.indices, state.counts, stand_ins_of(state), state.lse), state


_BRANCHES: dict[StepKind, Callable[[_Call, SparseState], tuple[Array, SparseState]]] = {
    StepKind.DENSE: _dense,
    StepKind.FUSED_SEARCH: _fused_search,
    StepKind.CACHED_SEARCH: _cached_search,
    StepKind.SPARSE: _sparse,
}


def _run(call: _Call, state: SparseState | None, step_kind: Any) -> tuple[Array, SparseState | None]:
    """([B, H, rows + Nt, D], new state): the switch over step kinds."""
    if state is None:
        return call.dense(call.q)[0], None
    if isinstance(step_kind, int):
        return _BRANCHES[StepKind(step_kind)](call, state)
    branches = [lambda state, run=run: run(call, state) for run in _BRANCHES.values()]
    return lax.switch(step_kind, branches, state)


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
    sharding: AttentionSharding | None = None,
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
      sharding: how attention is spread over a mesh, inside `jax.jit`; the state must have been created with it. The
        result is that of one device. `attend` takes video and text apart, which saves cutting and joining here.

    Returns:
      (out [B, L, H, D] in q's dtype, new state). Padding rows of out hold numbers that nobody should read.

    Raises:
      ValueError: shapes that do not fit each other, the layout, the state or the mesh.
      NotImplementedError: the named implementation cannot serve the call.
    """
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or q.shape[1] != layout.length:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"q, k and v must be [B, L, H, D] with L = {layout.length} for this layout; got {shapes}")
    valid = _check(q, state, step_kind, layout, config, block_valid, sharding)
    if sharding is None:
        return _alone(q, k, v, state, step_kind, layout, config, valid, implementation)
    video = layout.video_length
    cut = lambda x: (sharding.pad(x[:, :video], layout), x[:, video:])
    options: dict[str, Any] = {"layout": layout, "config": config, "block_valid": valid}
    options |= {"implementation": implementation}
    (out, text), state = attend(cut(q), cut(k), cut(v), state, step_kind, sharding=sharding, **options)
    return jnp.concatenate([out[:, :video], text], axis=1), state


def attend(
    q: Parts,
    k: Parts,
    v: Parts,
    state: SparseState | None,
    step_kind: StepKind | int | Array,
    *,
    layout: TokenLayout,
    config: SparseConfig,
    block_valid: Array | None = None,
    implementation: Implementation | None = None,
    sharding: AttentionSharding | None = None,
) -> tuple[Parts, SparseState | None]:
    """`adaspa_attention` of video and text apart; on a mesh the video is padded, by `sharding.pad`.

    Raises as `adaspa_attention` does.
    """
    length = layout.video_length if sharding is None else sharding.video_length(layout)
    for name, (video, text) in {"q": q, "k": k, "v": v}.items():
        if (
            video.shape != q[0].shape
            or text.shape != q[1].shape
            or (video.shape[1], text.shape[1])
            != (
                length,
                layout.text_length,
            )
        ):
            raise ValueError(
                f"{name} must be video [B, {length}, H, D] and text [B, {layout.text_length}, H, D] for this layout, "
                f"like q; got {list(video.shape)} and {list(text.shape)}"
            )
    valid = _check(q[0], state, step_kind, layout, config, block_valid, sharding)
    if sharding is not None:
        return _on_mesh(q, k, v, state, step_kind, layout, config, valid, implementation, sharding)
    join = lambda parts: jnp.concatenate(parts, axis=1) if layout.text else parts[0]
    out, state = _alone(join(q), join(k), join(v), state, step_kind, layout, config, valid, implementation)
    return (out[:, :length], out[:, length:]), state


def _check(
    q: Array,
    state: SparseState | None,
    step_kind: Any,
    layout: TokenLayout,
    config: SparseConfig,
    block_valid: Array | None,
    sharding: AttentionSharding | None,
) -> Array:
    """`block_valid` filled in. ValueError for what does not fit."""
    batch, _, heads, _ = q.shape
    for name, own, given in (
        ("block_size", config.block_size, layout.block),
        ("query_block_size", config.query_block, layout.query_block),
    ):
        if own != given:
            raise ValueError(f"{name}={own} of the config is not the layout's {given}")
    valid = layout.block_valid(None, batch) if block_valid is None else block_valid
    if valid.shape != (batch, layout.num_blocks):
        raise ValueError(f"block_valid must be [B, blocks] = {[batch, layout.num_blocks]}; got {list(valid.shape)}")
    if sharding is not None:
        sharding.check(config, batch, heads)
    if state is not None:
        state.check(layout, config, batch, heads, sharding)
    elif not isinstance(step_kind, int) or step_kind != StepKind.DENSE:
        raise ValueError(f"step_kind={step_kind!r} needs a state; without one every step is StepKind.DENSE")
    return valid


def _query_valid(valid: Array, layout: TokenLayout) -> Array:
    """int32 [B, query_blocks]: valid rows of each, which come first in it, from those of the key blocks."""
    return valid[:, : layout.video_blocks].reshape(len(valid), layout.query_blocks, -1).sum(-1, dtype=jnp.int32)


def _alone(
    q: Array,
    k: Array,
    v: Array,
    state: SparseState | None,
    step_kind: Any,
    layout: TokenLayout,
    config: SparseConfig,
    valid: Array,
    implementation: Implementation | None,
) -> tuple[Array, SparseState | None]:
    """On one device, [B, L, H, D]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    rows = layout.video_length, valid, _query_valid(valid, layout)
    out, state = _run(_Call(q, k, v, *rows, layout, config, implementation), state, step_kind)
    return out.swapaxes(1, 2), state


def _on_mesh(
    q: Parts,
    k: Parts,
    v: Parts,
    state: SparseState | None,
    step_kind: Any,
    layout: TokenLayout,
    config: SparseConfig,
    valid: Array,
    implementation: Implementation | None,
    sharding: AttentionSharding,
) -> tuple[Parts, SparseState | None]:
    """One shard_map around the switch: heads by all-to-all, K and V gathered over rows."""
    spread, video_length, heads = sharding.spread, layout.video_length, q[0].shape[2]
    blocks = sharding.video_length(layout) // layout.query_block
    query_valid = jnp.pad(_query_valid(valid, layout), ((0, 0), (0, blocks - layout.query_blocks)))
    static = isinstance(step_kind, int)

    def local(q: Any, k: Any, v: Any, valid: Array, query_valid: Array, state: Any, kind: Any) -> Any:
        places = jnp.broadcast_to(jnp.arange(heads, dtype=jnp.int32), (len(valid), heads))
        if state is not None:
            places = everyone(state.places, config)
            here = {n: jnp.zeros((*state.counts.shape[:2], *x.shape[2:]), x.dtype) for n, x in empty.items()}
            state = state._replace(**here)
        q, k, v = (x if len(x) > 1 else (x[0], x[0][:, :0]) for x in (q, k, v))
        q, k, v = (_to_heads(x, places, spread) for x in (q, k, v))
        if spread.rows is not None:
            k, v = ((lax.all_gather(x, spread.rows, axis=1, tiled=True), text) for x, text in (k, v))
        rows = q[0].shape[1]
        join = lambda video, text: jnp.concatenate([video, text], axis=1).swapaxes(1, 2)
        keys, values = (join(video[:, :video_length], text) for video, text in (k, v))
        call = _Call(join(*q), keys, values, rows, valid, query_valid, layout, config, implementation, spread)
        out, state = _run(call, state, step_kind if static else kind)
        out = out.swapaxes(1, 2)
        parts = _from_heads((out[:, :rows], out[:, rows:]), places, spread)
        return parts[:kinds], None if state is None else state._replace(**nothing)

    # Nothing empty goes in or out: XLA of jax 0.11 crashes on an empty array beside others.
    kinds = 2 if layout.text else 1
    empty = {} if state is None else state.empty
    nothing: dict[str, Any] = dict.fromkeys(empty, ())
    text, parts = sharding.spec(DATA), (sharding.spec(DATA, "tokens"), sharding.spec(DATA))[:kinds]
    states = None if state is None else SparseState.specs(sharding, layers=False)._replace(**nothing)
    given = None if state is None else state._replace(**nothing)
    in_specs = (parts, parts, parts, text, sharding.spec(DATA, ROWS), states, sharding.spec())
    run = jax.shard_map(local, mesh=sharding.mesh, in_specs=in_specs, out_specs=(parts, states), check_vma=False)
    kind = jnp.int32(0) if static else step_kind
    out, new = run(q[:kinds], k[:kinds], v[:kinds], valid, query_valid, given, kind)
    video = sharding.video(out[0])
    text_out = sharding.text(out[1]) if layout.text else video[:, :0]
    return (video, text_out), None if state is None else new._replace(**empty)


def _to_heads(x: Parts, places: Array, spread: Spread) -> Parts:
    """This device's tokens of all heads to all tokens, of its rows, of its heads."""
    if spread.heads is None:
        return x
    video = lax.all_to_all(take_heads(x[0], places, 2), spread.heads, split_axis=2, concat_axis=1, tiled=True)
    return video, spread.mine(x[1].swapaxes(1, 2), places).swapaxes(1, 2)


def _from_heads(x: Parts, places: Array, spread: Spread) -> Parts:
    """The way back."""
    if spread.heads is None:
        return x
    video = lax.all_to_all(x[0], spread.heads, split_axis=1, concat_axis=2, tiled=True)
    text = spread.by_head(x[1].swapaxes(1, 2), places).swapaxes(1, 2)
    return take_heads(video, inverse(places), 2), text
