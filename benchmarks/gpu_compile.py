"""What the GPU compilers make of our kernels, on a machine with no GPU.

Compiles with the very compilers that run on a GPU machine (the jax-cuda13 plugin's Triton and Mosaic, ptxas) for an
A100 (sm_80) or an H100 (sm_90) and reads registers, spills, shared memory and instructions. Nothing is run.
"""

import os

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

SHARED_MEMORY = {"8.0": 163 * 1024, "9.0": 227 * 1024}
"""Most dynamic shared memory of a block, bytes."""


def cuda_root() -> Path:
    """The CUDA toolkit that the nvidia-* wheels install; FileNotFoundError without one."""
    root = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
    if not (root / "bin" / "ptxas").is_file():
        raise FileNotFoundError(f"{root}/bin/ptxas is missing; pip install -e '.[gpu-compilers]'")
    return root


def run_ptxas(ptx: str) -> dict[str, int]:
    """Registers and spilled bytes of one kernel's PTX."""
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [cuda_root() / "bin" / "ptxas", "-v", f"-arch={arch[1]}", source, "-o", Path(folder) / "kernel.cubin"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"ptxas: {ended.stderr.strip()[:500]}")
    return read_ptxas(ended.stderr)


def read_ptxas(log: str) -> dict[str, int]:
    """Registers and spilled bytes in what `ptxas -v` prints."""
    numbers = lambda pattern: [int(n) for n in re.findall(pattern, log)]
    return {
        "registers": max(numbers(r"Used (\d+) registers")),
        "spill_bytes": sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
    }


def _custom_calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for op in block:
                if op.operation.name == "stablehlo.custom_call":
                    yield op
                yield from _custom_calls(op.operation)


def triton_report(lowered: jax.stages.Lowered, arch: str) -> list[dict[str, Any]]:
    """One row a Pallas-Triton kernel of a function lowered for cuda, compiled by XLA's own Triton."""
    from jax._src.lib import triton
    from jaxlib.mlir import ir

    jax.devices()  # registers the plugin's compiler
    rows = []
    for call in _custom_calls(lowered.compiler_ir("stablehlo").operation):
        if call.attributes["call_target_name"].value != "__gpu$xla.gpu.triton":
            continue
        config = ir.DictAttr(call.attributes["mhlo.backend_config"])
        number = lambda key, config=config: ir.IntegerAttr(config[key]).value
        warps, stages = number("num_warps"), number("num_stages")
        made = triton.compile("CUDA", config["ir"].value_bytes, arch, num_warps=warps, num_ctas=1, num_stages=stages)
        rows.append(
            {"name": config["name"].value, "arch": arch, "num_warps": warps, "num_stages": stages}
            | run_ptxas(made.asm)
            | {
                "smem_bytes": made.smem_bytes,
                "mma_sync": made.asm.count("mma.sync"),
                "wgmma": made.asm.count("wgmma.mma_async"),
                "tma_loads": made.asm.count("cp.async.bulk.tensor"),
            }
        )
    return rows


def topology(target_config: str, shape: str = "1x1x1") -> Any:
    """Devices of a GPU that is not there, for ahead-of-time compiles."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="cuda", topology_name="", topology=shape, target_config=target_config)
