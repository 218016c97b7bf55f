"""Interpreter of the Hopper kernels' bodies: what `machine.HOPPER` does on the device, done eagerly on a CPU.

Pallas' own interpreter lacks wgmma accumulators in registers. This one runs a body as it stands, one thread a
warpgroup, one of them at a time, and is as unkind as the hardware may be: shared memory and outputs begin as NaN, a TMA
copy spoils its target at once and lands only when its barrier is waited for, a product is taken only when its
accumulator is read, and a warpgroup runs until it must wait, in whichever order of precedence is asked for. An index
out of range, a barrier phase that was missed or is never waited for, shared memory read before it is committed, and a
deadlock are errors.
"""

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

PRODUCER_FIRST = False
"""Whether the last warpgroup takes precedence over the others; a test runs every case both ways."""


class KernelError(AssertionError):
    """What the kernel did is undefined on the device."""


def _resolve(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """A basic NumPy index; KernelError if it leaves the array."""
    given = index if isinstance(index, tuple) else (index,)
    if given == (Ellipsis,):
        return (...,)
    found: list[Any] = []
    for i, size in zip(given, shape, strict=False):
        start, length = (int(i.start), int(i.size)) if hasattr(i, "size") and hasattr(i, "start") else (int(i), 1)
        if start < 0 or start + length > size:
            raise KernelError(f"index {start}:{start + length} leaves an axis of {size}")
        found.append(slice(start, start + length) if hasattr(i, "start") else start)
    return (*found, ...)


def _spoiled(dtype: Any) -> Any:
    """NaN, or of integers the one that no quantised number is."""
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan


class _Indexer:
    def __init__(self, at: Callable[[Any], Any]):
        self._at = at

    def __getitem__(self, index: Any) -> Any:
        return self._at(index)


class _Ref:
    """A view of an array in device memory, or in shared memory if `owner` is given."""

    def __init__(self, array: np.ndarray, owner: "_Program | None" = None, tile: np.ndarray | None = None):
        self.array, self.owner, self.shape, self.dtype = array, owner, array.shape, array.dtype
        self.at = _Indexer(self._view)
        self.tile = array if tile is None else tile
        """What TMA loads: zeros past the end of device memory, where `array` is empty."""

    def _view(self, index: Any) -> "_Ref":
        try:
            return _Ref(self.array[_resolve(index, self.shape)], self.owner)
        except KernelError:
            if self.owner is not None or self.array.ndim != 3 or int(index[1].start) < 0:
                raise
            found = self.array[int(index[0]), int(index[1].start) :]
            return _Ref(found[:0], None, np.pad(found, ((0, int(index[1].size) - len(found)), (0, 0))))

    @property
    def T(self) -> "_Ref":  # noqa: N802, the name of NumPy and JAX
        return _Ref(self.array.T, self.owner)

    def __getitem__(self, index: Any) -> Array:
        if self.owner is not None and self.owner.uncommitted[self.owner.group]:
            raise KernelError("shared memory is read before what was written is committed")
        return jnp.asarray(self.array[_resolve(index, self.shape)].copy())

    def __setitem__(self, index: Any, value: Array) -> None:
        assert self.owner is not None, "device memory is written by copies only"
        self.owner.uncommitted[self.owner.group] = True
        self.array[_resolve(index, self.shape)] = np.asarray(value)


class _Barrier:
    """One mbarrier: the number of its completed phases, and how many each warpgroup has waited for."""

    def __init__(self, arrivals: int, groups: int):
        self.arrivals, self.arrived, self.completed, self.waited = arrivals, 0, 0, [0] * groups
        self.copy: tuple[_Ref, _Ref] | None = None

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived == self.arrivals:
            self.arrived, self.completed = 0, self.completed + 1

    def passable(self, group: int) -> bool:
        return self.copy is not None or self.completed > self.waited[group]

    def wait(self, group: int) -> None:
        if self.completed == self.waited[group]:
            assert self.copy is not None
            source, target = self.copy
            target.array[...] = source.tile
            self.copy = None
            self.arrive()
        self.waited[group] += 1
        if self.completed != self.waited[group]:
            raise KernelError(f"warpgroup {group} missed a barrier phase: its parity cannot tell them apart")


def _axes(shape: Any) -> tuple[int, ...]:
    # A number until jax 0.10.1, a shape since.
    return shape if isinstance(shape, tuple) else (shape,)


class _Barriers:
    def __init__(self, kind: Any, groups: int):
        self._all = [_Barrier(kind.num_arrivals, groups) for _ in range(math.prod(_axes(kind.num_barriers)))]
        self.at = _Indexer(lambda i: self._all[_resolve(i, (len(self._all),))[0]])


def _one(barrier: Any) -> _Barrier:
    return barrier.at[0] if isinstance(barrier, _Barriers) else barrier


class _Accumulator:
    """A matrix in registers. The products of a warpgroup, kept in `flight`, are taken in the order of their issue."""

    def __init__(self, value: Array, flight: list[tuple["_Accumulator", Any, _Ref]]):
        self.value, self.flight = value, flight

    def taken(self, pending: int) -> Array:
        """The value once no more than `pending` products are in flight."""
        while len(self.flight) > pending:
            of, a, b = self.flight.pop(0)
            left = a.array if isinstance(a, _Ref) else np.asarray(a)
            of.value += jnp.asarray(left.astype(np.float32) @ b.array.astype(np.float32)).astype(of.value.dtype)
        if any(of is self for of, _, _ in self.flight):
            raise KernelError("an accumulator is read while a product into it is in flight")
        return self.value

    def __getitem__(self, index: Any) -> Array:
        assert index is Ellipsis
        return self.taken(0)


class _State:
    """A value in registers that a body writes as a whole."""

    def __init__(self, value: Array):
        self.value = value

    def __getitem__(self, index: Any) -> Array:
        assert index is Ellipsis
        return self.value

    def __setitem__(self, index: Any, value: Array) -> None:
        assert index is Ellipsis
        self.value = value


class _Warpgroup(threading.Thread):
    """Runs the body until it must wait; `resume` and `paused` pass the turn to and fro."""

    def __init__(self, body: Callable[[], None]):
        super().__init__(daemon=True)
        self._body = body
        self.resume, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self.ended = False

    def run(self) -> None:
        self.resume.acquire()
        try:
            with jax.disable_jit():
                self._body()
        except BaseException as error:  # handed to the caller's thread
            self.error = error
        self.ended = True
        self.paused.release()

    def pause_until(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self.paused.release()
        self.resume.acquire()


class _Program:
    """One program of the grid, with the operations of `machine.HOPPER`."""

    def __init__(self, body: Any, refs: dict[str, _Ref], memory: Sequence[Any], axes: dict[str, int], groups: int):
        self.axes, self.group = axes, 0
        self.uncommitted = [False] * groups
        self.stores: list[list[tuple[_Ref, _Ref]]] = [[] for _ in range(groups)]
        self.flights: list[list[tuple[_Accumulator, Any, _Ref]]] = [[] for _ in range(groups)]
        scratch = [self._allocate(kind, groups) for kind in memory]
        self.threads = [_Warpgroup(lambda: body(self, refs, scratch)) for _ in range(groups)]
        self.barriers = [b for s in scratch if isinstance(s, _Barriers) for b in s._all]

    def _allocate(self, kind: Any, groups: int) -> Any:
        if isinstance(kind, plgpu.Barrier):
            return _Barriers(kind, groups)
        return _Ref(np.full(kind.shape, _spoiled(kind.dtype), kind.dtype), self)

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
        order = range(len(self.threads))[:: -1 if PRODUCER_FIRST else 1]
        while not all(thread.ended for thread in self.threads):
            able = [g for g in order if not self.threads[g].ended and self.threads[g].ready()]
            if not able:
                raise KernelError(f"deadlock: warpgroups {[g for g in order if not self.threads[g].ended]} wait")
            self.group = able[0]
            thread = self.threads[self.group]
            thread.resume.release()
            thread.paused.acquire()
            if thread.error is not None:
                raise thread.error
        if any(self.stores) or any(barrier.copy is not None for barrier in self.barriers):
            raise KernelError("the program ended before a copy that it had started")

    def axis_index(self, name: str) -> Array:
        return jnp.int32(self.group if name == "group" else self.axes[name])

    def set_max_registers(self, count: int, *, action: str) -> None:
        assert 24 <= count <= 256
        assert count % 8 == 0

    def layout_cast(self, x: Array, layout: Any) -> Array:
        return x

    def load(self, ref: _Ref, *, layout: Any) -> Array:
        return ref[...]

    def copy_gmem_to_smem(self, source: _Ref, target: _Ref, barrier: Any) -> None:
        barrier = _one(barrier)
        if barrier.copy is not None:
            raise KernelError("a second copy is started on a barrier whose first was not waited for")
        target.array[...] = _spoiled(target.dtype)
        barrier.copy = source, target

    def copy_smem_to_gmem(self, source: _Ref, target: _Ref) -> None:
        if self.uncommitted[self.group]:
            raise KernelError("shared memory is copied before what was written is committed")
        self.stores[self.group].append((source, target))

    def wait_smem_to_gmem(self, pending: int) -> None:
        stores = self.stores[self.group]
        while len(stores) > pending:
            source, target = stores.pop(0)
            target.array[...] = source.array

    def commit_smem(self) -> None:
        self.uncommitted[self.group] = False

    def barrier_arrive(self, barrier: Any) -> None:
        _one(barrier).arrive()

    def barrier_wait(self, barrier: Any) -> None:
        found, group = _one(barrier), self.group
        if not found.passable(group):
            self.threads[group].pause_until(lambda: found.passable(group))
        found.wait(group)

    def wgmma(self, accumulator: _Accumulator, a: Any, b: _Ref) -> None:
        accumulator.flight.append((accumulator, a, b))

    def run_scoped(self, body: Callable[[Any], Any], kind: Any) -> Any:
        return body(_Accumulator(jnp.zeros(kind.shape, kind.dtype), self.flights[self.group]))

    def peek(self, accumulator: _Accumulator, pending: int) -> Array:
        return accumulator.taken(pending)

    def accumulate(self, body: Callable[..., None], start: Array, *others: Array) -> tuple[Array, ...]:
        refs: tuple[Any, ...] = (_Accumulator(start, self.flights[self.group]), *map(_State, others))
        body(*refs)
        return tuple(ref[...] for ref in refs)


def run(
    body: Callable[[Any, dict[str, Any], Sequence[Any]], None],
    memory: Sequence[Any],
    groups: int,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    grid: tuple[int, int],
) -> dict[str, Array]:
    """Runs `body(gpu, refs by name, scratch)` for every (head, row) of the grid, one after the other.

    Raises:
      NotImplementedError: inside `jax.jit`, where there are no values to run on.
      KernelError: the device's behaviour would be undefined.
    """
    if any(isinstance(x, jax.core.Tracer) for x in inputs.values()):
        raise NotImplementedError(
            "implementation='mosaic_gpu' with interpret=True runs eagerly; call it outside jax.jit, or use 'triton'"
        )
    made = {name: np.full(x.shape, np.nan, x.dtype) for name, x in outputs.items()}
    refs = {name: _Ref(np.asarray(x)) for name, x in inputs.items()} | {name: _Ref(x) for name, x in made.items()}
    for head, row in itertools.product(*map(range, grid)):
        _Program(body, refs, memory, {"head": head, "row": row}, groups).run()
    return {name: jnp.asarray(x) for name, x in made.items()}
