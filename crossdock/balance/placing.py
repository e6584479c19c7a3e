"""New placements for the layers of a model, agreed on by all ranks of a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.balance.migrate import primaries_moved
from crossdock.placement import Placement, Planner, PlanningSituation, max_mean, plan_with_primaries

__all__ = ["Proposal", "propose"]


class Proposal(NamedTuple):
    """Placements, and what they promise.

    Attributes:
        placements: of each layer, held slots alone.
        before, after: `[L]` float64, max/mean over the ranks with the present placements and with these.
        moved: `[L]` int64, experts whose primary would change its rank.
    """

    placements: list[Placement]
    before: Tensor
    after: Tensor
    moved: Tensor


def propose(
    planner: Planner,
    loads: Tensor,
    situation: PlanningSituation,
    present: Sequence[Placement],
    group: dist.ProcessGroup | None,
    device: torch.device,
    min_gain: float = 0.0,
) -> Proposal:
    """Plan on the first rank of `group` and tell the others, whose arithmetic may differ in the last bit.

    Args:
        planner: one of `PLANNERS`.
        loads: `[L, E]`, averages.
        situation: of all layers.
        present: the placements in force, of each layer; slots beyond those of `situation` are not looked at.
        group: those that hold these layers; collective among them.
        device: that the group can send from.
        min_gain: a layer whose max/mean would fall by less stays as it is.
    """
    size = situation.slots_per_rank
    current = torch.tensor([[each.slots_of(rank)[:size] for rank in range(each.num_ranks)] for each in present])
    if dist.get_rank(group) == 0:
        plan = plan_with_primaries(planner, loads, situation, current)
        gain = max_mean(loads, current, situation) - max_mean(loads, plan, situation)
        plan = torch.where((gain < min_gain)[:, None, None], current, plan)
    else:
        plan = torch.empty_like(current)
    travelling = plan.to(device)
    dist.broadcast(travelling, group=group, group_src=0)
    plan = travelling.cpu()
    rows = present[0].rows_per_rank
    num_experts = present[0].num_experts
    placements = [_placement(slots, num_experts, rows) for slots in plan.tolist()]
    moved = torch.tensor([primaries_moved(old, new) for old, new in zip(present, placements, strict=True)])
    before, after = (max_mean(loads, each, situation) for each in (current, plan))
    return Proposal(placements, before, after, moved)


def _placement(slots: list[list[int]], num_experts: int, rows_per_rank: int) -> Placement:
    flat = tuple(expert for own in slots for expert in own)
    return Placement(num_experts, len(slots), flat, len(slots[0]) - rows_per_rank)
