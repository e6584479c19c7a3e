"""Statistics of loads, and the warning of a router that has collapsed."""

from __future__ import annotations

import math

import pytest
import torch

from crossdock.routing import CollapseMonitor, load_statistics


def test_statistics_equal_their_definitions() -> None:
    routes = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [10, 4, 2, 0], [0, 0, 0, 0]])
    statistics = load_statistics(routes)
    torch.testing.assert_close(statistics.max_mean, torch.tensor([1.0, 4.0, 2.5, 0.0]).double())
    deviation = [0.0, math.sqrt(48.0), math.sqrt((36 + 0 + 4 + 16) / 4)]
    torch.testing.assert_close(statistics.variation[:3], torch.tensor(deviation).double() / 4)
    shares = (10 / 16, 4 / 16, 2 / 16)
    entropy = -sum(share * math.log(share) for share in shares) / math.log(4)
    torch.testing.assert_close(statistics.entropy, torch.tensor([1.0, 0.0, entropy, 0.0]).double())
    assert statistics.dead.tolist() == [0, 3, 1, 4]


def _routes(collapsed: bool) -> torch.Tensor:
    """Two layers of 16 experts; the second may send 97 % to experts 3 and 7."""
    routes = torch.full((2, 16), 100)
    if collapsed:
        routes[1] = 3
        routes[1, [3, 7]] = 700
    return routes


def test_a_collapsed_layer_is_named_once() -> None:
    monitor = CollapseMonitor(["layers.0.mlp", "layers.1.mlp"], top_k=2, patience=10)
    said = [message for _ in range(100) for message in monitor.update(_routes(collapsed=True))]
    assert len(said) == 1
    for word in ("layers.1.mlp", "3, 7", "of 16", "97%", "10 steps"):
        assert word in said[0]
    assert monitor.average is not None
    assert monitor.average[0].sub(1 / 16).abs().max() < 1e-12
    assert not any(monitor.update(_routes(collapsed=False)) for _ in range(50))
    again = [message for _ in range(100) for message in monitor.update(_routes(collapsed=True))]
    assert len(again) == 1, "it recovered in between"


@pytest.mark.parametrize(
    ("routes", "named"),
    [
        ([100] + [0] * 63, "experts 0 of 64 took 100%"),
        ([0] * 60 + [1, 50, 45, 4], "experts 61, 62 of 64 took 95%"),
        ([10] * 8 + [0] * 56, "experts 0, 1, 2, 3, 4, 5, 6, 7 of 64 took 100%"),
    ],
)
def test_only_the_experts_that_take_nearly_all_are_named(routes: list[int], named: str) -> None:
    (message,) = CollapseMonitor(["a"], top_k=4, patience=1).update(torch.tensor([routes]))
    assert named in message


def test_an_even_router_a_short_skew_and_few_experts_are_left_alone() -> None:
    monitor = CollapseMonitor(["a", "b"], top_k=2, patience=10)
    assert not any(monitor.update(_routes(collapsed=step % 20 < 5)) for step in range(200))
    every = CollapseMonitor(["a"], top_k=3, patience=1)
    assert not any(every.update(torch.tensor([[9, 9, 9, 0]])) for _ in range(10))
