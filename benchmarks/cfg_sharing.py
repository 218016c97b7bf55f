"""What does it cost that one search serves both branches of guidance? Five prompts on the embedded checkpoint.

    python -m benchmarks.cfg_sharing [--json FILE]

The embedded model was not trained for classifier-free guidance: the negative branch is given no words at all. PSNR and
SSIM against dense from the same noise, a search for each branch and one for both; means over the prompts.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from adaspa_jax import SparseConfig
from benchmarks.quality import MODELS
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from models.commands.media import psnr, ssim
from models.pipeline.embeddings import NEGATIVE
from models.pipeline.families import pixel_family
from models.pipeline.video import Guidance, VideoPipeline
from models.pipeline.words import HunyuanVideoPipeline
from pallas_kernels import Implementation

SPARSITIES = (0.5, 0.8, 0.9)


def main(
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    scale: Annotated[float, typer.Option(help="of classifier-free guidance")] = 1.5,
    implementation: Annotated[str | None, typer.Option(help="kernels to run, see pallas_kernels")] = None,
) -> None:
    """Prints the quality of both ways by sparsity, and the bytes of the carried state."""
    kernels: Implementation | None = implementation  # type: ignore[assignment]
    demo, prompts = HunyuanVideoPipeline.load(MODELS["embedded"].checkpoint), list(MODELS["embedded"].prompts)
    text = demo.encoder.encode(prompts)
    branch = {
        "prompt_embeds": text.tokens,
        "prompt_attention_mask": text.mask,
        "pooled_prompt_embeds": text.pooled,
    }
    nothing = {NEGATIVE + name: np.zeros_like(x) for name, x in branch.items()}
    nothing[NEGATIVE + "prompt_attention_mask"][:, 0] = 1  # a mean over no words has no value
    pipeline = VideoPipeline((demo.transformer,), demo.scheduler, pixel_family(demo.size, demo.scheduler))

    def run(config: SparseConfig, **options: Any) -> Any:
        return pipeline.sample(branch | nothing, config, guidance=Guidance(scale), implementation=kernels, **options)

    config = SparseConfig.paper(steps, token_order="cube")
    dense = run(config, dense=True).latents
    rows = []
    for sparsity in track(SPARSITIES, "sampling"):
        for shared in (False, True):
            sample = run(dataclasses.replace(config, sparsity=sparsity, share_cfg_indices=shared))
            state = sum(x.nbytes for s in sample.states[0] for x in (s.indices, s.counts, s.lse))
            rows.append(
                {
                    "sparsity": sparsity,
                    "share_cfg_indices": shared,
                    "psnr_db": psnr(np.clip(sample.latents, -1, 1), np.clip(dense, -1, 1)),
                    "ssim": ssim(np.clip(sample.latents, -1, 1), np.clip(dense, -1, 1)),
                    "recall": sample.reports[0].recall,
                    "state_mb": state / 1e6,
                }
            )
            write_json(json, rows)
    show(f"{len(prompts)} prompts, {steps} steps, guidance {scale}, against dense", rows)


if __name__ == "__main__":
    run_cli(main)
