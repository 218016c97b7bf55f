"""What a consumer warpgroup does with the key tiles of its 64 rows: two products in flight, the softmax beneath them.

A step issues the scores of one tile and the values of the tile before, one behind the other, and goes through the
softmax of those scores while the values are multiplied, as FlashAttention-3 does (Shah et al. 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import FLOOR, LOG2E
from pallas_kernels.mosaic_gpu.shape import ROWS, Shape, TileList, loop, over_columns, row_vector, slot_of, tile_memory
from pallas_kernels.mosaic_gpu.softmax import PART, Softmax


def hold_memory(*leading: int) -> Any:
    """Shared memory of `Consumer.hold`."""
    return plgpu.SMEM((*leading, ROWS, PART), jnp.float32)


def own_out(shape: Shape, *leading: int) -> list[Any]:
    """Shared memory of the output, which takes that of q where both are of one dtype."""
    return [] if shape.score_dtype == shape.dtype else [tile_memory(shape, leading, ROWS)]


@dataclass(frozen=True)
class Consumer:
    """One warpgroup: where its rows are, its tiles, its shared memory and barriers."""

    gpu: Any
    shape: Shape
    refs: dict[str, Any]
    tiles: TileList
    program: tuple[Array, Array]
    """(head, row) of the grid."""
    first: Array
    """Of its rows."""
    q: Any
    k: Any
    """[stages, tile, D]"""
    v: Any
    """[stages, tile, D]; the numbers of stages may differ."""
    k_ready: Any
    v_ready: Any
    hold: Any
    """What is written here is never read, see `_step`."""
    begin: Callable[[Any], Any]
    """Of the number of a step; what it gives is handed to the next two."""
    k_done: Callable[[Any, Any], None]
    """(number of a tile whose scores are taken, what `begin` gave): its place may be filled."""
    v_done: Callable[[Any, Any], None]

    def _biased(self, s: Array, entry: Array) -> Array:
        bias = self.refs.get("bias")
        if self.shape.bias_rows:
            return s + self.tiles.pair_bias(bias, self.first, entry)
        return self.tiles.mask(s, entry, bias)

    def _zeros(self, columns: int) -> Array:
        return self.gpu.layout_cast(jnp.full((ROWS, columns), 0, jnp.float32), plgpu.Layout.WGMMA)

    def _score_memory(self, keys: int) -> Any:
        """Registers that a product of q and keys is summed in."""
        whole = jnp.issubdtype(self.shape.score_dtype, jnp.integer)
        return plgpu.ACC((ROWS, keys), jnp.int32 if whole else jnp.float32)

    def _scores(self, keys: Any) -> Array:
        def scores(s_ref: Any) -> Array:
            self.gpu.wgmma(s_ref, self.q, keys.T)
            return s_ref[...]

        return self.gpu.run_scoped(scores, self._score_memory(keys.shape[0])).astype(jnp.float32)

    def _values(self, acc: Array, narrow: Array, values: Any) -> Array:
        return self.gpu.accumulate(lambda ref: self.gpu.wgmma(ref, narrow, values), acc)[0]

    def _step(self, softmax: Softmax, j: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        gpu, (acc, narrow, state, entry) = self.gpu, carry
        slot, before = slot_of(j, self.k.shape[0]), slot_of(j - 1, self.v.shape[0])
        following, begun = self.tiles[j + 1], self.begin(j)
        gpu.barrier_wait(self.k_ready.at[slot])
        gpu.barrier_wait(self.v_ready.at[before])

        def products(acc_ref: Any, p_ref: Any, *state_refs: Any) -> None:
            def issue(s_ref: Any) -> Array:
                gpu.wgmma(s_ref, self.q, self.k.at[slot].T)
                gpu.wgmma(acc_ref, narrow, self.v.at[before])
                return gpu.peek(s_ref, 1)

            s = gpu.run_scoped(issue, self._score_memory(self.shape.tile)).astype(jnp.float32)
            self.k_done(j, begun)
            p_ref[...], found = softmax.step(self._biased(s, entry), state)
            for ref, x in zip(state_refs, found, strict=True):
                ref[...] = x
            # A store, which no compiler moves past the wait for the values, keeps the exponentials before it.
            self.hold[...] = found[0]

        acc, p, *found = gpu.accumulate(products, acc, self._zeros(self.shape.tile), *state)
        self.v_done(j - 1, begun)
        # Narrowed only now: until here the product read the registers of the tile before.
        acc, p = lax.optimization_barrier((acc, p))
        return softmax.rescaled(acc, found), p.astype(self.shape.dtype), tuple(found), following

    def _attend(self, softmax: Softmax) -> tuple[Array, ...]:
        gpu, steps = self.gpu, self.tiles.length
        begun = self.begin(np.int32(0))
        gpu.barrier_wait(self.k_ready.at[0])
        s = self._scores(self.k.at[0])
        self.k_done(np.int32(0), begun)
        p, state = softmax.step(self._biased(s, self.tiles[np.int32(0)]), softmax.start())
        start = self._zeros(self.shape.head_dim), p.astype(self.shape.dtype), state, self.tiles[np.int32(1)]
        acc, narrow, state, _ = loop(1, steps, lambda j, carry: self._step(softmax, j, carry), start)
        last = slot_of(steps - 1, self.v.shape[0])
        gpu.barrier_wait(self.v_ready.at[last])
        acc = self._values(acc, narrow, self.v.at[last])
        self.v_done(steps - 1, self.begin(steps - 1))
        return acc, *softmax.end(state)

    def _attend_in_halves(self, softmax: Softmax) -> tuple[Array, ...]:
        """One product at a time, of half a tile: a bias for every key and a maximum leave no registers for more."""
        gpu, half = self.gpu, self.shape.tile // 2

        def step(j: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            acc, state = carry
            slots, begun = [slot_of(j, x.shape[0]) for x in (self.k, self.v)], self.begin(j)
            gpu.barrier_wait(self.k_ready.at[slots[0]])
            gpu.barrier_wait(self.v_ready.at[slots[1]])
            for i in range(2):
                keys = pl.ds(i * half, half)
                s = self._scores(self.k.at[slots[0], keys])
                s += self.tiles.pair_bias(self.refs["bias"], self.first, self.tiles[j], i, 2)
                p, state = softmax.step(s, state)
                acc = self._values(softmax.rescaled(acc, state), p.astype(self.shape.dtype), self.v.at[slots[1], keys])
            self.k_done(j, begun)
            self.v_done(j, begun)
            return acc, state

        start = self._zeros(self.shape.head_dim), softmax.start()
        acc, state = loop(0, self.tiles.length, step, start)
        return acc, *softmax.end(state)

    def _attended(self) -> tuple[Array, Array, Array]:
        """(values times weights [64, D], sum of the weights [64], maximum [64]), by the softmax its scores allow."""
        scale: Any = self.shape.scale
        if "row_scale" in self.refs:
            rows = self.refs["row_scale"].at[self.program[0], pl.ds(self.first, ROWS)]
            scale = self.gpu.load(rows, layout=plgpu.Layout.WGMMA.reduce(1)) * scale
        bounded = lambda: self._attend(Softmax(self.gpu, scale, True))
        running = self._attend_in_halves if self.shape.bias_rows else self._attend
        nothing = lambda: (self._zeros(self.shape.head_dim), row_vector(self.gpu, 0.0), row_vector(self.gpu, FLOOR))

        def some() -> Any:
            unbounded = lambda: running(Softmax(self.gpu, scale, False))
            known = self.refs.get("bounded")
            return unbounded() if known is None else lax.cond(known[self.program] != 0, bounded, unbounded)

        return lax.cond(self.tiles.length > 0, some, nothing) if self.shape.sparse else some()

    def run(self, out: Any, lse: Any) -> None:
        """Attends, and stores out and LSE by way of shared memory `out` [64, D] and `lse` [64]."""
        gpu, (acc, total, m) = self.gpu, self._attended()
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = (acc / over_columns(safe, acc.shape[1])).astype(self.shape.dtype)
        lse[...] = jnp.where(total > 0, m * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
        gpu.commit_smem()
        for name, smem in (("out", out), ("lse", lse)):
            gpu.copy_smem_to_gmem(smem, self.refs[name].at[self.program[0], pl.ds(self.first, ROWS)])
        gpu.wait_smem_to_gmem(0)
