"""One launch of a `@triton.jit` kernel: through jax-triton on a GPU, or in Triton's interpreter."""

import inspect
from typing import Any

import jax
import numpy as np
from jax import Array

from pallas_kernels import varying
from pallas_kernels.tuning import TritonTuning


class _HostTensor:
    """What Triton's interpreter needs of a torch tensor, over a numpy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_HostTensor":
        return self

    def cpu(self) -> "_HostTensor":
        return self

    def copy_(self, other: "_HostTensor") -> None:
        if other.array is not self.array:
            raise AssertionError("the interpreter shares host memory")

    def new_empty(self, length: int, device: str | None = None) -> "_HostTensor":
        return _HostTensor(self.array)

    def set_(self, storage: "_HostTensor", offset: int, size: Any, stride: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)


def launch(
    kernel: Any,
    inputs: list[Array],
    outputs: list[tuple[tuple[int, ...], Any]],
    grid: tuple[int, int],
    tuning: TritonTuning,
    interpret: bool,
    compute_capability: int | None,
    **constants: Any,
) -> list[Array]:
    """One launch; the kernel takes the inputs, the outputs and the constants. `outputs`: shapes and dtypes."""
    results = [varying.result(*of, *inputs) for of in outputs]
    if interpret:

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            # Poisoned, so that what a kernel does not write is seen.
            made = [np.full(x.shape, np.nan, x.dtype) for x in results]
            tensors = [_HostTensor(np.ascontiguousarray(x)) for x in (*arrays, *made)]
            kernel[grid](*tensors, **constants)
            return [t.array for t in tensors[len(arrays) :]]

        return jax.pure_callback(run, results, *inputs)
    import jax_triton

    # jax-triton 0.4 renamed the argument.
    renamed = "out_type" in inspect.signature(jax_triton.triton_call).parameters
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        **{"out_type" if renamed else "out_shape": results},
        grid=grid,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        compute_capability=compute_capability,
        **constants,
    )
