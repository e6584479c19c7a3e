"""Which slot of an expert is its primary: every rank owns the same number of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from crossdock.placement.copy_rules import copies_of
from crossdock.placement.matching import match_primaries
from crossdock.placement.placement import EMPTY
from crossdock.placement.planner import Planner
from crossdock.placement.situation import PlanningSituation
from crossdock.placement.slot_order import keep_slots

__all__ = ["plan_with_primaries", "with_primaries"]


def plan_with_primaries(
    planner: Planner, loads: Tensor, situation: PlanningSituation, current: Tensor | None = None
) -> Tensor:
    """A plan `[L, R, S]` whose first `ceil(E / R)` slots on each rank are primaries (`with_primaries`).

    Where the living ranks do not divide the experts, the planner is given experts without load besides, one for every
    primary row that is too many; their slots are `-1` in the result, and groups are not looked at.

    Args:
        planner: one of `PLANNERS`.
        loads: `[L, E]`.
        situation: whose `slots_per_rank` counts primaries and copies.
        current: the plan in use, in the form of the result.

    Raises:
        ValueError: see `Planner`.
    """
    loads = situation.check(loads, current)
    num_layers, num_experts = loads.shape
    num_living = len(situation.living)
    rows_per_rank = -(-num_experts // num_living)
    num_pads = num_living * rows_per_rank - num_experts
    groups = 1 if num_pads else situation.num_groups
    situation = dataclasses.replace(situation, num_groups=groups, primary_rows=rows_per_rank)
    padded = torch.cat([loads, loads.new_zeros(num_layers, num_pads)], dim=1)
    before = None if current is None else _with_pads(current.cpu(), num_experts, num_pads, situation)
    plan = planner(padded, situation, before)
    plan = plan.masked_fill(plan >= num_experts, EMPTY)
    if (copies_of(plan[..., :rows_per_rank], num_experts) == 1).all():
        return plan  # a planner that looks at primary_rows
    return with_primaries(plan, num_experts, rows_per_rank, current, loads)


def with_primaries(
    plan: Tensor, num_experts: int, rows_per_rank: int, current: Tensor | None = None, loads: Tensor | None = None
) -> Tensor:
    """The same experts on each rank, in an order in which the first `rows_per_rank` slots are primaries.

    Every expert is exactly once among the primaries of all ranks; the other slots hold copies. Primary rows that the
    experts do not fill are `-1`, as are copies' slots that stay empty.

    A plan that admits no such order (a rank with more than `rows_per_rank` experts that have no second copy) is
    repaired by exchanging slots, with the least loss of balance.

    Args:
        plan: `[L, R, S]`, every expert in at least one slot, `-1` where a slot is empty. A rank that is wholly empty
            is out, and gets no primaries.
        num_experts: `E`.
        rows_per_rank: primaries of each rank, at least `E` over the ranks that are not out.
        current: the plan in use, in the form of the result. As many primaries as can be stay on their ranks, and
            those in their rows; a copy that stays keeps its slot.
        loads: `[L, E]`, by which a repair weighs balance; equal where `None`.

    Raises:
        ValueError: for too few rows or slots, or an expert without a slot.
    """
    num_layers, num_ranks, slots_per_rank = plan.shape
    num_living = int((plan != EMPTY).any(2).sum(1).min()) if num_layers else num_ranks
    if not -(-num_experts // max(num_living, 1)) <= rows_per_rank <= slots_per_rank:
        raise ValueError(
            f"rows_per_rank = {rows_per_rank}: {num_experts} experts on {num_living} ranks of {slots_per_rank} slots "
            f"need {-(-num_experts // max(num_living, 1))} to {slots_per_rank}"
        )
    if current is not None and current.shape != plan.shape:
        raise ValueError(f"current of shape {tuple(current.shape)}: must be {tuple(plan.shape)}")
    loads = torch.ones(num_layers, num_experts, dtype=torch.float64) if loads is None else loads.cpu().double()
    before = None if current is None else current[..., :rows_per_rank]
    primaries, copies = match_primaries(plan, loads, rows_per_rank, before)
    if current is not None:
        primaries = keep_slots(primaries, current[..., :rows_per_rank])
        copies = keep_slots(copies, current[..., rows_per_rank:])
    return torch.cat([primaries, copies], dim=2)


def _with_pads(current: Tensor, num_experts: int, num_pads: int, situation: PlanningSituation) -> Tensor:
    """The empty slots hold the experts without load: one in each primary row, others on the same rank beside them."""
    empty = torch.zeros_like(current, dtype=torch.bool)
    living = torch.tensor(situation.living)
    empty[:, living] = current[:, living] == EMPTY
    in_rows = empty[..., : situation.primary_rows].sum(2)
    number = empty.cumsum(2) - 1
    pad = num_experts + ((in_rows.cumsum(1) - in_rows)[..., None] + number) % max(num_pads, 1)
    return torch.where(empty & (number < num_pads), pad, current)
