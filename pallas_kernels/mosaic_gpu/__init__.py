"""Hopper kernels (sm_90a) in Pallas Mosaic GPU: TMA loads by block index, wgmma, warp specialisation."""

import jax.numpy as jnp

from pallas_kernels.calls import Request, ScorePrecision
from pallas_kernels.dispatch import gpu_capability
from pallas_kernels.mosaic_gpu.attention import block_sparse_attention, flash_attention, pooled_attention
from pallas_kernels.mosaic_gpu.mass import block_mass

__all__ = [
    "block_mass",
    "block_sparse_attention",
    "fastest_scores",
    "flash_attention",
    "pooled_attention",
    "unsupported",
]


def fastest_scores() -> ScorePrecision:
    """See `dispatch.choose_precision`. A Hopper multiplies e4m3 as fast, which is three times as far from bfloat16."""
    return "int8"


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if jnp.dtype(request.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype={jnp.dtype(request.dtype)} must be bfloat16 or float16"
    if request.head_dim not in (64, 128):
        return f"head_dim={request.head_dim} must be 64 or 128"
    if any(block is not None and block < 64 for block in (request.block_q, request.block_k)):
        return f"block_q={request.block_q}, block_k={request.block_k} must be at least 64"
    capability = gpu_capability()
    if capability is not None and not request.interpret and capability != "9.0":
        return f"compute capability {capability} is not 9.0 (Hopper)"
    return None
