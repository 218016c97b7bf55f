"""Does HunyuanVideo-13B's sampler fit the devices of a machine that is not there, and what do they send each other?

    python -m benchmarks.devices.compiled [--machine h100-8] [--layers 20 40] [--json FILE]

720p x 129 frames, block 64, 50 steps with stand-ins, compiled by the real compilers for all devices of the machine;
nothing runs. Memory is that of one device. What few layers compile to is what all do, so the default is one of a kind;
weights and states grow with them: `all_60_gib` adds those of the rest, whole or sliced, to what was compiled.
"""

import math
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax.sharding import AxisType, Mesh

from adaspa_jax import AttentionSharding, SparseConfig, SparseState
from benchmarks.full_size import ALL_LAYERS, HIDDEN_MB, LATENTS, TEXT, create, operands, program
from benchmarks.table import rows_of, show, write_json
from models.commands.cli import run_cli
from models.pipeline.mesh import Weights, placement
from models.transformers.hunyuan_video import HunyuanVideoConfig
from pallas_kernels import Implementation

GIB = 2**30
SMALL_MB = 0.01 * HIDDEN_MB
"""A hundredth of the video tokens' hidden state."""
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "f64": 8, "s64": 8, "u64": 8}
_OPERATIONS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


@dataclass(frozen=True)
class Machine:
    """Several devices and how the sampler is spread over them."""

    topology: str | None
    """Of a TPU slice; None: H100s."""
    heads: int
    rows: int
    weights: Weights
    gib: int
    """Memory of a device; a chip of v7x is two."""

    @property
    def implementation(self) -> Implementation:
        """Of the kernels."""
        return "mosaic_tpu" if self.topology else "mosaic_gpu"

    def mesh(self) -> Mesh:
        """Its devices, which need not be there."""
        count = self.heads * self.rows
        if self.topology is None:
            from benchmarks.gpu.compiled import devices
            from benchmarks.gpu.toolkit import use_toolkit

            use_toolkit()
            found = devices("9.0", count)
        else:
            from jax.experimental import topologies

            found = topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices[:count]
        grid = np.array(found).reshape(1, self.rows, self.heads)
        return Mesh(grid, ("data", "rows", "heads"), axis_types=(AxisType.Auto,) * 3)


MACHINES = {
    "h100-8": Machine(None, 8, 1, "replicated", 80),
    "h100-4": Machine(None, 4, 1, "replicated", 80),
    "v6e-8": Machine("v6e:2x4", 8, 1, "sharded", 32),
    "v5p-8": Machine("v5p:2x2x2", 8, 1, "sharded", 95),
    "v5e-16": Machine("v5e:4x4", 8, 2, "sharded", 16),
    "v7x-8": Machine("tpu7x:2x2x2", 8, 2, "sharded", 96),
}


def collectives(text: str) -> list[tuple[str, int]]:
    """(operation, bytes of its result on a device) of every collective in a compiled program's HLO."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({_OPERATIONS})(-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [_BYTES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes]
            # The result of an asynchronous one is (operands, results).
            found.append((match[2], sum(sizes[len(sizes) // 2 :] if match[3] else sizes)))
    return found


def operands_of(
    machine: Machine, mesh: Mesh, layers: tuple[int, int], config: SparseConfig
) -> tuple[Any, tuple[Any, ...]]:
    """(the sampler as a function, its operands as shapes with shardings: weights, noise, the rest, states)."""
    sharding, place = AttentionSharding(mesh), placement(mesh, machine.weights)
    graph, weights = nnx.split(nnx.eval_shape(lambda: create(layers)))
    shape = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    names = lambda path: tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path)
    weights = jax.tree_util.tree_map_with_path(lambda path, x: shape(x, place(names(path), x.shape)), weights)
    states = jax.eval_shape(lambda: create(layers).init_state(config, 1, LATENTS, TEXT, False, sharding))
    states = tuple(jax.tree.map(shape, state, SparseState.shardings(sharding)) for state in states)
    everywhere = partial(jax.tree.map, lambda x: shape(x, sharding.named()))
    given = everywhere(jax.eval_shape(lambda: operands(HunyuanVideoConfig())))
    noise = everywhere(jax.ShapeDtypeStruct(given.pop("hidden_states").shape, jnp.float32))
    run = program(graph, config, sharding=sharding, implementation=machine.implementation)
    return run, (weights, noise, given, states)


def per_device(tree: Any) -> float:
    """GiB of shapes with shardings that lie on one device."""
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)]
    return sum(sizes) / GIB


def measure(name: str, layers: tuple[int, int], steps: int) -> dict[str, Any]:
    """The row of one machine."""
    machine, begun = MACHINES[name], time.perf_counter()
    mesh, config = machine.mesh(), SparseConfig(steps=steps)
    run, given = operands_of(machine, mesh, layers, config)
    platform = "tpu" if machine.topology else "cuda"
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run).trace(*given).lower(lowering_platforms=(platform,)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "these compilers always give one"
    # A TPU's program cannot be printed: jax 0.10's own check of it fails.
    found = None if machine.topology else collectives(compiled.as_text() or "")
    _, every = operands_of(machine, mesh, ALL_LAYERS, config)
    return {
        "machine": name,
        "mesh": f"heads={machine.heads},rows={machine.rows}",
        "weights": machine.weights,
        "layers": f"{layers[0]}+{layers[1]}",
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporary_gib": memory.temp_size_in_bytes / GIB,
        "all_60_gib": per_device(every) + memory.temp_size_in_bytes / GIB,
        "of_gib": machine.gib,
        # Of the tokens: those of the lists, at a search, are hundreds of times smaller.
        "all_to_alls": found and sum(op == "all-to-all" and size > SMALL_MB * 1e6 for op, size in found),
        "largest_gather_mb": found and max((size for op, size in found if op == "all-gather"), default=0) / 1e6,
        "compile_seconds": time.perf_counter() - begun,
    }


def main(
    machine: Annotated[list[str] | None, typer.Option(help="several times for several; default: all")] = None,
    layers: Annotated[tuple[int, int], typer.Option(help="dual-stream and single-stream layers")] = (1, 1),
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Compiles the sampler for machines that are not there."""
    names = machine or list(MACHINES)
    if unknown := [name for name in names if name not in MACHINES]:
        raise ValueError(f"--machine {unknown[0]} must be one of {', '.join(MACHINES)}")
    if len(names) > 1:  # one process can compile for one kind of device
        options = ["--layers", *layers, "--steps", steps]
        rows = [row for name in names for row in rows_of("benchmarks.devices.compiled", "--machine", name, *options)]
    else:
        rows = [measure(names[0], layers, steps)]
    show("the sampler of HunyuanVideo-13B, compiled for several devices; NOTHING RAN", rows)
    write_json(json, rows)


if __name__ == "__main__":
    run_cli(main)
