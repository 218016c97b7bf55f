"""How attention, its state and its heads are spread over a mesh of devices; results do not depend on how many.

Tokens of the video are sharded over `rows` and `heads`, text is on every device, the batch over `data`. Inside one
shard_map around the switch over step kinds an all-to-all over `heads` gives each device whole rows of some heads
(Ulysses), and K and V are gathered over `rows`. Head tiers stay global: recall is summed over rows and gathered over
heads. After a search heads are dealt anew to the devices, easy with hard, so that all have the same work.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaspa_jax.config import SparseConfig
from adaspa_jax.layout import TokenLayout

DATA, HEADS, ROWS = "data", "heads", "rows"
"""Names of the mesh axes that attention is spread over."""


@dataclass(frozen=True)
class AttentionSharding:
    """Attention over the axes `data`, `heads` and `rows` of a mesh, those that it has; replicated over all others.

    A mesh with Explicit axes is taken as the same devices with Auto ones. Raises ValueError for a mesh that has none
    of the three.
    """

    mesh: Mesh

    def __post_init__(self) -> None:
        names = self.mesh.axis_names
        if not {DATA, HEADS, ROWS} & set(names):
            raise ValueError(f"the mesh has axes {names}; name at least one of them data, heads or rows")
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            auto = Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
            object.__setattr__(self, "mesh", auto)

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 where the mesh has none of that name."""
        return self.mesh.shape.get(axis, 1)

    def _axis(self, axis: str) -> str | None:
        return axis if axis in self.mesh.axis_names else None

    @property
    def tokens(self) -> tuple[str, ...]:
        """Axes over which video tokens are sharded outside of attention, the major one first."""
        return tuple(axis for axis in (ROWS, HEADS) if axis in self.mesh.axis_names)

    def video_length(self, layout: TokenLayout) -> int:
        """The layout's video part, padded so that rows of whole blocks and tokens divide over the devices."""
        rows, heads = self.size(ROWS), self.size(HEADS)
        unit = math.lcm(layout.query_block * rows, rows * heads)
        return -(-layout.video_length // unit) * unit

    def check(self, config: SparseConfig, batch: int, heads: int) -> None:
        """ValueError, with the fix, unless attention of `batch` and `heads` can be spread so, and exactly."""
        over_heads, over_data, rows = self.size(HEADS), self.size(DATA), self.size(ROWS)
        if heads % over_heads:
            best = math.gcd(heads, over_heads)
            raise ValueError(
                f"{heads} heads do not divide over {over_heads} devices of axis 'heads'; use heads={best} and "
                f"rows={rows * over_heads // best}"
            )
        if batch % over_data:
            best = math.gcd(batch, over_data)
            raise ValueError(
                f"a batch of {batch}, both branches of guidance counted, does not divide over {over_data} devices of "
                f"axis 'data'; use data={best} and rows={rows * over_data // best}"
            )
        if rows > 1 and not config.row_wise:
            raise ValueError(f"row_wise=False ranks all rows of a head: it needs rows=1; the mesh has rows={rows}")
        if over_data > 1 and config.share_cfg_indices:
            raise ValueError(
                f"share_cfg_indices needs both branches of guidance on one device: data=1; the mesh has "
                f"data={over_data}"
            )

    def spec(self, *axes: Any) -> PartitionSpec:
        """A PartitionSpec of the named axes, those the mesh lacks left out."""
        return PartitionSpec(*(self.tokens or None if axis == "tokens" else axis and self._axis(axis) for axis in axes))

    def named(self, *axes: Any) -> NamedSharding:
        """The same as a sharding."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def video(self, x: Array) -> Array:
        """Keeps [B, N, ...] sharded over data and tokens."""
        return lax.with_sharding_constraint(x, self.named(DATA, "tokens"))

    def text(self, x: Array) -> Array:
        """Keeps [B, ...] sharded over data alone."""
        return lax.with_sharding_constraint(x, self.named(DATA))

    def replicated(self, tree: Any) -> Any:
        """Keeps every array of a pytree whole on every device: weights that are gathered where they are used."""
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, self.named()), tree)

    def pad(self, x: Array, layout: TokenLayout, shared: bool = False) -> Array:
        """[B, layout.video_length, ...] padded with zeros to `video_length`, sharded; `shared`: over tokens alone."""
        extra = self.video_length(layout) - x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))
        return lax.with_sharding_constraint(x, self.named(None, "tokens")) if shared else self.video(x)

    def over_tokens(self, run: Any, video: Array, *rest: Array) -> Array:
        """`run(video, *rest)` on each device's own tokens of `video` [B, N, ...], with all of the rest [B, ...]."""
        video, rest = self.video(video), tuple(self.text(x) for x in rest)
        own, whole = self.spec(DATA, "tokens"), self.spec(DATA)
        specs = (own, *[whole] * len(rest))
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=own, check_vma=False)(video, *rest)

    @property
    def spread(self) -> "Spread":
        """What code inside the shard_map asks."""
        some = lambda axis: axis if self.size(axis) > 1 else None
        return Spread(some(HEADS), some(ROWS), self.size(HEADS))


@dataclass(frozen=True)
class Spread:
    """One device's view of the heads and rows; by default it has them all.

    B batch, H heads of the model, h heads of a device, in the order of its places. `places`, int32 [B, H], has the head
    that sits at each place, devices one after the other.
    """

    heads: str | None = None
    rows: str | None = None
    devices: int = 1
    """That share the heads."""

    def sum_rows(self, x: Array) -> Array:
        """Sum over the devices that share the rows."""
        return x if self.rows is None else lax.psum(x, self.rows)

    def mine(self, x: Array, places: Array) -> Array:
        """[B, h, ...] of this device, from [B, H, ...] in the order of heads."""
        if self.heads is None:
            return x
        count = places.shape[1] // self.devices
        begin = lax.axis_index(self.heads) * np.int32(count)
        return take_heads(x, lax.dynamic_slice_in_dim(places, begin, count, axis=1), axis=1)

    def by_head(self, x: Array, places: Array) -> Array:
        """[B, H, ...] in the order of heads, from every device's [B, h, ...]."""
        if self.heads is None:
            return x
        return take_heads(lax.all_gather(x, self.heads, axis=1, tiled=True), inverse(places), axis=1)

    def move(self, x: Array, places: Array, to: Array) -> Array:
        """[B, h, ...] of the heads that this device has at places `to`, from every device's at `places`.

        Each device takes a slice of all heads, puts them in order and gives them back: nobody ever holds everything.
        """
        if self.heads is None:
            return x
        batch, heads, *rest = x.shape
        flat = x.reshape(batch, heads, -1)
        flat = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % self.devices)))
        slices = lax.all_to_all(flat, self.heads, split_axis=2, concat_axis=1, tiled=True)
        slices = take_heads(slices, take_heads(inverse(places), to, axis=1), axis=1)
        flat = lax.all_to_all(slices, self.heads, split_axis=1, concat_axis=2, tiled=True)
        return flat[:, :, : math.prod(rest)].reshape(x.shape)

    def deal(self, work: Array) -> Array:
        """int32 [B, H]: places for heads of `work` [B, H], such that all devices get alike: easy with hard.

        Exact when at most a third of the heads are easy and as many hard, or h is even; ties go to the lower head.
        """
        heads = work.shape[1]
        pairs = heads // self.devices // 2
        order = jnp.argsort(-work, axis=-1, stable=True).astype(jnp.int32)
        ends = pairs * self.devices
        cut = lambda x: x.reshape(len(x), x.shape[1] // self.devices, self.devices)
        rounds = [cut(order[:, :ends]), cut(order[:, ::-1][:, :ends]), cut(order[:, ends : heads - ends])]
        return jnp.concatenate(rounds, axis=1).swapaxes(1, 2).reshape(len(order), heads)


ALONE = Spread()
"""One device."""


def take_heads(x: Array, places: Array, axis: int) -> Array:
    """x with the heads `places` [B, n] of its axis, another choice for each sample."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = places.shape
    return jnp.take_along_axis(x, places.reshape(shape), axis=axis)


def inverse(places: Array) -> Array:
    """int32 [B, H]: the place of each head."""
    return jnp.argsort(places, axis=-1).astype(jnp.int32)
