"""TPU kernels (v5e, v5p, v6e, v7x) in Pallas Mosaic."""

import jax
import jax.numpy as jnp

from pallas_kernels.calls import Request, ScorePrecision
from pallas_kernels.mosaic_tpu.calls import block_sparse_attention, flash_attention, pooled_attention
from pallas_kernels.mosaic_tpu.chip import chip
from pallas_kernels.mosaic_tpu.mass import block_mass

__all__ = [
    "block_mass",
    "block_sparse_attention",
    "fastest_scores",
    "flash_attention",
    "pooled_attention",
    "unsupported",
]

_BLOCKS = (64, 128, 256)


def fastest_scores() -> ScorePrecision:
    """The 8 bits that the chip multiplies faster than bfloat16, see `dispatch.choose_precision`."""
    return "fp8" if chip().generation > 6 else "int8"


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if request.kernel == "flash_attention" and request.score_precision != "input":
        return f"score_precision={request.score_precision!r} of dense attention is for Hopper GPUs"
    if jnp.dtype(request.dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype={jnp.dtype(request.dtype)} must be bfloat16 or float32"
    if request.head_dim not in (64, 128):
        return f"head_dim={request.head_dim} must be 64 or 128"
    if any(block is not None and block not in _BLOCKS for block in (request.block_q, request.block_k)):
        return f"block_q={request.block_q}, block_k={request.block_k} must be 64, 128 or 256"
    if not request.interpret and jax.default_backend() not in ("tpu", "cpu"):
        return f"the default platform is {jax.default_backend()}, not tpu"
    return None
