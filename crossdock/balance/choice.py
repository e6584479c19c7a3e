"""Which copy of its expert a route takes, where no rank asks another (docs/semantics.md, "EPLB").

Global slot ids number the slots of all ranks: `rank * P + local`, with `P` slots per rank, held and borrowed ones
together. That is what a dispatcher takes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["CopyRule", "CopyTable", "SortedRoutes", "choose", "copy_table", "sort_by_expert"]

CopyRule = Literal["even", "nearest"]
"""How a route chooses among the copies of its expert: each copy the same share, or the nearest first."""


class CopyTable(NamedTuple):
    """Where one rank sends its routes. Of `E` experts with `M` candidates at most; row 0 is of no route.

    Attributes:
        candidates: `[E + 1, M]` int64, global slot ids of expert `e` in row `e + 1`; past its number the row repeats
            the first. Row 0 is -1.
        number: `[E + 1]` int64, how many candidates; 1 or more.
    """

    candidates: Tensor
    number: Tensor

    def to(self, device: torch.device) -> CopyTable:
        return CopyTable(self.candidates.to(device), self.number.to(device))


def copy_table(
    slots: Tensor, slots_per_rank: int, rank: int, rule: CopyRule = "even", ranks_per_node: int = 1
) -> CopyTable:
    """The candidates of every expert, for the routes of one rank; on the CPU.

    Args:
        slots: `[R, S]` int64, the logical expert of each slot that is held, `-1` for none.
        slots_per_rank: `P >= S`, borrowed ones included: rank `r` has the global ids `r * P .. (r + 1) * P - 1`.
        rank: whose routes they are.
        rule: `even`: all copies of an expert. `nearest`: those on this rank, where there are none those on its node,
            where there are none all.
        ranks_per_node: consecutive ranks that make a node, for `nearest`.

    Raises:
        ValueError: on an unknown rule, an expert without a slot, or sizes that do not go together.
    """
    num_ranks, held = slots.shape
    if rule not in get_args(CopyRule):
        raise ValueError(f"the rule for choosing copies is {rule!r}; valid are {', '.join(get_args(CopyRule))}")
    if slots_per_rank < held or not 0 <= rank < num_ranks or ranks_per_node < 1:
        raise ValueError(
            f"slots_per_rank ({slots_per_rank}) must be {held} or more, rank ({rank}) one of 0 to {num_ranks - 1}, "
            f"ranks_per_node ({ranks_per_node}) 1 or more"
        )
    copies: list[list[tuple[int, int]]] = [[] for _ in range(int(slots.max()) + 1)]
    for holder, experts in enumerate(slots.tolist()):
        for local, expert in enumerate(experts):
            if expert >= 0:
                copies[expert].append((holder, holder * slots_per_rank + local))
    if missing := [expert for expert, held_by in enumerate(copies) if not held_by]:
        raise ValueError(f"every expert needs a slot; without one: {missing}")
    if rule == "nearest":
        copies = [_nearest(held_by, rank, ranks_per_node) for held_by in copies]
    most = max(map(len, copies))
    candidates = [[slot for _, slot in held_by] + [held_by[0][1]] * (most - len(held_by)) for held_by in copies]
    return CopyTable(torch.tensor([[-1] * most, *candidates]), torch.tensor([1, *map(len, copies)]))


def _nearest(copies: list[tuple[int, int]], rank: int, ranks_per_node: int) -> list[tuple[int, int]]:
    own = [copy for copy in copies if copy[0] == rank]
    return own or [copy for copy in copies if copy[0] // ranks_per_node == rank // ranks_per_node] or copies


def choose(expert_ids: Tensor, table: CopyTable, offset: int) -> Tensor:
    """Global slots of routes: the `i`-th of an expert, in token order, takes its candidate `(i + offset) % number`.

    The same in every call, so that recompute sends the same routes to the same ranks; without a host sync.

    Args:
        expert_ids: `[T, K]` logical experts; `-1` stays `-1`.
        table: `copy_table`, on the same device.
        offset: this rank's number, so that what does not divide evenly is spread over the copies.

    Raises:
        IndexError: on a CPU, where an id is `E` or more.
    """
    num_rows, most = table.candidates.shape
    routes = sort_by_expert(expert_ids, num_rows - 1)
    candidate = (routes.turn + offset) % table.number.index_select(0, routes.rows)
    return routes.unsort(table.candidates.flatten().index_select(0, routes.rows * most + candidate))


class SortedRoutes(NamedTuple):
    """The `M = T K` routes of a rank by expert, those of one in token order; all int64.

    Attributes:
        rows: `[M]`, `e + 1` for expert `e`, first the 0 of what is no route: tables have a row for it.
        turn: `[M]`, how many routes of the same expert come before.
        order: `[M]`, where each was in `expert_ids`.
        shape: of `expert_ids`.
    """

    rows: Tensor
    turn: Tensor
    order: Tensor
    shape: torch.Size

    def unsort(self, values: Tensor) -> Tensor:
        """`values [M]` of these routes, where they were: `[T, K]`."""
        return torch.empty_like(values).scatter_(0, self.order, values).view(self.shape)


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> SortedRoutes:
    """Sort routes, without a host sync. An id of `E` or more gets a row that no table of `E + 1` rows has."""
    rows = (expert_ids.clamp(-1, num_experts) + 1).flatten()
    if num_experts + 1 < torch.iinfo(torch.int16).max:
        rows = rows.to(torch.int16)  # narrow keys sort faster
    in_order, order = rows.sort(stable=True)
    all_rows = torch.arange(num_experts + 2, device=order.device, dtype=in_order.dtype)
    first = torch.searchsorted(in_order, all_rows)
    rows = in_order.long()
    turn = torch.arange(len(order), device=order.device) - first.index_select(0, rows)
    return SortedRoutes(rows, turn, order, expert_ids.shape)
