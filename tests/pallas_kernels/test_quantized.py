"""Scores in 8 bits: near the exact ones, whatever all keys have in common, and the same in every implementation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels import (
    block_sparse_attention,
    dispatch,
    flash_attention,
    mosaic_tpu,
    resolve_score_precision,
)
from pallas_kernels.calls import Request, SparseCall
from pallas_kernels.mosaic_tpu.chip import Chip
from pallas_kernels.quantized import DTYPES, quantize
from pallas_kernels.tuning import TpuAttentionTuning
from tests.kernel_cases import CASES, Case, how, in_matrix, operands

NAMES = ("D 128 bfloat16", "ragged length and blocks", "more keys than rows", "block 128", "density 0")
precisions = pytest.mark.parametrize("precision", DTYPES)
HOPPER = [
    dataclasses.replace(case, dtype=dtype)
    for case in CASES
    if case.name in NAMES
    for dtype in ("bfloat16", "float16")
    if case.served("mosaic_gpu", "block_sparse_attention") or case.dtype == "float32"
]
SERVED = [case for case in CASES if case.name in NAMES]


def attend(case: Case, x: Any, implementation: str, **options: Any) -> tuple[Array, Array]:
    """Over the case's lists, with int8 scores unless `options` say otherwise."""
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "block_valid": x.block_valid, "return_lse": True}
    options = {"score_precision": "int8", **how(implementation), **options}
    run = jax.jit(lambda *a: block_sparse_attention(*a, **blocks, **options))
    out: tuple[Array, Array] = run(x.q, x.k, x.v, x.indices, x.counts)
    return out


def assert_close(got: tuple[Array, Array], expected: tuple[Array, Array], out: float, lse: float) -> None:
    np.testing.assert_array_equal(np.isneginf(got[1]), np.isneginf(expected[1]))
    seen = np.isfinite(expected[1])
    np.testing.assert_allclose(np.asarray(got[1])[seen], np.asarray(expected[1])[seen], atol=lse)
    np.testing.assert_allclose(np.asarray(got[0], np.float32), np.asarray(expected[0], np.float32), atol=out)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [in_matrix(case, name) for case in SERVED for name in ("xla", "mosaic_tpu")],
)
@pytest.mark.parametrize("shifted", [False, True])
@precisions
def test_implementations_agree(case: Case, implementation: str, shifted: bool, precision: str) -> None:
    x = operands(case)
    expected = attend(case, x, "reference", score_precision=precision)
    shift = {"shift": jnp.where(jnp.isfinite(expected[1]), expected[1], 0.0)} if shifted else {}
    rounding = 2e-2 if case.dtype == "bfloat16" else 2e-5  # probabilities are of the values' dtype
    got = attend(case, x, implementation, score_precision=precision, **shift)
    assert_close(got, expected, rounding, 2e-5)


@pytest.mark.parametrize("case", [in_matrix(case) for case in HOPPER])
@precisions
def test_hopper_agrees(case: Case, precision: str) -> None:
    x = operands(case)
    expected = attend(case, x, "reference", score_precision=precision)
    with jax.disable_jit():
        got = attend(case, x, "mosaic_gpu", score_precision=precision)
    assert_close(got, expected, 2e-2, 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@precisions
def test_dense_attention_agrees(implementation: str, precision: Any) -> None:
    case = Case("dense", rows=200, keys=256, head_dim=64, dtype="bfloat16", ragged=True)
    x = operands(case)
    options: dict[str, Any] = {"block_valid": x.block_valid, "score_precision": precision, "return_lse": True}
    run = lambda name: flash_attention(x.q, x.k, x.v, **options, **how(name))
    assert_close(run(implementation), run("reference"), 2e-2, 2e-5)


def test_hopper_takes_a_shift_of_the_first_rows_of_q() -> None:
    case = Case("text", rows=256, keys=256, dtype="bfloat16", ragged=True)
    x = operands(case)
    expected, lse = attend(case, x, "reference", score_precision="fp8")
    longer = dataclasses.replace(x, q=jnp.pad(x.q, ((0, 0), (0, 0), (0, 100), (0, 0)), constant_values=1e4))
    for implementation in ("reference", "mosaic_gpu"):
        with jax.disable_jit(implementation == "mosaic_gpu"):
            found = attend(case, longer, implementation, score_precision="fp8", rows=256, shift=jnp.maximum(lse, 0.0))
        assert_close(found, (expected, lse), 2e-2, 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu", "mosaic_tpu"])
def test_masked_keys_of_tiny_rows(implementation: str) -> None:
    """Scores of 0 in fp8: the weights are those of the valid keys alone."""
    case = Case("tiny", rows=64, keys=64, dtype="bfloat16")
    x = operands(case)
    lists = {"indices": jnp.zeros((1, 2, 1, 1), jnp.int32), "counts": jnp.ones((1, 2, 1), jnp.int32)}
    x = dataclasses.replace(x, q=x.q * 1e-34, block_valid=jnp.full((1, 1), 10), **lists)
    with jax.disable_jit(implementation == "mosaic_gpu"):
        _, lse = attend(case, x, implementation, score_precision="fp8")
    np.testing.assert_allclose(lse, np.log(10), rtol=1e-5)


def test_auto_is_what_the_device_multiplies_faster() -> None:
    case = dataclasses.replace(HOPPER[0], dtype="bfloat16")
    x = operands(case)
    for implementation, same in (("xla", "input"), ("mosaic_tpu", "int8"), ("mosaic_gpu", "int8")):
        with jax.disable_jit(implementation == "mosaic_gpu"):
            got, expected = (attend(case, x, implementation, score_precision=p) for p in ("auto", same))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_auto_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = functools.partial(resolve_score_precision, "auto")
    assert resolve("xla") == resolve("mosaic_tpu", dtype=jnp.float32) == resolve() == "input"
    assert resolve("mosaic_gpu") == "int8"
    assert resolve_score_precision("fp8", "mosaic_gpu") == "fp8"
    with pytest.raises(NotImplementedError, match="score_precision='int8' is for TPUs and Hopper GPUs"):
        resolve_score_precision("int8", "triton")
    bogus: Any = "bogus"
    with pytest.raises(ValueError, match="score_precision='bogus' must be one of input, int8, fp8, auto"):
        resolve_score_precision(bogus)
    monkeypatch.setattr(mosaic_tpu, "chip", lambda: Chip(7, 1 << 26))
    assert resolve("mosaic_tpu") == "fp8"


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("blocks", [[0, 1], [1, 0], [1, 1]])
@precisions
def test_blocks_without_valid_keys_for_tiny_rows(implementation: str, blocks: list[int], precision: str) -> None:
    """Such a tile is masked as a whole, whatever a row's scale: beside large rows, for which kernels seek a maximum."""
    case = Case("tiny", rows=64, keys=128, head_dim=128, dtype="bfloat16")
    x = operands(case)
    lists = {"indices": jnp.broadcast_to(jnp.array(blocks), (1, 2, 1, 2)), "counts": jnp.full((1, 2, 1), 2)}
    q = (100 * x.q).at[:, :, ::2].multiply(jnp.bfloat16(1e-7)).at[:, :, 0].set(0)
    x = dataclasses.replace(x, q=q, block_valid=jnp.array([[61, 0]]), **lists)
    expected = attend(case, x, "reference", score_precision=precision)
    assert bool(jnp.isneginf(expected[1]).all()) == (0 not in blocks)
    with jax.disable_jit(implementation == "mosaic_gpu"):
        got = attend(case, x, implementation, score_precision=precision)
    assert_close(got, expected, 2e-2, 1e-3)


@pytest.mark.parametrize("resident", [False, True])
@precisions
def test_gathered_keys_are_the_same_numbers(resident: bool, precision: Any) -> None:
    case = Case("D 128 bfloat16", head_dim=128, dtype="bfloat16", ragged=True)
    x = operands(case)
    call = SparseCall(x.q, x.k, x.v, x.indices, x.counts, 128**-0.5, 64, 64, x.block_valid, True, None, precision)
    got = mosaic_tpu.block_sparse_attention(call, TpuAttentionTuning(2, 2, resident=resident))
    assert_close(got, attend(case, x, "reference", score_precision=precision), 2e-2, 2e-5)


@pytest.mark.parametrize("common", [0.0, 20.0])
@pytest.mark.parametrize(("precision", "near"), [("int8", 0.05), ("fp8", 0.15)])
def test_scores_are_near_whatever_all_keys_have_in_common(common: float, precision: str, near: float) -> None:
    """What a mean adds to a row's scores is exact, in the LSE too."""
    case = Case("plain", rows=256, keys=512, head_dim=64, density=0.6)
    x = operands(case)
    x = dataclasses.replace(x, k=x.k + common * jax.random.normal(jax.random.key(3), (1, 2, 1, 64)))
    exact = attend(case, x, "reference", score_precision="input")
    assert_close(attend(case, x, "reference", score_precision=precision), exact, near, near)


@pytest.mark.parametrize(("precision", "most", "near"), [("int8", 127, 0.1), ("fp8", 448, 0.3)])
def test_numbers_that_are_quantised(precision: Any, most: int, near: float) -> None:
    case = Case("ragged length and blocks", rows=333, keys=333, ragged=True)
    x = operands(case)
    valid = np.concatenate([np.arange(64) < n for n in np.asarray(x.block_valid[0])])[:333]
    anything = jnp.where(valid[:, None], x.k, jnp.nan)
    call = SparseCall(x.q, anything, x.v, x.indices, x.counts, 0.125, 64, 64, x.block_valid, score_precision=precision)
    z = quantize(call)
    assert (z.q.dtype, z.k.dtype) == (DTYPES[precision],) * 2
    assert int(jnp.abs(z.q.astype(jnp.float32)).max(3).min()) == most  # every row uses the whole range
    assert not np.asarray(z.k, np.float32)[:, :, ~valid].any()
    exact = jnp.einsum("bhqd,bhkd->bhqk", call.q, call.k)[..., valid] * 0.125
    ours = jnp.einsum("bhqd,bhkd->bhqk", z.q.astype(jnp.float32), z.k.astype(jnp.float32))[..., valid]
    ours = 0.125 * ours * z.row_scale[..., None] + z.offset[..., None]
    assert float(jnp.abs(ours - exact).max()) < near
    nothing = quantize(dataclasses.replace(call, q=0 * call.q, k=0 * call.k)).q
    np.testing.assert_array_equal(np.asarray(nothing, np.float32), 0)


def test_a_gpu_is_not_left_to_emulate_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    request = Request("block_sparse_attention", jnp.float32, 128, 64, 64, score_precision="int8")
    with pytest.raises(NotImplementedError, match=r"score_precision='int8' is for TPUs.*; use 'input'"):
        dispatch.choose(None, request)


def test_what_cannot_be_served_is_refused() -> None:
    case = Case("plain", head_dim=64, dtype="bfloat16")
    x = operands(case)
    with pytest.raises(NotImplementedError, match="score_precision='int8' is for TPUs and Hopper GPUs"):
        attend(case, x, "triton")
    with pytest.raises(NotImplementedError, match="score_precision='fp8' of dense attention is for Hopper GPUs"):
        flash_attention(x.q, x.k, x.v, score_precision="fp8", implementation="mosaic_tpu", interpret=True)
    with pytest.raises(ValueError, match="score_precision='int4' must be one of input, int8, fp8, auto"):
        attend(case, x, "xla", score_precision="int4")
