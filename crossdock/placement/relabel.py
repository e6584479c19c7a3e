"""Which rank gets which part of a plan, so that most experts stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rank_order"]


def rank_order(plan: Tensor, current: Tensor, node_of: Tensor | None = None) -> Tensor:
    """Which rank of `plan` takes the place of each, `[L, R]`, so that most of its experts stay as in `current`.

    Both are `[L, R, S]` without empty slots. Greedy: the pair of most experts in common first.

    Args:
        node_of: the node of each rank, `[R]`, where the ranks of a node shall stay together; `None` where any may go
            to any place. Nodes of different sizes stay where they are.
    """
    num_experts = int(max(plan.max(), current.max())) + 1
    held, before = (torch.zeros(*each.shape[:2], num_experts).scatter_(2, each, 1.0) for each in (plan, current))
    common = held @ before.mT
    if node_of is not None:
        num_nodes = int(node_of.max()) + 1
        if node_of.bincount(minlength=num_nodes).unique().numel() == 1:
            in_node = (node_of[:, None] == torch.arange(num_nodes)).float()
            of_nodes = in_node.mT @ common @ in_node
            place_of = _greedy(of_nodes)[:, node_of]
        else:
            place_of = node_of.expand(len(plan), -1)
        common = common.masked_fill(place_of[:, :, None] != node_of, -1.0)
    return _greedy(common.mT)


def _greedy(common: Tensor) -> Tensor:
    """The column of each row, `[L, n]`, all different, for `common [L, n, n]`."""
    num_layers, size, _ = common.shape
    common, place = common.clone(), torch.zeros(num_layers, size, dtype=torch.int64)
    layer = torch.arange(num_layers)
    for _ in range(size):
        which = common.flatten(1).argmax(1)
        row, column = which // size, which % size
        place[layer, row] = column
        common[layer, row] = -2.0
        common[layer, :, column] = -2.0
    return place
