"""Ours: copies and places chosen together, and improved by exchanging slots."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.placement.placement import EMPTY
from crossdock.placement.situation import PlanningSituation
from crossdock.placement.start import fresh_start

__all__ = ["plan_by_exchange"]


def plan_by_exchange(loads: Tensor, situation: PlanningSituation, current: Tensor | None = None) -> Tensor:
    """A plan without two copies of an expert on one rank."""
    loads = situation.check(loads, current)
    num_living = len(situation.living)
    filled = fresh_start(loads, num_living, min(situation.slots_per_rank, loads.shape[1]))
    plan = torch.full((len(loads), situation.num_ranks, situation.slots_per_rank), EMPTY)
    plan[:, torch.tensor(situation.living), : filled.shape[2]] = filled
    return plan
