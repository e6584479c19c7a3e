"""What autograd keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def kept_tensors() -> Iterator[list[int]]:
    """The addresses of the tensors that are kept for a backward pass."""
    addresses: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        addresses.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield addresses
