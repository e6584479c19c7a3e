"""Expert bias: balance without an auxiliary loss (docs/semantics.md, "Losses and bias"; arXiv 2408.15664)."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.routing.router import Router

__all__ = ["update_expert_bias"]


@torch.no_grad()
def update_expert_bias(routers: list[Router], counts: Tensor, rate: float) -> None:
    """After an optimizer step: `b += rate * sign(mean(n) - n)`, then centred. Routers without a bias are left alone.

    Args:
        routers: one per layer.
        counts: `[L, E]` routes per expert over the whole global batch, the same on all ranks.
        rate: step of the bias.
    """
    for router, layer_counts in zip(routers, counts, strict=True):
        if router.expert_bias is None:
            continue
        # E * n against the sum keeps the comparison with the mean in integers, so that every rank agrees on the sign.
        direction = torch.sign(layer_counts.sum() - len(layer_counts) * layer_counts)
        router.expert_bias += rate * direction.to(router.expert_bias.dtype)
        router.expert_bias -= router.expert_bias.mean()
