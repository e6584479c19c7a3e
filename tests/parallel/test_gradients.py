"""Outputs and gradients of expert-parallel layers against a single-process float64 reference."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock.comm import EXCHANGE_OPS
from crossdock.moe import MoE, moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import (
    ActivationCheckpointConfig,
    GradientManager,
    ParallelDims,
    apply_ep,
    apply_fsdp,
    clip_grad_norm_,
    global_grad_norm,
    parallelize,
)
from crossdock.routing import RouterConfig
from tests.ranks import RankPool

HIDDEN, INNER, CLASSES, SEQUENCES, LENGTH = 16, 24, 5, 8, 6


class Block(nn.Module):
    def __init__(self, num_experts: int, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = MoE(HIDDEN, INNER, RouterConfig(num_experts, 2), config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Classifier(nn.Module):
    def __init__(self, num_experts: int, config: MoEConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList([Block(num_experts, config) for _ in range(2)])
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(num_experts: int, dtype: torch.dtype, config: MoEConfig) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(num_experts, config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype)


def batch() -> tuple[Tensor, Tensor]:
    """Inputs `[B, S, H]` and labels `[B, S]`, a different number of them masked in every sequence."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SEQUENCES, LENGTH), generator=generator)
    for row in range(SEQUENCES):
        labels[row, : row % LENGTH] = -100
    return x, labels


def loss_of(logits: Tensor, labels: Tensor, targets: int) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / targets


def run(
    world_size: int, ep: int, num_experts: int, dtype: torch.dtype, config: MoEConfig, mode: Any, micro_batches: int
) -> dict[str, Any]:
    """One forward and backward of this rank's part of the batch; full gradients by name, experts in logical order."""
    model = build(num_experts, dtype, config)
    mesh = ParallelDims(world_size, ep=ep).build_mesh("cpu")
    parallelize(model, mesh, activation_checkpoint=ActivationCheckpointConfig(mode))
    x, labels = batch()
    targets = int((labels != -100).sum())
    rows = SEQUENCES // world_size
    own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    x, labels = x[own].to(dtype).requires_grad_(), labels[own]
    outputs = []
    for part, part_labels in zip(x.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        outputs.append(model(part))
        loss_of(outputs[-1], part_labels, targets).backward()
    norm = global_grad_norm(model.parameters())
    assert x.grad is not None
    return {
        "gradients": logical_gradients(model),
        "norm": norm.item(),
        "output": torch.cat(outputs).detach().double().numpy(),
        "input_gradient": x.grad.double().numpy(),
    }


def logical_gradients(model: Classifier) -> dict[str, np.ndarray]:
    """Whole gradients by name, experts in logical order."""
    layers = {id(p): layer for layer in moe_layers(model).values() for p in layer.experts.parameters()}
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        if id(parameter) in layers:
            gradient = gradient[torch.tensor(layers[id(parameter)].placement.expert_to_row)]
        gradients[name.replace("_checkpoint_wrapped_module.", "")] = gradient.double().numpy()
    return gradients


def reference(num_experts: int) -> dict[str, Any]:
    """The same in one process, without any parallelism, in float64."""
    model = build(num_experts, torch.float64, MoEConfig(experts="eager"))
    x, labels = batch()
    x.requires_grad_()
    output = model(x)
    loss_of(output, labels, int((labels != -100).sum())).backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert x.grad is not None
    return {"gradients": gradients, "norm": norm, "output": output.detach().numpy(), "input_gradient": x.grad.numpy()}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


@pytest.mark.parametrize(
    ("world_size", "ep", "num_experts", "mode", "micro_batches"),
    [
        (1, 1, 8, "none", 1),
        (2, 1, 8, "none", 1),
        (2, 2, 8, "none", 1),
        (4, 2, 8, "selective", 2),
        (4, 4, 8, "none", 1),
        (4, 4, 9, "full", 2),
        (4, 4, 9, "selective", 1),
        (4, 4, 3, "none", 2),
    ],
)
def test_gradients_equal_one_process(
    ranks: RankPool, world_size: int, ep: int, num_experts: int, mode: str, micro_batches: int
) -> None:
    config = MoEConfig(experts="grouped_mm")
    results = ranks.run(world_size, run, world_size, ep, num_experts, torch.float32, config, mode, micro_batches)
    expected = reference(num_experts)
    for name in ("output", "input_gradient"):
        assert relative(np.concatenate([result[name] for result in results]), expected[name]) < 1e-6
    assert results[0]["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert relative(results[0]["gradients"][name], gradient) < 1e-6, name
    norms = {result["norm"] for result in results}
    assert len(norms) == 1, "ranks disagree on the gradient norm"
    assert norms.pop() == pytest.approx(expected["norm"], rel=1e-6)


def idle_ranks(ep: int, busy_expert: int, empty_rank: int) -> dict[str, float]:
    """All tokens want one expert; one rank has no tokens at all."""
    model = build(8, torch.float32, MoEConfig())
    parallelize(
        model, ParallelDims(ep, ep=ep).build_mesh("cpu"), activation_checkpoint=ActivationCheckpointConfig("full")
    )
    for layer in moe_layers(model).values():
        layer.router.register_forward_hook(
            lambda router, args, routing: routing._replace(
                expert_ids=torch.where(torch.arange(2) == 0, busy_expert, -1).expand_as(routing.expert_ids)
            )
        )
    x, labels = batch()
    length = 0 if dist.get_rank() == empty_rank else SEQUENCES
    total = 0.0
    for _ in range(2):
        logits = model(x[:length].float())
        loss_of(logits, labels[:length], 10).backward()
        total += float(logits.isfinite().all())
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    norm = clip_grad_norm_(model.parameters(), 1.0).item()
    return {"finite": total, "norm": norm}


@pytest.mark.parametrize(("ep", "busy_expert", "empty_rank"), [(2, 0, 0), (2, 7, 0), (4, 3, 3)])
def test_idle_experts_and_ranks_neither_hang_nor_lose_gradients(
    ranks: RankPool, ep: int, busy_expert: int, empty_rank: int
) -> None:
    results = ranks.run(ep, idle_ranks, ep, busy_expert, empty_rank)
    assert all(result["finite"] == 2 for result in results)
    assert len({result["norm"] for result in results}) == 1
    assert np.isfinite(results[0]["norm"])
    assert results[0]["norm"] > 0


class CountExchanges(TorchDispatchMode):
    """Counts exchanges; a mode inside autograd's backward sees recomputation as well."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is EXCHANGE_OPS[0]
        return func(*args, **(kwargs or {}))


def exchanges(mode: Any) -> tuple[int, int]:
    """Exchanges in the forward and in the backward pass of two MoE layers at ep 2."""
    model = build(8, torch.float32, MoEConfig())
    parallelize(model, ParallelDims(2, ep=2).build_mesh("cpu"), activation_checkpoint=ActivationCheckpointConfig(mode))
    x, labels = batch()
    with CountExchanges() as forward:
        loss = loss_of(model(x.float()), labels, 10)
    with CountExchanges() as backward:
        loss.backward()
    return forward.count, backward.count


def test_selective_recompute_repeats_no_exchange(ranks: RankPool) -> None:
    plain, selective, full = (ranks.run(2, exchanges, mode)[0] for mode in ("none", "selective", "full"))
    assert plain == (8, 6)  # two layers: counts, routes, tokens, results; then results, weights, tokens
    assert selective == plain
    # Recomputation stops once the last saved tensor is there again, before the results travel back.
    assert full[0] == 8
    assert full[1] > plain[1]


def apply_ep_twice_and_keep_values() -> dict[str, Any]:
    model = build(9, torch.float32, MoEConfig())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mesh = ParallelDims(2, ep=2).build_mesh("cpu")
    assert apply_ep(model, None) is model
    assert apply_ep(model, mesh["ep_shard"]) is model
    assert all(not isinstance(parameter, DTensor) for parameter in model.parameters())
    apply_ep(model, mesh)
    layer = model.layers[0].moe
    assert isinstance(layer, MoE)
    assert layer.ep_group is mesh["ep"].get_group()
    for name, parameter in layer.experts.named_parameters():
        assert isinstance(parameter, DTensor)
        local, whole = parameter.to_local(), before[f"layers.0.moe.experts.{name}"]
        for slot, expert in enumerate(layer.local_expert_ids):
            assert torch.equal(local[slot], whole[expert] if expert >= 0 else torch.zeros_like(local[slot]))
    with pytest.raises(ValueError, match="already"):
        apply_ep(model, mesh)
    wrapped = parallelize(build(9, torch.float32, MoEConfig()), mesh)
    with pytest.raises(ValueError, match="FSDP"):
        apply_ep(wrapped, mesh)
    with pytest.raises(ValueError, match="no crossdock"):
        apply_ep(nn.Linear(2, 2), mesh)
    return {"rank": layer.ep_rank, "world": layer.ep_world_size, "experts": layer.local_expert_ids}


def test_apply_ep_keeps_values_and_says_where_experts_are(ranks: RankPool) -> None:
    first, second = ranks.run(2, apply_ep_twice_and_keep_values)
    assert (first["rank"], second["rank"], first["world"]) == (0, 1, 2)
    assert first["experts"] == (0, 1, 2, 3, -1)
    assert second["experts"] == (4, 5, 6, 7, 8)


def groups_per_parameter() -> dict[str, int]:
    from torch.distributed.fsdp import FSDPModule

    model = parallelize(build(8, torch.float32, MoEConfig()), ParallelDims(4, ep=2).build_mesh("cpu"))
    held: dict[str, int] = {name: 0 for name, _ in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            # torch 2.11 and 2.12 have one group per module.
            for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
                if group is None:
                    continue
                for parameter in group.fsdp_params:
                    held[names[id(parameter.sharded_param)]] += 1
                    size = parameter.mesh_info.mesh.size()
                    assert size == (2 if "experts" in names[id(parameter.sharded_param)] else 4)
    return held


def test_each_parameter_is_in_exactly_one_fsdp_group(ranks: RankPool) -> None:
    held = ranks.run(4, groups_per_parameter)[0]
    assert set(held.values()) == {1}


class _Order(TorchDispatchMode):
    """Names of the collectives, in the order in which they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def order_of_forward() -> list[str]:
    model = build(8, torch.float32, MoEConfig(dispatcher="alltoall"))
    parallelize(model, ParallelDims(4, ep=2).build_mesh("cpu"))
    with _Order() as order:
        model(batch()[0].float())
    return order.names


def test_a_block_gathers_the_next_one_and_its_experts_before_it_waits_for_tokens(ranks: RankPool) -> None:
    names = ranks.run(4, order_of_forward)[0]
    gathers = [index for index, name in enumerate(names) if name == "_allgather_base_"]
    # The model's own, two blocks' dense parameters and experts.
    assert len(gathers) == 5
    assert gathers[-1] < names.index("all_to_all_single")


def collectives_of_a_step(by_hand: bool) -> list[str]:
    """Names of the collectives of a step with `parallelize` and `GradientManager`, or with the least that does."""
    meshes = ParallelDims(4, ep=2).build_mesh("cpu")
    model = build(8, torch.float32, MoEConfig())
    if by_hand:
        apply_fsdp(apply_ep(model, meshes), meshes)
    else:
        parallelize(model, meshes)
    manager = None if by_hand else GradientManager(model, meshes)
    x, labels = batch()
    with _Order() as order:
        if manager is not None:
            manager.before_backward(is_last=True)
        loss_of(model(x.float()), labels, 10).backward()
        if manager is None:
            clip_grad_norm_(model.parameters(), 1.0)
        else:
            manager.clip(1.0)
    return order.names


def test_what_other_layouts_need_costs_nothing_where_they_are_not(ranks: RankPool) -> None:
    by_hand, whole = (ranks.run(4, collectives_of_a_step, choice)[0] for choice in (True, False))
    assert by_hand == whole


def time_outs() -> list[float]:
    mesh = ParallelDims(4, ep=2).build_mesh("cpu", timedelta(seconds=33))
    parallelize(build(8, torch.float32, MoEConfig()), mesh)
    backends = [mesh[name].get_group()._get_backend(torch.device("cpu")) for name in ("ep", "ep_shard")]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_the_mesh_keeps_the_time_out_that_it_is_given(ranks: RankPool) -> None:
    assert ranks.run(4, time_outs)[0] == [33.0, 33.0]


def _drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return F.dropout(output, 0.5)


def dropout(mode: Any) -> float:
    torch.manual_seed(dist.get_rank())
    model = build(8, torch.float64, MoEConfig(experts="eager"))
    for block in model.layers:
        block.register_forward_hook(_drop)
    parallelize(model, ParallelDims(2, ep=2).build_mesh("cpu"), activation_checkpoint=ActivationCheckpointConfig(mode))
    x, labels = batch()
    torch.manual_seed(7)
    loss_of(model(x), labels, 10).backward()
    return global_grad_norm(model.parameters()).item()


def test_recompute_draws_the_same_random_numbers(ranks: RankPool) -> None:
    plain, full, selective = (ranks.run(2, dropout, mode)[0] for mode in ("none", "full", "selective"))
    assert full == pytest.approx(plain, rel=1e-12)
    assert selective == pytest.approx(plain, rel=1e-12)


class Nested(Classifier):
    """Blocks as lists of their parts, as some models have them."""

    def __init__(self, num_experts: int, config: MoEConfig) -> None:
        super().__init__(num_experts, config)
        self.layers = nn.ModuleList([nn.ModuleList([block]) for block in self.layers])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            x = layer[0](x)
        return self.head(x)


def nested() -> bool:
    model = parallelize(
        Nested(8, MoEConfig()),
        ParallelDims(2, ep=2).build_mesh("cpu"),
        activation_checkpoint=ActivationCheckpointConfig("full"),
    )
    x, labels = batch()
    loss_of(model(x.float()), labels, 10).backward()
    return all(parameter.grad is not None for parameter in model.parameters())


def test_blocks_in_nested_lists_are_found(ranks: RankPool) -> None:
    assert ranks.run(2, nested) == [True, True]


def test_clipping_without_gradients_is_a_norm_of_zero() -> None:
    assert clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0) == 0


@pytest.mark.parametrize("experts", ["cpu", "eager", "grouped_mm"])
def test_autocast_computes_experts_in_its_dtype(experts: Any) -> None:
    model = build(8, torch.float32, MoEConfig(experts=experts))
    x = batch()[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert relative(output.float().detach().numpy(), model(x).detach().numpy()) < 3e-2
    output.float().sum().backward()
    assert all(p.grad is not None for layer in moe_layers(model).values() for p in layer.experts.parameters())
