"""Which implementation serves a call."""

import dataclasses
import functools
import importlib
import logging
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.calls import Request, ScorePrecision

Implementation = Literal["reference", "xla", "mosaic_tpu", "triton", "mosaic_gpu", "jax_triton"]
_BEST: dict[str, tuple[Implementation, ...]] = {
    "tpu": ("mosaic_tpu", "xla"),
    # jax 0.11 deprecates the Pallas Triton backend; without it jax_triton takes its place.
    "gpu": ("mosaic_gpu", "triton", "jax_triton", "xla"),
    "cpu": ("xla",),
}


def backend(name: Implementation) -> ModuleType:
    """The module of an implementation, imported when first asked for; NotImplementedError if it lacks a package.

    Each has `unsupported(request)`, the reason why it cannot serve or None, and the kernels, functions of a call; and
    those that multiply 8 bits faster than 16 `fastest_scores()`, which 8 bits.
    """
    try:
        return importlib.import_module(f"pallas_kernels.{name}")
    except ImportError as error:
        raise NotImplementedError(
            f"implementation={name!r} needs a package that is not installed ({error}); "
            "pip install 'adaspa_jax[gpu]' and, for jax_triton, jax-triton"
        ) from error


@functools.cache
def gpu_capability() -> str | None:
    """Compute capability of the default GPU, such as "9.0"; None without one."""
    if jax.default_backend() != "gpu":
        return None
    return getattr(jax.devices()[0], "compute_capability", None)


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("pallas_kernels").warning(message)


def choose(implementation: Implementation | None, request: Request) -> tuple[Implementation, ModuleType]:
    """The named implementation, or for None the best that can serve `request` on the default platform.

    Raises ValueError for an unknown name and NotImplementedError, with the reason, where a named one cannot serve.
    """
    if implementation is not None:
        if implementation not in get_args(Implementation):
            names = ", ".join(get_args(Implementation))
            raise ValueError(f"{implementation=} is unknown; choose one of {names}, or None")
        module = backend(implementation)
        if reason := module.unsupported(request):
            raise NotImplementedError(f"{implementation=} cannot run {request.kernel}: {reason}")
        return implementation, module
    reasons: list[str] = []
    for name in _BEST.get(jax.default_backend(), ("xla",)):
        try:
            module = backend(name)
        except NotImplementedError as missing:
            reasons.append(str(missing))
            continue
        reason = module.unsupported(request)
        if reason is None:
            if reasons and request.score_precision != "input":
                raise NotImplementedError(f"cannot run {request.kernel} here: {'; '.join(reasons)}; use 'input'")
            if name == "xla" and reasons:
                _say_once(f"{request.kernel} runs on slow XLA ({'; '.join(reasons)})")
            return name, module
        reasons.append(f"{name}: {reason}")
    raise AssertionError("xla serves every call")


def check_precision(score_precision: str) -> None:
    """Raises ValueError for one that is unknown."""
    if score_precision not in get_args(ScorePrecision):
        raise ValueError(f"{score_precision=} must be one of {', '.join(get_args(ScorePrecision))}")


def choose_precision(implementation: Implementation | None, request: Request) -> ScorePrecision:
    """The score precision of a request; "auto" is the 8 bits that the device multiplies faster than the dtype, if any.

    Raises as `choose` does.
    """
    if request.score_precision != "auto":
        return request.score_precision
    module = choose(implementation, dataclasses.replace(request, score_precision="input"))[1]
    fastest: ScorePrecision = module.fastest_scores() if hasattr(module, "fastest_scores") else "input"
    served = module.unsupported(dataclasses.replace(request, score_precision=fastest)) is None
    return fastest if served and jnp.dtype(request.dtype).itemsize == 2 else "input"


def resolve_implementation(
    implementation: Implementation | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    head_dim: int = 128,
    block_size: int = 64,
    query_block_size: int | None = None,
) -> Implementation:
    """The implementation that block-sparse attention of these shapes runs on the default platform.

    Raises ValueError for an unknown name and NotImplementedError for one that cannot serve.
    """
    return choose(implementation, _sparse(dtype, head_dim, block_size, query_block_size))[0]


def resolve_score_precision(
    score_precision: ScorePrecision,
    implementation: Implementation | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    head_dim: int = 128,
    block_size: int = 64,
    query_block_size: int | None = None,
) -> ScorePrecision:
    """What "auto" is in block-sparse attention of these shapes on the default platform; others are as they are.

    Raises as `resolve_implementation` does, and for a precision that is unknown or cannot be served.
    """
    check_precision(score_precision)
    request = dataclasses.replace(
        _sparse(dtype, head_dim, block_size, query_block_size), score_precision=score_precision
    )
    found = choose_precision(implementation, request)
    choose(implementation, dataclasses.replace(request, score_precision=found))
    return found


def _sparse(dtype: Any, head_dim: int, block: int, query_block: int | None) -> Request:
    return Request("block_sparse_attention", jnp.dtype(dtype), head_dim, query_block or block, block)
