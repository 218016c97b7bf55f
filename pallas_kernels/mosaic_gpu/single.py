"""Attention of query tiles of 64 rows: one warpgroup a program, two programs or three a multiprocessor."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import FLOOR
from pallas_kernels.mosaic_gpu.shape import ROWS, Shape, TileList, loop, row_vector, slot_of, tile_memory
from pallas_kernels.mosaic_gpu.softmax import finish, softmax


def kernel(gpu: Any, shape: Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """64 query rows: one warpgroup that loads ahead for itself; another program fills its gaps."""
    q, k_smem, v_smem, lse, q_ready, k_ready, v_ready = memory
    head, row = gpu.axis_index("head"), gpu.axis_index("row")
    tiles = TileList(gpu, shape, refs.get("entries"), refs.get("counts"), head, row)
    steps, stages = tiles.length, shape.stages
    mine = pl.ds(row * ROWS, ROWS)

    def load(ref: Any, smem: Any, ready: Any, slot: Any, entry: Array) -> None:
        gpu.copy_gmem_to_smem(ref.at[head, pl.ds(tiles.start(entry), shape.tile)], smem.at[slot], ready.at[slot])

    gpu.copy_gmem_to_smem(refs["q"].at[head, mine], q, q_ready)
    for i in range(stages):

        @pl.when(i < steps)
        def _fill(i: int = i) -> None:
            entry = tiles[np.int32(i)]
            load(refs["k"], k_smem, k_ready, i, entry)
            load(refs["v"], v_smem, v_ready, i, entry)

    gpu.barrier_wait(q_ready)
    pl.when(steps > 0)(lambda: gpu.barrier_wait(k_ready.at[0]))

    def multiply(acc_ref: Any, slot: Any) -> None:
        gpu.wgmma(acc_ref, q, k_smem.at[slot].T)

    def first(acc_ref: Any) -> Array:
        multiply(acc_ref, 0)
        return acc_ref[...]

    def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        s, acc, m, total, entry, ahead, further = carry
        slot, slot_next = slot_of(j, stages), slot_of(j + 1, stages)
        following, last = tiles[j + 1], tiles[j + stages + 2]
        pl.when(j + 1 < steps)(lambda: gpu.barrier_wait(k_ready.at[slot_next]))

        def overlapped(next_ref: Any) -> tuple[Array, ...]:
            # The scores of the next tile, while this one goes through its softmax. After the last there are none:
            # what is multiplied then is never used.
            multiply(next_ref, slot_next)
            p, m_new, shrunk, kept = softmax(tiles.mask(s, entry, refs.get("bias")), m, total, acc, shape.scale)
            narrow, shrunk = p.astype(shape.dtype), shrunk + p.sum(axis=1)
            narrow, m_new, shrunk, kept = lax.optimization_barrier((narrow, m_new, shrunk, kept))
            gpu.barrier_wait(v_ready.at[slot])
            out = gpu.accumulate(lambda ref: gpu.wgmma(ref, narrow, v_smem.at[slot]), kept)
            return next_ref[...], out, m_new, shrunk

        found = gpu.run_scoped(overlapped, plgpu.ACC((ROWS, shape.tile), jnp.float32))
        pl.when(j + 1 + stages < steps)(lambda: load(refs["k"], k_smem, k_ready, slot_next, further))
        pl.when(j + stages < steps)(lambda: load(refs["v"], v_smem, v_ready, slot, ahead))
        return *found, following, further, last

    s = gpu.run_scoped(first, plgpu.ACC((ROWS, shape.tile), jnp.float32))
    entries = [tiles[np.int32(i)] for i in (0, stages, stages + 1)]
    pl.when(stages < steps)(lambda: load(refs["k"], k_smem, k_ready, 0, entries[1]))
    acc = gpu.layout_cast(jnp.full((ROWS, shape.head_dim), 0, jnp.float32), plgpu.Layout.WGMMA)
    start = s, acc, row_vector(gpu, FLOOR), row_vector(gpu, 0.0), *entries
    _, acc, m, total, *_ = loop(0, steps, step, start)
    finish(gpu, acc, m, total, q, lse, shape.dtype)
    gpu.copy_smem_to_gmem(q, refs["out"].at[head, mine])
    gpu.copy_smem_to_gmem(lse, refs["lse"].at[head, mine])
    gpu.wait_smem_to_gmem(0)


def memory(shape: Shape) -> list[Any]:
    """Scratch, in the order in which the kernel unpacks it."""
    keys = [tile_memory(shape, (shape.stages,), shape.tile)] * 2
    ready = [plgpu.Barrier(num_barriers=shape.stages)] * 2
    return [tile_memory(shape, (), ROWS), *keys, plgpu.SMEM((ROWS,), jnp.float32), plgpu.Barrier(), *ready]
