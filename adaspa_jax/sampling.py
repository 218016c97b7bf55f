"""The denoising scan: one jitted loop over steps that carries the latents and the sparse state."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from adaspa_jax.config import SparseConfig
from adaspa_jax.state import SparseState

PyTree = Any


class Scheduler(Protocol):
    """What the scan needs of a sampler; `row` is one step of its scalar tables."""

    def init(self, latents: Array) -> PyTree:
        """The scheduler's carry before the first step."""
        ...

    def latents(self, carry: PyTree) -> Array:
        """The latents that the model sees next."""
        ...

    def step(self, carry: PyTree, prediction: Array, row: dict[str, Array]) -> PyTree:
        """The carry after one step with the model's prediction."""
        ...


class History(NamedTuple):
    """What was measured in each step; T steps, stacked over the layers of each state in the carry."""

    recall: PyTree
    """float32 [T, layers, B, H] for each SparseState: recall of the last search so far."""
    drift: PyTree
    """float32 [T, layers, B, H] for each SparseState: mean |log change of the normaliser| at that search."""
    stand_ins: PyTree
    """float32 [T, layers, B, H] for each SparseState: share of the mass that stand-ins of dropped blocks hold."""


Predict = Callable[[Array, dict[str, Array], PyTree, Array], tuple[Array, PyTree]]


def _is_state(x: object) -> bool:
    return isinstance(x, SparseState)


def denoise(
    predict: Predict,
    scheduler: Scheduler,
    tables: dict[str, Any],
    latents: Array,
    state: PyTree,
    config: SparseConfig,
    *,
    progress: Callable[[Any], None] | None = None,
) -> tuple[Array, PyTree, History]:
    """Runs all `config.steps` denoising steps in one `lax.scan`. Call it inside `jax.jit`.

    Args:
      predict: (latents, row, state, step_kind) -> (prediction, state); step_kind is a traced int32 scalar for
        `adaspa_attention`, row the step's entries of `tables`.
      scheduler: how a prediction moves the latents.
      tables: per-step scalars, each [T] with T = config.steps, such as timesteps and noise levels.
      latents: the initial noise, any shape.
      state: pytree with SparseState nodes, or of none for a dense run.
      config: gives the kind of every step.
      progress: called on the host with the number of the finished step, as an int32 array; the only host traffic.

    Returns:
      (latents, state, history).

    Raises:
      ValueError: a table whose length is not T.
    """
    for name, table in tables.items():
        if len(table) != config.steps:
            raise ValueError(f"tables[{name!r}] has {len(table)} entries for steps={config.steps}")
    kinds, begin = config.step_kinds(), scheduler.init(latents)
    carry, state, history = scan_steps(predict, scheduler, tables, begin, state, kinds, progress=progress)
    return scheduler.latents(carry), state, history


def scan_steps(
    predict: Predict,
    scheduler: Scheduler,
    tables: dict[str, Any],
    carry: PyTree,
    state: PyTree,
    kinds: Any,
    *,
    first: int = 1,
    progress: Callable[[Any], None] | None = None,
) -> tuple[PyTree, PyTree, History]:
    """Some of the denoising steps, from the scheduler's carry to its next: what `denoise` is made of.

    For a model of several experts, one scan each: `tables` and `kinds`, int32 StepKinds, [T] each, are those of its
    steps, `first` is the number of the first of them. The rest is as for `denoise`.
    """
    rows = {name: jnp.asarray(table) for name, table in tables.items()}
    numbers = jnp.arange(first, first + len(kinds), dtype=jnp.int32)

    def body(carry: tuple[PyTree, PyTree], step: tuple) -> tuple[tuple[PyTree, PyTree], History]:
        solver, state = carry
        number, kind, row = step
        prediction, state = predict(scheduler.latents(solver), row, state, kind)
        solver = scheduler.step(solver, prediction, row)
        if progress is not None:
            # One latent goes along unread: the call has to wait for the step.
            latent = jax.tree.leaves(solver)[0].reshape(-1)[0]
            jax.debug.callback(lambda number, _: progress(number), number, latent, ordered=False)
        pick = lambda field: jax.tree.map(lambda s: getattr(s, field), state, is_leaf=_is_state)
        return (solver, state), History(pick("recall"), pick("drift"), pick("stand_ins"))

    with jax.named_scope("denoise"):
        (carry, state), history = lax.scan(body, (carry, state), (numbers, jnp.asarray(kinds), rows))
    return carry, state, history
