"""How hard is a checkpoint for AdaSpa? How concentrated its attention is, how fast its velocity changes.

    python -m benchmarks.probe [--model yardstick] [--checkpoint FOLDER] [--json FILE]

Dense sampling that searches in every step: by step, the recall of the heaviest 20% of the key blocks, mean over layers,
samples and heads, and the mean change of the velocity since the step before over its mean size. A model is a yardstick
if it is no easier than real ones: they hold 0.75 of the mass and more in those blocks, and change by 2% a step.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax import Array, lax

from adaspa_jax import SparseConfig, SparseState, StepKind
from benchmarks.quality import MODELS, model_of
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.pipeline.plan import initial_noise
from models.pipeline.predict import predict
from models.pipeline.words import HunyuanVideoPipeline
from pallas_kernels import Implementation


def probe(pipeline: HunyuanVideoPipeline, prompts: list[str], config: SparseConfig, **how: Any) -> list[dict[str, Any]]:
    """A row a step of a dense run over `prompts`; `how`: seed, implementation."""
    video = pipeline.video_pipeline()
    plan = video.plan(pipeline.embed(prompts), config)
    graph, weights = nnx.split(video.experts[0])
    text = plan.given["prompt_embeds"].shape[1]
    noise = jnp.asarray(initial_noise(plan.shape, how["seed"], None))
    is_state = lambda x: isinstance(x, SparseState)
    options = {"config": config, "implementation": how["implementation"], "step_kind": StepKind.FUSED_SEARCH}

    @jax.jit
    def run(weights: Any, noise: Array, given: dict[str, Array]) -> tuple[Array, Array]:
        model = nnx.merge(graph, weights)
        state = model.init_state(config, plan.shape[0], plan.shape[2:], text)

        def step(carry: tuple[Any, Any, Array], row: dict[str, Array]) -> tuple[tuple[Any, Any, Array], Any]:
            solver, state, before = carry
            x = plan.scheduler.latents(solver)
            v, state = predict(model, video.family, x, row["timestep"], given, plan.scale, state=state, **options)
            v = v.astype(jnp.float32)
            recall = jnp.mean(jnp.concatenate([s.recall for s in jax.tree.leaves(state, is_leaf=is_state)]))
            change = jnp.abs(v - before).mean() / jnp.abs(before).mean()
            return (plan.scheduler.step(solver, v, row), state, v), (recall, change)

        begin = (plan.scheduler.init(noise), state, jnp.ones_like(noise))
        return lax.scan(step, begin, {name: jnp.asarray(x) for name, x in plan.tables.items()})[1]

    recall, change = (np.asarray(x) for x in run(weights, noise, plan.given))
    steps = range(1, config.steps + 1)
    return [
        {"step": step, "recall": float(r), "velocity_change": float(c) if step > 1 else float("nan")}
        for step, r, c in zip(steps, recall, change, strict=True)
    ]


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(MODELS)}")] = "yardstick",
    checkpoint: Annotated[Path | None, typer.Option(help="another of that model, one in training")] = None,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps", min=2)] = 50,
    prompts: Annotated[int, typer.Option(help="how many of the benchmark's", min=1, max=8)] = 8,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the model")] = "float32",
    implementation: Annotated[str | None, typer.Option(help="kernels to run, see pallas_kernels")] = None,
) -> None:
    """Prints recall and change of velocity by step, and their means: all steps, and the middle third."""
    kernels: Implementation | None = implementation  # type: ignore[assignment]
    known = model_of(model, checkpoint)
    folder, pipeline = known.checkpoint, HunyuanVideoPipeline.load(known.checkpoint, jnp.dtype(dtype))
    config = SparseConfig(steps=steps, sparsity=0.8, compensation="none")
    rows = probe(pipeline, list(known.prompts[:prompts]), config, seed=seed, implementation=kernels)
    middle = rows[steps // 3 : steps - steps // 3]
    mean = lambda name, rows: float(np.nanmean([row[name] for row in rows]))
    found = {"mean recall": mean("recall", rows), "velocity change in the middle": mean("velocity_change", middle)}
    show(f"{folder}: {found}", rows)
    write_json(json, [found, *rows])


if __name__ == "__main__":
    run_cli(main)
