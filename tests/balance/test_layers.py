"""Outputs and gradients of layers whose experts are placed, copied and borrowed, against one process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crossdock.balance import BalanceConfig, Balancer, LayerRelief
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ActivationCheckpointConfig, GradientManager, ParallelDims, apply_ep, parallelize
from tests.parallel.test_gradients import (
    HIDDEN,
    SEQUENCES,
    batch,
    build,
    logical_gradients,
    loss_of,
    reference,
    relative,
)
from tests.ranks import RankPool

# Whatever it costs, and however few routes there are.
EAGER = {"move_if_it_pays": False, "move_cost": 0.0}
HELPFUL = {"spill_if_it_pays": False, "min_spilled_routes": 0}


def balanced(
    layout: dict[str, int], num_experts: int, balance: dict[str, Any], moe: dict[str, Any], mode: Any, parts: int
) -> dict[str, Any]:
    """A step of two layers whose experts have moved, by loads that fall with an expert's number."""
    world_size = dist.get_world_size()
    model = build(num_experts, torch.float32, MoEConfig(**moe))
    meshes = ParallelDims(world_size, **layout).build_mesh("cpu")
    parallelize(model, meshes, activation_checkpoint=ActivationCheckpointConfig(mode))
    manager = GradientManager(model, meshes)
    balancer = Balancer(model, BalanceConfig(**balance))
    if balance["strategy"] != "spill":
        loads = 1 / torch.arange(1, num_experts + 1).double() ** 1.5
        balancer.monitor.average = torch.stack([loads, loads.roll(3)])
        balancer.rebalance(always=True)
    x, labels = batch()
    targets = int((labels != -100).sum())
    rows = SEQUENCES // world_size
    own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    x, labels = x[own].float().requires_grad_(), labels[own]
    outputs = []
    for index, (part, part_labels) in enumerate(zip(x.chunk(parts), labels.chunk(parts), strict=True)):
        manager.before_backward(is_last=index == parts - 1)
        outputs.append(model(part))
        loss_of(outputs[-1], part_labels, targets).backward()
    norm = manager.clip(1e9)
    assert x.grad is not None
    layers = moe_layers(model).values()
    placements = [layer.placement for layer in layers]
    return {
        "gradients": logical_gradients(model),
        "norm": norm.item(),
        "output": torch.cat(outputs).detach().double().numpy(),
        "input_gradient": x.grad.double().numpy(),
        "moved": sum(each.row_to_expert != tuple(sorted(each.row_to_expert)) for each in placements),
        "copies": sum(sum(expert >= 0 for expert in each.slot_to_expert) - num_experts for each in placements),
        "borrowed": sum(layer.relief.take_borrowed() for layer in layers if isinstance(layer.relief, LayerRelief)),
    }


@pytest.mark.parametrize(
    ("layout", "num_experts", "balance", "moe", "mode", "parts"),
    [
        pytest.param({"ep": 4}, 8, {"strategy": "eplb"}, {}, "none", 2, id="copies"),
        pytest.param({"ep": 2}, 8, {"strategy": "eplb"}, {}, "selective", 2, id="copies-ep-shard-selective"),
        pytest.param({"ep": 4}, 9, {"strategy": "eplb"}, {}, "full", 2, id="copies-nine-experts-full"),
        pytest.param({"ep": 4}, 8, {"strategy": "eplb", "num_redundant_experts": 0}, {}, "none", 1, id="moved-alone"),
        pytest.param({"ep": 4}, 8, {"strategy": "spill"}, {}, "selective", 1, id="spill-selective"),
        pytest.param(
            {"ep": 4}, 9, {"strategy": "eplb+spill", "memory_bound": True}, {"overlap_chunks": 2}, "full", 2, id="both"
        ),
        pytest.param({"ep": 2, "dp_replicate": 2}, 8, {"strategy": "spill"}, {}, "selective", 2, id="spill-replicas"),
        pytest.param(
            {"ep": 4},
            8,
            {"strategy": "eplb", "num_redundant_experts": 8, "copy_choice": "nearest"},
            {"dispatcher": "hierarchical", "ranks_per_node": 2},
            "none",
            1,
            id="nearest-on-two-nodes",
        ),
        pytest.param(
            {"ep": 4}, 8, {"strategy": "eplb", "copy_choice": "least_load"}, {}, "selective", 2, id="least-load"
        ),
        pytest.param({"ep": 4}, 8, {"strategy": "eplb"}, {"static_shapes": True}, "none", 2, id="static-shapes"),
        # DeepSeek-V3's numbers: 36 slots on each rank.
        pytest.param(
            {"ep": 8}, 256, {"strategy": "eplb", "num_redundant_experts": 32}, {}, "none", 1, id="256-and-32-copies"
        ),
    ],
)
def test_gradients_equal_one_process(
    ranks: RankPool,
    layout: dict[str, int],
    num_experts: int,
    balance: dict[str, Any],
    moe: dict[str, Any],
    mode: str,
    parts: int,
) -> None:
    strategy = balance["strategy"]
    balance = balance | (EAGER if "eplb" in strategy else {}) | (HELPFUL if "spill" in strategy else {})
    moe = {"experts": "grouped_mm"} | moe
    results = ranks.run(max(layout["ep"], 4), balanced, layout, num_experts, balance, moe, mode, parts)
    assert bool(results[0]["moved"]) == ("eplb" in strategy)
    assert bool(results[0]["copies"]) == ("eplb" in strategy and balance.get("num_redundant_experts") != 0)
    assert num_experts != 256 or results[0]["copies"] == 2 * 32
    assert bool(results[0]["borrowed"]) == ("spill" in strategy)
    expected = reference(num_experts)
    for name in ("output", "input_gradient"):
        assert relative(np.concatenate([result[name] for result in results]), expected[name]) < 1e-6
    for name, gradient in expected["gradients"].items():
        assert relative(results[0]["gradients"][name], gradient) < 1e-6, name
    assert {result["norm"] for result in results} == {results[0]["norm"]}, "ranks disagree on the gradient norm"
    assert results[0]["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def _routes_beyond_the_bound(strategy: str, copy_choice: str) -> int:
    """By how much the busiest rank exceeds `ceil(1.02 x mean)` routes that it computes, at the most."""
    torch.manual_seed(dist.get_rank())
    model = build(16, torch.float32, MoEConfig())
    parallelize(model, ParallelDims(dist.get_world_size(), ep=dist.get_world_size()).build_mesh("cpu"))
    config: dict[str, Any] = HELPFUL | {"spill_if_it_pays": True, "min_spilled_routes": 64, "memory_bound": True}
    if strategy == "eplb+spill":
        config |= EAGER | {"copy_choice": copy_choice}
    balancer = Balancer(model, BalanceConfig(strategy, **config))  # type: ignore[arg-type]
    if strategy == "eplb+spill":
        balancer.monitor.average = 1 / torch.arange(1, 17).double().expand(2, 16)
        balancer.rebalance(always=True)
    beyond = []
    for step in range(6):
        # All want two experts, which are others in each step; in one of them only one rank has tokens.
        popular = torch.full((16,), 1e-3).index_fill(0, torch.tensor([step, 15 - step]), 1.0)
        tokens = 0 if step == 3 and dist.get_rank() else int(torch.randint(1, 60, ()))
        ids = torch.multinomial(popular.expand(max(tokens, 1), 16), 2)[:tokens]
        layer = next(iter(moe_layers(model).values()))
        hook = layer.router.register_forward_hook(
            lambda router, args, routing, ids=ids: routing._replace(expert_ids=ids.view_as(routing.expert_ids))
        )
        model(torch.randn(1, tokens, HIDDEN)).square().sum().backward()
        hook.remove()
        computed = layer.load.computed.clone()
        most, total = computed.clone(), computed.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        beyond.append(int(most) - math.ceil(1.02 * int(total) / dist.get_world_size() - 1e-9))
        layer.load.reset()
    return max(beyond)


@pytest.mark.parametrize(("strategy", "copy_choice"), [("spill", "even"), ("eplb+spill", "nearest"), ("auto", "even")])
def test_no_rank_computes_more_than_the_bound(ranks: RankPool, strategy: str, copy_choice: str) -> None:
    assert max(ranks.run(4, _routes_beyond_the_bound, strategy, copy_choice)) <= 0


def _rows_computed_with() -> tuple[list[int], int]:
    """Rows of borrowed experts that this rank computes with, and how many it might borrow."""
    model = build(16, torch.float32, MoEConfig(debug_force_zipf=2.0))
    parallelize(model, ParallelDims(dist.get_world_size(), ep=dist.get_world_size()).build_mesh("cpu"))
    Balancer(model, BalanceConfig("spill", memory_bound=True, **HELPFUL))  # type: ignore[arg-type]
    layer = next(iter(moe_layers(model).values()))
    rows, compute = [], layer.experts.compute

    def watched(tokens: torch.Tensor, slot_ids: torch.Tensor, weights: torch.Tensor, params: Any) -> torch.Tensor:
        rows.append(len(params["down_projs"]))
        return compute(tokens, slot_ids, weights, params)

    layer.experts.compute = watched
    model(batch()[0][:2].float()).sum().backward()
    return rows, layer.placement.copies_per_rank


def test_only_what_is_borrowed_takes_memory(ranks: RankPool) -> None:
    results = ranks.run(4, _rows_computed_with)
    for (own, borrowed, *again), slots in results:
        assert own == 4
        assert borrowed < slots
        assert again == [borrowed], "fetched and computed again in the backward pass"


def _change(how: str) -> float:
    """How far outputs are from those with copies made anew, after the weights have changed."""
    model = build(8, torch.float32, MoEConfig())
    apply_ep(model, ParallelDims(dist.get_world_size(), ep=dist.get_world_size()).build_mesh("cpu"))
    balancer = Balancer(model, BalanceConfig("eplb", **EAGER))
    balancer.monitor.average = 1 / torch.arange(1, 9).double().expand(2, 8)
    balancer.rebalance(always=True)
    x = batch()[0][:2].float()
    if how == "inference":
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
    model(x)
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    with torch.no_grad():
        seen = model(x)
        for layer in moe_layers(model).values():
            layer.weights_changed()
        return float((seen - model(x)).abs().max())


@pytest.mark.parametrize("how", ["load", "inference"])
def test_copies_follow_a_state_dict_and_outlive_inference(ranks: RankPool, how: str) -> None:
    assert ranks.run(2, _change, how) == [0.0, 0.0]
