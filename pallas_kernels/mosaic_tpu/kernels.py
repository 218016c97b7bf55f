"""TPU kernels (v5e, v5p, v6e) in Pallas Mosaic: what they serve, their lists of key tiles, and the choice of memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import attention as tpu_attention
from pallas_kernels.mosaic_tpu import mass as tpu_mass
from pallas_kernels.blocks import MASKED, block_count, expand_valid, lookup, pad_tokens, partial_first, valid_counts
from pallas_kernels.dispatch import Request
from pallas_kernels.tuning import TpuAttentionTuning, tpu_attention_tuning

_BLOCKS = (64, 128, 256)
GATHERED_ROWS = 512
"""Of a dense query block where K and V come from HBM: fewer would wait for them."""
_RESERVED_VMEM = 128 << 10
"""Of a core, in bytes: what the compiler keeps for itself."""


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if jnp.dtype(request.dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype={jnp.dtype(request.dtype)} must be bfloat16 or float32"
    if request.head_dim not in (64, 128):
        return f"head_dim={request.head_dim} must be 64 or 128"
    if any(block is not None and block not in _BLOCKS for block in (request.block_q, request.block_k)):
        return f"block_q={request.block_q}, block_k={request.block_k} must be 64, 128 or 256"
    if not request.interpret and jax.default_backend() not in ("tpu", "cpu"):
        return f"the default platform is {jax.default_backend()}, not tpu"
    return None


@dataclass(frozen=True)
class Chip:
    """What the kernels ask of a TPU."""

    generation: int
    vmem_bytes: int
    """Of a core that a kernel may use."""


def chip() -> Chip:
    """The chip compiled for; a v5e where there is none."""
    try:
        info = pltpu.get_tpu_info()
    except (ValueError, KeyError, NotImplementedError):
        return Chip(5, (128 << 20) - _RESERVED_VMEM)
    return Chip(info.generation, info.vmem_capacity_bytes - _RESERVED_VMEM)


def _lists(starts: Array, used: Array, whole: Array, tuning: TpuAttentionTuning, resident: bool) -> Array:
    """Lists int32 [..., L] for `tpu_attention.attention` from first keys [..., tiles]; unused tiles are dropped."""
    pair, turn = 2 * tuning.group, tuning.group * tuning.unroll
    place = 1 + jnp.arange(starts.shape[-1], dtype=jnp.int32)
    length = jnp.where(used, place, 0).max(-1, keepdims=True)
    partial = jnp.where(used & whole | (place > length), 0, place).max(-1, keepdims=True)
    turns = (length - partial) // turn if resident else jnp.zeros_like(length)
    head = length - turns * turn
    pairs = -(-head // pair)
    # What is dropped reads a tile of the list all the same: one that is not in use may hold NaN.
    dropped = tpu_attention.DROPPED + jnp.where(used, starts, 0).max(-1, keepdims=True)
    ends = ((0, 0),) * (starts.ndim - 1) + ((pair, tuning.slack),)
    entries = jnp.where(jnp.pad(used, ends), jnp.pad(starts, ends), dropped)
    return jnp.concatenate([pair + head - pairs * pair, pairs, turns, entries], -1, dtype=jnp.int32)


def _tile_bias(
    block_valid: Array | None, batch: int, block: int, keys: int, padded: int, tile: int
) -> tuple[Array, Array]:
    """(bias float32 [B, tiles + 1, max(tile, 128)], whole bool [B, tiles]).

    Tiles of 64 keys have theirs twice over; the last row masks all.
    """
    valid = jnp.pad(expand_valid(block_valid, batch, block, keys), ((0, 0), (0, padded - keys + tile)))
    valid = valid.reshape(batch, -1, tile)
    bias = jnp.where(valid, 0.0, MASKED)
    return (jnp.concatenate([bias, bias], -1) if tile == 64 else bias), valid[:, :-1].all(-1)


def _resident(k: Array, rows: int, tile: int, tuning: TpuAttentionTuning) -> bool:
    """Whether K and V of a head, [B, H, N, D] padded to tiles, stay in VMEM: where they fit the chip."""
    if tuning.resident is not None:
        return tuning.resident
    needed = tpu_attention.resident_bytes(k.shape[2], rows, k.shape[3], k.dtype.itemsize, tile, tuning)
    return needed <= chip().vmem_bytes


def _attention(
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    used: Array,
    whole: Array,
    bias: Array,
    *,
    rows: int,
    tile: int,
    scale: float,
    resident: bool,
    tuning: TpuAttentionTuning,
    interpret: bool,
) -> tuple[Array, Array]:
    """Runs the kernel on [B, H, N, D] arrays, K and V padded to tiles.

    `starts`, `used` and `whole`, [B, H or 1, Nq / rows or 1, tiles], say of each list which tiles it has.
    """
    batch, heads, queries = q.shape[:3]
    table = _lists(starts, used, whole, tuning, resident)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    out, lse = tpu_attention.attention(
        flat(q),
        flat(k),
        flat(v),
        flat(table),
        bias,
        rows=rows,
        tile=tile,
        heads=heads,
        scale=scale,
        resident=resident,
        vmem_bytes=chip().vmem_bytes,
        tuning=tuning,
        interpret=interpret,
    )
    return out.reshape(q.shape), lse.reshape(batch, heads, queries)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_valid: Array | None,
    block_k: int,
    scale: float,
    interpret: bool = False,
    tuning: TpuAttentionTuning | None = None,
) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    batch, keys, tile = q.shape[0], k.shape[2], 128
    tuning = tuning or tpu_attention_tuning(tile, block_count(keys, tile), q.dtype, chip().generation)
    k, v = pad_tokens(k, tile), pad_tokens(v, tile)
    resident = _resident(k, tile, tile, tuning)
    rows = tile if resident else GATHERED_ROWS
    bias, whole = _tile_bias(block_valid, batch, block_k, keys, k.shape[2], tile)
    tiles = k.shape[2] // tile
    indices = jnp.broadcast_to(jnp.arange(tiles, dtype=jnp.int32), (batch, tiles))
    order = partial_first(indices, jnp.full(batch, tiles), ~whole)[:, None, None]
    lists = (tile * order, jnp.full(order.shape, True), lookup(whole[:, None, None], order))
    sizes: dict[str, Any] = {"rows": rows, "tile": tile, "scale": scale, "resident": resident}
    return _attention(q, k, v, *lists, bias, **sizes, tuning=tuning, interpret=interpret)


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    counts: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None,
    scale: float,
    interpret: bool = False,
    tuning: TpuAttentionTuning | None = None,
) -> tuple[Array, Array]:
    """Attention over selected key blocks; see `pallas_kernels.block_sparse_attention`."""
    batch, keys = q.shape[0], k.shape[2]
    tuning = tuning or tpu_attention_tuning(block_k, indices.shape[-1], q.dtype, chip().generation)
    k, v = pad_tokens(k, block_k), pad_tokens(v, block_k)
    bias, whole = _tile_bias(block_valid, batch, block_k, keys, k.shape[2], block_k)
    indices, kmax = indices.astype(jnp.int32), indices.shape[-1]
    used = (indices >= 0) & (indices < k.shape[2] // block_k) & (jnp.arange(kmax) < counts[..., None])
    whole = lookup(whole[:, None, None], jnp.where(used, indices, 0))
    lists = (indices * block_k, used, whole)
    resident = _resident(k, block_q, block_k, tuning)
    sizes: dict[str, Any] = {"rows": block_q, "tile": block_k, "scale": scale, "resident": resident}
    return _attention(q, k, v, *lists, bias, **sizes, tuning=tuning, interpret=interpret)


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
    tuning: Any = None,
) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    (batch, heads, rows, _), keys = q.shape, k.shape[2]
    tile_q, tile_k = tpu_mass.mass_tile(block_q, block_k)
    weight = expand_valid(query_valid, batch, block_q, rows).astype(jnp.float32)
    # A row of LSE -inf has no valid key: exp2(s - inf) = 0. Nor have the rows of the padding.
    shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse * math.log2(math.e))
    extra = -rows % tile_q
    shift = jnp.pad(shift, ((0, 0), (0, 0), (0, extra)), constant_values=jnp.inf)
    q, k = pad_tokens(q, tile_q), pad_tokens(k, tile_k)
    nq, nk, flat = block_count(rows, block_q), block_count(keys, block_k), lambda x: x.reshape(-1, *x.shape[2:])
    valid = valid_counts(block_valid, batch, block_k, keys)
    mass, row_sum = tpu_mass.block_mass(
        flat(q),
        flat(k),
        flat(shift),
        jnp.pad(weight, ((0, 0), (0, extra))),
        jnp.pad(valid, ((0, 0), (0, k.shape[2] // block_k - nk))),
        block_q=block_q,
        block_k=block_k,
        heads=heads,
        scale=scale,
        vmem_bytes=chip().vmem_bytes,
        interpret=interpret,
    )
    mass = mass.reshape(batch, heads, *mass.shape[1:])[:, :, :nq, :nk]
    return mass, row_sum.reshape(batch, heads, -1)[:, :, :rows]
