"""SparseState: what AdaSpa carries from step to step. Static shapes, a pytree, no hidden copies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout
from adaspa_jax.sharding import DATA, HEADS, ROWS, AttentionSharding


def index_dtype(layout: TokenLayout) -> Any:
    """The smallest dtype that numbers the layout's blocks."""
    return jnp.uint16 if layout.num_blocks <= 2**16 - 1 else jnp.uint32


class SparseState(NamedTuple):
    """The found blocks of one layer, or of a stack of layers with a leading layer axis.

    B batch, H heads, nq blocks of video rows, N video tokens of the layout. On a mesh nq and N are padded
    (`AttentionSharding.video_length`), and heads are in the order of their places; on one device that is their own.
    """

    indices: Array
    """uint16 [B, H, nq, kmax] (uint32 past 65,535 blocks): key blocks, the first `counts` in use."""
    counts: Array
    """int32 [B, H, nq]: key blocks in use."""
    lse: Array
    """float32 [B, H, N]: natural-log row normaliser of the last search."""
    recall: Array
    """float32 [B, H], by head: share of the video rows' mass in the blocks kept by the last search, at base budget."""
    drift: Array
    """float32 [B, H], by head: mean |change of the LSE| between the last two searches; 0 after the first."""
    mass: Array
    """float32 [B, H, nq, nk]: block mass of the last search, for pictures; [B, H, 0, 0] unless asked for."""
    row_bias: Array
    """float32 [B, H, nq]: calibration of the stand-ins of dropped blocks, added to their scores (natural log) by
    row block; empty without compensation, as are the next two."""
    col_bias: Array
    """float32 [B, H, nk]: the same by key block."""
    kept: Array
    """uint32 [B, H, nq, ceil(nk / 32)]: bits of the key blocks on the lists, of `pallas_kernels.pack_bits`."""
    strength: Array
    """float32 [B, H]: how far, 0 to 1, attention goes from the kept blocks' output towards that with stand-ins; 0
    without compensation."""
    stand_ins: Array
    """float32 [B, H], by head: share of the video rows' mass that the stand-ins held as calibrated by the last search,
    at full strength; 0 without compensation."""
    places: Array
    """int32 [B, H]: the head at each place, by which heads are dealt to devices; 0, 1, 2 ... on one."""

    @classmethod
    def create(
        cls,
        layout: TokenLayout,
        config: SparseConfig,
        batch: int,
        heads: int,
        layers: int | None = None,
        keep_mass: bool = False,
        sharding: AttentionSharding | None = None,
    ) -> "SparseState":
        """The empty state, of one layer, or stacked over `layers`. Shapes depend on the arguments alone.

        `keep_mass` also stores the block mass: small for a demo, gigabytes for a long video; on one device only. With
        `share_cfg_indices` it holds half of `batch`. `sharding`: of attention on a mesh; make the state inside
        `jax.jit` then, with `shardings` as `out_shardings`. ValueError for what does not divide.
        """
        if sharding is not None:
            sharding.check(config, batch, heads)
            if keep_mass:
                raise ValueError("keep_mass=True is for one device; leave it out on a mesh")
        if config.share_cfg_indices:
            if batch % 2:
                raise ValueError(f"share_cfg_indices needs a batch of two equal halves; got {batch=}")
            batch //= 2
        lead = (batch, heads) if layers is None else (layers, batch, heads)
        kmax = config.budget(layout).high if config.row_wise else layout.num_blocks
        length = layout.video_length if sharding is None else sharding.video_length(layout)
        rows = length // layout.query_block
        pooled = config.compensation == "pooled"
        pair_rows, cols = (rows, layout.num_blocks) if pooled else (0, 0)
        return cls(
            indices=jnp.zeros((*lead, rows, kmax), index_dtype(layout)),
            counts=jnp.zeros((*lead, rows), jnp.int32),
            lse=jnp.zeros((*lead, length), jnp.float32),
            recall=jnp.zeros(lead, jnp.float32),
            drift=jnp.zeros(lead, jnp.float32),
            mass=jnp.zeros((*lead, rows, layout.num_blocks) if keep_mass else (*lead, 0, 0), jnp.float32),
            row_bias=jnp.zeros((*lead, pair_rows), jnp.float32),
            col_bias=jnp.zeros((*lead, cols), jnp.float32),
            kept=jnp.zeros((*lead, pair_rows, -(-cols // 32)), jnp.uint32),
            strength=jnp.zeros(lead, jnp.float32),
            stand_ins=jnp.zeros(lead, jnp.float32),
            places=jnp.broadcast_to(jnp.arange(heads, dtype=jnp.int32), lead),
        )

    @property
    def empty(self) -> dict[str, Array]:
        """The fields that the configuration leaves without entries."""
        return {name: x for name, x in zip(self._fields, self, strict=True) if not x.size}

    @staticmethod
    def specs(sharding: AttentionSharding, layers: bool = True) -> "SparseState":
        """The PartitionSpec of every field on a mesh, with a leading layer axis or without."""
        lead = (None,) if layers else ()
        placed, by_head = sharding.spec(*lead, DATA, HEADS, ROWS), sharding.spec(*lead, DATA)
        of_heads = sharding.spec(*lead, DATA, HEADS)
        lists, calibration = (placed, placed, placed), (placed, of_heads, placed, of_heads)
        return SparseState(*lists, by_head, by_head, sharding.spec(), *calibration, by_head, by_head)  # type: ignore[arg-type]

    @staticmethod
    def shardings(sharding: AttentionSharding, layers: bool = True) -> "SparseState":
        """The same as NamedShardings: `out_shardings` of a jitted `create`."""
        is_spec = lambda x: isinstance(x, PartitionSpec)
        named = lambda spec: NamedSharding(sharding.mesh, spec)
        return jax.tree.map(named, SparseState.specs(sharding, layers), is_leaf=is_spec)

    def check(
        self,
        layout: TokenLayout,
        config: SparseConfig,
        batch: int,
        heads: int,
        sharding: AttentionSharding | None = None,
    ) -> None:
        """Raises ValueError if this is not the state of one layer of that layout, configuration and mesh."""
        create = lambda: SparseState.create(layout, config, batch, heads, None, self.mass.size > 0, sharding)
        expected = jax.eval_shape(create)
        for name, x, want in zip(self._fields, self, expected, strict=True):
            if x.shape != want.shape or x.dtype != want.dtype:
                raise ValueError(
                    f"state.{name} must be {want.dtype}{list(want.shape)} for {batch=}, {heads=} and this layout; "
                    f"got {x.dtype}{list(x.shape)}"
                )
