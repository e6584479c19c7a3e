"""Gradient norm and clipping over parameters that live on different meshes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from crossdock.experts import ranks_apart

__all__ = ["clip_grad_norm_", "global_grad_norm"]


@torch.no_grad()
def global_grad_norm(
    parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None, *, stages: int = 1
) -> Tensor:
    """The 2-norm of all gradients of the model, each element counted once: the same bits on every rank.

    A DTensor's elements live on the ranks of its `Shard` dimensions, an unpacked expert's on one expert-parallel rank;
    those that other ranks of `group` hold as well (a `Replicate` dimension, a plain tensor) count by one over the
    number of holders on each.

    Args:
        parameters: of the whole model on this rank.
        group: all ranks that hold a part of the model; the default group if there is one.
        stages: of a pipeline, over which these ranks are spread evenly.

    Returns:
        fp64 scalar on the parameters' device. Collective: one all-gather of a scalar.
    """
    world_size = dist.get_world_size(group) if dist.is_initialized() else 1
    parameters = list(parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    holders = world_size // stages
    squares = [
        torch.linalg.vector_norm(_local(parameter.grad), dtype=torch.float64).square() / _holders(parameter, holders)
        for parameter in parameters
        if parameter.grad is not None
    ]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    if world_size == 1:
        return total.sqrt()
    # Gathered, then summed in rank order: an all-reduce need not give all ranks the same last bit.
    totals = [torch.empty_like(total) for _ in range(world_size)]
    dist.all_gather(totals, total, group=group)
    return torch.stack(totals).sum().sqrt()


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    group: dist.ProcessGroup | None = None,
    *,
    stages: int = 1,
) -> Tensor:
    """Scale all gradients to a global norm of at most `max_norm`; returns the norm before (`global_grad_norm`)."""
    parameters = list(parameters)
    norm = global_grad_norm(parameters, group, stages=stages)
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _holders(parameter: nn.Parameter, stage_size: int) -> int:
    """How many ranks of a stage hold each element of a parameter, whose gradient is laid out as it is."""
    distinct = ranks_apart(parameter)
    tensor: Tensor = parameter
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            distinct *= 1 if isinstance(placement, Replicate) else size
    return stage_size // distinct
