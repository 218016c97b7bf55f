"""Hopper kernels (sm_90a) in Pallas Mosaic GPU: TMA loads by block index, wgmma, warp specialisation.

Query tiles of 128 rows: two consumer warpgroups of 64 rows take turns on the tensor cores, while one computes its
softmax the other multiplies; a producer warpgroup feeds both. Query blocks of 64 rows: one warpgroup a program, two
programs a multiprocessor. The order of the steps follows FlashAttention-3 as in
jax.experimental.pallas.ops.gpu.attention_mgpu; what is new is the list of key tiles.

Every step reads one int32 of a list: `2 * tile + partial`. A partial tile adds a bias row to its scores, all other
tiles skip that at the price of a branch. A tile past the last is clamped for the load and has nothing but masked keys.
"""

import inspect
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import interpret as mosaic_interpret
from pallas_kernels.blocks import MASKED, block_count, expand_valid, pad_tokens
from pallas_kernels.dispatch import Request, gpu_capability
from pallas_kernels.tuning import MosaicGpuTuning, mosaic_gpu_tuning

_LOG2E = math.log2(math.e)
_LOAD_TAKES_INDEX = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
_ROWS = 64  # of a warpgroup: the M of wgmma
# Floor of the running maximum: exp2(MASKED - m) is 0 for every m above it.
_FLOOR = -1e30


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if jnp.dtype(request.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype={jnp.dtype(request.dtype)} must be bfloat16 or float16"
    if request.head_dim not in (64, 128):
        return f"head_dim={request.head_dim} must be 64 or 128"
    if any(block is not None and block < 64 for block in (request.block_q, request.block_k)):
        return f"block_q={request.block_q}, block_k={request.block_k} must be at least 64"
    capability = gpu_capability()
    if capability is not None and not request.interpret and capability != "9.0":
        return f"compute capability {capability} is not 9.0 (Hopper)"
    return None


@dataclass(frozen=True)
class _Shape:
    """What a kernel is specialised on."""

    heads: int
    """Of one batch row; programs are numbered over batch and heads."""
    head_dim: int
    dtype: Any
    rows: int
    """Of a program: 128 (two consumer warpgroups) or 64."""
    tile: int
    """Keys of a step."""
    tiles: int
    """Key tiles of a head."""
    split: int
    """Programs that share one list."""
    stages: int
    scale: float
    """Of the scores, in base 2."""
    sparse: bool
    """Lists are of a query block, counts vary; else one list a batch row serves all, and every tile is on it."""
    masked: bool
    """Whether any tile may be partial."""


def _load(ref: Any, *, layout: Any) -> Array:
    # jax 0.10 requires an index, later versions deprecate it.
    index = (None,) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


HOPPER = SimpleNamespace(
    axis_index=lax.axis_index,
    set_max_registers=plgpu.set_max_registers,
    layout_cast=plgpu.layout_cast,
    load=_load,
    copy_gmem_to_smem=plgpu.copy_gmem_to_smem,
    copy_smem_to_gmem=plgpu.copy_smem_to_gmem,
    wait_smem_to_gmem=plgpu.wait_smem_to_gmem,
    commit_smem=plgpu.commit_smem,
    barrier_wait=plgpu.barrier_wait,
    barrier_arrive=plgpu.barrier_arrive,
    wgmma=plgpu.wgmma,
    run_scoped=pl.run_scoped,
    accumulate=lambda body, start: pl.run_state(body)(plgpu.ACC.init(start)),
)
"""All that a body asks of the machine; `mosaic_interpret` answers the same without a GPU."""


def _row_vector(gpu: Any, value: float) -> Array:
    return gpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _over_columns(x: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(x, (_ROWS, columns), [0])


class _List:
    """The key tiles of one program, read from device memory an entry ahead of their use."""

    def __init__(self, gpu: Any, shape: _Shape, entries: Any, counts: Any, head: Array, row: Array):
        self.gpu, self.shape, self.entries = gpu, shape, entries
        self.batch = lax.div(head, jnp.int32(shape.heads))
        self.key = (head, lax.div(row, jnp.int32(shape.split))) if shape.sparse else (self.batch,)
        self.length = counts[self.key] if shape.sparse else shape.tiles

    def __getitem__(self, j: Array) -> Array:
        if not self.shape.sparse and not self.shape.masked:
            return 2 * j
        last = self.entries.shape[-1] - 1
        return self.entries[(*self.key, jnp.minimum(j, last))]

    def start(self, entry: Array) -> Array:
        """First key to load."""
        return jnp.minimum(lax.shift_right_logical(entry, 1), self.shape.tiles - 1) * self.shape.tile

    def mask(self, s: Array, entry: Array, bias: Any) -> Array:
        """Adds the bias row if the tile is partial."""
        if bias is None:
            return s

        def partial(s: Array) -> Array:
            keys = pl.ds(lax.shift_right_logical(entry, 1) * self.shape.tile, self.shape.tile)
            row = self.gpu.load(bias.at[self.batch, keys], layout=plgpu.Layout.WGMMA.reduce(0))
            return s + lax.broadcast_in_dim(row, s.shape, [1])

        return lax.cond((entry & 1) == 1, partial, lambda s: s, s)


def _slot(step: Array, stages: int) -> Array:
    return lax.rem(step, jnp.int32(stages))


def _softmax(s: Array, m: Array, total: Array, acc: Array, scale: float) -> tuple[Array, Array, Array, Array]:
    """(p, m, total, acc) of one online-softmax step; m in base 2."""
    m_new = jnp.maximum(m, s.max(axis=1) * scale)
    shrink = jnp.exp2(m - m_new)
    p = jnp.exp2(s * scale - _over_columns(m_new, s.shape[1]))
    return p, m_new, total * shrink, acc * _over_columns(shrink, acc.shape[1])


def _finish(gpu: Any, acc: Array, m: Array, total: Array, out: Any, lse: Any, dtype: Any) -> None:
    """Writes out and LSE of one warpgroup to shared memory."""
    safe = jnp.where(total > 0, total, 1.0)
    out[...] = (acc / _over_columns(safe, acc.shape[1])).astype(dtype)
    lse[...] = jnp.where(total > 0, m * (1 / _LOG2E) + jnp.log(safe), -jnp.inf)
    gpu.commit_smem()


def _pair_kernel(gpu: Any, shape: _Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """128 query rows: two consumers and a producer."""
    q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = memory
    head, row, group = gpu.axis_index("head"), gpu.axis_index("row"), gpu.axis_index("group")
    tiles = _List(gpu, shape, refs.get("entries"), refs.get("counts"), head, row)
    steps, dim = tiles.length, shape.head_dim

    def take_turns() -> None:
        gpu.barrier_arrive(turn)
        gpu.barrier_wait(turn)

    @pl.when(group < 2)
    def _consume() -> None:
        gpu.set_max_registers(232, action="increase")
        mine = pl.ds(row * shape.rows + group * _ROWS, _ROWS)
        q, lse = q_smem.at[group], lse_smem.at[group]
        gpu.copy_gmem_to_smem(refs["q"].at[head, mine], q, q_ready.at[group])
        gpu.barrier_wait(q_ready.at[group])

        @pl.when(steps > 0)
        def _first() -> None:
            gpu.barrier_wait(k_ready.at[0])

        pl.when(group == 1)(take_turns)

        def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            acc, m, total, entry = carry
            slot, following = _slot(j, shape.stages), tiles[j + 1]

            def scores(acc_ref: Any) -> Array:
                gpu.wgmma(acc_ref, q, k_smem.at[slot].T)
                take_turns()
                return acc_ref[...]

            s = gpu.run_scoped(scores, plgpu.ACC((_ROWS, shape.tile), jnp.float32))
            gpu.barrier_arrive(k_free.at[slot])
            s = tiles.mask(s, entry, refs.get("bias"))
            p, m, total, acc = _softmax(s, m, total, acc, shape.scale)
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
                    gpu.barrier_wait(k_ready.at[_slot(j + 1, shape.stages)])

            acc = gpu.accumulate(values, acc)
            gpu.barrier_arrive(v_free.at[slot])
            return acc, m, total, following

        acc = gpu.layout_cast(jnp.full((_ROWS, dim), 0, jnp.float32), plgpu.Layout.WGMMA)
        start = acc, _row_vector(gpu, _FLOOR), _row_vector(gpu, 0.0), tiles[jnp.int32(0)]
        acc, m, total, _ = lax.fori_loop(0, steps, step, start)
        pl.when(group == 0)(take_turns)
        _finish(gpu, acc, m, total, q, lse, shape.dtype)
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
                entry = tiles[jnp.int32(i)]
                load(refs["k"], k_smem, k_ready, i, entry)
                load(refs["v"], v_smem, v_ready, i, entry)

        def step(j: Array, entry: Array) -> Array:
            slot, following = _slot(j, shape.stages), tiles[j + 1]
            gpu.barrier_wait(k_free.at[slot])
            load(refs["k"], k_smem, k_ready, slot, entry)
            gpu.barrier_wait(v_free.at[slot])
            load(refs["v"], v_smem, v_ready, slot, entry)
            return following

        lax.fori_loop(jnp.int32(shape.stages), steps, step, tiles[jnp.int32(shape.stages)])


def _single_kernel(gpu: Any, shape: _Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """64 query rows: one warpgroup that loads ahead for itself; another program fills its gaps."""
    q, k_smem, v_smem, lse, q_ready, k_ready, v_ready = memory
    head, row = gpu.axis_index("head"), gpu.axis_index("row")
    tiles = _List(gpu, shape, refs.get("entries"), refs.get("counts"), head, row)
    steps, stages = tiles.length, shape.stages
    mine = pl.ds(row * _ROWS, _ROWS)

    def load(ref: Any, smem: Any, ready: Any, slot: Any, entry: Array) -> None:
        gpu.copy_gmem_to_smem(ref.at[head, pl.ds(tiles.start(entry), shape.tile)], smem.at[slot], ready.at[slot])

    gpu.copy_gmem_to_smem(refs["q"].at[head, mine], q, q_ready)
    for i in range(stages):

        @pl.when(i < steps)
        def _fill(i: int = i) -> None:
            entry = tiles[jnp.int32(i)]
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
        slot, slot_next = _slot(j, stages), _slot(j + 1, stages)
        following, last = tiles[j + 1], tiles[j + stages + 2]
        pl.when(j + 1 < steps)(lambda: gpu.barrier_wait(k_ready.at[slot_next]))

        def overlapped(next_ref: Any) -> tuple[Array, ...]:
            # The scores of the next tile, while this one goes through its softmax. After the last there are none:
            # what is multiplied then is never used.
            multiply(next_ref, slot_next)
            p, m_new, shrunk, kept = _softmax(tiles.mask(s, entry, refs.get("bias")), m, total, acc, shape.scale)
            narrow, shrunk = p.astype(shape.dtype), shrunk + p.sum(axis=1)
            narrow, m_new, shrunk, kept = lax.optimization_barrier((narrow, m_new, shrunk, kept))
            gpu.barrier_wait(v_ready.at[slot])
            out = gpu.accumulate(lambda ref: gpu.wgmma(ref, narrow, v_smem.at[slot]), kept)
            return next_ref[...], out, m_new, shrunk

        found = gpu.run_scoped(overlapped, plgpu.ACC((_ROWS, shape.tile), jnp.float32))
        pl.when(j + 1 + stages < steps)(lambda: load(refs["k"], k_smem, k_ready, slot_next, further))
        pl.when(j + stages < steps)(lambda: load(refs["v"], v_smem, v_ready, slot, ahead))
        return *found, following, further, last

    s = gpu.run_scoped(first, plgpu.ACC((_ROWS, shape.tile), jnp.float32))
    entries = [tiles[jnp.int32(i)] for i in (0, stages, stages + 1)]
    pl.when(stages < steps)(lambda: load(refs["k"], k_smem, k_ready, 0, entries[1]))
    acc = gpu.layout_cast(jnp.full((_ROWS, shape.head_dim), 0, jnp.float32), plgpu.Layout.WGMMA)
    start = s, acc, _row_vector(gpu, _FLOOR), _row_vector(gpu, 0.0), *entries
    _, acc, m, total, *_ = lax.fori_loop(0, steps, step, start)
    _finish(gpu, acc, m, total, q, lse, shape.dtype)
    gpu.copy_smem_to_gmem(q, refs["out"].at[head, mine])
    gpu.copy_smem_to_gmem(lse, refs["lse"].at[head, mine])
    gpu.wait_smem_to_gmem(0)


_CONSUMER_REGISTERS = {2: 232, 3: 160, 4: 112}
"""Of a thread, by the number of consumer warpgroups: what the producer leaves of 65,536."""
_CHUNK = 64
"""Steps of the block-mass kernel between two reductions over rows."""


def _mass_kernel(gpu: Any, shape: _Shape, refs: dict[str, Any], memory: tuple[Any, ...]) -> None:
    """128 query rows against every key tile: mass of each 64 rows with each tile, and row sums.

    A step leaves its 64 row sums in shared memory; every 64 steps one reduction over rows serves them all.
    """
    q_smem, k_smem, parts, sums, rows_smem, q_ready, k_ready, k_free = memory
    head, row, group = gpu.axis_index("head"), gpu.axis_index("row"), gpu.axis_index("group")
    consumers = shape.rows // _ROWS
    tiles = _List(gpu, shape, refs.get("entries"), None, head, row)

    @pl.when(group < consumers)
    def _consume() -> None:
        gpu.set_max_registers(_CONSUMER_REGISTERS[consumers], action="increase")
        mine = pl.ds(row * shape.rows + group * _ROWS, _ROWS)
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

        def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            s, row_sum = carry
            more, slot, entry = j + 1 < shape.tiles, _slot(j + 1, shape.stages), tiles[j]
            pl.when(more)(lambda: gpu.barrier_wait(k_ready.at[slot]))

            def overlapped(next_ref: Any) -> tuple[Array, Array]:
                # The scores of the next tile, while this one is summed. After the last there are none: what is
                # multiplied then is never used.
                multiply(next_ref, slot)
                scaled = tiles.mask(s, entry, refs.get("bias")) * shape.scale
                seen = jnp.exp2(scaled - _over_columns(shift, shape.tile)).sum(axis=1)
                part[lax.rem(j, jnp.int32(_CHUNK))] = seen * weight
                return next_ref[...], row_sum + seen

            found = gpu.run_scoped(overlapped, plgpu.ACC((_ROWS, shape.tile), jnp.float32))
            pl.when(more)(lambda: gpu.barrier_arrive(k_free.at[slot]))
            return found

        def chunk(c: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            begin = c * _CHUNK
            carry = lax.fori_loop(begin, jnp.minimum(begin + _CHUNK, shape.tiles), step, carry)
            gpu.commit_smem()
            chunk_sums[...] = gpu.load(part, layout=plgpu.Layout.WGMMA).sum(axis=1)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(chunk_sums, refs["mass"].at[head, consumers * row + group, pl.ds(begin, _CHUNK)])
            gpu.wait_smem_to_gmem(0)
            return carry

        chunks = block_count(shape.tiles, _CHUNK)
        gpu.barrier_wait(k_ready.at[0])
        s = gpu.run_scoped(first, plgpu.ACC((_ROWS, shape.tile), jnp.float32))
        gpu.barrier_arrive(k_free.at[0])
        rows_smem.at[group][...] = lax.fori_loop(0, chunks, chunk, (s, _row_vector(gpu, 0.0)))[1]
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

        @pl.loop(shape.stages, shape.tiles)
        def _steps(j: Array) -> None:
            slot = _slot(j, shape.stages)
            gpu.barrier_wait(k_free.at[slot])
            load(j, slot)


def _mass_memory(shape: _Shape) -> list[Any]:
    """Scratch of the block-mass kernel, in the order in which it unpacks it."""
    groups = shape.rows // _ROWS
    return [
        _tile_memory(shape, (groups,), _ROWS),
        _tile_memory(shape, (shape.stages,), shape.tile),
        plgpu.SMEM((groups, _CHUNK, _ROWS), jnp.float32),
        plgpu.SMEM((groups, _CHUNK), jnp.float32),
        plgpu.SMEM((groups, _ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=groups),
        plgpu.Barrier(num_barriers=shape.stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=shape.stages),
    ]


def _tile_memory(shape: _Shape, leading: tuple[int, ...], rows: int) -> Any:
    """Shared memory for [*leading, rows, D] in the layout of TMA and wgmma."""
    columns = 128 // jnp.dtype(shape.dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*leading, rows, shape.head_dim), shape.dtype, transforms=transforms)


def _attention_memory(shape: _Shape) -> list[Any]:
    """Scratch of the attention kernels, in the order in which they unpack it."""
    keys = [_tile_memory(shape, (shape.stages,), shape.tile)] * 2
    ready = [plgpu.Barrier(num_barriers=shape.stages)] * 2
    if shape.rows == _ROWS:
        return [_tile_memory(shape, (), _ROWS), *keys, plgpu.SMEM((_ROWS,), jnp.float32), plgpu.Barrier(), *ready]
    free = [plgpu.Barrier(num_arrivals=2, num_barriers=shape.stages)] * 2
    lse = plgpu.SMEM((2, _ROWS), jnp.float32)
    turn = plgpu.Barrier(num_arrivals=2)
    return [_tile_memory(shape, (2,), _ROWS), *keys, lse, plgpu.Barrier(num_barriers=2), *ready, *free, turn]


def _launch(
    body: Any,
    shape: _Shape,
    memory: list[Any],
    groups: int,
    inputs: dict[str, Array],
    outputs: dict[str, Any],
    grid: tuple[int, int],
    interpret: bool,
) -> dict[str, Array]:
    """Runs `body(gpu, shape, refs by name, memory)` over (head, row) with `groups` warpgroups."""
    if interpret:
        run = lambda gpu, refs, scratch: body(gpu, shape, refs, scratch)
        return mosaic_interpret.run(run, memory, groups, inputs, outputs, grid)
    names = (*inputs, *outputs)

    def entry(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        axes = {"collective_axes": "group"} if groups > 1 else {}
        pl.run_scoped(lambda *scratch: body(HOPPER, shape, named, scratch), *memory, **axes)

    threads: dict[str, Any] = {"num_threads": groups, "thread_name": "group"} if groups > 1 else {}
    results = plgpu.kernel(
        entry,
        out_type=list(outputs.values()),
        grid=grid,
        grid_names=("head", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **threads,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _tile_bias(
    block_valid: Array | None, batch: int, block: int, keys: int, padded: int, tile: int
) -> tuple[Array, Array]:
    """(bias float32 [B, keys of tiles + 1], partial bool [B, tiles + 1]); a tile past the last masks all."""
    valid = expand_valid(block_valid, batch, block, keys)
    valid = jnp.pad(valid, ((0, 0), (0, padded - keys + tile)))
    return jnp.where(valid, 0.0, MASKED), ~valid.reshape(batch, -1, tile).all(-1)


def _every_tile(
    block_valid: Array | None, batch: int, block: int, keys: int, padded: int, tile: int
) -> tuple[dict[str, Array], Array | None]:
    """The list of all key tiles, one for each batch row, and the bias; neither if every key is valid."""
    if block_valid is None and keys == padded:
        return {}, None
    bias, partial = _tile_bias(block_valid, batch, block, keys, padded, tile)
    return {"entries": 2 * jnp.arange(partial.shape[1], dtype=jnp.int32) + partial}, bias


def _attention(
    q: Array, k: Array, v: Array, shape: _Shape, lists: dict[str, Array], bias: Array | None, interpret: bool
) -> tuple[Array, Array]:
    """Runs the kernel that serves `shape` on padded arrays; `lists` holds entries and, if sparse, counts."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    inputs = {"q": flat(q), "k": flat(k), "v": flat(v)} | lists | ({} if bias is None else {"bias": bias})
    programs = flat(q).shape[0], q.shape[2] // shape.rows
    pair = shape.rows == 2 * _ROWS
    made = _launch(
        _pair_kernel if pair else _single_kernel,
        shape,
        _attention_memory(shape),
        3 if pair else 1,
        inputs,
        {
            "out": jax.ShapeDtypeStruct(flat(q).shape, q.dtype),
            "lse": jax.ShapeDtypeStruct(flat(q).shape[:2], jnp.float32),
        },
        programs,
        interpret,
    )
    return made["out"].reshape(q.shape), made["lse"].reshape(q.shape[:3])


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_valid: Array | None,
    block_k: int,
    scale: float,
    interpret: bool = False,
    tuning: MosaicGpuTuning | None = None,
) -> tuple[Array, Array]:
    """Dense attention; see `pallas_kernels.flash_attention`."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    tuning = tuning or mosaic_gpu_tuning("dense", dim)
    q, k, v = pad_tokens(q, 2 * _ROWS), pad_tokens(k, tuning.tile_k), pad_tokens(v, tuning.tile_k)
    tile, tiles = tuning.tile_k, k.shape[2] // tuning.tile_k
    lists, bias = _every_tile(block_valid, batch, block_k, keys, k.shape[2], tile)
    shape = _Shape(
        heads,
        dim,
        q.dtype,
        rows=2 * _ROWS,
        tile=tile,
        tiles=tiles,
        split=1,
        stages=tuning.stages,
        scale=scale * _LOG2E,
        sparse=False,
        masked=bias is not None,
    )
    out, lse = _attention(q, k, v, shape, lists, bias, interpret)
    return out[:, :, :rows], lse[:, :, :rows]


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    counts: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None,
    scale: float,
    interpret: bool = False,
    tuning: MosaicGpuTuning | None = None,
) -> tuple[Array, Array]:
    """Attention over selected key blocks; see `pallas_kernels.block_sparse_attention`."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    tuning = tuning or mosaic_gpu_tuning("block_sparse", dim, block_q, block_k)
    q, k, v = pad_tokens(q, block_q), pad_tokens(k, block_k), pad_tokens(v, block_k)
    tile, tile_q = min(block_k, tuning.tile_k), min(block_q, 2 * _ROWS)
    tiles, parts = k.shape[2] // tile, block_k // tile
    bias, partial = _tile_bias(block_valid, batch, block_k, keys, k.shape[2], tile)
    indices = indices.astype(jnp.int32)
    first = jnp.where((indices >= 0) & (indices < k.shape[2] // block_k), indices * parts, tiles)
    tile_of = jnp.minimum(first[..., None] + jnp.arange(parts), tiles).reshape(*first.shape[:3], -1)
    entries = 2 * tile_of + jnp.take_along_axis(partial[:, None, None], tile_of, axis=-1, mode="clip")
    shape = _Shape(
        heads,
        dim,
        q.dtype,
        rows=tile_q,
        tile=tile,
        tiles=tiles,
        split=block_q // tile_q,
        stages=tuning.stages,
        scale=scale * _LOG2E,
        sparse=True,
        masked=True,
    )
    flat = lambda x: x.reshape(batch * heads, *x.shape[2:])
    lists = {"entries": flat(entries), "counts": flat(jnp.clip(counts, 0, indices.shape[3]).astype(jnp.int32) * parts)}
    out, lse = _attention(q, k, v, shape, lists, bias, interpret)
    return out[:, :, :rows], lse[:, :, :rows]


def block_mass(
    q: Array,
    k: Array,
    lse: Array,
    *,
    block_q: int,
    block_k: int,
    block_valid: Array | None,
    query_valid: Array | None,
    scale: float,
    interpret: bool = False,
    tuning: MosaicGpuTuning | None = None,
) -> tuple[Array, Array]:
    """Attention mass of block pairs; see `pallas_kernels.block_mass`."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    tuning = tuning or mosaic_gpu_tuning("block_mass", dim, block_q, block_k)
    tile, rows_each = min(block_k, tuning.tile_k), tuning.groups * _ROWS
    step = math.lcm(block_q, rows_each)
    nq, nk = block_count(rows, block_q), block_count(keys, block_k)
    weight = expand_valid(query_valid, batch, block_q, rows).astype(jnp.float32)
    # A row of LSE -inf has no valid key: exp2(s - inf) = 0.
    shift = pad_tokens(jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2E), step)
    q, k = pad_tokens(q, step), pad_tokens(k, block_k)
    tiles, padded = k.shape[2] // tile, q.shape[2]
    lists, bias = _every_tile(block_valid, batch, block_k, keys, k.shape[2], tile)
    shape = _Shape(
        heads,
        dim,
        q.dtype,
        rows=rows_each,
        tile=tile,
        tiles=tiles,
        split=1,
        stages=tuning.stages,
        scale=scale * _LOG2E,
        sparse=False,
        masked=bias is not None,
    )
    flat = lambda x: x.reshape(batch * heads, *x.shape[2:])
    inputs = {"q": flat(q), "k": flat(k), "shift": flat(shift)} | lists
    inputs |= {"weight": jnp.pad(weight, ((0, 0), (0, padded - rows)))} | ({} if bias is None else {"bias": bias})
    float32 = lambda *s: jax.ShapeDtypeStruct((batch * heads, *s), jnp.float32)
    outputs = {
        "mass": float32(padded // _ROWS, block_count(tiles, _CHUNK) * _CHUNK),
        "row_sum": float32(padded),
    }
    grid = batch * heads, padded // rows_each
    made = _launch(_mass_kernel, shape, _mass_memory(shape), tuning.groups + 1, inputs, outputs, grid, interpret)
    mass = made["mass"].reshape(batch, heads, -1, block_q // _ROWS, made["mass"].shape[-1])[..., :tiles]
    mass = mass.reshape(*mass.shape[:4], nk, block_k // tile).sum((3, 5))
    return mass[:, :, :nq], made["row_sum"].reshape(batch, heads, padded)[:, :, :rows]
