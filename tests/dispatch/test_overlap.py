"""Exchanges run beside other work, and selective recompute repeats none."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from crossdock import MoE, MoEConfig, RouterConfig, apply_ep
from crossdock.dispatch import build_dispatcher
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from tests.dispatch.recorder import Recorder
from tests.ranks import RankPool

H = 6


def _overlap() -> tuple[list[str], list[str]]:
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    dispatcher = build_dispatcher("alltoall", dist.group.WORLD, 2)
    x = torch.randn(5 + rank, H, dtype=torch.float64, requires_grad=True)
    with Recorder("sin", "cos", "sinh", "cosh") as recorder:
        arriving = dispatcher.dispatch(x, torch.randint(0, 4, (len(x), 1)), x.new_full((len(x), 1), 0.5))
        meanwhile = x.sin()
        arrived = arriving.wait()
        returning = dispatcher.combine(arrived.tokens * arrived.weights, arrived.handle)
        later = x.sinh()
        out = returning.wait() + meanwhile + later
        forward = list(recorder.names)
        out.sum().backward()
    return forward, recorder.names[len(forward) :]


def test_other_work_runs_while_tokens_travel_in_both_directions(ranks: RankPool) -> None:
    start, wait = f"all_to_all_single torch.float64 {H}", f"wait torch.float64 {H}"
    for forward, backward in ranks.run(2, _overlap):
        forward = [name for name in forward if name in (start, wait, "sin", "sinh")]
        assert forward == [start, "sin", wait, start, "sinh", wait]
        backward = [name for name in backward if name in (start, wait, "cos", "cosh")]
        assert backward == [start, "cosh", wait, start, "cos", wait]


class _Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.moe = MoE(
            H,
            4,
            RouterConfig(num_experts, 2),
            MoEConfig(experts="eager", sequence_aux_loss_coeff=0.1, z_loss_coeff=0.01, expert_bias=True),
        )
        self.moe.router.reset_parameters(std=1.0)
        self.moe.experts.reset_parameters(std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def _recompute() -> dict[str, dict[str, Any]]:
    """Two MoE layers of 9 experts on 4 ranks; the last rank has no tokens; two micro-batches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    torch.manual_seed(1)
    batches = torch.randn(2, world_size, 5, H, dtype=torch.float64)
    own = batches[:, rank, : 0 if rank == world_size - 1 else 5 - rank]
    results: dict[str, dict[str, Any]] = {}
    for mode in ("none", "full", "selective"):
        torch.manual_seed(0)
        blocks = nn.ModuleList([_Block(9), _Block(9)]).double()
        apply_activation_checkpoint(apply_ep(blocks, mesh), ActivationCheckpointConfig(mode))
        with Recorder() as recorder:
            for batch in own:
                x = batch.clone().requires_grad_()
                out = x
                for block in blocks:
                    out = block(out)
                out.square().sum().backward()
        grads = [parameter.grad for parameter in blocks.parameters()]
        assert all(grad is not None for grad in grads)
        results[mode] = {
            "grads": [(grad.to_local() if isinstance(grad, DTensor) else cast(Tensor, grad)).numpy() for grad in grads],
            "collectives": len(recorder.collectives()),
            "counts": [moe.load.tokens_per_expert.tolist() for moe in blocks.modules() if isinstance(moe, MoE)],
        }
    return results


def test_selective_recompute_repeats_no_exchange_and_counts_once(ranks: RankPool) -> None:
    exchanges = 2 * 2 * (4 + 3)  # layers, micro-batches, forward and backward
    for rank, results in enumerate(ranks.run(4, _recompute)):
        assert results["none"]["collectives"] == exchanges
        assert results["selective"]["collectives"] == exchanges
        assert results["full"]["collectives"] > exchanges, "nothing was recomputed"
        routes = 0 if rank == 3 else 2 * 2 * (5 - rank)
        for mode in ("none", "full", "selective"):
            assert [sum(counts) for counts in results[mode]["counts"]] == [routes, routes]
            assert results[mode]["counts"] == results["none"]["counts"]
            for ours, theirs in zip(results[mode]["grads"], results["none"]["grads"], strict=True):
                np.testing.assert_array_equal(ours, theirs)
