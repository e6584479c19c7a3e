"""How many routes each expert has."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_experts"]


def count_experts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Routes per expert `[..., E]` int64 of `expert_ids` `[..., T, K]`; `-1` is not counted."""
    experts = torch.where(expert_ids < 0, num_experts, expert_ids).flatten(-2)
    counts = experts.new_zeros(*experts.shape[:-1], num_experts + 1)
    return counts.scatter_add_(-1, experts, torch.ones_like(experts))[..., :num_experts]
