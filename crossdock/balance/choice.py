"""Which copy of its expert a route takes, where no rank asks another (docs/semantics.md, "EPLB").

Global slot ids number the slots of all ranks: `rank * P + local`, with `P` slots per rank, held and borrowed ones
together. That is what a dispatcher takes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["CopyRule", "CopyTable", "choose", "copy_table", "running_index"]

CopyRule = Literal["even", "nearest"]


class CopyTable(NamedTuple):
    """Where one rank sends its routes. Of `E` experts with `M` candidates at most.

    Attributes:
        candidates: `[E, M]` int64, global slot ids; past an expert's number the row repeats its first.
        number: `[E]` int64, how many candidates an expert has; 1 or more.
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
    return CopyTable(torch.tensor(candidates), torch.tensor([len(held_by) for held_by in copies]))


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
    number = table.number[expert_ids]
    if table.candidates.shape[1] == 1:
        turn = torch.zeros_like(expert_ids)
    else:
        turn = (running_index(expert_ids, len(table.number)) + offset) % number
    return torch.where(expert_ids < 0, expert_ids, table.candidates[expert_ids, turn])


def running_index(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How many routes of the same expert come before each, in token order: `[T, K]` int64; of no route: anything."""
    experts = torch.where(expert_ids < 0, num_experts, expert_ids).flatten()
    if num_experts < torch.iinfo(torch.int16).max:
        experts = experts.to(torch.int16)  # narrow keys sort faster
    in_order, order = experts.sort(stable=True)
    first = torch.searchsorted(in_order, torch.arange(num_experts + 1, device=order.device, dtype=in_order.dtype))
    place = torch.arange(len(order), device=order.device) - first[in_order.long()]
    return torch.empty_like(order).scatter_(0, order, place).view(expert_ids.shape)
