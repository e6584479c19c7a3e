"""Capacity drops the routes that the policy says, exactly, and says how many."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.routing import Router, RouterConfig, expert_capacity, within_capacity


def _expected(expert_ids: torch.Tensor, weights: torch.Tensor, num_experts: int, capacity: int, policy: str) -> list:
    """Route by route, in Python."""
    num_tokens, top_k = expert_ids.shape
    stays = [[False] * top_k for _ in range(num_tokens)]
    for expert in range(num_experts):
        routes = [(t, k) for t in range(num_tokens) for k in range(top_k) if expert_ids[t, k] == expert]
        if policy == "probs":
            routes.sort(key=lambda route: -weights[route].item())
        for t, k in routes[:capacity]:
            stays[t][k] = True
    return stays


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5),
    st.sampled_from(["probs", "position"]), st.integers(0, 2**16),
)  # fmt: skip
def test_keeps_the_routes_that_the_policy_names(
    num_tokens: int, top_k: int, num_experts: int, capacity: int, policy: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    # Few values: ties go to the first in order.
    weights = torch.randint(0, 4, (num_tokens, top_k), generator=generator) / 4
    stays = within_capacity(expert_ids, weights, num_experts, capacity, policy)  # type: ignore[arg-type]
    assert stays.tolist() == _expected(expert_ids, weights, num_experts, capacity, policy)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor"), [(40, 2, 8, 1.25), (10, 4, 40, 1.1), (7, 1, 3, 1.0), (0, 2, 4, 1.0)]
)
def test_capacity_is_rounded_up(tokens: int, top_k: int, experts: int, factor: float) -> None:
    exact = math.ceil(round(tokens * top_k * factor / experts, 9))
    assert int(expert_capacity(tokens, top_k, experts, factor)) == exact
    assert int(expert_capacity(torch.tensor(tokens), top_k, experts, factor)) == exact


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_router_drops_without_normalising_again(policy: str) -> None:
    torch.manual_seed(0)
    config = RouterConfig(8, 2, capacity_factor=0.5, drop_policy=policy)  # type: ignore[arg-type]
    router, dropless = Router(16, config), Router(16, RouterConfig(8, 2))
    dropless.load_state_dict(router.state_dict())
    x = torch.randn(64, 16, requires_grad=True)
    padding_mask = torch.arange(64) >= 48
    routing, whole = router(x, padding_mask=padding_mask), dropless(x, padding_mask=padding_mask)
    stays = routing.expert_ids >= 0
    assert torch.equal(routing.expert_ids[stays], whole.expert_ids[stays])
    assert torch.equal(routing.weights[stays], whole.weights[stays])
    assert (routing.weights[~stays] == 0).all()
    capacity = math.ceil(48 * 2 / 8 * 0.5)
    counts = torch.bincount(routing.expert_ids[stays], minlength=8)
    assert counts.max() == capacity
    assert routing.dropped is not None
    assert int(routing.dropped) == 96 - int(counts.sum()) > 0
    assert whole.dropped is None
    routing.weights.sum().backward()
    assert x.grad is not None
    lost = ~stays.any(dim=1)
    assert lost[:48].any()
    assert (x.grad[lost] == 0).all()
