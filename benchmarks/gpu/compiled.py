"""What the GPU compilers make of our kernels, on a machine with no GPU.

    python -m benchmarks.gpu.compiled --arch 9.0 --json rows.json

Every default configuration is compiled for an A100 (8.0) or an H100 (9.0) with the very compilers that run on a GPU
machine: XLA's Triton and Mosaic from the jax-cuda13 plugin, OpenAI Triton for jax_triton, and ptxas. Registers,
spills, shared memory and instructions are read off what they made. Nothing is run. One process an architecture:
Mosaic does not compile for a second one.
"""

import os
import tempfile

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read when jax is imported; the folder must exist by then.
_FOLDER = tempfile.TemporaryDirectory()
_DUMP = os.path.join(_FOLDER.name, "mosaic")
os.mkdir(_DUMP)
os.environ["MOSAIC_GPU_DUMP_TO"] = _DUMP
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu.stale import stale_copies
from benchmarks.gpu.toolkit import cuda_root, disassembled, use_toolkit
from benchmarks.table import show, write_json
from models.commands.cli import run_cli
from pallas_kernels.calls import DenseCall, MassCall, PooledCall, SparseCall
from pallas_kernels.dispatch import Implementation, backend

TARGETS: dict[str, dict[str, Any]] = {
    "8.0": {
        "name": "NVIDIA A100-SXM4-80GB",
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
        "core_count": 108,
        "fpus_per_core": 64,
        "memory_bandwidth": 2039040000000,
        "l2_cache_size": 41943040,
        "clock_rate_ghz": 1.41,
        "cuda_compute_capability": "{ major: 8 feature_extension: NONE }",
    },
    "9.0": {
        "name": "NVIDIA H100 80GB HBM3",
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "core_count": 132,
        "fpus_per_core": 128,
        "memory_bandwidth": 3352320000000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
    },
}
"""XLA's description of a GPU, by compute capability (GpuTargetConfigProto), less what both share."""
_SHARED = """
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_memory_size: 85000000000
"""

IN_8_BITS = {f"{kernel}, {name} scores": name for kernel in ("block_sparse", "dense") for name in ("int8", "fp8")}
"""Those of Hopper GPUs alone."""
KERNELS = ("dense", "block_mass", "block_sparse", "pooled", *IN_8_BITS)
_TMA = "cp.async.bulk.tensor"
# implementation -> (architectures, dtypes)
IMPLEMENTATIONS: dict[Implementation, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "triton": (("8.0", "9.0"), ("bfloat16", "float16", "float32")),
    "mosaic_gpu": (("9.0",), ("bfloat16", "float16")),
    "jax_triton": (("8.0", "9.0"), ("bfloat16", "float16", "float32")),
}


def devices(arch: str, count: int = 1) -> list[Any]:
    """`count` GPUs that are not there, for ahead-of-time compiles."""
    from jax.experimental import topologies

    target = dict(TARGETS[arch])
    name = target.pop("name")
    info = " ".join(f"{key} {value}" if key.startswith("cuda") else f"{key}: {value}" for key, value in target.items())
    text = (
        f"gpu_device_info {{ {_SHARED} {info} }}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 12 }\n'
        f'device_description_str: "{name}"'
    )
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=text
    ).devices


def run_ptxas(ptx: str, ptxas: Path | None = None) -> dict[str, int]:
    """Registers, spilled bytes, warnings that wgmmas are serialized, and what `benchmarks.gpu.stale` finds.

    `ptxas`: another than the toolkit's, for PTX that is newer.
    """
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        tool, made = str(ptxas or cuda_root() / "bin" / "ptxas"), f"{folder}/kernel.cubin"
        command = [tool, "-v", f"-arch={arch[1]}", str(source), "-o", made]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"ptxas: {ended.stderr.strip()[:500]}")
        stale = stale_copies(disassembled(Path(made))) if _TMA in ptx else []
    numbers = lambda pattern: [int(n) for n in re.findall(pattern, ended.stderr)]
    return {
        "registers": max(numbers(r"Used (\d+) registers")),
        "spill_bytes": sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        "serialized": ended.stderr.count("instructions are serialized"),
        "stale": len(stale),
    }


def count_instructions(ptx: str) -> dict[str, int]:
    """The instructions that say which units a kernel uses."""
    return {
        "mma_sync": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma_loads": ptx.count(_TMA),
        "local_memory": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
    }


def call(
    implementation: Implementation, kernel: str, block: int, head_dim: int, dtype: str, **options: Any
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """(function, argument shapes) of one kernel call, padded text and valid counts included."""
    module, tokens = backend(implementation), 8 * block
    shape = jax.ShapeDtypeStruct
    x = shape((1, 2, tokens, head_dim), dtype)
    valid, counts = shape((1, 8), jnp.int32), shape((1, 2, 8), jnp.int32)
    scale, blocks = head_dim**-0.5, (block, block)
    how: dict[str, Any] = {"score_precision": IN_8_BITS.get(kernel, "input")}
    if kernel.startswith("dense"):
        return lambda q, b: module.flash_attention(DenseCall(q, q, q, scale, block, b, **how), **options), [x, valid]
    if kernel == "block_mass":
        mass = lambda q, s, b: module.block_mass(MassCall(q, q, s, scale, *blocks, b, b), **options)
        return mass, [x, shape(x.shape[:3], jnp.float32), valid]
    if kernel == "pooled":
        means, words = shape((1, 2, 200, head_dim), dtype), shape((1, 2, 8, 7), jnp.uint32)
        pooled = lambda q, k, s, m: module.pooled_attention(PooledCall(q, k, k, s, m, scale, block), **options)
        return pooled, [x, means, shape(means.shape[:3], jnp.float32), words]
    given = lambda q, i, c, b: SparseCall(q, q, q, i, c, scale, *blocks, b, **how)
    sparse = lambda *arrays: module.block_sparse_attention(given(*arrays), **options)
    return sparse, [x, shape((1, 2, 8, 4), jnp.uint16), counts, valid]


def as_device(arch: str, **axes: int) -> Any:
    """A context in which Pallas Triton of jax 0.11 and later, which asks what GPU it is for, finds a mesh of `arch`."""
    device = jax.sharding.AbstractDevice(TARGETS[arch]["name"], TARGETS[arch]["core_count"], "gpu")
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lower(function: Callable[..., Any], arguments: list[jax.ShapeDtypeStruct], arch: str) -> jax.stages.Lowered:
    """The function lowered for a GPU that is not there."""
    sharding = NamedSharding(Mesh(np.array(devices(arch)), ("x",)), PartitionSpec())
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    with as_device(arch, x=1):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",))


def _custom_calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for op in block:
                if op.operation.name == "stablehlo.custom_call":
                    yield op
                yield from _custom_calls(op.operation)


def _pallas_triton(function: Callable[..., Any], arguments: list[Any], arch: str) -> dict[str, int]:
    """The kernel as XLA's own Triton compiles it."""
    from jax._src.lib import triton
    from jaxlib.mlir import ir

    jax.devices()  # registers the plugin's compiler
    lowered = lower(function, arguments, arch)
    module: Any = lowered.compiler_ir("stablehlo")
    for operation in _custom_calls(module.operation):
        if operation.attributes["call_target_name"].value == "__gpu$xla.gpu.triton":
            config: Any = ir.DictAttr(operation.attributes["mhlo.backend_config"])
            number = lambda key, config=config: ir.IntegerAttr(config[key]).value
            made = triton.compile(
                "CUDA",
                config["ir"].value_bytes,
                arch,
                num_warps=number("num_warps"),
                num_ctas=1,
                num_stages=number("num_stages"),
            )
            return run_ptxas(made.asm) | {"smem_bytes": made.smem_bytes} | count_instructions(made.asm)
    raise AssertionError("no Triton kernel in the lowered function")


def _mosaic(function: Callable[..., Any], arguments: list[Any], arch: str) -> dict[str, int]:
    """The kernel as Mosaic compiles it for a whole jitted function."""
    folder = Path(_DUMP)
    for old in folder.iterdir():
        old.unlink()
    lower(function, arguments, arch).compile()
    (source,) = folder.glob("*.ptx")
    ptx = source.read_text(encoding="utf-8")
    sizes = {
        int(n)
        for log in folder.glob("*.mlir-passes.log")
        for n in re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", log.read_text(encoding="utf-8"))
    }
    return run_ptxas(ptx) | {"smem_bytes": max(sizes, default=0)} | count_instructions(ptx)


def _jax_triton(function: Callable[..., Any], arguments: list[Any], arch: str) -> dict[str, int]:
    """The kernel as OpenAI Triton compiles it; what jax-triton would be called with is caught on the way."""
    import jax_triton
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    os.environ["TRITON_CACHE_DIR"] = os.path.join(_FOLDER.name, "triton")  # jax_triton empties it
    caught: dict[str, Any] = {}

    def catch(*inputs: Any, kernel: Any, out_shape: Any, grid: Any, num_warps: int, num_stages: int, **constants: Any):
        constants.pop("compute_capability")
        caught.update(kernel=kernel, arrays=[*inputs, *out_shape], constants=constants)
        caught["options"] = {"num_warps": num_warps, "num_stages": num_stages}
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    with mock.patch.object(jax_triton, "triton_call", catch):
        jax.eval_shape(function, *arguments)
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "uint16": "u16"}
    names = caught["kernel"].arg_names
    pointers = {n: "*" + short[x.dtype.name] for n, x in zip(names, caught["arrays"], strict=False)}
    source = ASTSource(
        caught["kernel"],
        pointers | dict.fromkeys(caught["constants"], "constexpr"),
        constexprs=caught["constants"],
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    made = triton.compile(source, target=GPUTarget("cuda", int(float(arch) * 10), 32), options=caught["options"])
    ptx = made.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # its newest takes every PTX it writes
    own = [tools / name for name in ("ptxas-blackwell", "ptxas") if (tools / name).is_file()]
    return run_ptxas(ptx, own[0]) | {"smem_bytes": made.metadata.shared} | count_instructions(ptx)


_COMPILE = {"triton": _pallas_triton, "mosaic_gpu": _mosaic, "jax_triton": _jax_triton}


def compiles_triton() -> bool:
    """Whether XLA's Triton can be had by itself: until jax 0.10. Later ones compile it within a program alone."""
    from jax._src.lib import triton

    return hasattr(triton, "compile")


def served(arch: str) -> list[tuple[Implementation, str]]:
    """(implementation, kernel) of what there is for an architecture and can be looked at."""
    names = [name for name, (arches, _) in IMPLEMENTATIONS.items() if arch in arches]
    every = [(name, kernel) for name in names if name != "triton" or compiles_triton() for kernel in KERNELS]
    return [(name, kernel) for name, kernel in every if name == "mosaic_gpu" or kernel not in IN_8_BITS]


def compile_rows(arch: str, few: bool = False) -> list[dict[str, Any]]:
    """One row a default configuration of every implementation that serves `arch`; `few`: bfloat16 at D = 128."""
    use_toolkit()
    rows = []
    if not compiles_triton():
        reason = f"jax {jax.__version__} does not compile it by itself, jax 0.10 does"
        print(f"triton is left out: {reason}", file=sys.stderr)
    for implementation, kernel in served(arch):
        dtypes = IMPLEMENTATIONS[implementation][1]
        for dtype in dtypes[:1] if few else dtypes:
            for head_dim in (128,) if few else (64, 128):
                # A dense kernel's tiles do not depend on the block.
                for block in (64, 128) if not kernel.startswith("dense") else (64,):
                    options = {"compute_capability": int(float(arch) * 10)} if implementation == "jax_triton" else {}
                    case: dict[str, Any] = {"block": block, "head_dim": head_dim, "dtype": dtype}
                    found = _COMPILE[implementation](*call(implementation, kernel, **(case | options)), arch)
                    rows.append({"implementation": implementation, "kernel": kernel, "arch": arch} | case | found)
    return rows


def main(
    arch: Annotated[str, typer.Option(help="8.0 (A100) or 9.0 (H100)")] = "9.0",
    few: Annotated[bool, typer.Option("--few", help="bfloat16 and D = 128 alone, as make test does")] = False,
    json: Annotated[Path | None, typer.Option(help="write the rows to this file")] = None,
) -> None:
    """Compiles every default configuration for one architecture and prints what came out."""
    if arch not in TARGETS:
        raise ValueError(f"--arch {arch} must be one of {', '.join(TARGETS)}")
    rows = compile_rows(arch, few)
    show(f"compiled for {TARGETS[arch]['name']}; nothing was run", rows)
    write_json(json, rows)


if __name__ == "__main__":
    run_cli(main)
