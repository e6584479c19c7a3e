"""What the monitor says of the ranks that hold the experts is what a count by hand says."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock.balance import BalanceConfig, Balancer
from crossdock.moe import finish_step, moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.parallel.test_gradients import build
from tests.ranks import RankPool

# Routes that ranks 0 to 3 computed in two layers, and seconds that they took for them.
COMPUTED = [[30, 10], [10, 10], [10, 30], [10, 30]]
SECONDS = 0.02


def _metrics(ep: int, ranks_per_node: int) -> tuple[dict[str, Any], list[float]]:
    """Metrics of a step, and the least and the most seconds that this rank's experts took in each of two layers."""
    model = build(8, torch.float32, MoEConfig(ranks_per_node=ranks_per_node))
    parallelize(model, ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu"))
    balancer = Balancer(model, BalanceConfig())
    took = []
    for layer, routes in zip(moe_layers(model).values(), COMPUTED[dist.get_rank()], strict=True):
        started = time.perf_counter()
        with layer.clock.running(torch.device("cpu")):
            time.sleep(SECONDS * routes / 10)
        took.append(time.perf_counter() - started)
    computed = [torch.tensor(routes) for routes in COMPUTED[dist.get_rank()]]
    load = finish_step(model, dist.group.WORLD)._replace(computed=torch.stack(computed))
    metrics, messages = balancer.after_step(load)
    assert messages == []
    return metrics, took


@pytest.mark.parametrize(
    ("ep", "of_ranks", "surplus"),
    [
        pytest.param(4, [[30, 10, 10, 10], [10, 10, 30, 30]], [15, 10], id="one-group"),
        # Ranks 0 and 2 hold the same experts, and so do 1 and 3; half of what both have is the surplus of one group.
        pytest.param(2, [[40, 20], [40, 40]], [5, 0], id="two-groups"),
    ],
)
def test_imbalance_costs_the_time_of_the_busiest_ranks_surplus(
    ranks: RankPool, ep: int, of_ranks: list[list[int]], surplus: list[float]
) -> None:
    results = ranks.run(4, _metrics, ep, 0)
    metrics = results[0][0]
    assert all(other == metrics for other, _ in results), "ranks agree"
    ratios = [max(layer) * ep / sum(layer) for layer in of_ranks]
    assert metrics["rank_max_mean"] == pytest.approx(sum(ratios) / 2)
    assert metrics["worst_rank_max_mean"] == pytest.approx(max(ratios))
    least, most = 0.0, 0.0
    for layer, (routes, more) in enumerate(zip(of_ranks, surplus, strict=True)):
        slept = SECONDS * sum(own[layer] for own in COMPUTED) / 10
        took = sum(times[layer] for _, times in results)
        least += 3 * slept / sum(routes) * more
        most += 3 * took / sum(routes) * more
    assert 0 < least <= metrics["imbalance_seconds"] <= most


def test_ranks_of_a_node_are_taken_together(ranks: RankPool) -> None:
    metrics, _ = ranks.run(4, _metrics, 4, 2)[0]
    # 40 and 20 routes in the first layer, 20 and 60 in the second.
    assert metrics["node_max_mean"] == pytest.approx((40 / 30 + 60 / 40) / 2)
    alone, _ = ranks.run(4, _metrics, 4, 4)[0]
    assert "node_max_mean" not in alone
