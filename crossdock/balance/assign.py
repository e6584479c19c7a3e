"""From a plan's pieces to a slot for each route of a rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.balance.choice import running_index
from crossdock.balance.pieces import Pieces

__all__ = ["Assignment", "assign", "assignment"]


class Assignment(NamedTuple):
    """Which slots the routes of one rank take. Of `E` experts and `N = R * P` pieces, empty ones included; int64.

    The first `staying` routes of an expert stay at this rank, in the slot `at_home`. Those of all ranks that do not
    stay are laid in one row, by expert, then source rank, then token; so are the pieces, less what stays, by expert,
    then rank. A route goes to the piece that lies beside it.

    Attributes:
        at_home: `[E]`, the global slot of this rank that has the expert, if one has.
        staying: `[E]`, routes of this rank that stay.
        first: `[E]`, the place in the row of this rank's first route that does not stay.
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
    # The first slot of each expert on each rank; one column more for slots without an expert.
    column = torch.where(experts < 0, num_experts, experts)
    home = local.new_full((num_ranks, num_experts + 1), slots_per_rank)
    home.scatter_reduce_(1, column, local, "amin")
    with_none = torch.nn.functional.pad(counts, (0, 1))
    stays = torch.where(home.gather(1, column) == local, torch.minimum(with_none.gather(1, column), amounts), 0)
    staying = torch.zeros_like(with_none).scatter_add_(1, column, stays)
    travelling = with_none - staying
    total = travelling.sum(dim=0)
    first = total.cumsum(0) - total + travelling[:rank].sum(dim=0)
    by_expert = column.flatten().argsort(stable=True)
    ends = (amounts - stays).flatten()[by_expert].cumsum(0)
    at_home = rank * slots_per_rank + home[rank].clamp_max(slots_per_rank - 1)
    # A piece's place among all is its global slot.
    return Assignment(at_home[:-1], staying[rank, :-1], first[:-1], ends, by_expert)


def assign(expert_ids: Tensor, table: Assignment) -> Tensor:
    """Global slots of this rank's routes; the same in every call, without a host sync.

    Args:
        expert_ids: `[T, K]` logical experts, of which there are as many as the table's counts say; `-1` stays `-1`.
        table: `assignment` of this rank, on the same device.

    Raises:
        IndexError: on a CPU, where an id is `E` or more.
    """
    staying = table.staying[expert_ids]  # refuses ids that there are none of
    index = running_index(expert_ids, len(table.first))
    place = table.first[expert_ids] + index - staying
    piece = torch.searchsorted(table.ends, place, right=True).clamp_max(len(table.ends) - 1)
    slots = torch.where(index < staying, table.at_home[expert_ids], table.slots[piece])
    return torch.where(expert_ids < 0, expert_ids, slots)
