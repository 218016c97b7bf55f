"""SparseState: what AdaSpa carries from step to step. Static shapes, a pytree, no hidden copies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout


def index_dtype(layout: TokenLayout) -> Any:
    """The smallest dtype that numbers the layout's blocks."""
    return jnp.uint16 if layout.num_blocks <= 2**16 - 1 else jnp.uint32


class SparseState(NamedTuple):
    """The found blocks of one layer, or of a stack of layers with a leading layer axis.

    B batch, H heads, nq video row blocks, L the layout's padded length.
    """

    indices: Array
    """uint16 [B, H, nq, kmax] (uint32 past 65,535 blocks): key blocks, the first `counts` in use."""
    counts: Array
    """int32 [B, H, nq]: key blocks in use."""
    lse: Array
    """float32 [B, H, L]: natural-log row normaliser of the last search."""
    recall: Array
    """float32 [B, H]: share of the video rows' mass in the blocks kept by the last search, at the base budget."""
    drift: Array
    """float32 [B, H]: mean |change of the LSE| between the last two searches; 0 after the first."""
    mass: Array
    """float32 [B, H, nq, nk]: block mass of the last search, for pictures; [B, H, 0, 0] unless asked for."""

    @classmethod
    def create(
        cls,
        layout: TokenLayout,
        config: SparseConfig,
        batch: int,
        heads: int,
        layers: int | None = None,
        keep_mass: bool = False,
    ) -> "SparseState":
        """The empty state, of one layer, or stacked over `layers`. Shapes depend on the arguments alone.

        `keep_mass` also stores the block mass: small for a demo, gigabytes for a long video. With
        `share_cfg_indices` it holds half of `batch`; ValueError if that is odd.
        """
        if config.share_cfg_indices:
            if batch % 2:
                raise ValueError(f"share_cfg_indices needs a batch of two equal halves; got {batch=}")
            batch //= 2
        lead = (batch, heads) if layers is None else (layers, batch, heads)
        kmax = config.budget(layout).high if config.row_wise else layout.num_blocks
        return cls(
            indices=jnp.zeros((*lead, layout.video_blocks, kmax), index_dtype(layout)),
            counts=jnp.zeros((*lead, layout.video_blocks), jnp.int32),
            lse=jnp.zeros((*lead, layout.length), jnp.float32),
            recall=jnp.zeros(lead, jnp.float32),
            drift=jnp.zeros(lead, jnp.float32),
            mass=jnp.zeros(
                (*lead, layout.video_blocks, layout.num_blocks) if keep_mass else (*lead, 0, 0), jnp.float32
            ),
        )

    def check(self, layout: TokenLayout, config: SparseConfig, batch: int, heads: int) -> None:
        """Raises ValueError if this is not the state of one layer of that layout and configuration."""
        keep_mass = self.mass.size > 0
        expected = jax.eval_shape(lambda: SparseState.create(layout, config, batch, heads, keep_mass=keep_mass))
        for name, x, want in zip(self._fields, self, expected, strict=True):
            if x.shape != want.shape or x.dtype != want.dtype:
                raise ValueError(
                    f"state.{name} must be {want.dtype}{list(want.shape)} for {batch=}, {heads=} and this layout; "
                    f"got {x.dtype}{list(x.shape)}"
                )
