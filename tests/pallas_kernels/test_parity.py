"""Every implementation against the float32 oracle, and the oracle against others' attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import block_mass, block_sparse_attention, flash_attention, pooled_attention
from tests.kernel_cases import (
    CASES,
    IMPLEMENTATIONS,
    Case,
    assert_attention,
    how,
    in_matrix,
    operands,
    pooled_operands,
)

every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# XLA, which people run on a CPU, on all cases always.
each = pytest.mark.parametrize(
    ("case", "implementation"),
    [pytest.param(c, "xla", id=f"{c.name} xla") for c in CASES if "xla" in IMPLEMENTATIONS]
    + [in_matrix(c, name) for c in CASES for name in IMPLEMENTATIONS if name != "xla"],
)


def skip_unserved(case: Case, implementation: str, kernel: str) -> None:
    if not case.served(implementation, kernel):
        pytest.skip(f"{implementation} does not serve D = {case.head_dim}, blocks {case.block_q} x {case.block_k}")


@each
def test_flash_attention(case: Case, implementation) -> None:
    skip_unserved(case, implementation, "flash_attention")
    x = operands(case)
    valid = None if case.keys % case.block_k else x.block_valid
    run = jax.jit(lambda q, k, v, b: flash_attention(q, k, v, block_valid=b, return_lse=True, **how(implementation)))
    whole = x.__class__(x.q, x.k, x.v, valid, None, x.indices, x.counts)
    assert_attention(case, whole, run(x.q, x.k, x.v, valid), selected=False)


@each
def test_block_sparse_attention(case: Case, implementation) -> None:
    skip_unserved(case, implementation, "block_sparse_attention")
    x = operands(case)
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "return_lse": True, **how(implementation)}
    run = jax.jit(lambda *a, b: block_sparse_attention(*a, block_valid=b, **blocks))
    assert_attention(case, x, run(x.q, x.k, x.v, x.indices, x.counts, b=x.block_valid), selected=True)


@each
def test_block_mass(case: Case, implementation) -> None:
    skip_unserved(case, implementation, "block_mass")
    x = operands(case)
    valid = {"block_valid": x.block_valid, "query_valid": x.query_valid}
    blocks = {"block_q": case.block_q, "block_k": case.block_k, "return_row_sum": True}
    # An older LSE: off by a little everywhere, -inf in one row.
    lse = jax.random.normal(jax.random.key(0), x.q.shape[:3]).at[0, 0, 0].set(-jnp.inf) * 0.1 + 5.0
    mass, row_sum = jax.jit(lambda q, k, s: block_mass(q, k, s, **blocks, **valid, **how(implementation)))(
        x.q, x.k, lse
    )
    expected, expected_sum = block_mass(x.q, x.k, lse, **blocks, **valid, implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(row_sum, expected_sum, rtol=2e-5, atol=1e-6)
    assert row_sum[0, 0, 0] == 0


@each
def test_pooled_attention(case: Case, implementation) -> None:
    skip_unserved(case, implementation, "pooled_attention")
    x, pooled = operands(case), pooled_operands(case)
    options = {"block_q": case.block_q, "return_lse": True, **how(implementation)}
    run = jax.jit(lambda *a: pooled_attention(*a, **options))
    assert_attention(case, x, run(x.q, x.k, x.v, pooled.bias, pooled.kept), selected=False, pooled=pooled)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_mass_of_a_block_row_is_its_number_of_valid_rows(implementation) -> None:
    case = Case("ragged", batch=2, rows=333, keys=333, ragged=True)
    x = operands(case)
    padded = jnp.pad(x.k, ((0, 0), (0, 0), (0, 384 - 333), (0, 0)))
    _, lse = flash_attention(
        x.q, padded, padded, block_valid=x.block_valid, return_lse=True, implementation="reference"
    )
    mass = block_mass(
        x.q,
        padded,
        lse,
        block_q=64,
        block_k=64,
        block_valid=x.block_valid,
        query_valid=x.query_valid,
        **how(implementation),
    )
    rows = jnp.clip(x.query_valid, 0, jnp.array([[64, 64, 64, 64, 64, 13]]))
    np.testing.assert_allclose(mass.sum(-1), jnp.broadcast_to(rows[:, None], mass.shape[:3]), rtol=1e-4)


def test_oracle_agrees_with_torch_and_jax() -> None:
    x = operands(Case("plain", batch=2, head_dim=40, rows=100, keys=300))
    out = flash_attention(x.q, x.k, x.v, implementation="reference")
    tensors = [torch.from_numpy(np.array(a)) for a in (x.q, x.k, x.v)]
    np.testing.assert_allclose(out, torch.nn.functional.scaled_dot_product_attention(*tensors), atol=2e-6)
    ours = jax.nn.dot_product_attention(*(a.swapaxes(1, 2) for a in (x.q, x.k, x.v))).swapaxes(1, 2)
    np.testing.assert_allclose(out, ours, atol=2e-6)


@every
def test_what_was_not_selected_is_not_read(implementation) -> None:
    x = operands(Case("plain", rows=256, keys=512))
    counts = jnp.full_like(x.counts, 2)
    indices = jnp.broadcast_to(jnp.array([3, 5, 65535, 7], jnp.uint16), (1, 2, 4, 4))
    unused = (jnp.arange(512) // 64 != 3) & (jnp.arange(512) // 64 != 5)
    poison = lambda a: jnp.where(unused[:, None], jnp.nan, a)
    run = lambda k, v, i: block_sparse_attention(
        x.q, k, v, i, counts, block_q=64, block_k=64, return_lse=True, **how(implementation)
    )
    clean, poisoned = run(x.k, x.v, indices[..., :2]), run(poison(x.k), poison(x.v), indices)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert not jnp.isnan(poisoned[0]).any()


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_used_indices_out_of_range_select_nothing(implementation) -> None:
    x = operands(Case("plain"))
    run = lambda i, c: block_sparse_attention(
        x.q, x.k, x.v, i, jnp.full_like(x.counts, c), block_q=64, block_k=64, **how(implementation)
    )
    bad = jnp.broadcast_to(jnp.array([-1, 2, 4, 99]), (1, 2, 4, 4))
    np.testing.assert_allclose(run(bad, 4), run(bad[..., 1:2], 1), rtol=1e-6, atol=1e-6)


@every
def test_extreme_scores_stay_finite(implementation) -> None:
    x = operands(Case("plain"))
    out, lse = flash_attention(x.q * 1e3, x.k * 10, x.v, return_lse=True, **how(implementation))
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(lse).all()
    assert lse.max() > 1e4


@every
def test_memory_is_linear_in_the_sequence(implementation) -> None:
    def temporaries(n: int) -> list[int]:
        q = jax.ShapeDtypeStruct((1, 2, n, 64), jnp.float32)
        lse = jax.ShapeDtypeStruct((1, 2, n), jnp.float32)
        indices = jax.ShapeDtypeStruct((1, 2, n // 64, n // 320), jnp.uint16)
        counts = jax.ShapeDtypeStruct((1, 2, n // 64), jnp.int32)
        blocks = {"block_q": 64, "block_k": 64, **how(implementation)}
        lowered = (
            jax.jit(lambda q: flash_attention(q, q, q, **how(implementation))).lower(q),
            jax.jit(lambda q, s: block_mass(q, q, s, **blocks)).lower(q, lse),
            jax.jit(lambda q, i, c: block_sparse_attention(q, q, q, i, c, **blocks)).lower(q, indices, counts),
            jax.jit(lambda q, k, b, m: pooled_attention(q, k, k, b, m, block_q=64, **how(implementation))).lower(
                q,
                jax.ShapeDtypeStruct((1, 2, n // 64, 64), jnp.float32),
                jax.ShapeDtypeStruct((1, 2, n // 64), jnp.float32),
                jax.ShapeDtypeStruct((1, 2, n // 64, n // 64 // 32), jnp.uint32),
            ),
        )
        return [low.compile().memory_analysis().temp_size_in_bytes for low in lowered]

    for small, large in zip(temporaries(8192), temporaries(32768), strict=True):
        assert large < 32768**2 // 4  # far below a byte a pair
        # Lists of blocks grow as (N / 64)^2, all else as N.
        assert large < 17 * small


@every
def test_work_follows_the_counts(implementation) -> None:
    """Fewer counts, fewer turns of the loop: with a count of 0 even NaN everywhere is never touched."""
    x = operands(Case("plain"))
    nan = jnp.full_like(x.k, jnp.nan)
    out = block_sparse_attention(
        x.q, nan, nan, x.indices, jnp.zeros_like(x.counts), block_q=64, block_k=64, **how(implementation)
    )
    np.testing.assert_array_equal(out, 0)


Q = jnp.zeros((1, 2, 128, 8))
BIAS, KEPT = jnp.zeros((1, 2, 128)), jnp.zeros((1, 2, 2, 4), jnp.uint32)
INDICES, COUNTS = jnp.zeros((1, 2, 2, 1), jnp.uint16), jnp.zeros((1, 2, 2), jnp.int32)
SPARSE = {"block_q": 64, "block_k": 64}
MISFITS = {
    "rank": (lambda: flash_attention(Q[0], Q[0], Q[0]), r"must be \[B, H, N, D\]; got q float32\[2, 128, 8\]"),
    "dtypes": (lambda: flash_attention(Q, Q.astype(jnp.bfloat16), Q), r"share one dtype.*bfloat16"),
    "integers": (lambda: flash_attention(*[Q.astype(jnp.int32)] * 3), r"share one dtype.*int32"),
    "heads": (lambda: flash_attention(Q, Q[:, :1], Q[:, :1]), r"agree in B, H and D.*\[1, 1, 128, 8\]"),
    "keys": (lambda: flash_attention(Q, Q, Q[:, :, :5]), "k and v in N"),
    "empty": (lambda: flash_attention(Q, Q[:, :, :0], Q[:, :, :0]), "must not be empty"),
    "valid": (lambda: flash_attention(Q, Q, Q, block_valid=jnp.zeros((1, 3), jnp.int32)), r"dividing Nk=128.*\[1, 3\]"),
    "valid batch": (lambda: flash_attention(Q, Q, Q, block_valid=jnp.zeros((2, 2), jnp.int32)), r"\[2, 2\]"),
    "name": (lambda: flash_attention(Q, Q, Q, implementation="cuda"), "implementation='cuda' is unknown"),
    "block": (lambda: block_sparse_attention(Q, Q, Q, INDICES, COUNTS, block_q=48, block_k=64), "block_q=48"),
    "counts": (
        lambda: block_sparse_attention(Q, Q, Q, INDICES, COUNTS[:, :, :1], **SPARSE),
        r"\[1, 2, 2\]; got int32\[1, 2, 1\]",
    ),
    "indices": (lambda: block_sparse_attention(Q, Q, Q, INDICES * 1.0, COUNTS, **SPARSE), "indices must be integers"),
    "bias": (
        lambda: pooled_attention(Q, Q, Q, BIAS[:, :, 1:], KEPT, block_q=64),
        r"bias must be float32\[1, 2, 128\]; got float32\[1, 2, 127\]",
    ),
    "kept": (
        lambda: pooled_attention(Q, Q, Q, BIAS, KEPT[..., :3], block_q=64),
        r"kept must be uint32\[1, 2, 2, 4\]; got uint32\[1, 2, 2, 3\]",
    ),
    "scale": (lambda: pooled_attention(Q, Q, Q, BIAS, KEPT, block_q=64, scale=0.0), "scale=0.0 must be positive"),
    "lse": (lambda: block_mass(Q, Q, Q[..., :4, 0], block_q=64, block_k=64), r"lse must be float32 .* \[1, 2, 128\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_value_errors_with_the_shapes(name: str) -> None:
    call, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        call()
