"""What memory does a denoising step of each model need on an H100? Needs no GPU; nothing runs.

    python -m benchmarks.gpu.memory [--model "Wan 2.2 A14B"] [--json FILE]

At the size, guidance and steps that a model has by default, with AdaSpa, weights in bfloat16, compiled by XLA for an
H100. What few layers of a kind compile to is what all do: weights and sparse states of all are added. `one_gib`: all
weights on the device; `experts_gib`: of two experts one at a time (`--offload experts`); `layers_gib`: of the layers
two at a time (`--offload layers`), one that runs and one that comes.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# First: it sets what jax reads when it is imported.
from benchmarks.gpu.compiled import devices  # isort: skip
from benchmarks.gpu.toolkit import use_toolkit  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.pipeline.embeddings import stand_ins
from models.pipeline.families import family_of
from models.pipeline.mesh import is_stacked
from models.pipeline.program import Functions, bytes_of
from models.pipeline.video import VideoPipeline
from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer
from models.transformers.wan import WanConfig, WanTransformer

GIB, LAYERS, AT_ONCE = 2**30, 2, 2
"""Layers that are compiled, of each kind; and that are on the device at a time."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model at its published size."""

    model: Any
    config: Any
    stacks: tuple[str, ...]
    """Fields of the config that say how many layers there are."""
    text: int
    """Tokens."""
    index: dict[str, Any] = dataclasses.field(default_factory=dict)

    def create(self, layers: int | None = None) -> Any:
        """With shapes in place of weights; `layers` of each kind, None: all."""
        config = (
            self.config if layers is None else dataclasses.replace(self.config, **dict.fromkeys(self.stacks, layers))
        )
        return nnx.eval_shape(lambda: self.model(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


_LAYERS = ("num_layers",)
SAMPLERS = {
    "HunyuanVideo 13B": Sampler(HunyuanVideoTransformer, HunyuanVideoConfig(), (*_LAYERS, "num_single_layers"), 256),
    "Wan 2.1 14B": Sampler(WanTransformer, WanConfig(), _LAYERS, 512),
    "Wan 2.2 A14B": Sampler(WanTransformer, WanConfig(), _LAYERS, 512, {"boundary_ratio": 0.875}),
}


def pipeline_of(sampler: Sampler, model: Any) -> VideoPipeline:
    """As it samples by default."""
    family, ratio = family_of(model, sampler.index), sampler.index.get("boundary_ratio")
    experts = (model,) if ratio is None else (model, model)
    return VideoPipeline(experts, family.scheduler, family, None if ratio is None else 1000 * ratio)


def measure(name: str) -> dict[str, Any]:
    """The row of one model."""
    sampler = SAMPLERS[name]
    few, all_layers = sampler.create(LAYERS), sampler.create()
    pipeline = pipeline_of(sampler, few)
    family, config = pipeline.family, pipeline.family.config()
    grid = family.latent_shape(family.size, few)
    zeros = stand_ins(few, grid, 1, image=False, first_frame=False)
    text = lambda x: np.ones((1, sampler.text, *x.shape[2:]), np.float32)
    given = {key: x if "pooled" in key else text(x) for key, x in zeros.items()}
    plan = pipeline.plan(given, config)
    functions = Functions(family, plan.scheduler, plan.scale, plan.guided, config, False, "mosaic_gpu", None)
    mesh = Mesh(np.array(devices("9.0")), ("device",))
    there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    shapes = lambda tree: jax.tree.map(there, tree)
    states = lambda model: jax.eval_shape(
        lambda: model.init_state(config, 1 + plan.guided, plan.shape[2:], sampler.text)
    )
    noise, embeddings = there(jax.ShapeDtypeStruct(plan.shape, jnp.float32)), shapes(dict(plan.given))
    carry = shapes(jax.eval_shape(functions.begin, noise, embeddings, jax.ShapeDtypeStruct((2,), jnp.uint32)))
    rows, kinds = shapes({key: x[:1] for key, x in plan.tables.items()}), there(np.zeros(1, np.int32))
    graph, weights = nnx.split(few)
    step = jax.jit(partial(functions.step, graph), donate_argnums=(2, 3))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = step.trace(shapes(weights), embeddings, carry, shapes(states(few)), rows, kinds)
        memory = traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    assert memory is not None, "these compilers always give one"
    # The new states of all layers come beside the old ones.
    work = memory.temp_size_in_bytes + bytes_of(states(all_layers)) - bytes_of(states(few))
    return row_of(name, pipeline, all_layers, states(all_layers), bytes_of((embeddings, carry)), work)


def row_of(name: str, pipeline: VideoPipeline, model: Any, states: Any, operands: int, work: int) -> dict[str, Any]:
    """Sizes in GiB and what they come to, by `--offload`."""
    count, size = len(pipeline.experts), pipeline.family.size
    leaves = nnx.to_flat_state(nnx.state(model))
    weights = bytes_of([leaf for _, leaf in leaves])
    streamed = sum(bytes_of(x) * AT_ONCE / x.shape[0] for path, x in leaves if is_stacked(path))
    resident = count * sum(bytes_of(x) for path, x in leaves if not is_stacked(path))
    rest = bytes_of([states] * count) + operands + work
    return {
        "model": name,
        "video": f"{size.frames} x {size.height} x {size.width}",
        "weights_gib": weights * count / GIB,
        "states_gib": bytes_of([states] * count) / GIB,
        "work_gib": work / GIB,
        "one_gib": (weights * count + rest) / GIB,
        "experts_gib": (weights + rest) / GIB if count > 1 else None,
        "layers_gib": (resident + streamed + rest) / GIB,
    }


def main(
    model: Annotated[list[str] | None, typer.Option(help="several times for several; default: all")] = None,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Compiles a step of each model and prints what it needs."""
    names = model or list(SAMPLERS)
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise ValueError(f"--model {unknown[0]!r} must be one of {', '.join(SAMPLERS)}")
    use_toolkit()
    rows = [measure(name) for name in names]
    show("a denoising step, compiled for one H100; NOTHING RAN", rows)
    write_json(json, rows)


if __name__ == "__main__":
    run_cli(main)
