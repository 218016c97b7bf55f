"""`@triton.jit` kernels called through jax-triton, the paper's own kind of kernel.

Needs the jax-triton package and a CUDA plugin of jax. For tests without a GPU, TRITON_INTERPRET=1 set before the first
import of triton makes `interpret=True` run the kernels in Triton's interpreter, in float16 and float32.
"""

import importlib.util
import os

import jax.numpy as jnp

from pallas_kernels import triton_calls
from pallas_kernels.calls import Request
from pallas_kernels.jax_triton.kernels import block_mass, block_sparse_attention, flash_attention, pooled_attention

__all__ = ["block_mass", "block_sparse_attention", "flash_attention", "pooled_attention", "unsupported"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(request: Request) -> str | None:
    """Why the call cannot run here, or None."""
    if request.interpret and not _INTERPRETED:
        return "interpret=True needs TRITON_INTERPRET=1 in the environment before triton is imported"
    if request.interpret and jnp.dtype(request.dtype) == jnp.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; test in float16 or float32"
    if not request.interpret and importlib.util.find_spec("jax_triton") is None:
        return "the package jax-triton is not installed"
    return triton_calls.unsupported(request)
