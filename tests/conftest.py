"""Settings of every test: full float32 products, no implicit rank promotion, property tests that repeat themselves."""

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "adaspa", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("adaspa")


@pytest.fixture
def rng() -> np.random.Generator:
    """The one source of random numbers of a test, the same in every run."""
    return np.random.default_rng(0)
