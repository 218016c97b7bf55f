"""Tile sizes. They change speed, never the result beyond rounding."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

Kernel = Literal["dense", "block_mass", "block_sparse"]


@dataclass(frozen=True)
class XlaTuning:
    """Tiles of the portable XLA path; the defaults were chosen on two AVX2 cores (benchmarks/cpu.py)."""

    dense_q: int = 512
    """Rows of a dense or block-mass tile."""
    dense_k: int = 1024
    """Keys of a dense or block-mass tile."""
    group_keys: int = 1664
    """Most keys that a query block gathers for one softmax step."""
    short_group_keys: int = 448
    """About as many for rows that fit in three such steps."""
    step_keys: int = 4096
    """Keys that the query blocks of one step gather together."""


XLA = XlaTuning()


@dataclass(frozen=True)
class TritonTuning:
    """One Triton kernel's tiles and resources."""

    tile_q: int
    """Rows of a program; a query block of more rows is split."""
    tile_k: int
    """Keys of one step; a key block of more keys is split."""
    num_warps: int
    num_stages: int


def triton_tuning(kernel: Kernel, dtype: Any, head_dim: int) -> TritonTuning:
    """Defaults of the Triton kernels; none of them spills on sm_80 or sm_90 (benchmarks.gpu --compile-only)."""
    if jnp.dtype(dtype).itemsize == 4:
        mass = kernel == "block_mass"
        return TritonTuning(tile_q=32, tile_k=16 if mass else 32, num_warps=4 if mass else 8, num_stages=2)
    if kernel == "block_mass":
        return TritonTuning(tile_q=128, tile_k=128, num_warps=8, num_stages=2)
    return TritonTuning(tile_q=64, tile_k=64, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class MosaicGpuTuning:
    """One Hopper kernel's key tile and pipeline depth; the query tile follows from the query block."""

    tile_k: int
    """Keys of one step; a key block of more keys is split."""
    stages: int
    """Key tiles in shared memory at a time."""
    groups: int = 2
    """Consumer warpgroups of the block-mass kernel, of 64 rows each."""


def mosaic_gpu_tuning(kernel: Kernel, head_dim: int, block_q: int = 128, block_k: int = 128) -> MosaicGpuTuning:
    """Defaults of the Hopper kernels."""
    if kernel == "block_sparse" and block_q == 64:
        # Little shared memory, so that three programs share a multiprocessor.
        return MosaicGpuTuning(tile_k=min(block_k, 64), stages=2)
    tile = min(block_k, 128)
    if kernel == "block_sparse" and tile == 64:
        return MosaicGpuTuning(tile_k=64, stages=3)
    if kernel == "block_mass" and head_dim == 128:
        return MosaicGpuTuning(tile_k=tile, stages=3 if tile == 128 else 4, groups=3)
    return MosaicGpuTuning(tile_k=tile, stages=2 if tile * head_dim == 128 * 128 else 4)


@dataclass(frozen=True)
class TpuAttentionTuning:
    """Groups of key tiles of the TPU attention kernels."""

    group: int
    """Tiles of one softmax step."""
    unroll: int
    """Softmax steps of one turn of the loop over whole tiles: 2, 4 or 8."""
    resident: bool | None = None
    """Keep K and V of a head in VMEM; None: if they fit the chip."""

    def __post_init__(self) -> None:
        if self.unroll not in (2, 4, 8):
            raise ValueError(f"unroll={self.unroll} must be 2, 4 or 8")


def tpu_pooled_tuning(tile: int, tiles: int, dtype: Any, generation: int = 5) -> TpuAttentionTuning:
    """Defaults for `tiles` tiles that every query block takes: as few pairs of groups as `tpu_attention_tuning` allows.

    Each has a bias, so that there are no longer turns.
    """
    most = tpu_attention_tuning(tile, 4096, dtype, generation).group
    pairs = -(-tiles // (2 * most))
    return TpuAttentionTuning(group=-(-tiles // (2 * pairs)), unroll=2)


def tpu_attention_tuning(tile: int, tiles: int, dtype: Any, generation: int = 5) -> TpuAttentionTuning:
    """Defaults for lists of at most `tiles` tiles: long steps, but few enough for short lists to fill."""
    narrow = jnp.dtype(dtype).itemsize == 2
    keys = 1024 if not narrow else 2560 if generation == 6 and tile == 128 else 2048
    group = keys // tile
    while group > 2 and 2 * group > tiles:
        group //= 2
    return TpuAttentionTuning(group=group, unroll=8 if narrow and tiles >= 4 * group else 2)
