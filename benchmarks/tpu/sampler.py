"""Does the whole sampler compile for a TPU, and does it fit? Needs no TPU; nothing runs.

    python -m benchmarks.tpu.sampler [--chip v6e] [--layers 1 2]

HunyuanVideo at 13B sizes with abstract weights, 720p x 129 frames (118,800 video tokens and 256 of text), the preset
`balanced`, 50 steps, as one jitted function with the TPU kernels inside, on one chip. Layers of a kind are scanned, so
few of them compile to the same code as all: what grows with them is the weights and the carried state, printed apart.
"""

import os
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx

from adaspa_jax import SparseConfig
from benchmarks.full_size import LATENTS, TEXT, create, operands, program
from benchmarks.table import show
from benchmarks.tpu import static
from benchmarks.tpu.schedule import CHIPS
from models.commands.cli import run_cli
from models.transformers.hunyuan_video import HunyuanVideoConfig

# Read when the compiler is loaded: dumps of this many operations would take minutes.
os.environ.pop("LIBTPU_INIT_ARGS", None)


def compile_sampler(chip: str, layers: tuple[int, int], block_size: int = 64, steps: int = 50) -> dict[str, Any]:
    """Memory of the compiled sampler [GiB] and seconds of its compilation."""
    config = SparseConfig.preset("balanced", block_size=block_size, steps=steps)
    graph, weights = nnx.split(nnx.eval_shape(lambda: create(layers)))
    given = jax.eval_shape(lambda: operands(HunyuanVideoConfig()))
    noise = jax.ShapeDtypeStruct(given.pop("hidden_states").shape, jnp.float32)
    state = jax.eval_shape(lambda: create(layers).init_state(config, 1, LATENTS, TEXT))
    run = program(graph, config, implementation="mosaic_tpu")
    begun = time.perf_counter()
    lowered = static.lower(run, [weights, noise, given, state], static.chip_mesh(chip))
    kernels = lowered.as_text().count("tpu_custom_call")
    memory = static.memory(lowered.compile())
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**30
    return {
        "chip": chip,
        "layers": f"{layers[0]}+{layers[1]}",
        "kernels": kernels,
        "weights_gib": size(weights),
        "state_gib": size(state),
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "compile_seconds": time.perf_counter() - begun,
    }


def main(
    chip: Annotated[
        list[str] | None, typer.Option(help=f"one of {', '.join(CHIPS)}; several times for several")
    ] = None,
    layers: Annotated[tuple[int, int], typer.Option(help="dual-stream and single-stream layers")] = (1, 2),
) -> None:
    """Compiles the sampler and prints its memory."""
    chips = chip or ["v5p", "v6e"]
    if unknown := [name for name in chips if name not in CHIPS]:
        raise ValueError(f"--chip {unknown[0]} must be one of {', '.join(CHIPS)}")
    show("the whole sampler, compiled for one TPU chip; NOTHING RAN", [compile_sampler(c, layers) for c in chips])


if __name__ == "__main__":
    run_cli(main)
