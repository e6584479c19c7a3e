"""Triton, where it is installed, and where its kernels can run: compiled on a GPU, interpreted anywhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton import knobs  # pyright: ignore[reportMissingImports]
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]
else:
    try:
        import triton
        import triton.language as tl
        from triton import knobs
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        triton = tl = knobs = TensorDescriptor = None

__all__ = [
    "ALIGNMENT_BYTES",
    "INTERPRETED",
    "blocks_of",
    "buffer_dtype",
    "cdiv",
    "device_of",
    "jit",
    "num_sms",
    "runs",
    "runs_on",
    "tl",
]

ALIGNMENT_BYTES = 16
"""What rows and tensors begin at a multiple of where the copy engine of a GPU reads them."""

# Triton decides when a kernel is decorated, that is when its module is imported.
INTERPRETED: bool = triton is not None and knobs.runtime.interpret


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is, never to be called.

    Kernels' modules need `from __future__ import annotations`: without Triton there is no `tl.constexpr`.
    """
    return function if triton is None else triton.jit(function)


def runs(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these tensors.

    Not without Triton, not on a CPU unless interpreted, not in float64 (kernels compute in fp32), and no tensor
    subclass: a FakeTensor has no memory, a DTensor's is a part of it.
    """
    return all(
        type(tensor) in (Tensor, nn.Parameter) and runs_on(tensor.device) and tensor.dtype != torch.float64
        for tensor in tensors
        if tensor is not None
    )


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on a device."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


def buffer_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes fp32 results to that are wanted in `dtype`; the caller converts the buffer.

    Compiled kernels round to nearest where they store. The interpreter truncates to bfloat16: there they store fp32.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 where kernels are interpreted, so that programs take more than one tile each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def blocks_of(matrices: Tensor, block: list[int]) -> Any:
    """A descriptor by which a kernel loads blocks of a contiguous tensor; what lies outside of it is 0.

    Rows and where the tensor begins must be multiples of `ALIGNMENT_BYTES`.
    """
    # Of a dimension with one entry a tensor may have any stride.
    strides = [prod(matrices.shape[dim + 1 :]) for dim in range(matrices.dim())]
    return TensorDescriptor(matrices, list(matrices.shape), strides, block)
