"""From a plan's pieces to a slot for each route of a rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.balance.choice import sort_by_expert
from crossdock.balance.pieces import Pieces

__all__ = ["Assignment", "assign", "assignment"]


class Assignment(NamedTuple):
    """Which slots the routes of one rank take. Of `E` experts and `N = R * P` pieces, empty ones included; int64.

    The first `staying` routes of an expert stay at this rank, in the slot `at_home`. Those of all ranks that do not
    stay are laid in one row, by expert, then source rank, then token; so are the pieces, less what stays, by expert,
    then rank. A route goes to the piece that lies beside it.

    Attributes:
        at_home: `[E + 1]`, the global slot of this rank that has the expert `e`, if one has, at `e + 1`; at 0, for no
            route, -1.
        staying: `[E + 1]`, routes of this rank that stay; what is no route always does.
        first: `[E + 1]`, the place in the row of this rank's first route that does not stay.
        ends: `[N]`, ascending: where in the row each piece ends.
        slots: `[N]`, the global slot of each piece.
    """

    at_home: Tensor
    staying: Tensor
    first: Tensor
    ends: Tensor
    slots: Tensor

    def to(self, device: torch.device) -> Assignment:
        """On another device, by one copy."""
        sizes = [len(part) for part in self]
        return Assignment(*torch.cat(self).to(device).split(sizes))


def assignment(counts: Tensor, pieces: Pieces, rank: int) -> Assignment:
    """The slots that one rank's routes take, so that all ranks' routes together fill the pieces exactly.

    As many routes stay on the rank that has the token as its pieces have room for: no other way to fill these pieces
    keeps more.

    Args:
        counts: `[R, E]` int64, routes of this step by source rank and logical expert, on the CPU.
        pieces: of these counts, over `P` slots per rank; the amounts of an expert add up to its routes.
        rank: whose routes they are.

    Returns:
        On the CPU, of shapes that depend on no count.
    """
    experts, amounts = pieces
    num_ranks, slots_per_rank = experts.shape
    num_experts = counts.shape[1]
    local = torch.arange(slots_per_rank).expand_as(experts)
    rows = experts + 1
    # The first slot of each expert on each rank.
    home = local.new_full((num_ranks, num_experts + 1), slots_per_rank)
    home.scatter_reduce_(1, rows, local, "amin")
    counts = torch.nn.functional.pad(counts, (1, 0))
    stays = torch.where(home.gather(1, rows) == local, torch.minimum(counts.gather(1, rows), amounts), 0)
    staying = torch.zeros_like(counts).scatter_add_(1, rows, stays)
    travelling = counts - staying
    total = travelling.sum(dim=0)
    first = total.cumsum(0) - total + travelling[:rank].sum(dim=0)
    by_expert = rows.flatten().argsort(stable=True)
    ends = (amounts - stays).flatten()[by_expert].cumsum(0)
    at_home = rank * slots_per_rank + home[rank].clamp_max(slots_per_rank - 1)
    staying = staying[rank]
    at_home[0], staying[0] = -1, torch.iinfo(torch.int64).max
    # A piece's place among all is its global slot.
    return Assignment(at_home, staying, first, ends, by_expert)


def assign(expert_ids: Tensor, table: Assignment) -> Tensor:
    """Global slots of this rank's routes; the same in every call, without a host sync.

    Args:
        expert_ids: `[T, K]` logical experts, of which there are as many as the table's counts say; `-1` stays `-1`.
        table: `assignment` of this rank, on the same device.

    Raises:
        IndexError: on a CPU, where an id is `E` or more.
    """
    routes = sort_by_expert(expert_ids, len(table.first) - 1)
    at_home, staying, first = (of_expert.index_select(0, routes.rows) for of_expert in table[:3])
    left = routes.turn - staying
    piece = torch.searchsorted(table.ends, first + left, right=True).clamp_max_(len(table.ends) - 1)
    return routes.unsort(torch.where(left < 0, at_home, table.slots.index_select(0, piece)))
