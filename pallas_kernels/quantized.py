"""Scores in 8 bits: q by row and k by head, k less its mean over the tokens, which moves a row's scores together.

After SageAttention (Zhang et al., arXiv 2410.02367), whose scales of k are by block. Channels of k that are larger than
others hand half of that, as a logarithm, over to q, after SmoothQuant (Xiao et al., arXiv 2211.10438): on the models
here errors of scores in int8 are a quarter smaller, in fp8 the same, and bounds of scores, which kernels go by, hardly
larger. Probabilities and values stay.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import expand_valid
from pallas_kernels.calls import DenseCall, SparseCall

Call = TypeVar("Call", DenseCall, SparseCall)

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""What each `ScorePrecision` but "input" multiplies."""


LEAST = 1e-8
"""Of what q · k is multiplied by, natural log: what masks a key is added before that, and must stay below FLOOR after.
Smaller rows are rounded the more coarsely, by 1e-4 nats at most."""


class Quantized(NamedTuple):
    """Operands of scores row_scale * (q · k) + offset."""

    q: Array
    """int8 or float8_e4m3fn [B, H, Nq, D]"""
    k: Array
    """The same dtype [B, H, Nk, D]; 0 for a key that is not valid."""
    row_scale: Array
    """float32 [B, H, Nq]"""
    offset: Array
    """float32 [B, H, Nq], what the mean of k takes from the scaled scores, natural log."""


def _rounded(x: Array, largest: Array, dtype: Any, least: float | Array = 0.0) -> tuple[Array, Array]:
    """(x as `dtype`, its scale, `least` or more): the `largest` number, in absolute value, fills the range, or less."""
    whole = jnp.issubdtype(dtype, jnp.integer)
    scale = jnp.maximum(largest / float((jnp.iinfo if whole else jnp.finfo)(dtype).max), least)
    scale = jnp.where(scale > 0, scale, 1.0)
    return (jnp.round(x / scale) if whole else x / scale).astype(dtype), scale


def quantize(call: DenseCall | SparseCall) -> Quantized:
    """Of a call's q and k, in its score precision."""
    dtype = DTYPES[call.score_precision]
    keys = call.k.shape[2]
    valid = expand_valid(call.block_valid, call.k.shape[0], call.block_k, keys)[:, None, :, None]
    k, q = (x.astype(jnp.float32) for x in (call.k, call.q))
    mean = jnp.where(valid, k, 0.0).sum(2, keepdims=True) / jnp.maximum(valid.sum(2, keepdims=True), 1)
    offset = call.scale * (q * mean).sum(3)
    k = jnp.where(valid, k - mean, 0.0)
    root = jnp.sqrt(jnp.abs(k).max(2, keepdims=True))
    k, q = k / jnp.where(root > 0, root, 1.0), q * root
    rounded_k, scale_k = _rounded(k, root.max(3, keepdims=True), dtype)
    rounded_q, scale_q = _rounded(q, jnp.abs(q).max(3, keepdims=True), dtype, LEAST / call.scale / scale_k)
    return Quantized(rounded_q, rounded_k, (scale_q * scale_k)[..., 0], offset)


def in_precision(call: Call, run: Callable[[Call, Array | None], tuple[Array, Array]]) -> tuple[Array, Array]:
    """A call by a kernel `run` of q and k as they are, or quantised, with `row_scale`; k's mean is put back here."""
    if call.score_precision == "input":
        return run(call, None)
    z = quantize(call)
    rows = None if call.shift is None else call.shift.shape[2]
    shift = None if call.shift is None else call.shift - z.offset[:, :, :rows]
    out, lse = run(dataclasses.replace(call, q=z.q, k=z.k, shift=shift), z.row_scale)
    return out, lse + z.offset[:, :, : lse.shape[2]]


def emulated(call: Call, run: Callable[[Call], tuple[Array, Array]]) -> tuple[Array, Array]:
    """A call with scores in 8 bits by a kernel `run` that knows none, on their values in float32."""

    def plain(call: Call, row_scale: Array | None) -> tuple[Array, Array]:
        assert row_scale is not None
        q, k, v = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
        return run(dataclasses.replace(call, q=q * row_scale[..., None], k=k, v=v, score_precision="input"))

    out, lse = in_precision(call, plain)
    return out.astype(call.v.dtype), lse
