"""What can AdaSpa gain where a model samples in 4 to 8 steps, and when should it search? On the embedded checkpoint.

    python -m benchmarks.few_steps [--json FILE]

The embedded model is not distilled: its videos of few steps are blurred, but how far AdaSpa's are from the dense ones
of as many steps can be measured. `attention` is the work of all steps in units of dense attention. Means over five
prompts, from the same noise.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from adaspa_jax import SparseConfig
from benchmarks.quality import MODELS, work
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.commands.media import psnr, ssim
from models.pipeline.words import HunyuanVideoPipeline

SCHEDULES = {
    4: ((1,), (2,), (1, 2), (2, 3), (1, 2, 3)),
    6: ((1,), (2,), (1, 4), (1, 2, 4), (2, 4)),
    8: ((1,), (2,), (2, 5), (1, 2, 5), (3, 6)),
}
"""Steps -> the searches that are tried."""


def main(
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    sparsity: Annotated[float, typer.Option(help="share of block pairs to skip")] = 0.8,
    compensation: Annotated[str, typer.Option(help="what stands for skipped blocks: none or pooled")] = "pooled",
) -> None:
    """Prints quality and work by number of steps and by search steps."""
    words, prompts = HunyuanVideoPipeline.load(MODELS["embedded"].checkpoint), list(MODELS["embedded"].prompts[:5])
    pipeline, given = words.video_pipeline(), words.embed(prompts)
    base = SparseConfig(sparsity=sparsity, compensation=compensation, steps=max(SCHEDULES))  # type: ignore[arg-type]
    plan = pipeline.plan(given, base)
    # When a step searches is an input of the program.
    programs = {dense: pipeline.compile(plan, base, dense=dense) for dense in (True, False)}
    run = lambda config, dense: pipeline.sample(given, config, dense=dense, program=programs[dense])
    rows: list[dict[str, Any]] = []
    for steps in track(SCHEDULES, "sampling"):
        config = dataclasses.replace(base, steps=steps)
        dense = run(config, True)
        for search in SCHEDULES[steps]:
            own = dataclasses.replace(config, search_steps=search)
            sparse = run(own, False)
            videos = [np.clip(x.latents, -1, 1) for x in (sparse, dense)]
            row = {"steps": steps, "search_steps": list(search)}
            row |= {"psnr_db": psnr(videos[0], videos[1]), "ssim": ssim(videos[0], videos[1])}
            row |= {"attention": work(own, sparse.layout), "recall": sparse.reports[0].recall}
            rows.append(row | {"speedup": dense.seconds / sparse.seconds})
            write_json(json, rows)
    show(f"{len(prompts)} prompts, sparsity {sparsity}, compensation {compensation}, against dense", rows)


if __name__ == "__main__":
    run_cli(main)
