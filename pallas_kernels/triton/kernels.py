"""Pallas-Triton kernels for Ampere and later: dense, block mass, block-sparse, over pooled keys.

One program serves one tile of query rows and loops over its key tiles, all of them or the selected ones. Scores are
kept in base 2: exp2(s * log2(e)) is one multiply-add and one instruction.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import varying
from pallas_kernels.blocks import FLOOR, LOG2E, merge_heads
from pallas_kernels.calls import MassCall
from pallas_kernels.triton_calls import padded_dense, padded_mass, padded_pooled, padded_sparse
from pallas_kernels.tuning import TritonTuning, triton_tuning


def _precision(dtype: Any, interpret: bool) -> Any:
    """Products of float32 inputs in three TF32 parts: float32's accuracy at the speed of the tensor cores."""
    if jnp.dtype(dtype) != jnp.float32:
        return lax.Precision.DEFAULT
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def _dot(a: Array, b: Array, precision: Any) -> Array:
    return lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _attention_kernel(
    *refs: Any, names: tuple[str, ...], scale: float, precision: Any, tile: int, block: int, blocks: int
) -> None:
    """One query tile. Refs: q, out [R, D], k, v [N, D], lse [R]; bias [N], indices [kmax], counts [1] where named."""
    ref = dict(zip(names, refs, strict=True))
    q = ref["q"][...]
    sparse, parts = "indices" in ref, np.int32(block // tile)
    steps = ref["counts"][0] * parts if sparse else np.int32(ref["k"].shape[0] // tile)

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, m, total = carry
        start, inside = j * tile, None
        if sparse:
            chosen = ref["indices"][lax.div(j, parts)].astype(jnp.int32)
            inside = (chosen >= 0) & (chosen < blocks)
            start = jnp.where(inside, chosen, 0) * block + lax.rem(j, parts) * tile
        keys = pl.ds(start, tile)
        s = _dot(q, ref["k"][keys, :].T, precision) * scale
        if "bias" in ref:
            s = s + ref["bias"][keys][None, :]
        m_new = jnp.maximum(m, s.max(1))
        # A block out of range selects nothing, at no cost per score: exp2(s - inf) = 0.
        p = jnp.exp2(s - (m_new if inside is None else jnp.where(inside, m_new, jnp.inf))[:, None])
        shrink = jnp.exp2(m - m_new)
        acc = acc * shrink[:, None] + _dot(p.astype(q.dtype), ref["v"][keys, :], precision)
        return acc, m_new, total * shrink + p.sum(1)

    rows = q.shape[0]
    start = jnp.zeros(q.shape, jnp.float32), jnp.full(rows, FLOOR, jnp.float32), jnp.zeros(rows, jnp.float32)
    acc, m, total = lax.fori_loop(np.int32(0), steps, step, start)
    safe = jnp.where(total > 0, total, 1.0)
    ref["out"][...] = (acc / safe[:, None]).astype(q.dtype)
    ref["lse"][...] = jnp.where(total > 0, (m + jnp.log2(safe)) / LOG2E, -jnp.inf)


def _mass_kernel(*refs: Any, names: tuple[str, ...], scale: float, precision: Any, tile: int, group: int) -> None:
    """One query tile of `group` blocks. Refs: q [R, D], k [N, D], shift, weight, row_sum [R], mass [group, tiles]."""
    ref = dict(zip(names, refs, strict=True))
    q, weight, shift = ref["q"][...], ref["weight"][...], ref["shift"][...][:, None]

    def step(j: Array, row_sum: Array) -> Array:
        keys = pl.ds(j * tile, tile)
        s = _dot(q, ref["k"][keys, :].T, precision) * scale
        if "bias" in ref:
            s = s + ref["bias"][keys][None, :]
        seen = jnp.exp2(s - shift).sum(1)
        ref["mass"][:, j] = (seen * weight).reshape(group, -1).sum(1)
        return row_sum + seen

    none, tiles = jnp.zeros(q.shape[0], jnp.float32), np.int32(ref["mass"].shape[1])
    ref["row_sum"][...] = lax.fori_loop(np.int32(0), tiles, step, none)


def _call(
    kernel: Any,
    inputs: dict[str, tuple[Array, pl.BlockSpec]],
    outputs: dict[str, tuple[tuple[int, ...], Any, pl.BlockSpec]],
    **options: Any,
) -> list[Array]:
    """A pallas_call whose kernel gets its refs by name; `outputs` gives shape, dtype and block of each result."""
    tuning: TritonTuning = options.pop("tuning")
    grid, interpret, name = (options.pop(key) for key in ("grid", "interpret", "name"))
    operands = [x for x, _ in inputs.values()]
    return pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs), **options),
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for *_, spec in outputs.values()],
        out_shape=[varying.result(*of, *operands) for *of, _ in outputs.values()],
        compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name=name,
    )(*operands)


def _attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    table: tuple[Array, Array] | None,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    tuning: TritonTuning,
    interpret: bool,
) -> tuple[Array, Array]:
    """Dense attention, or with a table of (indices, counts) block-sparse; tokens padded to whole blocks.

    The bias is [B, Nk], or [B, H, query blocks, Nk].
    """
    batch, heads, rows, dim = q.shape
    tile_q, tile_k, keys = min(block_q, tuning.tile_q), min(block_k, tuning.tile_k), k.shape[2]
    # Tiles of one head come one after the other, so that its keys stay in the L2 cache.
    row_spec = pl.BlockSpec((None, tile_q, dim), lambda i, h: (h, i, 0))
    key_spec = pl.BlockSpec((None, keys, dim), lambda i, h: (h, 0, 0))
    inputs = {"q": (merge_heads(q), row_spec), "k": (merge_heads(k), key_spec), "v": (merge_heads(v), key_spec)}
    split = block_q // tile_q
    if bias is not None and bias.ndim == 2:
        inputs["bias"] = bias, pl.BlockSpec((None, keys), lambda i, h: (h // heads, 0))
    elif bias is not None:
        inputs["bias"] = merge_heads(bias), pl.BlockSpec((None, None, keys), lambda i, h: (h, i // split, 0))
    if table is not None:
        indices, counts = table
        inputs["indices"] = (
            merge_heads(indices),
            pl.BlockSpec((None, None, indices.shape[3]), lambda i, h: (h, i // split, 0)),
        )
        inputs["counts"] = merge_heads(counts), pl.BlockSpec((None, 1), lambda i, h: (h, i // split))
    out, lse = _call(
        _attention_kernel,
        inputs,
        {
            "out": ((batch * heads, rows, dim), q.dtype, row_spec),
            "lse": ((batch * heads, rows), jnp.float32, pl.BlockSpec((None, tile_q), lambda i, h: (h, i))),
        },
        grid=(rows // tile_q, batch * heads),
        scale=scale * LOG2E,
        precision=_precision(q.dtype, interpret),
        tile=tile_k,
        block=block_k,
        blocks=keys // block_k,
        tuning=tuning,
        interpret=interpret,
        name="dense" if table is None else "block_sparse",
    )
    return out.reshape(q.shape), lse.reshape(batch, heads, rows)


def _mass(
    q: Array,
    k: Array,
    shift: Array,
    weight: Array,
    bias: Array | None,
    *,
    tile_q: int,
    tile_k: int,
    block_q: int,
    scale: float,
    tuning: TritonTuning,
    interpret: bool,
) -> tuple[Array, Array]:
    """Mass of blocks, or of tiles smaller than a block, with each key tile; row sums."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    group, tiles, key_tiles = max(1, tile_q // block_q), rows // tile_q, keys // tile_k
    row = pl.BlockSpec((None, tile_q), lambda i, h: (h, i))
    inputs = {
        "q": (merge_heads(q), pl.BlockSpec((None, tile_q, dim), lambda i, h: (h, i, 0))),
        "k": (merge_heads(k), pl.BlockSpec((None, keys, dim), lambda i, h: (h, 0, 0))),
        "shift": (merge_heads(shift), row),
        "weight": (weight, pl.BlockSpec((None, tile_q), lambda i, h: (h // heads, i))),
    }
    if bias is not None:
        inputs["bias"] = bias, pl.BlockSpec((None, keys), lambda i, h: (h // heads, 0))
    block = pl.BlockSpec((None, group, key_tiles), lambda i, h: (h, i, 0))
    mass, row_sum = _call(
        _mass_kernel,
        inputs,
        {
            "mass": ((batch * heads, tiles * group, key_tiles), jnp.float32, block),
            "row_sum": ((batch * heads, rows), jnp.float32, row),
        },
        grid=(tiles, batch * heads),
        scale=scale * LOG2E,
        precision=_precision(q.dtype, interpret),
        tile=tile_k,
        group=group,
        tuning=tuning,
        interpret=interpret,
        name="block_mass",
    )
    return mass, row_sum.reshape(batch, heads, rows)


flash_attention = functools.partial(padded_dense, _attention)
block_sparse_attention = functools.partial(padded_sparse, _attention)
pooled_attention = functools.partial(padded_pooled, _attention)


def block_mass(call: MassCall, tuning: TritonTuning | None = None) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    tuning = tuning or triton_tuning("block_mass", call.q.dtype, call.q.shape[3])
    return padded_mass(_mass, call, tuning, tuning.tile_q)
