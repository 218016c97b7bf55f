"""Pallas-Triton kernels for Ampere and later."""

from pallas_kernels.calls import Request
from pallas_kernels.dispatch import gpu_capability
from pallas_kernels.triton.kernels import block_mass, block_sparse_attention, flash_attention, pooled_attention

__all__ = ["block_mass", "block_sparse_attention", "flash_attention", "pooled_attention", "unsupported"]


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if request.score_precision != "input":
        return f"score_precision={request.score_precision!r} is for TPUs"
    if request.head_dim < 16 or request.head_dim > 128 or request.head_dim & (request.head_dim - 1):
        return f"head_dim={request.head_dim} must be a power of two from 16 to 128"
    if any(block is not None and block < 16 for block in (request.block_q, request.block_k)):
        return f"block_q={request.block_q}, block_k={request.block_k} must be at least 16"
    capability = gpu_capability()
    if capability is not None and not request.interpret and float(capability) < 8.0:
        return f"compute capability {capability} is below 8.0 (Ampere)"
    return None
