"""A plan that no longer fits made one that does, with the least change."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.placement.copy_rules import copies_of
from crossdock.placement.matching import match_primaries
from crossdock.placement.placement import EMPTY

__all__ = ["filled", "mended"]


def mended(loads: Tensor, current: Tensor, slots_per_rank: int, primary_rows: int) -> Tensor:
    """The plan `[L, R, slots_per_rank]`: without empty slots, without two copies of an expert on a rank, all experts.

    Layers that are so already stay as they are, up to the order of slots.

    Args:
        loads: `[L, E]`.
        current: `[L, R, S]`, `-1` where a slot is empty; experts may be missing or twice on a rank.
        slots_per_rank: to fill, `S` or (all experts, where they are fewer) less.
        primary_rows: of each rank; the result's first slots hold each expert once. 0: all slots are alike.
    """
    num_experts, before = loads.shape[1], current[..., :primary_rows]
    current = torch.cat([before, _closed_up(_once(current)[..., primary_rows:])], dim=2)[..., :slots_per_rank]
    twice = (_once(current) != current).flatten(1).any(1)
    fits = ~twice & (current != EMPTY).flatten(1).all(1) & (copies_of(current, num_experts) > 0).all(1)
    if primary_rows:
        fits &= (copies_of(before, num_experts) == 1).all(1)
    layers = (~fits).nonzero().flatten()
    if not len(layers):
        return current
    whole = filled(loads[layers], _closed_up(_once(current[layers])))
    if primary_rows:
        whole = torch.cat(match_primaries(whole, loads[layers], primary_rows, before[layers]), dim=2)
    plan = current.clone()
    plan[layers] = whole
    return plan


def _once(plan: Tensor) -> Tensor:
    """Without second slots of an expert on a rank."""
    earlier = torch.ones(plan.shape[2], plan.shape[2], dtype=torch.bool).tril(-1)
    again = ((plan[..., :, None] == plan[..., None, :]) & earlier).any(3)
    return plan.masked_fill(again, EMPTY)


def _closed_up(plan: Tensor) -> Tensor:
    """Empty slots last."""
    return plan.gather(2, (plan == EMPTY).int().argsort(dim=2, stable=True))


def filled(loads: Tensor, plan: Tensor) -> Tensor:
    """Missing experts, then copies of those with most load per copy, in the empty slots, on the lightest ranks.

    No rank gets a second slot of an expert. Where slots are too few, copies that are missed least make room.

    Args:
        loads: `[L, E]`.
        plan: `[L, R, S]`, `-1` where a slot is empty; needs `S <= E`.
    """
    num_experts, plan = loads.shape[1], plan.clone()
    layer = torch.arange(len(plan))
    while True:
        copies, flat = copies_of(plan, num_experts), plan.flatten(1)
        short = (copies == 0).sum(1) > (flat == EMPTY).sum(1)
        if not short.any():
            break
        left = torch.where(copies > 1, loads / (copies - 1).clamp_min(1), torch.inf)
        left = left.gather(1, flat.clamp_min(0)).masked_fill_(flat == EMPTY, torch.inf)
        slot = left.argmin(1)
        flat[layer[short], slot[short]] = EMPTY
        plan = flat.view(plan.shape)
    held = torch.zeros(*plan.shape[:2], num_experts + 1, dtype=torch.bool)
    held.scatter_(2, torch.where(plan == EMPTY, num_experts, plan), torch.ones_like(plan, dtype=torch.bool))
    held = held[..., :num_experts]
    while True:
        layer = (plan == EMPTY).flatten(1).any(1).nonzero().flatten()
        if not len(layer):
            return plan
        here, held_here, load = plan[layer], held[layer], loads[layer]
        copies = copies_of(here, num_experts)
        share = load / copies.clamp_min(1)
        free = (here == EMPTY).any(2)
        placeable = (free[..., None] & ~held_here).any(1)
        # Missing ones before all others.
        wish = torch.where(copies == 0, share + share.amax(1, keepdim=True) + 1, share)
        expert = wish.masked_fill_(~placeable, -1.0).argmax(1)
        share = share.gather(1, here.flatten(1).clamp_min(0)).view(here.shape).masked_fill_(here == EMPTY, 0.0)
        barred = ~free | held_here[torch.arange(len(layer)), :, expert]
        rank = share.sum(2).masked_fill_(barred, torch.inf).argmin(1)
        slot = (here[torch.arange(len(layer)), rank] == EMPTY).int().argmax(1)
        plan[layer, rank, slot] = expert
        held[layer, rank, expert] = True
