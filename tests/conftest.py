"""Settings of every test: full float32 products, no implicit rank promotion, property tests that repeat themselves.

What XLA has compiled in this process is kept on disk until the process ends: the same program is compiled once, however
often a test makes it anew. Without the matrices LLVM optimises little, which halves the time; `make test-all` compiles
as people do.
"""

import atexit
import os
import tempfile

import hypothesis
import jax
import numpy as np
import pytest

COMPILED = tempfile.TemporaryDirectory(prefix="adaspa-tests-")
atexit.register(COMPILED.cleanup)
# What commands keep for the user goes there too, that of processes of their own included.
os.environ["XDG_CACHE_HOME"] = COMPILED.name
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "adaspa", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("adaspa")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles fast where only representative cases run."""
    jax.config.update("jax_disable_most_optimizations", config.option.markexpr == "not matrix")


@pytest.fixture
def rng() -> np.random.Generator:
    """The one source of random numbers of a test, the same in every run."""
    return np.random.default_rng(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that wait for compilers come first, so that none is left alone at the end of two processes."""
    items.sort(key=lambda item: "compile" not in item.path.name)
