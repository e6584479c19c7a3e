"""DeepSeek's expert-parallel load balancer (EPLB), as published, for all layers at once (docs/semantics.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.placement.placement import EMPTY
from crossdock.placement.situation import PlanningSituation

__all__ = ["EPLB", "eplb", "pack", "published"]


class EPLB(NamedTuple):
    """A plan in the form in which the method was published; all int64.

    Attributes:
        physical_to_logical: the logical expert of each slot, `[L, P]`; `-1` where a slot is empty.
        logical_to_physical: the slots of each expert, `[L, E, most copies]`, padded with -1.
        copies: of each expert, `[L, E]`.
    """

    physical_to_logical: Tensor
    logical_to_physical: Tensor
    copies: Tensor


def eplb(weight: Tensor, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> EPLB:
    """Copies for the heaviest experts, then all packed on ranks, the heaviest first.

    Where `num_nodes` divides `num_groups`, groups of experts are packed on nodes first and copies stay on their node
    (hierarchical); else nodes and groups are not looked at (global). Two copies of an expert may lie on one rank.

    Args:
        weight: loads `[L, E]`; computed with in fp32, as published.
        num_slots: to fill, at least `E`. Where it is no multiple of `num_ranks`, `P` is the next one, and the slots
            that are too many stay empty.
        num_groups: of experts, in order, of equal size.
        num_nodes: of ranks, in order, of equal size.
        num_ranks: `R`.

    Raises:
        ValueError: for numbers that do not divide, or loads whose sum fp32 can't hold.
    """
    num_layers, num_experts = weight.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for name, number, by, of in (
        ("num_slots", num_slots, num_nodes, "num_nodes"),
        ("num_ranks", num_ranks, num_nodes, "num_nodes"),
        ("the experts", num_experts, num_groups, "num_groups"),
    ):
        if number % by:
            raise ValueError(f"{name} = {number}: must be a multiple of {of} = {by}")
    if num_slots < num_experts:
        raise ValueError(f"num_slots = {num_slots}: must be at least {num_experts}, the experts")
    weight = weight.float().cpu()
    if not weight.sum(1).isfinite().all():
        raise ValueError("weight: must have sums that fp32 can hold")
    slots_per_rank = -(-num_slots // num_ranks)
    group_size, per_node = num_experts // num_groups, num_experts // num_nodes
    # Groups on nodes; experts are in the order of nodes from here on.
    node, place = pack(weight.unflatten(1, (num_groups, group_size)).sum(-1), num_nodes)
    first = (node * (num_groups // num_nodes) + place) * group_size
    position = (first[..., None] + torch.arange(group_size)).flatten(1)
    expert_at = _inverse(position)
    of_nodes = weight.gather(1, expert_at).view(-1, per_node)
    slot_expert, number, copies = _replicate(of_nodes, num_slots // num_nodes)
    # Copies on the ranks of their node; what stays empty is an item without load after all others.
    share = (of_nodes / copies).gather(1, slot_expert)
    num_empty = slots_per_rank * (num_ranks // num_nodes) - share.shape[1]
    share, slot_expert, number = (
        torch.nn.functional.pad(each, (0, num_empty), value=value)
        for each, value in ((share, 0.0), (slot_expert, EMPTY), (number, 0))
    )
    rank, place = pack(share, num_ranks // num_nodes)
    order = _inverse(rank * slots_per_rank + place)
    in_order = slot_expert.gather(1, order).view(num_layers, num_nodes, -1)
    empty = (in_order == EMPTY).flatten(1)
    in_order = (in_order + torch.arange(0, num_experts, per_node)[None, :, None]).flatten(1)
    physical_to_logical = expert_at.gather(1, in_order.masked_fill(empty, 0)).masked_fill(empty, EMPTY)
    number = number.gather(1, order).view(num_layers, -1)
    copies = copies.view(num_layers, -1).gather(1, position)
    most = int(copies.max())
    # Empty slots write to one entry past the end.
    target = torch.where(empty, num_experts * most, physical_to_logical * most + number)
    logical_to_physical = torch.full((num_layers, num_experts * most + 1), EMPTY)
    logical_to_physical.scatter_(1, target, torch.arange(target.shape[1]).expand(num_layers, -1))
    return EPLB(physical_to_logical, logical_to_physical[:, :-1].unflatten(1, (num_experts, most)), copies)


def pack(weight: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Pack and place in it of each of `n` items `[X, n]`: the heaviest first, each to the lightest pack with room."""
    num_rows, num_items = weight.shape
    size = num_items // num_packs
    if size == 1:
        pack = torch.arange(num_items).expand(num_rows, -1).contiguous()
        return pack, torch.zeros_like(pack)
    order = weight.sort(dim=1, descending=True, stable=True).indices
    pack, place = torch.zeros_like(order), torch.zeros_like(order)
    loads, filled = weight.new_zeros(num_rows, num_packs), torch.zeros(num_rows, num_packs, dtype=torch.int64)
    for item in order.split(1, dim=1):
        lightest = loads.masked_fill(filled == size, torch.inf).argmin(dim=1, keepdim=True)
        pack.scatter_(1, item, lightest)
        place.scatter_(1, item, filled.gather(1, lightest))
        loads.scatter_add_(1, lightest, weight.gather(1, item))
        filled.scatter_add_(1, lightest, torch.ones_like(lightest))
    return pack, place


def published(loads: Tensor, situation: PlanningSituation) -> Tensor:
    """The method's plan for the living ranks, `[L, R', S]`, hierarchical where these are as many on each node."""
    num_living = len(situation.living)
    alike = situation.node_of_living.bincount(minlength=situation.num_nodes).unique().numel() == 1
    groups, nodes = (situation.num_groups, situation.num_nodes) if alike else (1, 1)
    slots = eplb(loads, num_living * situation.slots_per_rank, groups, nodes, num_living).physical_to_logical
    return slots.unflatten(1, (num_living, situation.slots_per_rank))


def _replicate(weight: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert and number of each of `[X, num_slots]` copies, and how many `[X, n]` each expert has.

    Each further copy goes to the expert with the most load per copy.
    """
    num_rows, num_experts = weight.shape
    expert = torch.arange(num_slots).expand(num_rows, -1).contiguous()
    number, copies = torch.zeros_like(expert), torch.ones(num_rows, num_experts, dtype=torch.int64)
    for slot in range(num_experts, num_slots):
        heaviest = (weight / copies).argmax(dim=1, keepdim=True)
        expert[:, slot : slot + 1] = heaviest
        number[:, slot : slot + 1] = copies.gather(1, heaviest)
        copies.scatter_add_(1, heaviest, torch.ones_like(heaviest))
    return expert, number, copies


def _inverse(permutation: Tensor) -> Tensor:
    """Of each row."""
    order = torch.arange(permutation.shape[1]).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, order)
