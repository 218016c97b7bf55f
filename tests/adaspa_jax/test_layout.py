"""TokenLayout: where every token goes, for any grid, text length, block size and order."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaspa_jax import TokenLayout
from adaspa_jax.layout import best_cube

side = st.integers(1, 11)
layouts = st.builds(
    TokenLayout.create,
    st.tuples(side, side, side),
    st.integers(0, 70),
    st.sampled_from([1, 2, 16, 64]),
    st.sampled_from(["raster", "cube"]),
)


def real_rows(layout: TokenLayout) -> np.ndarray:
    """bool [length]: which packed rows hold a token, from the block counts."""
    valid = np.asarray(layout.block_valid())[0]
    return (np.arange(layout.block) < valid[:, None]).reshape(-1)


@given(layouts)
@settings(max_examples=40)
@example(TokenLayout.create((33, 45, 80), 256, 128, "cube"))
def test_unpack_inverts_pack(layout: TokenLayout) -> None:
    video = np.arange(2 * layout.video_tokens, dtype=np.int32).reshape(2, -1)
    packed = layout.pack_video(jnp.asarray(video))
    assert packed.shape == (2, layout.video_length)
    np.testing.assert_array_equal(layout.unpack_video(packed), video)
    text = np.arange(layout.text, dtype=np.int32)[None]
    np.testing.assert_array_equal(layout.unpack_text(layout.pack_text(jnp.asarray(text))), text)


@given(layouts)
@settings(max_examples=40)
def test_every_token_is_in_exactly_one_place_and_padding_repeats_its_block(layout: TokenLayout) -> None:
    ids = np.arange(layout.video_tokens, dtype=np.int32)[None]
    packed = np.asarray(layout.pack_video(jnp.asarray(ids)))[0]
    real = real_rows(layout)[: layout.video_length]
    np.testing.assert_array_equal(np.sort(packed[real]), ids[0])
    for block, is_real in zip(packed.reshape(-1, layout.block), real.reshape(-1, layout.block), strict=True):
        assert is_real[0]  # no block of padding alone
        assert set(block) == set(block[is_real])


@given(layouts)
@settings(max_examples=40)
def test_a_block_is_one_cube_of_the_grid_or_one_run_of_the_raster(layout: TokenLayout) -> None:
    ids = np.arange(layout.video_tokens, dtype=np.int32)[None]
    blocks = np.asarray(layout.pack_video(jnp.asarray(ids)))[0].reshape(-1, layout.block)
    for number, (block, count) in enumerate(zip(blocks, layout.video_valid, strict=True)):
        if layout.cube is None:
            np.testing.assert_array_equal(block[:count], number * layout.block + np.arange(count))
        else:
            places = np.stack(np.unravel_index(block, layout.grid))
            assert len({tuple(cell) for cell in (places // np.array(layout.cube)[:, None]).T}) == 1


@given(st.tuples(side, side, side), st.sampled_from([1, 2, 16, 64, 128]))
@example((33, 45, 80), 128)
def test_no_other_cube_pads_less(grid: tuple[int, int, int], block: int) -> None:
    def padded(cube: tuple[int, ...]) -> int:
        return math.prod(math.ceil(n / s) * s for n, s in zip(grid, cube, strict=True))

    powers = [1, 2, 4, 8, 16, 32, 64, 128]
    every = [c for c in itertools.product(powers, repeat=3) if math.prod(c) == block]
    chosen = best_cube(grid, block)
    assert chosen in every
    assert padded(chosen) == min(map(padded, every))
    assert sum(chosen) == min(sum(c) for c in every if padded(c) == padded(chosen))


def test_block_valid_counts_text_that_is_known_at_run_time_only() -> None:
    layout = TokenLayout.create((2, 3, 5), text=20, block_size=8, order="raster")
    run = jax.jit(lambda count: layout.block_valid(count, batch=4))
    got = run(jnp.array([0, 9, 20, 99], jnp.int32))
    assert got.dtype == jnp.int32
    video = [8, 8, 8, 6]
    expected = [video + text for text in ([0, 0, 0], [8, 1, 0], [8, 8, 4], [8, 8, 4])]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(layout.block_valid(None, batch=4)[1], video + [8, 8, 4])


L = TokenLayout.create((2, 3, 5), text=20, block_size=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenLayout.create((2, 0, 5)), r"grid=\(2, 0, 5\)"),
        (lambda: TokenLayout.create((2, 5)), r"grid=\(2, 5\)"),  # type: ignore[arg-type]
        (lambda: TokenLayout.create((2, 3, 5), text=-1), "text=-1"),
        (lambda: TokenLayout.create((2, 3, 5), block_size=48), "block_size=48"),
        (lambda: TokenLayout.create((2, 3, 5), order="hilbert"), "order='hilbert' must be one of raster, cube"),
        (lambda: L.pack_video(jnp.zeros((1, 31))), r"takes \[B, 30, ...\]; got \[1, 31\]"),
        (lambda: L.unpack_video(jnp.zeros((1, 30))), r"takes \[B, 32, ...\]; got \[1, 30\]"),
        (lambda: L.pack_text(jnp.zeros((20,))), r"takes \[B, 20, ...\]; got \[20\]"),
        (lambda: L.unpack_text(jnp.zeros((1, 20))), r"takes \[B, 24, ...\]; got \[1, 20\]"),
        (lambda: L.block_valid(jnp.zeros(3, jnp.int32), batch=2), r"\[B\] = \[2\]; got \[3\]"),
    ],
)
def test_misfits_are_value_errors_with_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
