"""Pallas-Triton kernels for Ampere and later: dense with LSE, block mass, block-sparse with LSE.

One program serves one tile of query rows and loops over its key tiles, all of them or the selected ones. Scores are
kept in base 2: exp2(s * log2(e)) is one multiply-add and one instruction.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.blocks import block_count, expand_valid, key_bias, pad_tokens
from pallas_kernels.dispatch import Request, gpu_capability
from pallas_kernels.triton.padding import padded_dense, padded_sparse
from pallas_kernels.tuning import TritonTuning, triton_tuning

_LOG2E = math.log2(math.e)
# Floor of the running maximum: exp2(MASKED - m) is 0 for every m above it.
_FLOOR = -1e30


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if request.head_dim < 16 or request.head_dim > 128 or request.head_dim & (request.head_dim - 1):
        return f"head_dim={request.head_dim} must be a power of two from 16 to 128"
    if any(block is not None and block < 16 for block in (request.block_q, request.block_k)):
        return f"block_q={request.block_q}, block_k={request.block_k} must be at least 16"
    capability = gpu_capability()
    if capability is not None and not request.interpret and float(capability) < 8.0:
        return f"compute capability {capability} is below 8.0 (Ampere)"
    return None


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
    sparse, parts = "indices" in ref, block // tile
    steps = ref["counts"][0] * parts if sparse else ref["k"].shape[0] // tile

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
    start = jnp.zeros(q.shape, jnp.float32), jnp.full(rows, _FLOOR, jnp.float32), jnp.zeros(rows, jnp.float32)
    acc, m, total = lax.fori_loop(0, steps, step, start)
    safe = jnp.where(total > 0, total, 1.0)
    ref["out"][...] = (acc / safe[:, None]).astype(q.dtype)
    ref["lse"][...] = jnp.where(total > 0, (m + jnp.log2(safe)) / _LOG2E, -jnp.inf)


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

    ref["row_sum"][...] = lax.fori_loop(0, ref["mass"].shape[1], step, jnp.zeros(q.shape[0], jnp.float32))


def _call(
    kernel: Any,
    inputs: dict[str, tuple[Array, pl.BlockSpec]],
    outputs: dict[str, tuple[Any, pl.BlockSpec]],
    **options: Any,
) -> list[Array]:
    """A pallas_call whose kernel gets its refs by name."""
    tuning: TritonTuning = options.pop("tuning")
    grid, interpret, name = (options.pop(key) for key in ("grid", "interpret", "name"))
    return pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs), **options),
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name=name,
    )(*(x for x, _ in inputs.values()))


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
    """Dense attention, or with a table of (indices, counts) block-sparse; tokens padded to whole blocks."""
    batch, heads, rows, dim = q.shape
    tile_q, tile_k, keys = min(block_q, tuning.tile_q), min(block_k, tuning.tile_k), k.shape[2]
    flat = lambda x: x.reshape(batch * heads, *x.shape[2:])
    # Tiles of one head come one after the other, so that its keys stay in the L2 cache.
    row_spec = pl.BlockSpec((None, tile_q, dim), lambda i, h: (h, i, 0))
    key_spec = pl.BlockSpec((None, keys, dim), lambda i, h: (h, 0, 0))
    inputs = {"q": (flat(q), row_spec), "k": (flat(k), key_spec), "v": (flat(v), key_spec)}
    if bias is not None:
        inputs["bias"] = bias, pl.BlockSpec((None, keys), lambda i, h: (h // heads, 0))
    if table is not None:
        indices, counts = table
        split = block_q // tile_q
        inputs["indices"] = (
            flat(indices),
            pl.BlockSpec((None, None, indices.shape[3]), lambda i, h: (h, i // split, 0)),
        )
        inputs["counts"] = flat(counts), pl.BlockSpec((None, 1), lambda i, h: (h, i // split))
    out, lse = _call(
        _attention_kernel,
        inputs,
        {
            "out": (jax.ShapeDtypeStruct((batch * heads, rows, dim), q.dtype), row_spec),
            "lse": (
                jax.ShapeDtypeStruct((batch * heads, rows), jnp.float32),
                pl.BlockSpec((None, tile_q), lambda i, h: (h, i)),
            ),
        },
        grid=(rows // tile_q, batch * heads),
        scale=scale * _LOG2E,
        precision=_precision(q.dtype, interpret),
        tile=tile_k,
        block=block_k,
        blocks=keys // block_k,
        tuning=tuning,
        interpret=interpret,
        name="dense" if table is None else "block_sparse",
    )
    return out.reshape(q.shape), lse.reshape(batch, heads, rows)


flash_attention = functools.partial(padded_dense, _attention)
block_sparse_attention = functools.partial(padded_sparse, _attention)


def block_mass(
    q: Array,
    k: Array,
    lse: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None,
    query_valid: Array | None,
    scale: float,
    interpret: bool = False,
    tuning: TritonTuning | None = None,
) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    tuning = tuning or triton_tuning("block_mass", q.dtype, dim)
    tile_q, tile_k = tuning.tile_q, min(block_k, tuning.tile_k)
    nq, nk = block_count(rows, block_q), block_count(keys, block_k)
    # A tile holds whole blocks, or a block whole tiles.
    group = max(1, tile_q // block_q)
    weight = expand_valid(query_valid, batch, block_q, rows).astype(jnp.float32)
    bias = key_bias(block_valid, batch, block_k, keys, nk * block_k)
    step = max(block_q, tile_q)
    # A row of LSE -inf has no valid key: exp2(s - inf) = 0.
    shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2E)
    q, k, shift = pad_tokens(q, step), pad_tokens(k, block_k), pad_tokens(shift, step)
    padded, key_tiles = q.shape[2], nk * block_k // tile_k
    tiles, flat = padded // tile_q, lambda x: x.reshape(batch * heads, *x.shape[2:])
    row = pl.BlockSpec((None, tile_q), lambda i, h: (h, i))
    inputs = {
        "q": (flat(q), pl.BlockSpec((None, tile_q, dim), lambda i, h: (h, i, 0))),
        "k": (flat(k), pl.BlockSpec((None, nk * block_k, dim), lambda i, h: (h, 0, 0))),
        "shift": (flat(shift), row),
        "weight": (
            jnp.pad(weight, ((0, 0), (0, padded - rows))),
            pl.BlockSpec((None, tile_q), lambda i, h: (h // heads, i)),
        ),
    }
    if bias is not None:
        inputs["bias"] = bias, pl.BlockSpec((None, nk * block_k), lambda i, h: (h // heads, 0))
    shape = lambda *s: jax.ShapeDtypeStruct((batch * heads, *s), jnp.float32)
    mass, row_sum = _call(
        _mass_kernel,
        inputs,
        {
            "mass": (shape(tiles * group, key_tiles), pl.BlockSpec((None, group, key_tiles), lambda i, h: (h, i, 0))),
            "row_sum": (shape(padded), row),
        },
        grid=(tiles, batch * heads),
        scale=scale * _LOG2E,
        precision=_precision(q.dtype, interpret),
        tile=tile_k,
        group=group,
        tuning=tuning,
        interpret=interpret,
        name="block_mass",
    )
    # Tiles smaller than a block add up.
    mass = mass.reshape(batch, heads, -1, max(1, block_q // tile_q), nk, block_k // tile_k).sum((3, 5))
    return mass[:, :, :nq], row_sum.reshape(batch, heads, padded)[:, :, :rows]
