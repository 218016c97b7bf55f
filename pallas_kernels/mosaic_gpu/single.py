"""Attention of query tiles of 64 rows: one warpgroup a program, two programs or three a multiprocessor."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.consumer import Consumer, hold_memory, own_out
from pallas_kernels.mosaic_gpu.shape import ROWS, Shape, TileList, slot_of, tile_memory


def kernel(gpu: Any, shape: Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """64 query rows: one warpgroup that loads ahead for itself; another program fills its gaps."""
    q, k_smem, v_smem, lse, hold, q_ready, k_ready, v_ready, *apart = memory
    head, row = gpu.axis_index("head"), gpu.axis_index("row")
    tiles = TileList(gpu, shape, refs.get("entries"), refs.get("counts"), head, row)
    steps = tiles.length
    loads = (refs["k"], k_smem, k_ready), (refs["v"], v_smem, v_ready)
    gpu.copy_gmem_to_smem(refs["q"].at[head, pl.ds(row * ROWS, ROWS)], q, q_ready)
    for which in loads:
        for i in range(which[1].shape[0]):

            @pl.when(i < steps)
            def _fill(which: Any = which, i: int = i) -> None:
                tiles.load(which, i, tiles[np.int32(i)])

    gpu.barrier_wait(q_ready)

    def done(which: int, j: Array, entries: tuple[Array, Array]) -> None:
        stages = loads[which][1].shape[0]
        pl.when(j + stages < steps)(lambda: tiles.load(loads[which], slot_of(j, stages), entries[which]))

    consumer = Consumer(
        gpu,
        shape,
        refs,
        tiles,
        program=(head, row),
        first=row * ROWS,
        q=q,
        k=k_smem,
        v=v_smem,
        k_ready=k_ready,
        v_ready=v_ready,
        hold=hold,
        # Step j is through with the scores of tile j and the values of tile j - 1.
        begin=lambda j: (tiles[j + k_smem.shape[0]], tiles[j - 1 + v_smem.shape[0]]),
        k_done=lambda j, entries: done(0, j, entries),
        v_done=lambda j, entries: done(1, j, entries),
    )
    consumer.run((apart or [q])[0], lse)


def memory(shape: Shape) -> list[Any]:
    """Scratch, in the order in which the kernel unpacks it."""
    # The scores of a tile are through before its values are begun.
    stages, dtypes = (max(1, shape.stages - 1), shape.stages), (shape.score_dtype, shape.dtype)
    tiles = [tile_memory(shape, (n,), shape.tile, dtype) for n, dtype in zip(stages, dtypes, strict=True)]
    ready = [plgpu.Barrier(num_barriers=n) for n in stages]
    q, lse = tile_memory(shape, (), ROWS, shape.score_dtype), plgpu.SMEM((ROWS,), jnp.float32)
    return [q, *tiles, lse, hold_memory(), plgpu.Barrier(), *ready, *own_out(shape)]
