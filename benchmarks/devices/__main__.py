"""How much faster are several devices than one, at HunyuanVideo-13B's proportions, and where does the time go?

    python -m benchmarks.devices [--mesh heads=4] [--json FILE] [--layers 1 2]

720p x 129 frames, bfloat16, random weights, as in `benchmarks.gpu.sampler`, on one device and on the mesh in one run.
Efficiency is (seconds on one) / (devices x seconds on the mesh). Half of the heads count as easy and half as hard, so
that head tiers really differ: random weights would give all the same. A float32 sampler of a short video says how far
the latents are from one device's.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax import Array, lax

from adaspa_jax import AttentionSharding, SparseConfig, SparseState, StepKind, attend
from benchmarks.full_size import LATENTS, TEXT, create, operands, program
from benchmarks.measure import device, seconds
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.pipeline.mesh import create_states, parse_mesh
from models.transformers.hunyuan_video import HunyuanVideoConfig, HunyuanVideoTransformer

SHORT, SHORT_TEXT = (9, 32, 48), 64
"""Latents and text of the float32 comparison."""


def sampler(
    model: Any, given: dict[str, Array], config: SparseConfig, sharding: AttentionSharding | None, dense: bool
) -> tuple[Array, Any, float]:
    """(latents, states, seconds of the scan)."""
    graph, weights = nnx.split(model)
    given = dict(given)
    noise = given.pop("hidden_states").astype(jnp.float32)
    place = (lambda tree: tree) if sharding is None else lambda tree: jax.device_put(tree, sharding.named())
    weights, noise, given = place(weights), place(noise), place(given)
    size, text = noise.shape[2:], given["encoder_hidden_states"].shape[1]
    make = lambda: model.init_state(config, 1, size, text, False, sharding)
    states = () if dense else create_states(make, sharding)
    run = program(graph, config, dense=dense, sharding=sharding)
    compiled = jax.jit(run).lower(weights, noise, given, states).compile()
    begun = time.perf_counter()
    latents, states = jax.block_until_ready(compiled(weights, noise, given, states))
    return latents, states, time.perf_counter() - begun


def parts(config: SparseConfig, sharding: AttentionSharding | None) -> dict[str, float]:
    """Milliseconds of one layer's attention, dense and sparse, and of one all-to-all, on a mesh or one device."""
    layout = config.layout((LATENTS[0], LATENTS[1] // 2, LATENTS[2] // 2), TEXT)
    length = layout.video_length if sharding is None else sharding.video_length(layout)
    draw = lambda n: jax.random.normal(jax.random.key(0), (1, n, 24, 128), jnp.bfloat16)
    video, text = draw(length), draw(layout.text_length)
    if sharding is not None:
        video = jax.device_put(video, sharding.named("data", "tokens"))
        text = jax.device_put(text, sharding.named("data"))
    make = lambda: (SparseState.create(layout, config, 1, 24, 1, sharding=sharding),)
    (stacked,) = create_states(make, sharding)
    state = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree))(stacked)

    def step(kind: StepKind) -> Any:
        return lambda v, t, s: attend((v, t), (v, t), (v, t), s, kind, layout=layout, config=config, sharding=sharding)

    state = jax.jit(step(StepKind.FUSED_SEARCH))(video, text, state)[1]
    kinds = {"dense": StepKind.DENSE, "sparse": StepKind.SPARSE}
    found = {f"{name} attention": 1e3 * seconds(step(kind), (video, text, state)) for name, kind in kinds.items()}
    if sharding is not None and sharding.spread.heads:
        specs = sharding.spec("data", "tokens"), sharding.spec("data", "rows", "heads")
        swap = lambda x: lax.all_to_all(x, "heads", 2, 1, tiled=True)
        run = jax.shard_map(swap, mesh=sharding.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
        found["all-to-all"] = 1e3 * seconds(run, (video,))
    return found


def loads(states: Any, sharding: AttentionSharding) -> list[int]:
    """Blocks that each device along `heads` computes in a sparse step, over all layers and rows."""
    counts = np.concatenate([np.asarray(s.counts) for s in states])  # [layers, 1, H, nq]
    by_head = counts.sum((1, 3), dtype=np.int64)
    return by_head.reshape(len(by_head), sharding.size("heads"), -1).sum((0, 2)).tolist()


def difference(config: SparseConfig, sharding: AttentionSharding) -> float:
    """Relative L2 of float32 latents of a short video, mesh against one device."""
    sizes = HunyuanVideoConfig(num_layers=1, num_single_layers=1)
    model = nnx.jit(lambda: HunyuanVideoTransformer(sizes, rngs=nnx.Rngs(0)))()
    given = {name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for name, x in operands(sizes).items()}
    frames, rows, columns = SHORT
    given["hidden_states"] = given["hidden_states"][:, :, :frames, :rows, :columns]
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        given[name] = given[name][:, :SHORT_TEXT]
    config = dataclasses.replace(config, block_size=64)
    with jax.default_matmul_precision("highest"):  # else TF32, whose sums depend on the shape
        one, many = (np.asarray(sampler(model, given, config, s, False)[0]) for s in (None, sharding))
    return float(np.linalg.norm(many - one) / np.linalg.norm(one))


def main(
    mesh: Annotated[str, typer.Option(help="data=N,heads=N,rows=N, or auto for all devices")] = "auto",
    layers: Annotated[tuple[int, int], typer.Option(help="dual-stream and single-stream layers")] = (1, 2),
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    block_size: Annotated[int, typer.Option(help="tokens of a block")] = 128,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Samples on one device and on the mesh, dense and with AdaSpa."""
    if jax.default_backend() == "cpu":
        raise ValueError("no accelerator here: run on a machine with several GPUs or TPU chips")
    # Tiers make heads differ, and every head is above the threshold: half of them, the most, are easy.
    tiers: dict[str, Any] = {"token_order": "cube", "recall_threshold": 0.0}
    config = SparseConfig.paper(steps, block_size=block_size, **tiers)
    sharding = AttentionSharding(parse_mesh(mesh, 24, 1, config))
    count = sharding.mesh.size
    model = nnx.jit(lambda: create(layers))()
    rows: list[dict[str, Any]] = []
    pieces = [parts(config, s) for s in (None, sharding)]
    for name in pieces[1]:
        one, many = pieces[0].get(name, float("nan")), pieces[1][name]
        rows.append(
            {"what": f"a layer's {name}", "one": one, "mesh": many, "unit": "ms", "efficiency": one / many / count}
        )
        print(rows[-1], flush=True)
    for dense in (True, False):
        given = operands(model.config)
        first, _, one = sampler(model, given, config, None, dense)
        second, states, many = sampler(model, given, config, sharding, dense)
        apart = float(jnp.linalg.norm(second - jax.device_put(first, sharding.named())) / jnp.linalg.norm(second))
        name = "dense" if dense else "AdaSpa"
        rows.append(
            {"what": f"sampler, {name}", "one": one, "mesh": many, "unit": "s", "efficiency": one / many / count}
        )
        print(rows[-1] | {"bfloat16 latents apart by": apart}, flush=True)
    facts = device() | {"mesh": dict(sharding.mesh.shape), "layers": list(layers), "steps": steps, "block": block_size}
    facts |= {"loads": loads(states, sharding), "float32_latents_apart_by": difference(config, sharding)}
    show(f"{facts}", rows)
    write_json(json, [facts, *rows])


if __name__ == "__main__":
    run_cli(main)
