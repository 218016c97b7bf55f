"""The compiled programs of a run: begin, one denoising step of every expert, end.

They serve every prompt, seed and number of steps of the same shapes. Steps are called one by one and not in one loop on
the device: JAX keeps no program with a host callback, which progress needs in there, in its compilation cache.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from adaspa_jax import AttentionSharding, SparseConfig, SparseState, StepKind, scan_steps
from models.pipeline.families import Family
from models.pipeline.guidance import cfg
from models.pipeline.mesh import Place, create_states, gather_small, placed, put
from models.pipeline.offload import fetched, waits
from models.pipeline.plan import Plan
from models.pipeline.predict import predict as call
from models.schedulers import AnyScheduler, CogVideoXDPM, FewStep
from models.schedulers.seeds import key_of, words_of
from models.transformers.base import VideoTransformer
from pallas_kernels import Implementation

Progress = Callable[[int], None]
"""Called with the number of each finished step, from 1."""


@dataclass(frozen=True)
class Functions:
    """What is compiled, and all that it depends on but the shapes of its operands."""

    family: Family
    scheduler: AnyScheduler
    scale: float
    """Embedded in the model."""
    guided: bool
    config: SparseConfig
    dense: bool
    implementation: Implementation | None
    sharding: AttentionSharding | None

    def begin(self, noise: Array, given: dict[str, Array], words: Array) -> Any:
        """The scheduler's carry before the first step; `words` uint32 [2], of the seed."""
        scheduler = self.scheduler
        if isinstance(scheduler, CogVideoXDPM | FewStep):
            scheduler = dataclasses.replace(scheduler, seed=key_of(words))
        return scheduler.init(self.family.start(noise, given.get("condition")))

    def step(self, graph: Any, weights: Any, given: Any, carry: Any, state: Any, rows: Any, kinds: Array) -> Any:
        """(carry, state, history, mark) after one step of an expert; `rows` and `kinds`: [1], of the step.

        `mark` []: a number that is there when the step is done, and that no later one overwrites.
        """
        sharding = self.sharding
        model = nnx.merge(graph, weights if sharding is None else gather_small(weights, sharding))

        def predict(latents: Array, row: dict[str, Array], state: Any, kind: Any) -> Any:
            both = jnp.concatenate([latents, latents]) if self.guided else latents
            how = {"state": None, "step_kind": StepKind.DENSE} if self.dense else {"state": state, "step_kind": kind}
            how |= {"config": self.config, "implementation": self.implementation, "sharding": sharding}
            out = call(model, self.family, both, row["timestep"], given, self.scale, **how)
            out, state = (out, state) if self.dense else out
            if self.guided:
                unconditional, conditional = jnp.split(out, 2)
                out = cfg(unconditional, conditional, row["guidance"])
            return (out if sharding is None else sharding.replicated(out)), state

        carry, state, history = scan_steps(predict, self.scheduler, rows, carry, state, kinds)
        return carry, state, history, jax.tree.leaves(carry)[0].ravel()[0]

    def end(self, carry: Any, given: dict[str, Array]) -> Array:
        """The latents [B, C, F, H, W] after the last step."""
        latents = self.scheduler.latents(carry)
        if self.family.fixed_first_frame and "condition" in given:
            latents = jnp.concatenate([given["condition"][-len(latents) :], latents[:, :, 1:]], axis=2)
        return latents


@dataclass(frozen=True)
class Need:
    """Bytes on one device while a program runs; what waits in the memory of the host is not counted."""

    weights: int
    operands: int
    """Embeddings, latents, sparse states."""
    temporary: int
    """As the compiler has it."""
    step: str = "sample"
    """Of a run that needs it: or "decode"."""

    @property
    def total(self) -> int:
        """Of all."""
        return self.weights + self.operands + self.temporary


@dataclass(frozen=True)
class Program:
    """The compiled functions of a pipeline; make it with `VideoPipeline.compile`."""

    begin: Any
    steps: dict[int, Any]
    """Expert -> its step; experts of one architecture share it."""
    end: Any
    states: Callable[[], Any]
    """Makes an expert's empty state; () for a dense run."""
    sharding: AttentionSharding | None
    turns: bool
    """The experts are fetched out of the memory of the host, each for its steps."""
    need: Need
    seconds: float
    """That compiling took."""

    def run(
        self, experts: tuple[VideoTransformer, ...], plan: Plan, noise: Array, seed: int, progress: Progress | None
    ) -> tuple[Array, tuple[Any, ...], tuple[Any, ...]]:
        """(latents, final state and history of each part of the plan) with the weights of `experts`."""
        given = {name: put(x, self.sharding) for name, x in plan.given.items()}
        carry = self.begin(put(noise, self.sharding), given, put(words_of(seed), self.sharding))
        ended, marks = [], []
        for part in plan.parts:
            weights, state, histories = nnx.state(experts[part.expert]), self.states(), []
            if self.turns:
                jax.block_until_ready(carry)
                weights = fetched(weights)
            for number, kind in enumerate(part.kinds, part.first):
                rows = {name: put(x[number : number + 1], self.sharding) for name, x in plan.tables.items()}
                kinds = put(np.array([kind], np.int32), self.sharding)
                run = self.steps[part.expert]
                carry, state, history, mark = run(weights, given, carry, state, rows, kinds)
                histories.append(history)
                marks.append(mark)
                if progress is not None and number:
                    jax.block_until_ready(marks[number - 1])  # with the next step on its way to the device
                    progress(number)
            join = lambda *x: np.concatenate([np.asarray(y) for y in x])
            ended.append((state, jax.tree.map(join, *histories)))
            del weights  # before those of the next expert come
        latents = jax.block_until_ready(self.end(carry, given))
        if progress is not None:
            progress(len(marks))
        states, found = zip(*ended, strict=True)
        return latents, states, found


def compile_program(
    functions: Functions,
    experts: tuple[VideoTransformer, ...],
    plan: Plan,
    keep_mass: bool = False,
    place: Place | None = None,
    turns: bool = False,
) -> Program:
    """Compiles for the experts, with weights or with shapes in their place, and the operands of a plan.

    `place`: how the weights lie, or will lie, if not all on the default device. `turns`: see `Program`.
    """
    sharding, begun = functions.sharding, time.perf_counter()
    create = lambda: _states(functions, experts[0], plan, keep_mass)
    states: Any = () if functions.dense else jax.eval_shape(create)
    out: Any = {}
    edge: Any = {}
    if sharding is not None:
        spread = tuple(SparseState.shardings(sharding) for _ in states)
        states = jax.tree.map(lambda x, where: x.update(sharding=where), states, spread)
        everywhere = sharding.named()
        out, edge = ({"out_shardings": x} for x in ((everywhere, spread, everywhere, everywhere), everywhere))
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if sharding is None else sharding.named())
    noise = shape(jax.ShapeDtypeStruct(plan.shape, jnp.float32))
    given = {name: shape(x) for name, x in plan.given.items()}
    rows = {name: shape(x[:1]) for name, x in plan.tables.items()}
    kinds, words = shape(np.zeros(1, np.int32)), shape(words_of(0))
    begin = jax.jit(functions.begin, **edge).lower(noise, given, words).compile()
    carry = jax.tree.map(shape, jax.eval_shape(functions.begin, noise, given, words))
    end = jax.jit(functions.end, **edge).lower(carry, given).compile()
    used = {part.expert: experts[part.expert] for part in plan.parts}
    run = lambda graph: jax.jit(partial(functions.step, graph), donate_argnums=(2, 3), **out)
    lower = lambda graph, weights: run(graph).lower(weights, given, carry, states, rows, kinds)
    steps, sizes = _compile_steps(used, None if turns else place, lower)
    operands = bytes_of((given, carry, *[states] * len(plan.parts)))
    temporary = max(_temporary(run, bytes_of((carry, states))) for run in steps.values())
    need = Need(max(sizes) if turns else sum(sizes), operands, temporary)
    fresh = (lambda: ()) if functions.dense else lambda: create_states(create, sharding)
    return Program(begin, steps, end, fresh, sharding, turns, need, time.perf_counter() - begun)


def _compile_steps(
    experts: dict[int, VideoTransformer], place: Place | None, lower: Callable[[Any, Any], Any]
) -> tuple[dict[int, Any], list[int]]:
    """(the compiled step of each expert, one for those that are alike, bytes of the weights of each on a device)."""
    steps: dict[int, Any] = {}
    made: dict[int, tuple[Any, Any]] = {}
    for number, expert in experts.items():
        graph, weights = nnx.split(expert)
        made[number] = own = graph, placed(weights, place)
        same = [steps[other] for other in steps if made[other] == own]
        steps[number] = same[0] if same else lower(*own).compile()
    return steps, [bytes_of(weights) for _, weights in made.values()]


def bytes_of(tree: Any) -> int:
    """Of shapes, or arrays, that lie on one device."""
    shape = lambda x: x.shape if getattr(x, "sharding", None) is None else x.sharding.shard_shape(x.shape)
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if not waits(x))


def _temporary(compiled: Any, donated: int) -> int:
    """Bytes that a program needs besides its operands, and besides results in the place of those that are donated."""
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - donated)


def _states(functions: Functions, model: VideoTransformer, plan: Plan, keep_mass: bool) -> tuple[SparseState, ...]:
    """An expert's empty states, one a stack of layers."""
    batch, text = plan.shape[0] * (1 + plan.guided), plan.given["prompt_embeds"].shape[1]
    return model.init_state(functions.config, batch, plan.shape[2:], text, keep_mass, functions.sharding)
