"""Work beside other work on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from crossdock.comm.collectives import Pending

__all__ = ["run_beside"]


def run_beside(function: Callable[[Tensor], Tensor], x: Tensor) -> Pending[Tensor]:
    """`function(x)` on a second stream of the GPU, beside what the caller starts until it waits; on a CPU at once.

    Autograd runs the backward pass of an operation on the stream of its forward pass, and waits between streams where
    tensors pass from one to the other: that of `function` is beside the caller's too.
    """
    if not x.is_cuda:
        y = function(x)
        return Pending(lambda: y)
    caller, beside = torch.cuda.current_stream(x.device), _second_stream(x.device)
    # What the caller has started so far, `x` and gathered parameters among it, comes first.
    beside.wait_stream(caller)
    with torch.cuda.stream(beside):
        y = function(x)
    # Memory of `x` is not handed out again while the second stream reads it; that of `y` is the second stream's.
    x.record_stream(beside)

    def finish() -> Tensor:
        caller.wait_stream(beside)
        y.record_stream(caller)
        return y

    return Pending(finish)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers, so that they share its memory."""
    return torch.cuda.Stream(device)
