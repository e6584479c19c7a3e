"""Where experts are, and which of its slots each route takes: in order, or by their loads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crossdock.balance.choice import choose, copy_table
from crossdock.placement import EMPTY, PLANNERS, Placement, PlanningSituation
from crossdock.tools.bench.outcome import Moves
from crossdock.tools.bench.workload import Workload

__all__ = ["Placed", "place"]


@dataclass(frozen=True)
class Placed:
    """Routes with their slots.

    Attributes:
        slots: `[R, T, K]` int64, global.
        experts: `[R, P / R]`, the expert of each slot; `-1` where it is empty.
        moves: what it took; `None` for experts in their first places.
    """

    slots: np.ndarray
    experts: np.ndarray
    moves: Moves | None = None

    @property
    def slots_per_rank(self) -> int:
        return self.experts.shape[1]

    @property
    def ranks(self) -> np.ndarray:
        """`[R, T, K]`: the rank of each route."""
        return self.slots // self.slots_per_rank


def place(workload: Workload, routes: np.ndarray, *, balanced: bool) -> Placed:
    """The slots of `routes` `[R, T, K]`, of experts in order, or `balanced`: placed anew, with a further slot per rank
    for copies, by the loads of these very routes, and copies chosen in turn (`docs/balance.md`)."""
    first = Placement.contiguous(workload.num_experts, workload.num_ranks)
    if not balanced:
        slot_of = np.array(first.expert_to_slot)
        experts = np.array([first.slots_of(rank) for rank in range(workload.num_ranks)])
        return Placed(slot_of[routes], experts)
    loads = torch.from_numpy(np.bincount(routes.reshape(-1), minlength=workload.num_experts))[None]
    slots_per_rank = first.slots_per_rank + 1
    nodes = workload.num_nodes if workload.num_ranks % workload.num_nodes == 0 else 1
    (plan,) = PLANNERS["exchange"](loads, PlanningSituation(workload.num_ranks, slots_per_rank, nodes))
    table = copy_table(plan, slots_per_rank, 0)
    slots = [choose(torch.from_numpy(own), table, rank).numpy() for rank, own in enumerate(routes)]
    return Placed(np.stack(slots), plan.numpy(), _moves(workload, first, plan))


def _moves(workload: Workload, first: Placement, plan: torch.Tensor) -> Moves:
    fetched = 0
    for rank, experts in enumerate(plan.tolist()):
        fetched += len(set(experts) - set(first.slots_of(rank)) - {EMPTY})
    weights = 3 * workload.hidden_size * workload.intermediate_size * workload.dtype.itemsize
    return Moves(fetched, fetched * weights)
