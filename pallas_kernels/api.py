"""The four kernels: argument checks and dispatch by `implementation`.

Arrays are [B, H, N, D]: batch, heads, tokens, head dim. Softmax statistics and sums are float32 whatever the input
dtype, LSE is the natural logarithm. ValueError means the caller is wrong, NotImplementedError that the named
implementation cannot serve the call; nothing falls back in silence.
"""

import dataclasses
import math
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.blocks import block_count
from pallas_kernels.calls import TAKES_MORE_ROWS, DenseCall, MassCall, PooledCall, ScorePrecision, SparseCall
from pallas_kernels.dispatch import Implementation, check_precision, choose, choose_precision
from pallas_kernels.whole import check_whole

_Call = TypeVar("_Call", DenseCall, MassCall, PooledCall, SparseCall)
_LEAST_SCALE = 1e-6
"""Of scores, in absolute value; below it q is scaled."""
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _check_qk(q: Array, k: Array, v: Array | None = None) -> None:
    named = {"q": q, "k": k} | ({} if v is None else {"v": v})
    shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in named.items())
    if any(x.ndim != 4 for x in named.values()):
        raise ValueError(f"q, k and v must be [B, H, N, D]; got {shapes}")
    if q.dtype not in _DTYPES or any(x.dtype != q.dtype for x in named.values()):
        raise ValueError(f"q, k and v must share one dtype of float32, bfloat16, float16; got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or (v is not None and v.shape != k.shape):
        raise ValueError(f"q, k and v must agree in B, H and D, and k and v in N; got {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k and v must not be empty; got {shapes}")


def _check_block(**blocks: int) -> None:
    for name, block in blocks.items():
        if block < 1 or block & (block - 1):
            raise ValueError(f"{name}={block} must be a power of two")


def _check_integers(name: str, x: Array, shape: tuple[int, ...], meaning: str) -> None:
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers {meaning} = {list(shape)}; got {x.dtype}{list(x.shape)}")


def _check_shift(shift: Array | None, q: Array, rows: int) -> None:
    shape = (*q.shape[:2], rows)
    if shift is not None and (shift.shape != shape or shift.dtype != jnp.float32):
        raise ValueError(f"shift must be float32 [B, H, Nq] = {list(shape)}; got {shift.dtype}{list(shift.shape)}")


def _served(implementation: Implementation | None, call: _Call) -> tuple[ModuleType, _Call]:
    """The implementation that runs a call, and the call, refused where XLA would gather the operands of a kernel."""
    if call.request.score_precision == "auto":
        native: Any = {"score_precision": choose_precision(implementation, call.request)}
        call = dataclasses.replace(call, **native)
    name, module = choose(implementation, call.request)
    if name not in ("xla", "reference") and not call.interpret:
        call = dataclasses.replace(call, q=check_whole(call.q, f"{call.request.kernel} of {name}"))
    rows = getattr(call, "rows", None)
    if rows is not None and name not in TAKES_MORE_ROWS:
        cut: Any = {"q": call.q[:, :, :rows], "rows": None}
        call = dataclasses.replace(call, **cut)
    return module, call


def _rows(q: Array, rows: int | None) -> int:
    """How many rows of q attend. Raises ValueError for more than there are."""
    if rows is not None and not 0 < rows <= q.shape[2]:
        raise ValueError(f"{rows=} must be from 1 to Nq={q.shape[2]}")
    return q.shape[2] if rows is None else rows


def _positive(q: Array, scale: float | None) -> tuple[Array, float]:
    """(q, scale) of the same scores, the scale above 0, and not far: kernels add what masks a key before they scale."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"{scale=} must be finite")
    if abs(scale) < _LEAST_SCALE:
        return (q.astype(jnp.float32) * scale).astype(q.dtype), 1.0
    return (q, scale) if scale > 0 else (-q, -scale)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_valid: Array | None = None,
    scale: float | None = None,
    shift: Array | None = None,
    score_precision: ScorePrecision = "input",
    return_lse: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Any:
    """Dense, non-causal attention in memory linear in N.

    Args:
      q: [B, H, Nq, D], float32, bfloat16 or float16.
      k: [B, H, Nk, D], dtype of q.
      v: [B, H, Nk, D], dtype of q.
      block_valid: integers [B, nk], may be traced: of each of nk equal key blocks the first `block_valid` keys are
        attended to. nk must divide Nk. None: all keys.
      scale: factor on q·k; None: D**-0.5.
      shift: float32 [B, H, Nq], a number near each row's largest scaled score, such as its LSE of an earlier step. A
        hint: kernels that have a use for it are faster, and the result is right however far off it is, NaN too.
      score_precision: as in `block_sparse_attention`; a TPU has "input" alone.
      return_lse: also return the log-sum-exp of each row's scaled scores.
      implementation: see `pallas_kernels.resolve_implementation`.
      interpret: run a Pallas kernel in interpret mode; "xla" and "reference" need none and ignore it.

    Returns:
      out [B, H, Nq, D] in q's dtype, and with `return_lse` (out, lse), lse float32 [B, H, Nq].
      A row with no valid key gives out 0 and lse -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation cannot serve the call.
    """
    _check_qk(q, k, v)
    block_k = k.shape[2]
    if block_valid is not None:
        if block_valid.ndim != 2 or block_valid.shape[1] == 0 or k.shape[2] % block_valid.shape[1]:
            raise ValueError(
                f"block_valid must be [B, nk] with nk dividing Nk={k.shape[2]}; got {list(block_valid.shape)}"
            )
        _check_integers("block_valid", block_valid, (k.shape[0], block_valid.shape[1]), "[B, nk]")
        block_k //= block_valid.shape[1]
    _check_shift(shift, q, q.shape[2])
    check_precision(score_precision)
    q, scale = _positive(q, scale)
    call = DenseCall(q, k, v, scale, block_k, block_valid, interpret, shift, score_precision)
    module, call = _served(implementation, call)
    with jax.named_scope("flash_attention"):
        out, lse = module.flash_attention(call)
    return (out, lse) if return_lse else out


def block_mass(
    q: Array,
    k: Array,
    lse: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None = None,
    query_valid: Array | None = None,
    scale: float | None = None,
    return_row_sum: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Any:
    """Attention mass of every block pair, in one pass over Q and K (AdaSpa, block-mass search).

    mass[p, q] is the sum of exp(scale * q_i·k_j - lse_i) over the valid rows i of query block p and the valid keys j
    of key block q. With the exact LSE a block row sums to its number of valid rows.

    Args:
      q: [B, H, Nq, D], float32, bfloat16 or float16.
      k: [B, H, Nk, D], dtype of q.
      lse: float32 [B, H, Nq], row normalisers, of this or of an earlier step; a row of -inf has no mass.
      block_q: rows of a query block, a power of two; the last block may be partial.
      block_k: keys of a key block, a power of two; the last block may be partial.
      block_valid: integers [B, nk], may be traced: valid keys, the first ones of each block. None: all.
      query_valid: integers [B, nq], may be traced: valid rows, the first ones of each block. None: all.
      scale: factor on q·k; None: D**-0.5.
      return_row_sum: also return r_i = sum_j exp(scale * q_i·k_j - lse_i): lse + log r is the exact LSE of this step.
      implementation: see `pallas_kernels.resolve_implementation`.
      interpret: as in `flash_attention`.

    Returns:
      mass float32 [B, H, nq, nk], and with `return_row_sum` (mass, row_sum), row_sum float32 [B, H, Nq].

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation cannot serve the call.
    """
    _check_qk(q, k)
    _check_block(block_q=block_q, block_k=block_k)
    if lse.shape != q.shape[:3] or lse.dtype != jnp.float32:
        raise ValueError(f"lse must be float32 [B, H, Nq] = {list(q.shape[:3])}; got {lse.dtype}{list(lse.shape)}")
    for label, valid, x, block in (("block_valid", block_valid, k, block_k), ("query_valid", query_valid, q, block_q)):
        if valid is not None:
            _check_integers(label, valid, (x.shape[0], block_count(x.shape[2], block)), "[B, blocks]")
    q, scale = _positive(q, scale)
    call = MassCall(q, k, lse, scale, block_q, block_k, block_valid, query_valid, interpret)
    module, call = _served(implementation, call)
    with jax.named_scope("block_mass"):
        mass, row_sum = module.block_mass(call)
    return (mass, row_sum) if return_row_sum else mass


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    counts: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None = None,
    scale: float | None = None,
    shift: Array | None = None,
    score_precision: ScorePrecision = "input",
    rows: int | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Any:
    """Attention of each query block over its own list of key blocks; work proportional to `counts`.

    Args:
      q: [B, H, Nq, D], float32, bfloat16 or float16.
      k: [B, H, Nk, D], dtype of q.
      v: [B, H, Nk, D], dtype of q.
      indices: integers [B, H, nq, kmax]: key blocks of each query block, the first `counts` in use, without
        repetition. Entries past `counts` are ignored; used entries outside [0, nk) select nothing.
      counts: integers [B, H, nq] in [0, kmax].
      block_q: rows of a query block, a power of two; the last block may be partial.
      block_k: keys of a key block, a power of two; the last block may be partial.
      block_valid: integers [B, nk], may be traced: valid keys, the first ones of each block. None: all.
      scale: factor on q·k; None: D**-0.5.
      shift: as in `flash_attention`.
      score_precision: "input", or in 8 bits "int8" or "fp8" (e4m3): a scale a row of q and one a head of k, which is
        taken less its mean. "auto": what the device multiplies faster than a 16-bit dtype, int8 on Hopper GPUs and TPU
        v5 and v6, fp8 on TPU v7x, elsewhere "input".
      rows: only the first `rows` rows of q attend, and are Nq in all of the above; None: all. Saves Hopper a copy of
        them where they are part of a longer array.
      return_lse: also return the log-sum-exp over the selected keys.
      implementation: see `pallas_kernels.resolve_implementation`.
      interpret: as in `flash_attention`.

    Returns:
      out [B, H, Nq, D] in q's dtype, and with `return_lse` (out, lse), lse float32 [B, H, Nq].
      A row with no valid key gives out 0 and lse -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation cannot serve the call.
    """
    _check_qk(q, k, v)
    _check_block(block_q=block_q, block_k=block_k)
    blocks = (*q.shape[:2], block_count(_rows(q, rows), block_q))
    _check_integers("counts", counts, blocks, "[B, H, nq]")
    if indices.ndim != 4 or indices.shape[3] == 0:
        raise ValueError(f"indices must be [B, H, nq, kmax] = {[*blocks, 'kmax']}; got {list(indices.shape)}")
    _check_integers("indices", indices, (*blocks, indices.shape[3]), "[B, H, nq, kmax]")
    if block_valid is not None:
        _check_integers("block_valid", block_valid, (k.shape[0], block_count(k.shape[2], block_k)), "[B, nk]")
    _check_shift(shift, q, _rows(q, rows))
    check_precision(score_precision)
    q, scale = _positive(q, scale)
    sizes = scale, block_q, block_k
    call = SparseCall(q, k, v, indices, counts, *sizes, block_valid, interpret, shift, score_precision, rows)
    module, call = _served(implementation, call)
    with jax.named_scope("block_sparse_attention"):
        out, lse = module.block_sparse_attention(call)
    return (out, lse) if return_lse else out


def pooled_attention(
    q: Array,
    k_mean: Array,
    v_mean: Array,
    bias: Array,
    kept: Array,
    *,
    block_q: int,
    scale: float | None = None,
    rows: int | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Any:
    """Attention over one pooled key a block, but for the blocks that a query block attends to key by key.

    A row's score of block j is scale * q·k_mean_j + bias_j. With bias_j = log of the block's number of keys, a block of
    equal keys weighs what its keys would. `merge_attention` joins it with `block_sparse_attention` over the kept ones.

    Args:
      q: [B, H, Nq, D], float32, bfloat16 or float16.
      k_mean: [B, H, nk, D], dtype of q.
      v_mean: [B, H, nk, D], dtype of q.
      bias: float32 [B, H, nk], natural log; -inf for a block without keys.
      kept: uint32 [B, H, nq, ceil(nk / 32)] from `pack_bits`: the blocks that a query block leaves out.
      block_q: rows of a query block, a power of two; the last block may be partial.
      scale: factor on q·k, positive; None: D**-0.5.
      rows: as in `block_sparse_attention`.
      return_lse: also return the log-sum-exp of each row's scores.
      implementation: see `pallas_kernels.resolve_implementation`.
      interpret: as in `flash_attention`.

    Returns:
      out [B, H, Nq, D] in q's dtype, and with `return_lse` (out, lse), lse float32 [B, H, Nq].
      A row that leaves out all gives out 0 and lse -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation cannot serve the call.
    """
    _check_qk(q, k_mean, v_mean)
    _check_block(block_q=block_q)
    batch, heads, nk = k_mean.shape[:3]
    words = (batch, heads, block_count(_rows(q, rows), block_q), block_count(nk, 32))
    for name, x, dtype, shape in (("bias", bias, jnp.float32, k_mean.shape[:3]), ("kept", kept, jnp.uint32, words)):
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name} must be {jnp.dtype(dtype)}{list(shape)}; got {x.dtype}{list(x.shape)}")
    if scale is not None and not scale > 0:
        raise ValueError(f"{scale=} must be positive")
    q, scale = _positive(q, scale)
    call = PooledCall(q, k_mean, v_mean, bias, kept, scale, block_q, interpret, rows)
    module, call = _served(implementation, call)
    with jax.named_scope("pooled_attention"):
        out, lse = module.pooled_attention(call)
    return (out, lse) if return_lse else out


def merge_attention(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over two sets of keys as one, from (out [..., N, D], lse float32 [..., N]) of each; exact.

    Rows of LSE -inf saw no key and count for nothing; where neither saw one, out is 0 and the LSE -inf.
    """
    (a, lse_a), (b, lse_b) = first, second
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    safe = jnp.where(total > 0, total, 1.0)
    share = lambda x, weight: x.astype(jnp.float32) * (weight / safe)[..., None]
    out = (share(a, weight_a) + share(b, weight_b)).astype(a.dtype)
    return out, jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
