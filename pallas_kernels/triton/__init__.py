"""Pallas-Triton kernels for Ampere and later."""

from pallas_kernels.triton.kernels import block_mass, block_sparse_attention, flash_attention, pooled_attention
from pallas_kernels.triton_calls import unsupported

__all__ = ["block_mass", "block_sparse_attention", "flash_attention", "pooled_attention", "unsupported"]
