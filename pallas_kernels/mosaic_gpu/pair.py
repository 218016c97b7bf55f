"""Attention of query tiles of 128 rows: two consumer warpgroups of 64 rows take turns on the tensor cores.

While one computes its softmax the other multiplies; a producer warpgroup feeds both. The order of the steps follows
FlashAttention-3 as in jax.experimental.pallas.ops.gpu.attention_mgpu; what is new is the list of key tiles.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import FLOOR
from pallas_kernels.mosaic_gpu.shape import ROWS, Shape, TileList, loop, over_rows, row_vector, slot_of, tile_memory
from pallas_kernels.mosaic_gpu.softmax import finish, softmax


def kernel(gpu: Any, shape: Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """128 query rows: two consumers and a producer."""
    q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = memory
    head, row, group = gpu.axis_index("head"), gpu.axis_index("row"), gpu.axis_index("group")
    tiles = TileList(gpu, shape, refs.get("entries"), refs.get("counts"), head, row)
    steps, dim = tiles.length, shape.head_dim

    def take_turns() -> None:
        gpu.barrier_arrive(turn)
        gpu.barrier_wait(turn)

    @pl.when(group < 2)
    def _consume() -> None:
        gpu.set_max_registers(232, action="increase")
        first = row * shape.rows + group * ROWS
        mine = pl.ds(first, ROWS)
        q, lse = q_smem.at[group], lse_smem.at[group]
        gpu.copy_gmem_to_smem(refs["q"].at[head, mine], q, q_ready.at[group])
        gpu.barrier_wait(q_ready.at[group])

        @pl.when(steps > 0)
        def _first() -> None:
            gpu.barrier_wait(k_ready.at[0])

        pl.when(group == 1)(take_turns)

        def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            acc, m, total, entry = carry
            slot, following = slot_of(j, shape.stages), tiles[j + 1]

            def scores(acc_ref: Any) -> Array:
                gpu.wgmma(acc_ref, q, k_smem.at[slot].T)
                bias = tiles.bias_of(refs.get("bias"), first, entry)
                take_turns()
                return acc_ref[...] if bias is None else acc_ref[...] + over_rows(bias, ROWS)

            s = gpu.run_scoped(scores, plgpu.ACC((ROWS, shape.tile), jnp.float32))
            gpu.barrier_arrive(k_free.at[slot])
            s = s if shape.bias_rows else tiles.mask(s, entry, refs.get("bias"))
            p, m, total, acc = softmax(s, m, total, acc, shape.scale)
            narrow = p.astype(shape.dtype)
            total += p.sum(axis=1)
            # Keeps the softmax before the barriers: the other warpgroup has the tensor cores until then.
            acc, total, m, narrow = lax.optimization_barrier((acc, total, m, narrow))
            gpu.barrier_arrive(turn)
            gpu.barrier_wait(v_ready.at[slot])
            gpu.barrier_wait(turn)

            def values(acc_ref: Any) -> None:
                gpu.wgmma(acc_ref, narrow, v_smem.at[slot])

                @pl.when(j + 1 < steps)
                def _next() -> None:
                    gpu.barrier_wait(k_ready.at[slot_of(j + 1, shape.stages)])

            acc = gpu.accumulate(values, acc)
            gpu.barrier_arrive(v_free.at[slot])
            return acc, m, total, following

        acc = gpu.layout_cast(jnp.full((ROWS, dim), 0, jnp.float32), plgpu.Layout.WGMMA)
        start = acc, row_vector(gpu, FLOOR), row_vector(gpu, 0.0), tiles[np.int32(0)]
        acc, m, total, _ = loop(0, steps, step, start)
        pl.when(group == 0)(take_turns)
        finish(gpu, acc, m, total, q, lse, shape.dtype)
        gpu.copy_smem_to_gmem(q, refs["out"].at[head, mine])
        gpu.copy_smem_to_gmem(lse, refs["lse"].at[head, mine])
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _produce() -> None:
        gpu.set_max_registers(40, action="decrease")

        def load(ref: Any, smem: Any, ready: Any, slot: Any, entry: Array) -> None:
            keys = pl.ds(tiles.start(entry), shape.tile)
            gpu.copy_gmem_to_smem(ref.at[head, keys], smem.at[slot], ready.at[slot])

        for i in range(shape.stages):

            @pl.when(i < steps)
            def _fill(i: int = i) -> None:
                entry = tiles[np.int32(i)]
                load(refs["k"], k_smem, k_ready, i, entry)
                load(refs["v"], v_smem, v_ready, i, entry)

        def step(j: Array, entry: Array) -> Array:
            slot, following = slot_of(j, shape.stages), tiles[j + 1]
            gpu.barrier_wait(k_free.at[slot])
            load(refs["k"], k_smem, k_ready, slot, entry)
            gpu.barrier_wait(v_free.at[slot])
            load(refs["v"], v_smem, v_ready, slot, entry)
            return following

        loop(shape.stages, steps, step, tiles[np.int32(shape.stages)])


def memory(shape: Shape) -> list[Any]:
    """Scratch, in the order in which the kernel unpacks it."""
    keys = [tile_memory(shape, (shape.stages,), shape.tile)] * 2
    lse = plgpu.SMEM((2, ROWS), jnp.float32)
    ready = [plgpu.Barrier(num_barriers=shape.stages)] * 2
    free = [plgpu.Barrier(num_arrivals=2, num_barriers=shape.stages)] * 2
    turn = plgpu.Barrier(num_arrivals=2)
    return [tile_memory(shape, (2,), ROWS), *keys, lse, plgpu.Barrier(num_barriers=2), *ready, *free, turn]
