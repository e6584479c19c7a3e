"""How ranks agree: once after each measurement, so that all decide alike and none waits for one that has stopped."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

__all__ = ["Agreement", "ProcessGroupAgreement", "Reading"]


class Reading(NamedTuple):
    """A measurement that all ranks have made; the same on all of them.

    Attributes:
        seconds: of the slowest rank.
        stop: whether any rank was asked to stop, or is out of time.
        late: whether any rank has spent a setting's share of the time.
        problem: what failed, on the first rank where something did; empty where nothing has.
    """

    seconds: float
    stop: bool
    late: bool
    problem: str = ""


class Agreement(Protocol):
    """Makes what one rank has seen what all have."""

    def __call__(self, seconds: float, *, stop: bool, late: bool, problem: str) -> Reading: ...


class ProcessGroupAgreement:
    """Over the default process group: one collective, and one more where something has failed."""

    def __call__(self, seconds: float, *, stop: bool, late: bool, problem: str) -> Reading:
        largest = torch.tensor([seconds, stop, late, bool(problem)], dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        slowest, stops, lates, failures = largest.tolist()
        if failures:
            problems: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
            problem = next(each for each in problems if each)
        return Reading(slowest, stops > 0, lates > 0, problem)
