"""What does sparsity cost? Five prompts on the embedded checkpoint, AdaSpa against dense from the same noise.

    python -m benchmarks.quality [--json FILE] [--full]

Sparsity by token order; then, at sparsity 0.8, head tiers and the LSE cache switched off one at a time. --full takes
every combination. PSNR, SSIM and recall are means over the prompts.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from adaspa_jax import SparseConfig
from adaspa_jax.layout import TokenOrder
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.commands.media import psnr, ssim
from models.pipeline.words import HunyuanVideoPipeline, Sample
from pallas_kernels import Implementation

CHECKPOINT = Path(__file__).parent.parent / "models" / "demo" / "checkpoint"
PROMPTS = [
    "red circle moving left",
    "blue square moving down",
    "yellow triangle moving up",
    "green ring moving right",
    "white circle moving right",
]
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
ORDERS: tuple[TokenOrder, ...] = ("cube", "raster")


def configs(steps: int, full: bool) -> Iterator[SparseConfig]:
    """The configurations of the table."""
    base = SparseConfig(steps=steps)
    for sparsity, order, tiers, cache in itertools.product(SPARSITIES, ORDERS, (True, False), (True, False)):
        varied = (not tiers) + (not cache)
        if full or varied == 0 or (varied == 1 and sparsity == base.sparsity):
            yield dataclasses.replace(base, sparsity=sparsity, token_order=order, head_adaptive=tiers, lse_cache=cache)


def row(config: SparseConfig, sparse: Sample, dense: Sample) -> dict[str, Any]:
    """One line of the table."""
    assert sparse.report is not None
    return {
        "sparsity": config.sparsity,
        "token_order": config.token_order,
        "head_adaptive": config.head_adaptive,
        "lse_cache": config.lse_cache,
        "psnr_db": psnr(sparse.video, dense.video),
        "ssim": ssim(sparse.video, dense.video),
        "recall": sparse.report.recall,
        "density": sparse.report.density,
    }


def main(
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    full: Annotated[bool, typer.Option("--full", help="every combination of the four switches")] = False,
    implementation: Annotated[str | None, typer.Option(help="kernels to run, see pallas_kernels")] = None,
) -> None:
    """Prints PSNR, SSIM and recall by sparsity, token order, head tiers and LSE cache."""
    kernels: Implementation | None = implementation  # type: ignore[assignment]
    pipeline = HunyuanVideoPipeline.load(CHECKPOINT)
    chosen = list(configs(steps, full))
    dense = pipeline.sample(PROMPTS, chosen[0], seed=seed, dense=True, implementation=kernels)
    rows = []
    for config in track(chosen, "sampling"):
        rows.append(row(config, pipeline.sample(PROMPTS, config, seed=seed, implementation=kernels), dense))
        write_json(json, rows)
    show(f"{len(PROMPTS)} prompts, {steps} steps, seed {seed}, against dense", rows)


if __name__ == "__main__":
    run_cli(main)
