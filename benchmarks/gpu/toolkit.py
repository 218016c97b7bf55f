"""The CUDA tools that the nvidia-* wheels install: they need no GPU."""

import os
import subprocess
import sysconfig
from pathlib import Path


def cuda_root() -> Path:
    """The CUDA toolkit; FileNotFoundError without one."""
    root = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
    if not (root / "bin" / "ptxas").is_file():
        raise FileNotFoundError(f"{root}/bin/ptxas is missing; pip install -e '.[gpu-compilers]'")
    return root


def use_toolkit() -> None:
    """Lets the compilers find ptxas and libdevice; FileNotFoundError without them."""
    os.environ["PATH"] += os.pathsep + str(cuda_root() / "bin")
    os.environ["CUDA_ROOT"] = str(cuda_root())


def disassembled(cubin: Path) -> str:
    """Machine code as text."""
    command = [str(cuda_root() / "bin" / "nvdisasm"), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
