"""From loads to plans: which slot of which rank holds which expert, for all layers at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from crossdock.placement.eplb import published
from crossdock.placement.exchange import plan_by_exchange
from crossdock.placement.placement import EMPTY
from crossdock.placement.situation import PlanningSituation

__all__ = ["PLANNERS", "Planner", "plan_as_published"]


class Planner(Protocol):
    """A pure function, the same on every rank."""

    def __call__(self, loads: Tensor, situation: PlanningSituation, current: Tensor | None = None) -> Tensor:
        """The expert of each slot, `[L, R, S]` int64 on the CPU, `-1` where it is empty; every expert has a slot.

        Args:
            loads: `[L, E]` of each layer's experts, of any real dtype, at least 0.
            situation: the slots to fill.
            current: the plan in use, in the form of the result; `None` where there is none.

        Raises:
            ValueError: for loads that are NaN, infinite or negative, for slots that are too few, for a `current` of
                another shape.
        """
        ...


def plan_as_published(loads: Tensor, situation: PlanningSituation, current: Tensor | None = None) -> Tensor:
    """DeepSeek's method (`eplb`), on the living ranks: hierarchical where groups and these divide over nodes.

    It looks at loads alone: not at `current`, the cost of moves or the rule of copies.
    """
    loads = situation.check(loads, current)
    plan = torch.full((len(loads), situation.num_ranks, situation.slots_per_rank), EMPTY)
    plan[:, torch.tensor(situation.living)] = published(loads, situation)
    return plan


PLANNERS: dict[str, Planner] = {"deepseek": plan_as_published, "exchange": plan_by_exchange}
"""By the names of settings; `exchange` is the default."""
