"""Gradients of unevenly loaded experts on one scale (docs/semantics.md, "Gradients across ranks")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from crossdock.experts.routes import count_routes

__all__ = ["load_factors", "scale_gradient"]


def load_factors(slot_ids: Tensor, num_slots: int, num_experts: int, dtype: torch.dtype) -> Tensor:
    """`c / c_e` of each slot `[P/R]`: the mean number of routes of this rank's experts over the expert's own.

    Args:
        slot_ids: `[U, K]`, `-1` is no route.
        num_slots: `P/R`.
        num_experts: how many of them hold an expert; an empty slot does not count in the mean.
        dtype: of the result.

    Returns:
        1 for a slot without a route, where nothing is to be scaled.
    """
    counts = count_routes(slot_ids, num_slots).to(dtype)
    return torch.where(counts > 0, counts.sum() / max(num_experts, 1) / counts.clamp_min(1), 1.0)


def scale_gradient(parameter: Tensor, factors: Tensor) -> Tensor:
    """Identity on `parameter` `[P/R, ...]`; its gradient is multiplied by `factors` `[P/R]`."""
    return _ScaleGradient.apply(parameter, factors)  # type: ignore[return-value]


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (factors,) = ctx.saved_tensors
        shape = (-1, *(1,) * (grads[0].dim() - 1))
        return grads[0] * factors.to(grads[0].dtype).view(shape), None
