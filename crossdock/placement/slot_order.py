"""The order of experts within a rank: those that stay keep their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.placement.placement import EMPTY

__all__ = ["keep_slots", "moved_experts"]


def keep_slots(plan: Tensor, current: Tensor) -> Tensor:
    """The experts of each rank of `plan [L, R, S]`, those that it has in `current [L, R, S]` in their slots there.

    Others take the slots that are left, in order, and empty slots come last.
    """
    slots_per_rank = plan.shape[2]
    if not plan.numel():
        return plan
    same = (plan[..., :, None] == current[..., None, :]) & (plan != EMPTY)[..., None]
    # Of several slots with one expert the n-th stays in the n-th.
    earlier = torch.ones(slots_per_rank, slots_per_rank, dtype=torch.bool).tril(-1)
    number = ((plan[..., :, None] == plan[..., None, :]) & earlier).sum(-1)
    number_before = ((current[..., :, None] == current[..., None, :]) & earlier).sum(-1)
    same &= number[..., :, None] == number_before[..., None, :]
    stays, taken = same.any(3), same.any(2)
    # Those that come, real ones first, to the slots that are free, in order.
    coming = (stays.int() * 2 + (plan == EMPTY).int()).argsort(dim=2, stable=True)
    free = taken.int().argsort(dim=2, stable=True)
    target = torch.where(stays, same.int().argmax(3), 0)
    place = torch.where(stays.gather(2, coming), target.gather(2, coming), free)
    return torch.empty_like(plan).scatter_(2, place, plan.gather(2, coming))


def moved_experts(plan: Tensor, current: Tensor) -> Tensor:
    """How many slots of each layer hold an expert that their rank does not hold in `current`, `[L]` int64."""
    held = (plan[..., :, None] == current[..., None, :]).any(3)
    return ((plan != EMPTY) & ~held).flatten(1).sum(1)
