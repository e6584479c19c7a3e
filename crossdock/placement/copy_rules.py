"""What a plan makes of loads: how much each slot and rank computes under the rule by which tokens choose copies."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.placement.levelling import level
from crossdock.placement.placement import EMPTY
from crossdock.placement.situation import PlanningSituation

__all__ = ["copies_of", "max_mean", "nearest_loads", "rank_loads", "slot_loads"]


def rank_loads(loads: Tensor, plan: Tensor, situation: PlanningSituation) -> Tensor:
    """The load of each rank under the situation's `copy_choice`, `[L, R]` float64; 0 for ranks that are out.

    `even` and `nearest` are exact expectations with sources spread evenly over the living ranks. `least_load` is the
    division of each expert's load over its copies that levels the ranks most, each rank's to 1e-3 of the mean.

    Args:
        loads: `[L, E]`, of any real dtype.
        plan: `[L, R, S]`, the expert of each slot or `-1`; each expert has one.

    Raises:
        ValueError: for loads or a plan that the situation does not allow.
    """
    return slot_loads(situation.check(loads, plan), plan, situation).sum(2)


def max_mean(loads: Tensor, plan: Tensor, situation: PlanningSituation) -> Tensor:
    """The most loaded rank over the mean of the living ones, `[L]` float64; 1 where there is no load at all."""
    by_rank = rank_loads(loads, plan, situation)
    mean = by_rank.sum(1) / len(situation.living)
    return torch.where(mean > 0, by_rank.amax(1) / mean.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def slot_loads(loads: Tensor, plan: Tensor, situation: PlanningSituation) -> Tensor:
    """The load of each slot `[L, R, S]` of `plan`, in the dtype of `loads [L, E]`; 0 where it is empty."""
    if situation.copy_choice == "nearest":
        living = torch.tensor(situation.living)
        placed = torch.zeros(plan.shape, dtype=loads.dtype)
        placed[:, living] = nearest_loads(loads, plan[:, living], situation.node_of_living)
        return placed
    if situation.copy_choice == "least_load":
        return level(loads, plan)
    share = loads / copies_of(plan, loads.shape[1]).clamp_min(1)
    return share.gather(1, plan.flatten(1).clamp_min(0)).view(plan.shape).masked_fill(plan == EMPTY, 0.0)


def copies_of(plan: Tensor, num_experts: int) -> Tensor:
    """The number of slots of each expert, `[L, E]` int64."""
    slots = torch.where(plan == EMPTY, num_experts, plan).flatten(1)
    counts = torch.zeros(len(plan), num_experts + 1, dtype=torch.int64)
    return counts.scatter_add_(1, slots, torch.ones_like(slots))[:, :num_experts]


def nearest_loads(loads: Tensor, plan: Tensor, node_of: Tensor) -> Tensor:
    """The load of each slot `[L, R, S]` where tokens stay on their rank, else on their node, else choose evenly.

    An expert of load `w` has `c` copies, `k` of them on the node `n`, on `a` of its `m` ranks. Of the tokens, spread
    evenly over `R` ranks, `1/R` lie on a rank that has `s` copies, and stay; `(m - a) / R` lie on others of `n`, and
    spread over its `k`; those on nodes without a copy, a share `u` of all, spread over all `c`. So a copy gets
    `w (1 / (R s) + (m - a) / (R k) + u / c)`: with one copy per rank, `w (m / (R k) + u / c)`.

    Args:
        node_of: the node of each rank, `[R]`.
    """
    num_layers, num_ranks, _ = plan.shape
    num_experts, num_nodes = loads.shape[1], int(node_of.max()) + 1
    expert = torch.where(plan == EMPTY, num_experts, plan)
    on_rank = (plan[..., :, None] == plan[..., None, :]).sum(-1).to(loads.dtype)
    at_node = (node_of[None, :, None] * (num_experts + 1) + expert).flatten(1)
    zero = loads.new_zeros(num_layers, num_nodes * (num_experts + 1))
    of_node = zero.scatter_add(1, at_node, loads.new_ones(1, 1).expand(at_node.shape))
    ranks_with = zero.scatter_add(1, at_node, (1 / on_rank).flatten(1))
    ranks_of = node_of.bincount(minlength=num_nodes).to(loads.dtype)[None, :, None]
    k, a = (each.view(num_layers, num_nodes, -1)[..., :num_experts] for each in (of_node, ranks_with))
    copies = k.sum(1)
    unserved = 1 - ((k > 0) * ranks_of).sum(1) / num_ranks
    per_copy = (ranks_of - a) / (num_ranks * k.clamp_min(1)) + (unserved / copies.clamp_min(1))[:, None]
    per_copy = torch.nn.functional.pad(loads[:, None] * per_copy, (0, 1)).flatten(1)
    of_rank = torch.nn.functional.pad(loads, (0, 1)).gather(1, expert.flatten(1)).view(plan.shape)
    return per_copy.gather(1, at_node).view(plan.shape) + of_rank / (num_ranks * on_rank)
