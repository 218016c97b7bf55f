"""Attention kernels as pure functions of arrays: dense with LSE, block mass, block-sparse with LSE."""

from pallas_kernels.api import block_mass, block_sparse_attention, flash_attention
from pallas_kernels.blocks import lookup, partial_first
from pallas_kernels.dispatch import Implementation, resolve_implementation

__all__ = [
    "Implementation",
    "block_mass",
    "block_sparse_attention",
    "flash_attention",
    "lookup",
    "partial_first",
    "resolve_implementation",
]
