"""What a Hopper kernel asks of the machine, and how it is launched: on a GPU, or in the interpreter."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import varying
from pallas_kernels.mosaic_gpu import interpret as interpreter
from pallas_kernels.mosaic_gpu.shape import Shape


def index_of(load: Callable[..., Any]) -> tuple[None, ...]:
    """What `plgpu.load` takes after the array: an index in jax 0.10, which 0.11 deprecates and 0.12 does not have."""
    index = inspect.signature(load).parameters.get("idx")
    return (None,) if index is not None and index.default is inspect.Parameter.empty else ()


_INDEX = index_of(plgpu.load)


def _load(ref: Any, *, layout: Any) -> Array:
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def _accumulate(body: Any, start: Array, *others: Array) -> tuple[Array, ...]:
    return pl.run_state(lambda refs: body(*refs))((plgpu.ACC.init(start), *others))


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
    peek=lambda acc, pending: plgpu.wgmma_accumulator_load(acc, wait_n=pending),
    accumulate=_accumulate,
)
"""All that a body asks of the machine; `interpret` answers the same without a GPU."""


def launch(
    body: Any,
    shape: Shape,
    memory: list[Any],
    groups: int,
    inputs: dict[str, Array],
    outputs: dict[str, tuple[tuple[int, ...], Any]],
    grid: tuple[int, int],
    interpret: bool,
) -> dict[str, Array]:
    """Runs `body(gpu, shape, refs by name, memory)` over (head, row) with `groups` warpgroups.

    `outputs` gives shape and dtype of each result.
    """
    made = {name: varying.result(*of, *inputs.values()) for name, of in outputs.items()}
    if interpret:
        run = lambda gpu, refs, scratch: body(gpu, shape, refs, scratch)
        return interpreter.run(run, memory, groups, inputs, made, grid)
    names = (*inputs, *outputs)

    def entry(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        axes = {"collective_axes": "group"} if groups > 1 else {}
        pl.run_scoped(lambda *scratch: body(HOPPER, shape, named, scratch), *memory, **axes)

    threads: dict[str, Any] = {"num_threads": groups, "thread_name": "group"} if groups > 1 else {}
    results = plgpu.kernel(
        entry,
        out_type=list(made.values()),
        grid=grid,
        grid_names=("head", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **threads,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))
