"""The state of an optimizer, before a checkpoint is loaded into it."""

from __future__ import annotations

import torch

__all__ = ["materialise_optimizer_state"]


@torch.no_grad()
def materialise_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state, parameters unchanged: a checkpoint is loaded into it, memory is known early."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
