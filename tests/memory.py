"""What autograd keeps between a forward pass and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(call: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Of what `call()` keeps, `parameters` aside, each memory counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(call())
    return sum(kept.values())
