"""How fast are the TPU kernels on a TPU, against JAX's own attention?

    python -m benchmarks.tpu [--json FILE]

bfloat16, 24 heads, D = 128, on one chip, timed as `benchmarks.measure` says.
`python -m benchmarks.tpu.static` says, without a TPU, what to expect at best.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from benchmarks.measure import (
    BLOCKS,
    DENSITIES,
    HEAD_DIM,
    HEADS,
    add_ratios,
    ceilings,
    figures,
    gain,
    inputs,
    ours,
    selection,
)
from benchmarks.table import show, write_json
from models.commands.cli import run_cli

# Multiples of the peers' largest tile: they take no ragged lengths.
SIZES = (16384, 32768, 65536, 118784)
COLUMNS: dict[str, Any] = {"tokens": 0, "implementation": "", "kernel": "", "block": None, "density": None, "note": ""}


def peers(tokens: int, sets: list[Any]) -> Iterator[dict[str, Any]]:
    """Splash and flash attention of JAX, dense, at the tiles that are best by their static cycles."""
    sizes = splash.BlockSizes(block_q=1024, block_kv=2048, block_kv_compute=512)
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((tokens, tokens))] * HEADS)
    kernel = splash.make_splash_mha(mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    scale = HEAD_DIM**-0.5
    tiles = jax_flash.BlockSizes(block_q=2048, block_k_major=1024, block_k=1024, block_b=1)
    runs: dict[str, Callable[..., Any]] = {
        "splash": jax.vmap(lambda q, k, v: kernel(q * scale, k, v)),
        "flash": lambda q, k, v: jax_flash.flash_attention(q, k, v, sm_scale=scale, block_sizes=tiles),
    }
    work = 4e-12 * HEADS * tokens**2 * HEAD_DIM
    for name, run in runs.items():
        yield {"tokens": tokens, "implementation": name, "kernel": "dense"} | figures(run, sets, work)


def main(
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="sequence length; several times for several")] = None,
) -> None:
    """Times our three kernels, the selection and the peers."""
    if jax.default_backend() != "tpu":
        raise ValueError("no TPU here: run on a TPU machine, or python -m benchmarks.tpu.static for static cycles")
    rows: list[dict[str, Any]] = []
    for size in tokens or SIZES:
        sets = inputs(size)
        for part in (peers(size, sets), ours(size, sets, "mosaic_tpu", list(DENSITIES)), selection(size)):
            for row in part:
                print(row, flush=True)
                rows.append(COLUMNS | row)
    add_ratios(rows)
    show(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, matrix peak {ceilings()['matrix_tflops']:.0f}", rows)
    for size in tokens or SIZES:
        for block in BLOCKS:
            print(f"{size} tokens, block {block}: attention of 50 steps {gain(rows, size, 'mosaic_tpu', block):.2f}x")
    write_json(json, rows)


if __name__ == "__main__":
    run_cli(main)
