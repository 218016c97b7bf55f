"""Block mass on Hopper: scores of 128 query rows with every key tile, summed as they come."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import LOG2E, block_count, merge_heads, pad_tokens
from pallas_kernels.calls import MassCall
from pallas_kernels.mosaic_gpu.machine import launch
from pallas_kernels.mosaic_gpu.shape import (
    ROWS,
    Shape,
    TileList,
    every_tile,
    loop,
    over_columns,
    row_vector,
    slot_of,
    tile_memory,
)
from pallas_kernels.mosaic_gpu.softmax import PART, partial_sums
from pallas_kernels.tuning import MosaicGpuTuning, mosaic_gpu_tuning

_CONSUMER_REGISTERS = {2: 232, 3: 160, 4: 112}
"""Of a thread, by the number of consumer warpgroups: what the producer leaves of 65,536."""
_CHUNK = 64
"""Steps of the block-mass kernel between two reductions over rows."""


def kernel(gpu: Any, shape: Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """128 query rows against every key tile: mass of each 64 rows with each tile, and row sums.

    A step leaves its 64 row sums in shared memory; every 64 steps one reduction over rows serves them all.
    """
    q_smem, k_smem, parts, sums, rows_smem, q_ready, k_ready, k_free = memory
    head, row, group = gpu.axis_index("head"), gpu.axis_index("row"), gpu.axis_index("group")
    consumers = shape.rows // ROWS
    tiles = TileList(gpu, shape, refs.get("entries"), None, head, row)

    @pl.when(group < consumers)
    def _consume() -> None:
        gpu.set_max_registers(_CONSUMER_REGISTERS[consumers], action="increase")
        mine = pl.ds(row * shape.rows + group * ROWS, ROWS)
        vector = lambda ref, i: gpu.load(ref.at[i, mine], layout=plgpu.Layout.WGMMA.reduce(1))
        q, part, chunk_sums = q_smem.at[group], parts.at[group], sums.at[group]
        gpu.copy_gmem_to_smem(refs["q"].at[head, mine], q, q_ready.at[group])
        shift, weight = vector(refs["shift"], head), vector(refs["weight"], tiles.batch)
        gpu.barrier_wait(q_ready.at[group])

        def multiply(acc_ref: Any, slot: Any) -> None:
            gpu.wgmma(acc_ref, q, k_smem.at[slot].T)

        def first(acc_ref: Any) -> Array:
            multiply(acc_ref, 0)
            return acc_ref[...]

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            s, row_sum, last = carry
            more, slot, entry = j + 1 < shape.tiles, slot_of(j + 1, shape.stages), tiles[j]
            pl.when(more)(lambda: gpu.barrier_wait(k_ready.at[slot]))

            def overlapped(next_ref: Any) -> tuple[Array, Array, Array]:
                # The scores of the next tile, while this one is summed. After the last there are none: what is
                # multiplied then is never used. The sums of the tile before are reduced between the exponentials.
                multiply(next_ref, slot)
                part[lax.rem(j, np.int32(_CHUNK))] = last.sum(axis=1) * weight
                scaled = tiles.mask(s, entry, refs.get("bias")) * shape.scale
                seen = partial_sums(jnp.exp2(scaled - over_columns(shift, shape.tile)))
                return next_ref[...], row_sum + seen, seen

            found = gpu.run_scoped(overlapped, plgpu.ACC((ROWS, shape.tile), jnp.float32))
            pl.when(more)(lambda: gpu.barrier_arrive(k_free.at[slot]))
            return found

        def chunk(c: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            begin = c * _CHUNK
            end = jnp.minimum(begin + _CHUNK, shape.tiles)
            s, row_sum, last = loop(begin, end, step, (*carry, none))
            part[end - begin] = last.sum(axis=1) * weight
            gpu.commit_smem()
            # Place 0 is of the tile before the first.
            chunk_sums[...] = gpu.load(part.at[pl.ds(1, _CHUNK)], layout=plgpu.Layout.WGMMA).sum(axis=1)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(chunk_sums, refs["mass"].at[head, consumers * row + group, pl.ds(begin, _CHUNK)])
            gpu.wait_smem_to_gmem(0)
            return s, row_sum

        none = over_columns(row_vector(gpu, 0.0), PART)
        chunks = block_count(shape.tiles, _CHUNK)
        gpu.barrier_wait(k_ready.at[0])
        s = gpu.run_scoped(first, plgpu.ACC((ROWS, shape.tile), jnp.float32))
        gpu.barrier_arrive(k_free.at[0])
        rows_smem.at[group][...] = loop(0, chunks, chunk, (s, none))[1].sum(axis=1)
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(rows_smem.at[group], refs["row_sum"].at[head, mine])
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == consumers)
    def _produce() -> None:
        gpu.set_max_registers(24 if consumers > 2 else 40, action="decrease")

        def load(j: Any, slot: Any) -> None:
            keys = pl.ds(j * shape.tile, shape.tile)
            gpu.copy_gmem_to_smem(refs["k"].at[head, keys], k_smem.at[slot], k_ready.at[slot])

        for i in range(min(shape.stages, shape.tiles)):
            load(i, i)

        @pl.loop(np.int32(shape.stages), np.int32(shape.tiles))
        def _steps(j: Array) -> None:
            slot = slot_of(j, shape.stages)
            gpu.barrier_wait(k_free.at[slot])
            load(j, slot)


def memory(shape: Shape) -> list[Any]:
    """Scratch, in the order in which the kernel unpacks it."""
    groups = shape.rows // ROWS
    return [
        tile_memory(shape, (groups,), ROWS),
        tile_memory(shape, (shape.stages,), shape.tile),
        plgpu.SMEM((groups, _CHUNK + 1, ROWS), jnp.float32),
        plgpu.SMEM((groups, _CHUNK), jnp.float32),
        plgpu.SMEM((groups, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=groups),
        plgpu.Barrier(num_barriers=shape.stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=shape.stages),
    ]


def block_mass(call: MassCall, tuning: MosaicGpuTuning | None = None) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    (batch, heads, _, dim), keys = call.q.shape, call.k.shape[2]
    tuning = tuning or mosaic_gpu_tuning("block_mass", dim, call.block_q, call.block_k)
    tile, rows = min(call.block_k, tuning.tile_k), tuning.groups * ROWS
    q, k = pad_tokens(call.q, math.lcm(call.block_q, rows)), pad_tokens(call.k, call.block_k)
    tiles, padded = k.shape[2] // tile, q.shape[2]
    lists = every_tile(call.block_valid, batch, call.block_k, keys, k.shape[2], tile)
    shape = Shape.of(q, tile, tiles, call.scale, rows=rows, stages=tuning.stages, masked="bias" in lists)
    inputs = {"q": merge_heads(q), "k": merge_heads(k), "shift": merge_heads(call.shift(padded)) * LOG2E} | lists
    inputs |= {"weight": call.weight(padded)}
    outputs = {
        "mass": ((batch * heads, padded // ROWS, block_count(tiles, _CHUNK) * _CHUNK), jnp.float32),
        "row_sum": ((batch * heads, padded), jnp.float32),
    }
    grid, groups = (batch * heads, padded // rows), tuning.groups + 1
    made = launch(kernel, shape, memory(shape), groups, inputs, outputs, grid, call.interpret)
    mass = call.of_blocks(made["mass"][..., :tiles], call.block_q // ROWS)
    return mass, made["row_sum"].reshape(batch, heads, padded)[:, :, : call.q.shape[2]]
