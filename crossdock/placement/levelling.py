"""Dividing each expert's load over its copies so as to level the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.placement.placement import EMPTY

__all__ = ["EXACTNESS", "level"]

EXACTNESS = 1e-3
"""Of the mean: how far a rank's load may be from the ideal."""

_MOST_STEPS = 5000
_STEPS_PER_CHECK = 20


def level(loads: Tensor, plan: Tensor) -> Tensor:
    """The load of each slot `[L, R, S]` where the squares of the ranks' loads have the least sum.

    That division has the least maximum too: load that could be poured from the heaviest ranks to lighter ones would
    lower the sum. It is found by accelerated projected gradient (FISTA with restarts): the gradient is the rank's
    load, and the loads of each expert's copies are projected on those that sum to its own. The Frank-Wolfe gap `g`,
    what experts would save if each went to its lightest rank whole, bounds the error,
    `sum over ranks (load - ideal)^2 <= 2 g`; the search ends where it is `EXACTNESS` of the mean, or after 5,000 steps.

    Args:
        loads: `[L, E]`, not negative.
        plan: `[L, R, S]`, the expert of each slot or `-1`.
    """
    num_layers, num_ranks, slots_per_rank = plan.shape
    num_experts, num_slots = loads.shape[1], num_ranks * slots_per_rank
    slots, counts = _slots_of_experts(plan.flatten(1), num_experts)
    # Experts with one copy are a fixed part of their rank's load.
    num_rows = max(int((counts > 1).sum(1).max()), 1)
    rows = counts.topk(num_rows, dim=1).indices
    fixed = loads.scatter(1, rows, 0.0)
    # Padding is a slot past the end, on a rank past the end.
    base = loads.new_zeros(num_layers, num_slots + slots_per_rank)
    base.scatter_(1, slots[:, :, 0], fixed)
    base[:, num_slots:] = 0.0
    slots = slots.gather(1, rows[..., None].expand(-1, -1, slots.shape[2]))
    load = loads.gather(1, rows)[..., None]
    amount = _descend(load, slots, base.unflatten(1, (-1, slots_per_rank)).sum(2), slots_per_rank)
    return base.scatter_add_(1, slots.flatten(1), amount.flatten(1))[:, :num_slots].view(plan.shape)


def _descend(load: Tensor, slots: Tensor, base: Tensor, slots_per_rank: int) -> Tensor:
    """The loads `[L, M, C]` of the copies in `slots` of experts with `load [L, M, 1]`, on ranks that have `base`."""
    rank = (slots // slots_per_rank).flatten(1)
    padding = slots // slots_per_rank == base.shape[1] - 1
    mean = ((base.sum(1) + load.sum((1, 2))) / (base.shape[1] - 1)).clamp_min(torch.finfo(base.dtype).tiny)
    copies_on = torch.zeros_like(base).scatter_add_(1, rank, (~padding).flatten(1).to(base.dtype))
    step = 1 / copies_on.amax(1).clamp_min(1)[:, None, None]
    amount = _project(torch.zeros_like(slots, dtype=base.dtype).masked_fill_(padding, -torch.inf), load)
    ahead, momentum = amount, 1.0
    for number in range(_MOST_STEPS):
        slope = base.scatter_add(1, rank, ahead.flatten(1)).gather(1, rank).view(slots.shape)
        if number % _STEPS_PER_CHECK == 0:
            exact = base.scatter_add(1, rank, amount.flatten(1)).gather(1, rank).view(slots.shape)
            lightest = exact.masked_fill(padding, torch.inf).amin(2, keepdim=True)
            gap = ((exact - lightest) * amount).sum((1, 2))
            if ((2 * gap).sqrt() <= EXACTNESS * mean).all():
                break
        following = _project((ahead - step * slope).masked_fill_(padding, -torch.inf), load)
        change = following - amount
        # A restart, layer by layer, where the momentum points uphill.
        uphill = ((ahead - following) * change).sum((1, 2), keepdim=True) > 0
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + torch.where(uphill, 0.0, (momentum - 1) / next_momentum) * change
        amount, momentum = following, next_momentum
    return amount


def _project(point: Tensor, total: Tensor) -> Tensor:
    """The nearest points with entries of at least 0 that sum to `total [L, M, 1]`; `-inf` is no entry."""
    descending = point.sort(dim=2, descending=True).values
    excess = (descending.cumsum(2) - total) / torch.arange(1, point.shape[2] + 1)
    last = (descending > excess).sum(2, keepdim=True).clamp_min(1) - 1
    return (point - excess.gather(2, last)).clamp_min(0.0)


def _slots_of_experts(flat: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The slots `[L, E, C]` of each expert, padded with `P`, and their number `[L, E]`, for a plan `[L, P]`."""
    num_layers, num_slots = flat.shape
    expert, order = torch.where(flat == EMPTY, num_experts, flat).sort(dim=1, stable=True)
    counts = torch.zeros(num_layers, num_experts + 1, dtype=torch.int64)
    counts.scatter_add_(1, expert, torch.ones_like(expert))
    number = torch.arange(num_slots) - (counts.cumsum(1) - counts).gather(1, expert)
    most = int(counts[:, :num_experts].max())
    target = torch.where(expert == num_experts, num_experts * most, expert * most + number)
    slots = torch.full((num_layers, num_experts * most + 1), num_slots).scatter_(1, target, order)
    return slots[:, :-1].unflatten(1, (num_experts, most)), counts[:, :num_experts]
