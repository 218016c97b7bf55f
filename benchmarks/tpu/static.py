"""How fast can the TPU kernels be at best? Static cycles from the real TPU compiler; nothing runs on a TPU.

    python -m benchmarks.tpu.static [--chip v5e] [--json rows.json]

Our kernels and the selection at full scale, beside JAX's splash and flash attention at their best blocks. A cycle
count leaves out what DMA and semaphores make a kernel wait: it is a lower bound on time. `cycles` are those of the loop
over whole key tiles, `masked` those of the loop over tiles with keys that are not valid, `all_in` those of a whole list
with one such tile, with what comes before and after its loops and the tiles its length is rounded up by. `layer_ms` is
one layer of an 8 s 720p clip at `all_in`: 24 heads and 119,056 tokens, all blocks for a dense kernel and a fifth of
them for the sparse one; `hbm_ms` is what its traffic takes at the chip's full bandwidth. `select` is XLA's: its sort as
scheduled, and the rest at the bandwidth. One process a chip: the compiler reads its flags once.
"""

import os
import sys
import tempfile

# Read when the compiler is loaded.
_DUMP = tempfile.TemporaryDirectory(prefix="adaspa-tpu-")
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={_DUMP.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=post-ra"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaspa_jax import SparseConfig
from adaspa_jax.search import select_blocks
from benchmarks.table import rows_of, show, write_json
from benchmarks.tpu.schedule import CHIPS, Chip, loops, schedules, scoped_bytes, total_cycles
from models.commands.cli import run_cli
from pallas_kernels import mosaic_tpu
from pallas_kernels.blocks import block_count
from pallas_kernels.calls import DenseCall, MassCall, PooledCall, ScorePrecision, SparseCall
from pallas_kernels.mosaic_tpu.calls import GATHERED_ROWS, POOLED_ROWS, multiplies, query_blocks
from pallas_kernels.mosaic_tpu.chip import chip as tpu_chip
from pallas_kernels.mosaic_tpu.mass import mass_tile
from pallas_kernels.quantized import DTYPES
from pallas_kernels.tuning import TpuAttentionTuning, tpu_attention_tuning, tpu_pooled_tuning

TOKENS, HEADS, DENSITY = 119056, 24, 0.2
GRID, TEXT = (33, 45, 80), 256
"""Video tokens by frame, row and column, and text tokens: TOKENS in all."""
LONG = 350080
"""Tokens of a 24 s clip, to a multiple of 128: K and V of a head no longer fit VMEM."""
UNIT = 128**3
"""Of a block: rows x keys x head dim."""


_SCORES: dict[str, ScorePrecision] = {"int8_scores": "int8", "fp8_scores": "fp8"}
_ATTENTION = ("dense", "block_sparse", *_SCORES, "gathered", "pooled")


@dataclass(frozen=True)
class Case:
    """One kernel of the table."""

    kernel: str
    """dense, block_mass, select, block_sparse, int8_scores and fp8_scores (block-sparse with them), gathered (K and V
    in HBM), pooled, splash, flash or matmul."""
    block: int = 128
    head_dim: int = 128
    dtype: str = "bfloat16"
    tokens: int = TOKENS
    ragged: bool = False
    """With valid counts given at run time."""

    @property
    def name(self) -> str:
        """A key for JSON and test names."""
        parts = [self.kernel, str(self.block), f"D{self.head_dim}", self.dtype, str(self.tokens)]
        return " ".join(parts + ["ragged"] * self.ragged)

    @property
    def kept(self) -> float:
        """Share of the blocks that it computes."""
        if self.kernel == "pooled":
            return 1 / self.block
        return DENSITY if self.kernel in ("block_sparse", *_SCORES, "gathered") else 1.0


MAIN = (
    Case("dense"),
    *(Case(kernel, block) for kernel in ("block_sparse", "block_mass", "select", "pooled") for block in (128, 64)),
    Case("int8_scores"),
    Case("fp8_scores"),
)
MATRIX = (
    *MAIN,
    *(Case(kernel, head_dim=64, ragged=True) for kernel in ("dense", "block_sparse", "block_mass")),
    Case("block_sparse", 64, head_dim=64),
    Case("block_sparse", 256),
    Case("gathered", tokens=LONG),
    Case("gathered", 64, tokens=LONG, ragged=True),
    Case("dense", tokens=LONG),
    Case("block_mass", 64, tokens=LONG),
    *(Case(kernel, dtype="float32", tokens=32768) for kernel in ("dense", "block_mass")),
    Case("block_sparse", 64, dtype="float32", tokens=32768, ragged=True),
)
"""What `make test-all` compiles for every chip."""
FEW = (Case("dense"), Case("block_sparse"), Case("block_mass"), Case("gathered", 64, tokens=LONG, ragged=True))
"""What `make test` does."""
SETS = {"main": MAIN, "all": MATRIX, "few": FEW}
PEERS = (Case("splash", tokens=16384), Case("flash", tokens=16384), Case("matmul", tokens=4096))
Targets = dict[tuple[str, int], dict[str, float]]
TARGETS: Targets = {
    ("block_sparse", 128): {"v5e": 67, "v5p": 67, "v6e": 36, "v7x": 37.5},
    ("block_sparse", 64): {"v5e": 69, "v5p": 69, "v6e": 48, "v7x": 48},
    ("dense", 128): {"v5e": 67, "v5p": 67, "v6e": 36, "v7x": 37.5},
    ("block_mass", 128): {"v5e": 34, "v5p": 34, "v6e": 19, "v7x": 19},
}
"""Static cycles per 128 x 128 x 128 block in bfloat16, of the loop."""
LIST_TARGETS: Targets = {
    ("block_sparse", 128): {"v5e": 73, "v5p": 73, "v6e": 41, "v7x": 43},
    ("block_sparse", 64): {"v5e": 80, "v5p": 80, "v6e": 58, "v7x": 60},
}
"""The same of whole lists."""
OUT_OF_REACH = {("block_sparse", 64, chip) for chip in ("v6e", "v7x")}
"""Loops that miss: a weight that is loaded into their unit of 256 serves 64 rows, and the loads fill the loop."""


_MATMUL = 1024


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in tiles of 1024: the compiler is known to keep the matrix units busy every cycle."""

    def kernel(a: Any, b: Any, out: Any, acc: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _first() -> None:
            acc[...] = jnp.zeros_like(acc)

        acc[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _last() -> None:
            out[...] = acc[...].astype(out.dtype)

    n = a.shape[0]
    return pl.pallas_call(
        kernel,
        grid=(n // _MATMUL,) * 3,
        in_specs=[
            pl.BlockSpec((_MATMUL, _MATMUL), lambda i, j, m: (i, m)),
            pl.BlockSpec((_MATMUL, _MATMUL), lambda i, j, m: (m, j)),
        ],
        out_specs=pl.BlockSpec((_MATMUL, _MATMUL), lambda i, j, m: (i, j)),
        scratch_shapes=[pltpu.VMEM((_MATMUL, _MATMUL), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct((n, n), a.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=60 << 20
        ),
        name="matmul",
    )(a, b)


def _peer(case: Case) -> tuple[Callable[..., Any], list[tuple[Any, ...]], float]:
    """(function, shapes and dtypes, blocks of one turn of its loop) of a kernel that is not ours."""
    n, d = case.tokens, case.head_dim
    if case.kernel == "matmul":
        return _matmul, [((n, n), jnp.bfloat16)] * 2, _MATMUL**3 / UNIT
    if case.kernel == "splash":
        sizes = splash.BlockSizes(block_q=1024, block_kv=2048, block_kv_compute=512)
        mask = splash_mask.MultiHeadMask([splash_mask.FullMask((n, n))] * 2)
        kernel = splash.make_splash_mha(mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        return kernel, [((2, n, d), jnp.bfloat16)] * 3, 1024 * 2048 / 128**2
    tiles = jax_flash.BlockSizes(block_q=2048, block_k_major=1024, block_k=1024, block_b=1)
    flash = functools.partial(jax_flash.flash_attention, sm_scale=d**-0.5, block_sizes=tiles)
    return flash, [((1, 2, n, d), jnp.bfloat16)] * 3, 2048 * 1024 / 128**2


def _tuning(case: Case, generation: int) -> tuple[int, int, TpuAttentionTuning]:
    """(tile, most tiles of a list, tuning) of an attention kernel of ours."""
    whole = case.kernel in ("dense", "pooled")
    tile = 128 if whole else case.block
    keys = block_count(case.tokens, case.block) if case.kernel == "pooled" else case.tokens
    tiles = block_count(keys, tile)
    listed = tiles if whole else int(tiles * 0.3)  # the head tier with the most
    best = tpu_pooled_tuning if case.kernel == "pooled" else tpu_attention_tuning
    tuning = best(tile, listed, jnp.dtype(case.dtype), generation)
    if case.kernel == "gathered":
        tuning = dataclasses.replace(tuning, resident=False)
    return tile, listed, tuning


def _select(case: Case) -> tuple[Callable[..., Any], list[tuple[Any, ...]], float]:
    config = SparseConfig(block_size=case.block)
    layout = config.layout(GRID, TEXT)
    shape = (1, HEADS, layout.video_blocks, layout.num_blocks)
    return lambda mass: select_blocks(mass, layout, config), [(shape, jnp.float32)], HEADS * (TOKENS / 128) ** 2


def _ours(case: Case, generation: int) -> tuple[Callable[..., Any], list[tuple[Any, ...]], float]:
    """The same of one of our kernels."""
    n, block, dtype = case.tokens, case.block, jnp.dtype(case.dtype)
    blocks = block_count(n, block)
    x, scale = ((1, HEADS, n, case.head_dim), dtype), case.head_dim**-0.5
    valid: list[tuple[Any, ...]] = [((1, blocks), jnp.int32)] if case.ragged else []
    given = lambda rest: rest[0] if rest else None
    if case.kernel == "block_mass":
        tile_q, tile_k = mass_tile(block, block, n, n, dtype)
        mass = lambda q, k, lse, *v: mosaic_tpu.block_mass(MassCall(q, k, lse, scale, block, block, given(v)))
        return mass, [x, x, (x[0][:3], jnp.float32), *valid], tile_q * tile_k / 128**2
    tile, listed, tuning = _tuning(case, generation)
    unroll = 2 if tuning.resident is False else tuning.unroll
    step_rows = {"dense": 128, "pooled": POOLED_ROWS}.get(case.kernel, block)
    turn = tuning.group * unroll * (tile / 128) * step_rows / 128
    if case.kernel == "dense":
        if case.ragged:
            x = ((1, HEADS, blocks * block, case.head_dim), dtype)
        dense = lambda q, k, v, *b: mosaic_tpu.flash_attention(DenseCall(q, k, v, scale, block, given(b)), tuning)
        return dense, [x, x, x, *valid], turn
    rows = (1, HEADS, blocks)
    if case.kernel == "pooled":
        pooled = lambda q, k, v, s, m: mosaic_tpu.pooled_attention(PooledCall(q, k, v, s, m, scale, block), tuning)
        means = ((*rows, case.head_dim), dtype)
        return pooled, [x, means, means, (rows, jnp.float32), ((*rows, block_count(blocks, 32)), jnp.uint32)], turn
    precision = _SCORES.get(case.kernel, "input")
    sparse = lambda q, k, v, i, c, s, *b: mosaic_tpu.block_sparse_attention(
        SparseCall(q, k, v, i, c, scale, block, block, given(b), shift=s, score_precision=precision), tuning
    )
    shift = (x[0][:3], jnp.float32)
    return sparse, [x, x, x, ((*rows, listed), jnp.uint16), (rows, jnp.int32), shift, *valid], turn


@functools.cache
def chip_mesh(chip: str) -> Mesh:
    """One chip of a machine that is not there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices
    return Mesh(np.array(devices[:1]), ("x",))


def lower(function: Callable[..., Any], arguments: list[Any], mesh: Mesh, spec: Any = None) -> jax.stages.Lowered:
    """`function` lowered for the TPUs of `mesh`; `arguments` are pytrees of shapes, sharded by `spec`."""
    sharding = NamedSharding(mesh, PartitionSpec() if spec is None else spec)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    # The kernels ask for the chip they are compiled for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",))


def memory(compiled: jax.stages.Compiled) -> Any:
    """The compiler's account of a chip's HBM."""
    found = compiled.memory_analysis()
    assert found is not None, "the TPU compiler always gives one"
    return found


def _layer_ms(case: Case, chip: Chip, cycles: float) -> float:
    """Milliseconds of one layer of the reference clip at `cycles` a block, all cores of a chip working."""
    pairs = HEADS * (TOKENS / 128) ** 2 * case.head_dim / 128 * case.kept
    return pairs * cycles / (chip.ghz * 1e6) / chip.cores


def _hbm_ms(case: Case, chip: Chip, rows: float) -> float:
    """Milliseconds of its HBM traffic: K and V (mass: K) once for every `rows` query rows, Q and out once."""
    token = case.head_dim * jnp.dtype(case.dtype).itemsize
    reads = TOKENS / rows * case.kept * (1 if case.kernel == "block_mass" else 2) + 2
    return HEADS * TOKENS * token * reads / (chip.hbm_gb_per_s * 1e6) / chip.cores


def _schedule(case: Case) -> Path:
    names = {"splash": "splash", "flash": "flash", "matmul": "matmul", "select": "-sort-"}
    # Of the two kernels of a call the one with a shift, which runs unless the shift is far off.
    names |= dict.fromkeys(_ATTENTION, "adaspa_shifted")
    found = schedules(Path(_DUMP.name), names.get(case.kernel, "adaspa"))
    return max(found, key=lambda path: path.stat().st_size)


def _all_in(case: Case, schedule: Path, generation: int, turn: float, mesh: Mesh) -> tuple[float, float]:
    """(masked, all_in) cycles a block of an attention kernel; `turn` blocks a turn of its main loop."""
    found = loops(schedule)
    inner = sorted((loop for loop in found if loop.innermost), key=lambda loop: loop.matmuls)
    (outer,) = (loop for loop in found if not loop.innermost)
    tile, listed, tuning = _tuning(case, generation)
    gathered = len(inner) == 1
    turn_tiles = (2 if gathered else tuning.unroll) * tuning.group
    pooled = case.kernel == "pooled"  # every tile has a bias, and a program one list
    tiles = listed if pooled else round(block_count(case.tokens, tile) * case.kept)
    lists = 1 if pooled or gathered else _lists(case, mesh)
    groups = lists * block_count(tiles, tuning.group)
    masked = groups if pooled or gathered else lists
    turns = (groups - masked) // tuning.unroll
    pairs = block_count(groups - turns * tuning.unroll, 2)
    # The turn in the middle of the outer loop runs one pair of groups.
    cycles = turns * inner[-1].cycles + pairs * inner[0].cycles + outer.cycles - inner[0].cycles
    blocks = turn / turn_tiles  # of a tile
    return inner[0].cycles / (2 * tuning.group * blocks), cycles / (lists * tiles * blocks)


def _lists(case: Case, mesh: Mesh) -> int:
    """Query blocks of a program of a kernel that keeps K and V in VMEM."""
    tile, _, tuning = _tuning(case, generation_of(mesh))
    rows = 128 if case.kernel == "dense" else case.block
    keys = tile * block_count(case.tokens, tile)
    scored = jnp.dtype(DTYPES[_SCORES[case.kernel]] if case.kernel in _SCORES else case.dtype)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        dtype = scored if multiplies(scored) else jnp.dtype(case.dtype)
        k, values = jax.ShapeDtypeStruct((1, 1, keys, case.head_dim), dtype), jnp.dtype(case.dtype).itemsize
        return query_blocks(k, rows, block_count(case.tokens, rows), tile, tuning, values)


def generation_of(mesh: Mesh) -> int:
    """Of the chip of a mesh."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return tpu_chip().generation


def compile_case(case: Case, chip: str) -> dict[str, Any]:
    """One row of the table."""
    for path in Path(_DUMP.name).iterdir():
        path.unlink()
    attention = case.kernel in _ATTENTION
    mesh = chip_mesh(chip)
    generation = generation_of(mesh)
    if case.kernel == "select":
        function, shapes, turn = _select(case)
    else:
        ours = attention or case.kernel == "block_mass"
        function, shapes, turn = _ours(case, generation) if ours else _peer(case)
    compiled = lower(function, [jax.ShapeDtypeStruct(*s) for s in shapes], mesh).compile()
    schedule = _schedule(case)
    if "gathered" in schedule.name and case.kernel != "gathered":
        turn *= 2 / _tuning(case, generation)[2].unroll  # it knows no longer turns
        turn *= GATHERED_ROWS / 128 if case.kernel == "dense" else 1
    turn *= case.head_dim / 128
    # The loop of block mass is its grid, with one over strips of the result inside that it runs at the end of a row.
    candidates = [loop for loop in loops(schedule) if loop.innermost or case.kernel == "block_mass"]
    main = max(candidates, key=lambda loop: loop.matmuls)
    cycles = (total_cycles(schedule) if case.kernel == "select" else main.cycles) / turn
    masked, all_in = _all_in(case, schedule, generation, turn, mesh) if attention else (cycles, cycles)
    cycles = masked if case.kernel == "pooled" else cycles
    products = 0 if case.kernel == "select" else 1 if case.kernel in ("block_mass", "matmul") else 2
    scoped = scoped_bytes(schedule)
    reread = {
        "block_mass": mass_tile(case.block, case.block, case.tokens, case.tokens, case.dtype)[0],
        "splash": 1024,
        "flash": 2048,
    }
    gathered = GATHERED_ROWS if case.kernel == "dense" else case.block
    rows = reread.get(case.kernel, gathered if "gathered" in schedule.name else TOKENS)
    layer_ms: float | None = _layer_ms(case, CHIPS[chip], all_in)
    hbm_ms: float | None = _hbm_ms(case, CHIPS[chip], rows)
    if case.kernel == "matmul":
        layer_ms = hbm_ms = None
    if case.kernel == "select":
        hbm_ms = (compiled.cost_analysis() or {})["bytes accessed"] / (CHIPS[chip].hbm_gb_per_s * 1e6)
        layer_ms = cycles * turn / (CHIPS[chip].ghz * 1e6) + hbm_ms
    return {
        "kernel": case.kernel,
        "chip": chip,
        "block": case.block,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "ragged": case.ragged,
        "cycles_per_block": cycles,
        "masked_cycles_per_block": masked,
        "all_in_cycles_per_block": all_in,
        "mxu_percent": 100 * products * 2 * UNIT / CHIPS[chip].flops_per_cycle / cycles,
        "vmem_bytes": scoped["vmem"],
        "smem_bytes": scoped["smem"],
        "hbm_temp_bytes": memory(compiled).temp_size_in_bytes,
        "layer_ms": layer_ms,
        "hbm_ms": hbm_ms,
    }


def missed(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Targets that a row misses, in words: those that are known to be out of reach, and the others."""
    known: list[str] = []
    others: list[str] = []
    for row in rows:
        if (row["dtype"], row["head_dim"], row["tokens"]) != ("bfloat16", 128, TOKENS):
            continue
        for figure, targets in (("cycles_per_block", TARGETS), ("all_in_cycles_per_block", LIST_TARGETS)):
            target = targets.get((row["kernel"], row["block"]), {}).get(row["chip"], math.inf)
            if row[figure] > target:
                where = row["kernel"], row["block"], row["chip"]
                found = known if where in OUT_OF_REACH and targets is TARGETS else others
                found.append(f"{where[0]} {where[1]} on {where[2]}: {figure} {row[figure]:.1f} > {target}")
    return known, others


def in_processes(chips: list[str], cases: str) -> list[dict[str, Any]]:
    """Rows of several chips, each from a process of its own, two at a time."""

    one = lambda chip: rows_of("benchmarks.tpu.static", "--chip", chip, "--cases", cases)
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(one, chips) for row in rows]


def main(
    chip: Annotated[
        list[str] | None, typer.Option(help=f"one of {', '.join(CHIPS)}; several times for several")
    ] = None,
    cases: Annotated[str, typer.Option(help="main, few (make test) or all (make test-all)")] = "main",
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Compiles our kernels and their peers and prints the table."""
    chips = chip or list(CHIPS)
    if unknown := [name for name in chips if name not in CHIPS]:
        raise ValueError(f"--chip {unknown[0]} must be one of {', '.join(CHIPS)}")
    if cases not in SETS:
        raise ValueError(f"--cases {cases} must be one of {', '.join(SETS)}")
    if len(chips) > 1:
        rows = in_processes(chips, cases)
    else:
        rows = []
        for case in (*SETS[cases], *PEERS):
            begun = time.perf_counter()
            rows.append(compile_case(case, chips[0]))
            print(f"{chips[0]}: {case.name} in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    short = [{k.replace("_per_block", "").replace("_cycles", ""): v for k, v in row.items()} for row in rows]
    show("static cycles per 128 x 128 x 128 block, compiled for TPU; NOTHING RAN ON A TPU", short)
    known, others = missed(rows)
    for line in known:
        print(f"{line}: out of reach, a weight serves 64 rows")
    for line in others or [f"every {'other ' * bool(known)}target is met"]:
        print(line)
    write_json(json, rows)


if __name__ == "__main__":
    run_cli(main)
