"""Seeds: 64 bits, each its own noise; below 2^32 that of `jax.random.key`; the same whatever x64 is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.schedulers import CogVideoXDPM
from models.schedulers.seeds import as_key, random_key

SEEDS = [0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63, 2**63 + 5, 2**64 - 1]


def noise(seed: object) -> np.ndarray:
    return np.asarray(jax.random.normal(random_key(seed), (8,), jnp.float32))


def test_every_seed_is_its_own_noise() -> None:
    assert len({noise(seed).tobytes() for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_small_seeds_keep_their_noise(seed: int) -> None:
    expected = jax.random.normal(jax.random.key(seed), (8,), jnp.float32)
    np.testing.assert_array_equal(noise(seed), expected)
    np.testing.assert_array_equal(noise(np.uint64(seed)), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_x64_and_the_default_generator_change_nothing(seed: int) -> None:
    with jax.enable_x64(True), jax.default_prng_impl("rbg"):
        wide = noise(seed)
    np.testing.assert_array_equal(noise(seed), wide)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, 1.5, float("nan"), "1", None, True])
def test_anything_else_is_no_seed(seed: object) -> None:
    for make in (random_key, lambda seed: CogVideoXDPM(seed=seed)):
        with pytest.raises(ValueError, match=r"seed=.* must be a whole number in 0 \.\. 2\^64 - 1"):
            make(seed)


def test_traced_seeds_and_keys_give_the_same_key() -> None:
    expected = jax.random.key_data(random_key(7))
    np.testing.assert_array_equal(jax.jit(lambda seed: jax.random.key_data(as_key(seed)))(jnp.int32(7)), expected)
    np.testing.assert_array_equal(jax.random.key_data(as_key(random_key(7))), expected)


def test_the_solver_draws_from_all_64_bits() -> None:
    keys = {jax.random.key_data(CogVideoXDPM(seed=seed).init(jnp.zeros(1)).key).tobytes() for seed in SEEDS}
    assert len(keys) == len(SEEDS)
