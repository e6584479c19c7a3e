"""What the ranks that hold the experts compute: per layer and rank, over time, and what unevenness costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.moe import MoELayerPlaces
from crossdock.placement import EMPTY, Placement
from crossdock.routed_experts import RoutedExperts
from crossdock.routing import StepLoad

__all__ = ["PASSES", "BalanceMonitor", "RankLoad"]

PASSES = 3
"""Of a step, by the time of a forward pass: a backward pass computes two products for each of the forward pass."""


class RankLoad(NamedTuple):
    """Of one step, the same on all ranks.

    Attributes:
        computed: `[L, R]` float64, routes that each rank computed, summed over the groups that hold the same experts.
        unrelieved: likewise, had every expert its first place and no copy.
        seconds: that the step lasted longer than if every rank had computed the mean, by the time that experts take.
    """

    computed: Tensor
    unrelieved: Tensor
    seconds: float

    def metrics(self, ranks_per_node: int) -> dict[str, float]:
        """For `metrics.jsonl`; max/mean over ranks of the mean layer, which the step's time follows, and the worst."""
        before, after = max_over_mean(self.unrelieved), max_over_mean(self.computed)
        values = {
            "rank_max_mean_before": before.mean().item(),
            "rank_max_mean": after.mean().item(),
            "worst_rank_max_mean": after.max().item(),
            "imbalance_seconds": self.seconds,
        }
        num_ranks = self.computed.shape[1]
        if ranks_per_node and ranks_per_node < num_ranks and num_ranks % ranks_per_node == 0:
            of_nodes = self.computed.unflatten(1, (-1, ranks_per_node)).sum(-1)
            values["node_max_mean"] = max_over_mean(of_nodes).mean().item()
        return values


def max_over_mean(loads: Tensor) -> Tensor:
    """`[L]` of loads `[L, R]`; 1 where there is none."""
    mean = loads.mean(dim=1)
    return torch.where(mean > 0, loads.amax(dim=1) / mean.clamp_min(1e-12), 1.0)


class BalanceMonitor:
    """Takes in the counts of every step.

    Args:
        places: of the model's layers.
        layers: those of this rank.
        num_ranks: `R`, that hold the experts of a layer together.
        num_groups: of such ranks, each for tokens of its own.
        decay: of the moving average, per step.

    Attributes:
        average: `[L, E]` float64, the moving average of each layer's routes per step; `None` before the first step.
    """

    def __init__(
        self, places: MoELayerPlaces, layers: Sequence[RoutedExperts], num_ranks: int, num_groups: int, decay: float
    ) -> None:
        self.places, self.layers, self.decay = places, layers, decay
        self.num_ranks, self.num_groups = num_ranks, num_groups
        self.average: Tensor | None = None

    def gather(self, load: StepLoad) -> Tensor:
        """What the ranks of the default group have computed in a step, and how long. Collective among them.

        Returns:
            `[L, R + 1]` float64 on the CPU: routes that each rank computed, and seconds that all have spent on them.
        """
        device = load.routes.device
        own = torch.zeros(len(self.places.names), self.num_ranks + 1, dtype=torch.float64)
        computed = load.computed.cpu()
        for index, layer in zip(self.places.own, self.layers, strict=True):
            own[index, layer.ep_rank] = computed[index]
            own[index, -1] = layer.clock.take()
        if dist.is_initialized():
            everywhere = own.to(device)
            dist.all_reduce(everywhere)
            own = everywhere.cpu()
        return own

    def update(self, load: StepLoad, gathered: Tensor, copies: int = 1) -> RankLoad:
        """Take in a step.

        Args:
            load: of the step, over all copies of the model.
            gathered: what `gather` returns, summed over all copies.
            copies: of the model, beside those in the default group.
        """
        routes = load.routes.cpu().double()
        if self.average is None:
            self.average = routes
        else:
            self.average = self.decay * self.average + (1 - self.decay) * routes
        of_ranks, seconds = gathered[:, :-1], gathered[:, -1]
        surplus = of_ranks.amax(dim=1) - of_ranks.mean(dim=1)
        total = of_ranks.sum(dim=1).clamp_min(1)
        price = float((surplus / (self.num_groups * copies) * seconds / total).sum()) * PASSES
        return RankLoad(of_ranks, self._unrelieved(routes), price)

    def _unrelieved(self, routes: Tensor) -> Tensor:
        num_experts = routes.shape[1]
        first = Placement.contiguous(num_experts, self.num_ranks)
        rows = torch.tensor(first.row_to_expert)
        loads = torch.where(rows == EMPTY, 0, routes[:, rows])
        return loads.view(len(routes), self.num_ranks, -1).sum(dim=-1)
