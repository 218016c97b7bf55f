"""adaspa_attention: one attention call of a video DiT, and the one switch over step kinds, on one device or a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from adaspa_jax.call import Call, everyone, stand_ins_of
from adaspa_jax.compensation import SAMPLE, towards
from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.schedule import StepKind
from adaspa_jax.sharding import DATA, ROWS, AttentionSharding, Spread, inverse, take_heads
from adaspa_jax.state import SparseState
from pallas_kernels import Implementation

Parts = tuple[Array, Array]
"""Video [B, N, H, D] in the layout's order and text [B, Nt, H, D]; Nt = 0 where there is none."""


def _dense(call: Call, state: SparseState) -> tuple[Array, SparseState]:
    return call.dense(call.q)[0], state


def _fused_search(call: Call, state: SparseState) -> tuple[Array, SparseState]:
    out, lse = call.dense(call.q)
    searched, here = call.searched, -state.lse.shape[0]
    lse = lse[here:, :, : call.rows]
    mass = searched.mass(lse)[0]
    found = searched.select(mass, state)
    made, share = searched.calibrate(found, mass, lse, state)
    if call.config.compensation == "pooled":
        made = searched.fitted(made, out[here:, :, : call.rows], *searched.both(found.indices, found.counts, made, lse))
    return out, searched.keep(found, mass, lse, jnp.zeros_like(state.drift), (made, share), state)


def _cached_search(call: Call, state: SparseState) -> tuple[Array, SparseState]:
    searched, config = call.searched, call.config
    if config.lse_cache:
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
    made, share = searched.calibrate(found, mass, norm, state)
    lists = everyone((found.indices, found.counts, made, lse), config)
    if config.compensation == "pooled":
        kept, both = call.both(*lists)
        here = -len(lse)
        exact = searched.dense(searched.rows_of_blocks(searched.q[:, :, : call.rows], SAMPLE))[0]
        made = searched.fitted(made, exact, kept[here:], both[here:], SAMPLE)
        out = call.with_text(towards(kept, both, everyone(made.strength, config)))
    else:
        out = call.sparse(*lists)
    return out, searched.keep(found, mass, lse, searched.drift(change, state), (made, share), state)


def _sparse(call: Call, state: SparseState) -> tuple[Array, SparseState]:
    lists = state.indices, state.counts, stand_ins_of(state), state.lse
    return call.sparse(*everyone(lists, call.config)), state


_BRANCHES: dict[StepKind, Callable[[Call, SparseState], tuple[Array, SparseState]]] = {
    StepKind.DENSE: _dense,
    StepKind.FUSED_SEARCH: _fused_search,
    StepKind.CACHED_SEARCH: _cached_search,
    StepKind.SPARSE: _sparse,
}


def _run(call: Call, state: SparseState | None, step_kind: Any) -> tuple[Array, SparseState | None]:
    """([B, H, rows + Nt, D], new state): the switch over step kinds."""
    if state is None:
        return call.dense(call.q)[0], None
    if isinstance(step_kind, int):
        return _BRANCHES[StepKind(step_kind)](call, state)
    # A run with one search has no later one, which would be a third of what is compiled.
    kinds = [kind for kind in StepKind if kind != StepKind.CACHED_SEARCH or len(call.config.search) > 1]
    branches = [lambda state, run=_BRANCHES[kind]: run(call, state) for kind in kinds]
    where = [kinds.index(kind if kind in kinds else StepKind.FUSED_SEARCH) for kind in StepKind]
    return lax.switch(jnp.asarray(where, jnp.int32)[step_kind], branches, state)


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
      step_kind: a StepKind; or a traced int32 scalar, then all kinds that `config` has are compiled and one runs: with
        one of `search_steps`, or the default, CACHED_SEARCH is not among them, and runs as FUSED_SEARCH.
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
    out, state = _run(Call(q, k, v, *rows, layout, config, implementation), state, step_kind)
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
        call = Call(join(*q), keys, values, rows, valid, query_valid, layout, config, implementation, spread)
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
