"""Attention kernels as pure functions of arrays: dense, block mass, block-sparse, over pooled keys."""

from pallas_kernels.api import (
    block_mass,
    block_sparse_attention,
    flash_attention,
    merge_attention,
    pooled_attention,
)
from pallas_kernels.blocks import ascending, lookup, pack_bits, partial_first, unpack_bits
from pallas_kernels.calls import ScorePrecision
from pallas_kernels.dispatch import Implementation, resolve_implementation, resolve_score_precision

__all__ = [
    "Implementation",
    "ScorePrecision",
    "ascending",
    "block_mass",
    "block_sparse_attention",
    "flash_attention",
    "lookup",
    "merge_attention",
    "pack_bits",
    "partial_first",
    "pooled_attention",
    "resolve_implementation",
    "resolve_score_precision",
    "unpack_bits",
]
