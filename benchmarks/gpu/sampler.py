"""What does a whole sampler gain on a GPU, at HunyuanVideo-13B's proportions?

    python -m benchmarks.gpu.sampler [--json FILE] [--layers 2 4] [--preset balanced]

720p x 129 frames: 118,800 video tokens and 256 of text, 24 heads, D = 128, bfloat16, random weights, one tenth of the
60 layers by default. Fewer layers scale the whole run, not its ratios: everything outside the layers is a small part.
Random weights say nothing of quality, and spread the attention more evenly than trained ones, which changes which
blocks are kept, not how many. Dense is our own, as fast as FlashAttention-3: see the README.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx

from adaspa_jax import SparseConfig, SparseState, StepKind, adaspa_attention
from adaspa_jax.config import PRESETS
from adaspa_jax.search import select_blocks
from benchmarks.full_size import LATENTS, TEXT, create, operands, program
from benchmarks.measure import device, seconds
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.transformers.hunyuan_video import HunyuanVideoTransformer
from pallas_kernels import resolve_score_precision


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


def compared(model: HunyuanVideoTransformer, config: SparseConfig, name: str, dense: dict[str, Any]) -> dict[str, Any]:
    """The run of a preset and how much faster it is than the run `dense`."""
    run = sample(model, config, dense=False)
    run |= {
        "preset": name,
        "sparsity": config.sparsity,
        "compensation": config.compensation,
        "score_precision": resolve_score_precision(config.score_precision, block_size=config.block_size),
        "search_steps": list(config.search),
        "sampler_speedup": dense["seconds"] / run["seconds"],
    }
    print(run, flush=True)
    return run


def taken_apart(
    model: HunyuanVideoTransformer, config: SparseConfig, run: dict[str, Any], dense: dict[str, Any], layers: int
) -> list[dict[str, Any]]:
    """Rows of where the time of a preset's run goes and of what a layer takes; adds the share of attention to `run`."""
    split = attention_split(model, config)
    print({kind: f"{1e3 * s:.2f} ms" for kind, s in split.items()}, flush=True)
    dense_attention = config.steps * layers * split["dense"]
    own = layers * sum(split[StepKind(kind).name.lower()] for kind in config.step_kinds())
    run |= {
        "attention_speedup": dense_attention / own,
        "attention_percent_of_dense_run": 100 * dense_attention / dense["seconds"],
    }
    parts = account(split, config, layers, run["seconds"])
    show(f"{run['preset']}: where {run['seconds']:.1f} s go", parts)
    rows = [*parts, *({"one layer": kind, "ms": 1e3 * s} for kind, s in split.items())]
    return [{"preset": run["preset"]} | row for row in rows]


def main(
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    layers: Annotated[tuple[int, int], typer.Option(help="dual-stream and single-stream layers")] = (2, 4),
    block_size: Annotated[int, typer.Option(help="tokens of a block")] = 64,
    query_block_size: Annotated[int | None, typer.Option(help="tokens of a block of rows; default: the same")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    preset: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PRESETS)}; repeatable; default: all")] = None,
    compensation: Annotated[str | None, typer.Option(help="none or pooled; default: the preset's")] = None,
) -> None:
    """Samples dense and with each preset, and says where the time goes."""
    if jax.default_backend() != "gpu":
        raise ValueError("no GPU here: run on a GPU machine")
    changes: dict[str, Any] = {"block_size": block_size, "query_block_size": query_block_size, "steps": steps}
    changes |= {} if compensation is None else {"compensation": compensation}
    configs = {name: SparseConfig.preset(name, **changes) for name in preset or PRESETS}
    model = nnx.jit(lambda: create(layers))()
    dense = sample(model, next(iter(configs.values())), dense=True)
    print(dense, flush=True)
    rows: list[dict[str, Any]] = [device() | {"layers": list(layers)} | changes, dense]
    for name, config in configs.items():
        rows.append(compared(model, config, name, dense))
        write_json(json, rows)
    for run in [row for row in rows if "preset" in row]:
        rows += taken_apart(model, configs[run["preset"]], run, dense, sum(layers))
        write_json(json, rows)


if __name__ == "__main__":
    run_cli(main)
