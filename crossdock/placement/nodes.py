"""Traffic between nodes, and which ranks make up a node."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Nodes"]


class Nodes:
    """What a plan sends between nodes, for plans `[L, R, S]` without empty slots.

    Args:
        node_of: the node of each rank, `[R]`.
        num_groups: of experts, to which routing is limited; 1 where it is not.
        nearest: whether tokens choose the nearest copy.
    """

    def __init__(self, node_of: Tensor, num_groups: int, nearest: bool) -> None:
        self.node_of, self.num_groups, self.nearest = node_of, num_groups, nearest
        self.ranks_of = node_of.bincount(minlength=int(node_of.max()) + 1)
        self.matter = len(self.ranks_of) > 1 and (nearest or num_groups > 1)

    def between(self, loads: Tensor, plan: Tensor, share: Tensor) -> Tensor:
        """A number of 0 to 1 for each layer, the mean of those that apply.

        With `nearest`, the part of the load whose tokens lie on a node without a copy. With groups, the chance that
        two tokens of a group, drawn by load, are computed on different nodes: routing that is limited to few groups
        then reaches many nodes. Else 0: where copies are chosen evenly, every plan sends the same.

        Args:
            loads: `[L, E]`.
            plan: `[L, R, S]`.
            share: the load of each slot, `[L, R, S]`.
        """
        num_layers, num_experts = loads.shape
        if not self.matter:
            return loads.new_zeros(num_layers)
        of_all = loads.sum(1).clamp_min(torch.finfo(loads.dtype).tiny)
        parts = []
        if self.nearest:
            held = self._by_node(torch.ones_like(share), plan, num_experts) > 0
            reached = (held * (self.ranks_of / len(self.node_of))[:, None]).sum(1)
            parts.append((loads * (1 - reached)).sum(1) / of_all)
        if self.num_groups > 1:
            by_node = self._by_node(share, plan // (num_experts // self.num_groups), self.num_groups)
            of_group = by_node.sum(1).clamp_min(torch.finfo(loads.dtype).tiny)
            parts.append(1 - (by_node**2 / of_group[:, None]).sum((1, 2)) / of_all)
        return torch.stack(parts).mean(0).clamp_min(0.0)

    def arrange(self, loads: Tensor, plan: Tensor, share: Tensor) -> Tensor:
        """The ranks of a plan in an order in which they send less between nodes; each rank's experts stay together.

        Pairs of ranks change nodes, the best first, as long as that brings ranks together that belong together: by the
        load that they have in the same groups, less (with `nearest`) the load of experts of which both have a copy.
        """
        num_layers, num_ranks, _ = plan.shape
        num_experts = loads.shape[1]
        affinity = loads.new_zeros(num_layers, num_ranks, num_ranks)
        rank = torch.arange(num_ranks)[:, None] * torch.ones_like(plan[0])
        if self.nearest:
            held = torch.zeros(num_layers, num_ranks, num_experts, dtype=loads.dtype)
            held.scatter_(2, plan, 1.0)
            weighed = held * loads[:, None] / held.sum(1, keepdim=True).clamp_min(1.0)
            affinity -= weighed @ held.mT
        if self.num_groups > 1:
            target = (rank * self.num_groups + plan // (num_experts // self.num_groups)).flatten(1)
            of_rank = loads.new_zeros(num_layers, num_ranks * self.num_groups)
            of_rank = of_rank.scatter_add_(1, target, share.flatten(1)).view(num_layers, num_ranks, -1)
            of_group = of_rank.sum(1, keepdim=True).clamp_min(torch.finfo(loads.dtype).tiny)
            affinity += (of_rank / of_group) @ of_rank.mT
        order = _group_by_affinity(affinity, self.node_of)
        return plan.gather(1, order[..., None].expand_as(plan))

    def _by_node(self, amount: Tensor, group: Tensor, num_groups: int) -> Tensor:
        """The sum of `amount [L, R, S]` by node and `group [L, R, S]`, `[L, N, num_groups]`."""
        num_nodes = len(self.ranks_of)
        target = (self.node_of[:, None] * num_groups + group).flatten(1)
        sums = amount.new_zeros(len(amount), num_nodes * num_groups)
        return sums.scatter_add_(1, target, amount.flatten(1)).view(-1, num_nodes, num_groups)


def _group_by_affinity(affinity: Tensor, node_of: Tensor) -> Tensor:
    """Which rank to put in the place of each, `[L, R]`: pairs change places while that joins more affinity `[L, R, R]`.

    Kernighan and Lin's gain of a pair in different nodes, `with(one, node of two) + with(two, node of one)
    - with(one, its node) - with(two, its node) - 2 affinity(one, two)`, where no rank is counted with itself.
    """
    num_layers, num_ranks, _ = affinity.shape
    affinity = affinity.clone()
    affinity.diagonal(dim1=1, dim2=2).zero_()
    order = torch.arange(num_ranks).expand(num_layers, -1).clone()
    in_node = (node_of[:, None] == torch.arange(int(node_of.max()) + 1)).to(affinity.dtype)
    together = node_of[:, None] == node_of
    threshold = 1e-6 * affinity.abs().amax((1, 2))
    layers = torch.arange(num_layers)
    for _ in range(4 * num_ranks):
        with_node = affinity @ in_node
        own = with_node.gather(2, node_of[None, :, None].expand(len(affinity), -1, 1))
        moving = with_node[:, :, node_of] - own
        gain = (moving + moving.mT - 2 * affinity).masked_fill_(together, -torch.inf)
        best, which = gain.flatten(1).max(1)
        good = best > threshold
        if not good.any():
            break
        affinity, threshold, layers = affinity[good], threshold[good], layers[good]
        one, two = which[good] // num_ranks, which[good] % num_ranks
        place = torch.arange(num_ranks).expand(len(layers), -1).clone()
        place.scatter_(1, one[:, None], two[:, None]).scatter_(1, two[:, None], one[:, None])
        order[layers] = order[layers].gather(1, place)
        affinity = affinity.gather(1, place[..., None].expand_as(affinity))
        affinity = affinity.gather(2, place[:, None].expand_as(affinity))
    return order
