"""What the kernels ask of the TPU they are compiled for."""

from dataclasses import dataclass

from jax.experimental.pallas import tpu as pltpu

_RESERVED_VMEM = 128 << 10
"""Of a core, in bytes: what the compiler keeps for itself."""


@dataclass(frozen=True)
class Chip:
    """What the kernels ask of a TPU."""

    generation: int
    vmem_bytes: int
    """Of a core that a kernel may use."""


def chip() -> Chip:
    """The chip compiled for; a v5e where there is none."""
    try:
        info = pltpu.get_tpu_info()
    except (ValueError, KeyError, NotImplementedError):
        return Chip(5, (128 << 20) - _RESERVED_VMEM)
    return Chip(info.generation, info.vmem_capacity_bytes - _RESERVED_VMEM)
