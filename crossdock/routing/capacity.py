"""Capacity: at most so many routes per expert, the others dropped (docs/semantics.md, "Capacity")."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crossdock.routing.counting import count_experts

__all__ = ["DropPolicy", "expert_capacity", "within_capacity"]

DropPolicy = Literal["probs", "position"]
"""Which routes beyond an expert's capacity are dropped: those of lowest weight, or the last ones."""


def expert_capacity(num_tokens: Tensor | int, top_k: int, num_experts: int, capacity_factor: float) -> Tensor:
    """`C = ceil(T K / E * capacity_factor)`, a scalar int64 tensor; `num_tokens` `T` may be one too, without a sync."""
    tokens = torch.as_tensor(num_tokens, dtype=torch.float64)
    # Rounded first, so that 4 * 1.1 * 10 is 44 and not 45.
    return (tokens * top_k * capacity_factor / num_experts).round(decimals=9).ceil().long()


def within_capacity(
    expert_ids: Tensor, weights: Tensor, num_experts: int, capacity: Tensor | int, policy: DropPolicy
) -> Tensor:
    """Which routes stay, `[T, K]` bool: for each expert `capacity` of them at most.

    Args:
        expert_ids: `[T, K]`, `-1` where there is no route.
        weights: `[T, K]`, looked at by `probs` alone.
        num_experts: `E`.
        capacity: `C`.
        policy: `probs` keeps the routes of the largest weights, the first of equal ones; `position` keeps the first in
            token order.
    """
    experts = torch.where(expert_ids < 0, num_experts, expert_ids).flatten()
    if policy == "probs":
        by_weight = weights.flatten().argsort(descending=True, stable=True)
        order = by_weight[experts[by_weight].argsort(stable=True)]
    else:
        order = experts.argsort(stable=True)
    in_order = experts[order]
    # What is no route comes last, and stays out of the count.
    counts = torch.nn.functional.pad(count_experts(expert_ids, num_experts), (0, 1))
    place = torch.arange(len(experts), device=experts.device) - (counts.cumsum(0) - counts)[in_order]
    stays = (place < capacity) & (in_order < num_experts)
    return torch.empty_like(stays).scatter_(0, order, stays).view_as(expert_ids)
