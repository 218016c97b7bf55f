"""What the shared cases do not reach of the TPU kernels: gathering from HBM, races, lists, and what is refused."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # the one place that counts races
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_mass, block_sparse_attention, dispatch, flash_attention, mosaic_tpu, reference
from pallas_kernels.calls import DenseCall, Request, SparseCall
from pallas_kernels.mosaic_tpu import calls
from pallas_kernels.mosaic_tpu.mass import mass_tile
from pallas_kernels.tuning import TpuAttentionTuning
from tests.kernel_cases import CASES, Case, assert_attention, operands
from tests.matrix import only

NAMES = ("bfloat16", "D 128 bfloat16", "ragged length and blocks", "block 128", "more keys than rows", "density 0")
GATHERED = [case for case in CASES if case.name in NAMES]


def run(
    case: Case, x: Any, tuning: TpuAttentionTuning, indices: Any = None, interpret: Any = True, shift: Any = None
) -> Any:
    indices, blocks = x.indices if indices is None else indices, (case.block_q, case.block_k)
    call = SparseCall(x.q, x.k, x.v, indices, x.counts, case.head_dim**-0.5, *blocks, x.block_valid, interpret, shift)
    return mosaic_tpu.block_sparse_attention(call, tuning)


@pytest.mark.parametrize("case", GATHERED, ids=lambda c: c.name)
def test_gathered_from_hbm(case: Case) -> None:
    x = operands(case)
    assert_attention(case, x, run(case, x, TpuAttentionTuning(2, 2, resident=False)), selected=True)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("unroll", [2, 4, 8])
def test_resident_at_every_unrolling(unroll: int, shifted: bool) -> None:
    """Without a shift a turn is run in parts."""
    case = Case("long lists", rows=300, keys=2500, ragged=True, density=0.8)
    x = operands(case)
    shift = jnp.zeros(x.q.shape[:3]) if shifted else None
    got = run(case, x, TpuAttentionTuning(4, unroll, resident=True), shift=shift)
    assert_attention(case, x, got, selected=True)


def test_a_turn_of_other_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="unroll=6 must be 2, 4 or 8"):
        TpuAttentionTuning(4, 6)


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


def test_mass_in_large_tiles() -> None:
    """Those of long videos, of 2048 rows by 6144 keys; the last of each is not full, nor is a block."""
    rows, keys = 2000, 6100
    assert mass_tile(128, 128, rows, keys, "bfloat16") == (2048, 6144)
    assert mass_tile(128, 128, 1500, 4000, "bfloat16") == (1024, 2048)
    assert mass_tile(128, 128, rows, keys, "float32") == (1024, 2048)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, n, 64)), jnp.bfloat16) for n in (rows, keys))
    valid = jnp.full((1, 48), 128).at[0, 5].set(60)
    how: dict[str, Any] = {"block_q": 128, "block_k": 128, "block_valid": valid, "return_row_sum": True}
    lse = jnp.full((1, 1, rows), 9.0)
    got = block_mass(q, k, lse, implementation="mosaic_tpu", interpret=True, **how)
    for ours, theirs in zip(got, block_mass(q, k, lse, implementation="reference", **how), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


SHIFTS = {
    "its own": 0.0,
    "5 off": 5.0,
    "80 off": 80.0,
    "200 off": 200.0,
    "-200 off": -200.0,
    "-inf": -np.inf,
    "NaN": np.nan,
}


@pytest.mark.parametrize("far", only({"its own", "-200 off"}, SHIFTS))
@pytest.mark.parametrize("kernel", ["dense", "resident", "gathered"])
def test_a_shift_changes_nothing_however_far_off_it_is(kernel: str, far: str) -> None:
    """Rows that see no key among them; a shift that is right, one nearly right, and ones that float32 cannot hold."""
    case = Case("ragged length and blocks", rows=300, keys=700, ragged=True, density=0.4)
    x = operands(case)
    counts = x.counts.at[:, :, 1].set(0)
    if kernel == "dense":
        right = flash_attention(x.q, x.k, x.v, return_lse=True, implementation="reference")
        call: Any = DenseCall(x.q, x.k, x.v, case.head_dim**-0.5, 700, None, True)
        run = mosaic_tpu.flash_attention
    else:
        blocks = {"block_q": case.block_q, "block_k": case.block_k, "block_valid": x.block_valid}
        lists = x.q, x.k, x.v, x.indices, counts
        right = block_sparse_attention(*lists, return_lse=True, implementation="reference", **blocks)
        sizes = case.head_dim**-0.5, case.block_q, case.block_k
        call = SparseCall(*lists, *sizes, x.block_valid, True)
        tuning = TpuAttentionTuning(2, 2, resident=kernel == "resident")
        run = functools.partial(mosaic_tpu.block_sparse_attention, tuning=tuning)
    # One row far off is enough to lose it.
    off = SHIFTS[far]
    shift = right[1].at[:, :, 7].add(off) if np.isfinite(off) else right[1].at[:, :, 7].set(off)
    out, lse = run(dataclasses.replace(call, shift=shift))
    np.testing.assert_allclose(lse, right[1], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(out, right[0], atol=2e-5)
    again = run(call)
    np.testing.assert_allclose(out, again[0], atol=2e-5)


@pytest.mark.matrix
def test_the_shift_of_a_search_lasts_while_q_and_k_drift() -> None:
    """A random walk of 50 steps, after which q and k are no longer those of the search."""
    case = Case("plain", rows=256, keys=512)
    x = operands(case)
    lists = {"block_q": case.block_q, "block_k": case.block_k, "return_lse": True}
    shift = block_sparse_attention(x.q, x.k, x.v, x.indices, x.counts, implementation="reference", **lists)[1]
    rng, q, k = np.random.default_rng(0), x.q, x.k
    walk = lambda y: y + 0.2 * jnp.asarray(rng.standard_normal(y.shape), y.dtype)
    for step in range(50):
        q, k = walk(q), walk(k)
        if step % 10 == 9:
            how = lists | {"shift": shift, "implementation": "mosaic_tpu", "interpret": True}
            got = block_sparse_attention(q, k, x.v, x.indices, x.counts, **how)
            right = block_sparse_attention(q, k, x.v, x.indices, x.counts, implementation="reference", **lists)
            for ours, theirs in zip(got, right, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-5)


def test_dense_attention_bounds_its_scores_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("plain", rows=256, keys=512)
    x = operands(case)
    call = DenseCall(x.q, x.k, x.v, case.head_dim**-0.5, case.block_k, None, True)
    right = mosaic_tpu.flash_attention(call)
    for most in (-1.0, np.inf):  # never, always
        monkeypatch.setattr(calls, "MOST_SHIFT", most)
        for got, want in zip(mosaic_tpu.flash_attention(call), right, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)
    large = dataclasses.replace(call, q=40 * x.q)  # bounds of hundreds of nats, which must be lost and computed again
    out, lse = mosaic_tpu.flash_attention(large)
    right = reference.flash_attention(large)
    np.testing.assert_allclose(out, right[0], atol=1e-4)
    np.testing.assert_allclose(lse, right[1], rtol=1e-4)


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
