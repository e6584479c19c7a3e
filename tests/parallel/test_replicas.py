"""Replicas of experts: their gradients are those of one process, and idle experts are not sent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock.moe import MoE, moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ActivationCheckpointConfig, GradientManager, ParallelDims, parallelize
from crossdock.routing import RouterConfig
from tests.parallel.test_gradients import HIDDEN, INNER, SEQUENCES, batch, build, loss_of, reference, relative
from tests.ranks import RankPool


def step(
    model: nn.Module,
    layout: tuple[int, int],
    mode: Any = "none",
    micro_batches: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """A step on `dp_replicate, ep` of the ranks that there are; whole gradients by name, and what replicas sent."""
    world_size, (dp_replicate, ep) = dist.get_world_size(), layout
    meshes = ParallelDims(world_size, dp_replicate=dp_replicate, ep=ep).build_mesh("cpu")
    parallelize(model, meshes, activation_checkpoint=ActivationCheckpointConfig(mode))
    manager = GradientManager(model, meshes, **options)
    x, labels = batch()
    targets = int((labels != -100).sum())
    rows = SEQUENCES // world_size
    own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    x, labels = x[own].to(next(model.parameters()).dtype), labels[own]
    for index, (part, part_labels) in enumerate(zip(x.chunk(micro_batches), labels.chunk(micro_batches), strict=True)):
        manager.before_backward(is_last=index == micro_batches - 1)
        loss_of(model(part), part_labels, targets).backward()
    norm = manager.clip(1e9)
    layers = {id(p): layer for layer in moe_layers(model).values() for p in layer.experts.parameters()}
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        gradient = parameter.grad.full_tensor()
        if id(parameter) in layers and layers[id(parameter)].experts.slot_parameters():
            gradient = gradient[torch.tensor(layers[id(parameter)].placement.expert_to_slot)]
        gradients[name.replace("_checkpoint_wrapped_module.", "")] = gradient.double().numpy()
    return {"gradients": gradients, "norm": norm.item(), "traffic": manager.replica_traffic}


def replicas(num_experts: int, layout: tuple[int, int], *args: Any, **options: Any) -> dict[str, Any]:
    return step(build(num_experts, torch.float32, MoEConfig(experts="grouped_mm")), layout, *args, **options)


@pytest.mark.parametrize(
    ("world_size", "layout", "num_experts", "mode", "micro_batches", "reduction"),
    [
        (2, (2, 1), 8, "none", 1, "micro_batch"),
        (4, (2, 2), 8, "selective", 2, "micro_batch"),
        (4, (2, 2), 9, "none", 2, "step"),
        (4, (2, 1), 8, "full", 2, "step"),
        (4, (4, 1), 8, "none", 1, "micro_batch"),
        (8, (2, 2), 8, "none", 1, "micro_batch"),
    ],
)
def test_gradients_equal_one_process(
    ranks: RankPool,
    world_size: int,
    layout: tuple[int, int],
    num_experts: int,
    mode: str,
    micro_batches: int,
    reduction: str,
) -> None:
    arguments = (num_experts, layout, mode, micro_batches)
    results = ranks.run(world_size, _with_options, {"reduction": reduction}, *arguments)
    expected = reference(num_experts)
    assert results[0]["gradients"].keys() == expected["gradients"].keys()
    for result in results:
        for name, gradient in expected["gradients"].items():
            assert relative(result["gradients"][name], gradient) < 1e-6, name
            # Whatever holds a gradient holds the same bits of it.
            np.testing.assert_array_equal(result["gradients"][name], results[0]["gradients"][name], name)
        assert result["norm"] == results[0]["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def _with_options(options: dict[str, Any], *args: Any) -> dict[str, Any]:
    return replicas(*args, **options)


def idle(layout: tuple[int, int], unpacked: bool, sparse: bool) -> dict[str, Any]:
    """Five of eight experts are never chosen: the router's logits have a bias against them."""
    torch.manual_seed(0)
    model = build(8, torch.float32, MoEConfig())
    for block in model.layers:
        experts = [nn.Sequential(nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)) for _ in range(8)] if unpacked else None
        layer = MoE(HIDDEN, None if unpacked else INNER, RouterConfig(8, 2, bias=True), experts=experts)
        with torch.no_grad():
            for parameter in layer.experts.parameters():
                parameter.normal_(std=0.3)
            layer.router.bias.zero_()
            layer.router.bias[3:] = -100
        block.moe = layer
    return step(model, layout, sparse=sparse)


@pytest.mark.parametrize("unpacked", [False, True])
def test_sums_without_idle_experts_are_those_of_all_bit_by_bit_and_smaller(ranks: RankPool, unpacked: bool) -> None:
    sparse, dense = (ranks.run(4, idle, (2, 2), unpacked, choice) for choice in (True, False))
    for ours, all_sums in zip(sparse, dense, strict=True):
        for name, gradient in all_sums["gradients"].items():
            np.testing.assert_array_equal(ours["gradients"][name], gradient, name)
        assert ours["traffic"].sent + ours["traffic"].skipped == all_sums["traffic"].sent
        assert all_sums["traffic"].skipped == 0
        assert ours["traffic"].overlapped >= 0 < ours["traffic"].waited or not ours["traffic"].sent
    # Experts 0 to 3 live on the first rank of each replica, 4 to 7 on the second.
    assert [result["traffic"].sent == 0 for result in sparse] == [False, True, False, True]
    assert sparse[0]["traffic"].sent == 3 * sparse[0]["traffic"].skipped


def test_sums_of_four_replicas_without_idle_experts_are_those_of_all(ranks: RankPool) -> None:
    sparse, dense = (ranks.run(4, idle, (4, 1), False, choice)[0] for choice in (True, False))
    for name, gradient in dense["gradients"].items():
        assert relative(sparse["gradients"][name], gradient) < 1e-6
    assert sparse["traffic"].sent < dense["traffic"].sent


def unsummed() -> str:
    model = build(8, torch.float32, MoEConfig())
    parallelize(model, ParallelDims(2, dp_replicate=2).build_mesh("cpu"))
    x, labels = batch()
    with pytest.raises(RuntimeError) as raised:
        loss_of(model(x.float()), labels, 10).backward()
    return str(raised.value)


def test_replicas_that_nobody_sums_are_refused(ranks: RankPool) -> None:
    assert "make one after apply_fsdp" in ranks.run(2, unsummed)[0]


class _Counted(TorchDispatchMode):
    """Counts reductions by the names of their operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in str(func):
            self.counts["scatter" if "reduce_scatter" in str(func) else "all"] += 1
        return func(*args, **(kwargs or {}))


def reductions(reduction: Any, micro_batches: int) -> Counter[str]:
    """How many reductions a step takes, over the ranks that share parameters and over replicas."""
    with _Counted() as counted:
        replicas(8, (2, 1), "none", micro_batches, reduction=reduction)
    return counted.counts


def test_a_step_reduces_as_often_as_it_is_told(ranks: RankPool) -> None:
    arguments = (("micro_batch", 2), ("step", 2), ("step", 1))
    each, once, single = (ranks.run(4, reductions, *each)[0] for each in arguments)
    assert each["scatter"] == 2 * once["scatter"] == 2 * single["scatter"] > 0
    # Replicas are summed once in any case.
    assert each["all"] == once["all"] == single["all"] > 0
