"""What the shared cases do not reach of the TPU kernels: gathering from HBM, races, lists, and what is refused."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # the one place that counts races
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sparse_attention, dispatch, flash_attention, mosaic_tpu
from pallas_kernels.calls import Request, SparseCall
from pallas_kernels.tuning import TpuAttentionTuning
from tests.kernel_cases import CASES, Case, assert_attention, operands

NAMES = ("bfloat16", "D 128 bfloat16", "ragged length and blocks", "block 128", "more keys than rows", "density 0")
GATHERED = [case for case in CASES if case.name in NAMES]


def run(case: Case, x: Any, tuning: TpuAttentionTuning, indices: Any = None, interpret: Any = True) -> Any:
    indices, blocks = x.indices if indices is None else indices, (case.block_q, case.block_k)
    call = SparseCall(x.q, x.k, x.v, indices, x.counts, case.head_dim**-0.5, *blocks, x.block_valid, interpret)
    return mosaic_tpu.block_sparse_attention(call, tuning)


@pytest.mark.parametrize("case", GATHERED, ids=lambda c: c.name)
def test_gathered_from_hbm(case: Case) -> None:
    x = operands(case)
    assert_attention(case, x, run(case, x, TpuAttentionTuning(2, 2, resident=False)), selected=True)


@pytest.mark.parametrize("unroll", [2, 4])
def test_resident_at_every_unrolling(unroll: int) -> None:
    case = Case("long lists", rows=300, keys=2500, ragged=True, density=0.8)
    x = operands(case)
    assert_attention(case, x, run(case, x, TpuAttentionTuning(4, unroll, resident=True)), selected=True)


@pytest.mark.parametrize("ragged", [False, True])
def test_no_races_while_gathering(ragged: bool) -> None:
    """The one kernel that starts its own copies, in the interpreter that follows each of them."""
    case = Case("races", heads=1, rows=256, keys=512, ragged=ragged, density=0.7)
    x = operands(case)
    modes = [pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode) for mode in ("eager", "on_wait")]
    for mode in modes:
        got = run(case, x, TpuAttentionTuning(2, 2, resident=False), interpret=mode)
        assert_attention(case, x, got, selected=True)
        assert not interpreter.races.races_found


@pytest.mark.parametrize("resident", [False, True])
def test_poisoned_lists_are_never_read(resident: bool) -> None:
    """Outside of [0, nk) or past the counts an entry must not become an address: interpreting would clamp it."""
    case = Case("plain", rows=256, keys=512)
    x = operands(case)
    past = np.arange(x.indices.shape[-1]) >= np.asarray(x.counts)[..., None]
    clean = np.asarray(x.indices, np.int32)
    tuning = TpuAttentionTuning(2, 2, resident=resident)
    right = run(case, x, tuning, jnp.asarray(clean))
    for poison in (-1, 2**31 - 1):
        got = run(case, x, tuning, jnp.asarray(np.where(past, poison, clean)))
        jax.tree.map(np.testing.assert_array_equal, got, right)


Q = jnp.zeros((1, 2, 128, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attention(*[Q[..., :40]] * 3, implementation="mosaic_tpu"), "head_dim=40 must be 64 or 128"),
        (lambda: flash_attention(*[Q.astype("float16")] * 3, implementation="mosaic_tpu"), "dtype=float16"),
        (
            lambda: block_sparse_attention(
                Q,
                Q,
                Q,
                jnp.zeros((1, 2, 4, 1), jnp.uint16),
                jnp.zeros((1, 2, 4), jnp.int32),
                block_q=32,
                block_k=32,
                implementation="mosaic_tpu",
            ),
            "block_q=32, block_k=32 must be 64, 128 or 256",
        ),
    ],
)
def test_what_it_cannot_serve_it_names(call: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        call()


def test_on_a_tpu_xla_takes_the_rest_and_says_so_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    dispatch._say_once.cache_clear()
    wide = Request("block_mass", "bfloat16", 128, 64, 64)
    assert dispatch.choose(None, wide)[0] == "mosaic_tpu"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch.choose(None, dataclasses.replace(wide, head_dim=40))[0] == "xla"
    assert caplog.text.count("head_dim=40 must be 64 or 128") == 1
