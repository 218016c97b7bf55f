"""What does a whole sampler gain on a GPU, at HunyuanVideo-13B's proportions?

    python -m benchmarks.gpu.sampler [--json FILE] [--layers 2 4]

720p x 129 frames: 118,800 video tokens and 256 of text, 24 heads, D = 128, bfloat16, random weights, one tenth of the
60 layers by default. Fewer layers scale the whole run, not its ratios: everything outside the layers is a small part.
Random weights say nothing of quality, and spread the attention more evenly than trained ones, which changes which
blocks are kept, not how many. Dense is our own, the fastest measured (benchmarks.gpu).
"""

import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx

from adaspa_jax import SparseConfig, SparseState, StepKind, adaspa_attention
from adaspa_jax.search import select_blocks
from benchmarks.full_size import LATENTS, TEXT, create, operands, program
from benchmarks.measure import device, seconds
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.transformers.hunyuan_video import HunyuanVideoTransformer


def sample(model: HunyuanVideoTransformer, config: SparseConfig, dense: bool) -> dict[str, Any]:
    """Seconds of the sampling scan, compile time apart."""
    graph, weights = nnx.split(model)
    given = operands(model.config)
    noise = given.pop("hidden_states").astype(jnp.float32)
    state = () if dense else model.init_state(config, 1, LATENTS, TEXT)
    run = program(graph, config, dense=dense)
    begun = time.perf_counter()
    compiled = jax.jit(run).lower(weights, noise, given, state).compile()
    compiled_at = time.perf_counter()
    latents, _ = jax.block_until_ready(compiled(weights, noise, given, state))
    took = time.perf_counter() - compiled_at
    if not bool(jnp.isfinite(latents).all()):
        raise FloatingPointError("the sampled latents are not finite")
    return {"run": "dense" if dense else "AdaSpa", "seconds": took, "compile_seconds": compiled_at - begun}


def attention_split(model: HunyuanVideoTransformer, config: SparseConfig) -> dict[str, float]:
    """Seconds of one layer's attention by step kind, and of the selection inside a search."""
    layout = model.layout(LATENTS, TEXT, config)
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (1, layout.length, heads, dim), jnp.bfloat16)
    qkv = draw(0), draw(1), draw(2)
    state = SparseState.create(layout, config, 1, heads)

    def attend(kind: StepKind) -> Any:
        return lambda q, k, v, state: adaspa_attention(q, k, v, state, kind, layout=layout, config=config)

    state = jax.jit(attend(StepKind.FUSED_SEARCH))(*qkv, state)[1]
    split = {kind.name.lower(): seconds(attend(kind), (*qkv, state), rounds=3) for kind in StepKind}
    mass = jax.random.uniform(jax.random.key(3), (1, heads, layout.video_blocks, layout.num_blocks))
    return split | {"select": seconds(lambda mass: select_blocks(mass, layout, config), (mass,))}


def account(split: dict[str, float], config: SparseConfig, layers: int, total: float) -> list[dict[str, Any]]:
    """Where the seconds of an AdaSpa run go: each part's share of `total`."""
    kinds = [StepKind(kind).name.lower() for kind in config.step_kinds()]
    searches = sum(kind.endswith("search") for kind in kinds)
    sparse = sum(split["sparse"] for kind in kinds if kind in ("sparse", "cached_search"))
    dense = sum(split["dense"] for kind in kinds if kind in ("dense", "fused_search"))
    select = searches * split["select"]
    parts = {
        "dense attention": dense * layers,
        "sparse attention": sparse * layers,
        "search: block mass": (sum(split[kind] for kind in kinds) - sparse - dense - select) * layers,
        "search: top-k and tiers": select * layers,
    }
    parts["everything else"] = total - sum(parts.values())
    return [{"part": name, "seconds": s, "percent": 100 * s / total} for name, s in parts.items()]


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    layers: Annotated[tuple[int, int], typer.Option(help="dual-stream and single-stream layers")] = (2, 4),
    block_size: Annotated[int, typer.Option(help="tokens of a block")] = 128,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
) -> None:
    """Samples dense and with AdaSpa, and says where the time goes."""
    if jax.default_backend() != "gpu":
        raise ValueError("no GPU here: run on a GPU machine")
    config = SparseConfig(block_size=block_size, steps=steps)
    model = nnx.jit(lambda: create(layers))()
    split = attention_split(model, config)
    print({name: f"{1e3 * s:.2f} ms" for name, s in split.items()}, flush=True)
    runs = []
    for dense in (False, True):
        runs.append(sample(model, config, dense))
        print(runs[-1], flush=True)
    sparse, dense_run = runs
    count = sum(layers)
    dense_attention = steps * count * split["dense"]
    ratios = {
        "sampler_speedup": dense_run["seconds"] / sparse["seconds"],
        "attention_speedup": dense_attention
        / sum(count * split[StepKind(kind).name.lower()] for kind in config.step_kinds()),
        "attention_percent_of_dense_run": 100 * dense_attention / dense_run["seconds"],
    }
    parts = account(split, config, count, sparse["seconds"])
    facts = device() | {"layers": list(layers), "block": block_size, "steps": steps, "sparsity": config.sparsity}
    show(f"{facts}: AdaSpa run", parts)
    print(ratios)
    layer_rows = [{"one layer": name, "ms": 1e3 * s} for name, s in split.items()]
    write_json(json, [facts, ratios, *runs, *parts, *layer_rows])


if __name__ == "__main__":
    run_cli(main)
