"""Attention of query tiles of 128 rows: two consumer warpgroups of 64 rows each and a producer that feeds them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.consumer import Consumer, hold_memory, own_out
from pallas_kernels.mosaic_gpu.shape import ROWS, Shape, TileList, loop, slot_of, tile_memory


def kernel(gpu: Any, shape: Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """128 query rows: two consumers and a producer."""
    q_smem, k_smem, v_smem, lse_smem, hold_smem, q_ready, k_ready, v_ready, k_free, v_free, *apart = memory
    head, row, group = gpu.axis_index("head"), gpu.axis_index("row"), gpu.axis_index("group")
    tiles = TileList(gpu, shape, refs.get("entries"), refs.get("counts"), head, row)
    steps = tiles.length

    @pl.when(group < 2)
    def _consume() -> None:
        gpu.set_max_registers(232, action="increase")
        first = row * shape.rows + group * ROWS
        q = q_smem.at[group]
        gpu.copy_gmem_to_smem(refs["q"].at[head, pl.ds(first, ROWS)], q, q_ready.at[group])
        gpu.barrier_wait(q_ready.at[group])

        free = lambda barrier, j: gpu.barrier_arrive(barrier.at[slot_of(j, shape.stages)])
        consumer = Consumer(
            gpu,
            shape,
            refs,
            tiles,
            program=(head, row),
            first=first,
            q=q,
            k=k_smem,
            v=v_smem,
            k_ready=k_ready,
            v_ready=v_ready,
            hold=hold_smem.at[group],
            begin=lambda _: None,
            k_done=lambda j, _: free(k_free, j),
            v_done=lambda j, _: free(v_free, j),
        )
        consumer.run((apart or [q_smem])[0].at[group], lse_smem.at[group])

    @pl.when(group == 2)
    def _produce() -> None:
        gpu.set_max_registers(40, action="decrease")

        keys, values = (refs["k"], k_smem, k_ready), (refs["v"], v_smem, v_ready)

        for i in range(shape.stages):

            @pl.when(i < steps)
            def _fill(i: int = i) -> None:
                entry = tiles[np.int32(i)]
                tiles.load(keys, i, entry)
                tiles.load(values, i, entry)

        def step(j: Array, entry: Array) -> Array:
            slot, following = slot_of(j, shape.stages), tiles[j + 1]
            gpu.barrier_wait(k_free.at[slot])
            tiles.load(keys, slot, entry)
            gpu.barrier_wait(v_free.at[slot])
            tiles.load(values, slot, entry)
            return following

        loop(shape.stages, steps, step, tiles[np.int32(shape.stages)])


def memory(shape: Shape) -> list[Any]:
    """Scratch, in the order in which the kernel unpacks it."""
    tiles = [tile_memory(shape, (shape.stages,), shape.tile, dtype) for dtype in (shape.score_dtype, shape.dtype)]
    lse = plgpu.SMEM((2, ROWS), jnp.float32)
    ready = [plgpu.Barrier(num_barriers=shape.stages)] * 2
    free = [plgpu.Barrier(num_arrivals=2, num_barriers=shape.stages)] * 2
    q, barriers = tile_memory(shape, (2,), ROWS, shape.score_dtype), [plgpu.Barrier(num_barriers=2), *ready, *free]
    return [q, *tiles, lse, hold_memory(2), *barriers, *own_out(shape, 2)]
