"""torch.compile of models with MoE layers: nothing is compiled anew step by step, and numbers are those of eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from crossdock import MoEConfig, moe_layers
from crossdock.parallel import CompileConfig, ParallelDims, apply_compile, apply_ep
from tests.parallel.test_gradients import Classifier, batch, build, loss_of
from tests.ranks import RankPool

# Tokens per sequence: from the second length on, sizes are symbols.
LENGTHS = (6, 5, 4, 6, 3, 5)
WARM_UP = 2


def _step(model: nn.Module, length: int) -> dict[str, Tensor]:
    """The loss and all gradients of this rank's sequences, and a step of descent, which moves the routing."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x, labels = (tensor[rank::world_size, :length] for tensor in batch())
    loss = loss_of(model(x.float()), labels, 10)
    model.zero_grad()
    loss.backward()
    results = {"loss": loss.detach()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            assert grad is not None
            results[name] = (grad.to_local() if isinstance(grad, DTensor) else grad).clone()
            parameter -= 0.1 * grad
    return results


def _build(experts: Any) -> Classifier:
    world_size = dist.get_world_size()
    model = build(9, torch.float32, MoEConfig(experts=experts, overlap_chunks=2, sequence_aux_loss_coeff=0.1))
    apply_ep(model, ParallelDims(world_size, ep=world_size).build_mesh("cpu"))
    return model


def _compare(how: str, experts: str) -> tuple[float, int, bool]:
    """The largest norm-relative difference from eager; graphs of the whole; whether the routing moved."""
    eager, compiled = _build(experts), _build(experts)
    torch._dynamo.reset()
    counters.clear()
    if how == "model":
        compiled.compile(backend="aot_eager")
    else:
        apply_compile(compiled, CompileConfig(enable=True, backend="aot_eager"))
    errors, loads, graphs = [], [], 0
    for step, length in enumerate(LENGTHS):
        with torch._dynamo.config.patch(error_on_recompile=step >= WARM_UP):  # type: ignore[attr-defined]
            ours = _step(compiled, length)
        theirs = _step(eager, length)
        errors += [float((ours[name] - value).norm() / value.norm().clamp_min(1e-9)) for name, value in theirs.items()]
        if step == WARM_UP - 1:
            graphs = counters["stats"]["unique_graphs"]
        loads.append([layer.load.tokens_per_expert.tolist() for layer in moe_layers(compiled).values()])
        for layer in moe_layers(compiled).values():
            layer.load.reset()
    assert counters["stats"]["unique_graphs"] == graphs, "compiled anew after the first steps"
    return max(errors), graphs, loads[LENGTHS.index(5)] != loads[-1]


@pytest.mark.parametrize(("how", "experts"), [("model", "grouped_mm"), ("model", "cpu"), ("blocks", "grouped_mm")])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nothing_is_compiled_anew_and_numbers_are_those_of_eager(
    ranks: RankPool, num_ranks: int, how: str, experts: str
) -> None:
    """Between the two MoE layers and around them: three pieces, for the first length and for any."""
    for error, graphs, moved in ranks.run(num_ranks, _compare, how, experts):
        assert error <= 1e-5
        assert 0 < graphs <= 2 * 3
        assert moved, "all steps had the same routes"
