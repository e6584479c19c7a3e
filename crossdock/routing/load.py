"""Counting: how many routes each logical expert received, on the device, without a host sync."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["LoadCounter", "max_mean_load", "reduce_counts"]


class LoadCounter(nn.Module):
    """Counts of one layer since the last `reset`.

    Training counts in the backward pass (`losses.attach_losses`), evaluation in its forward pass into a counter of its
    own, which the expert bias never sees.
    """

    tokens_per_expert: Tensor
    evaluation_tokens_per_expert: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        for name in ("tokens_per_expert", "evaluation_tokens_per_expert"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.losses: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget what training counted."""
        self.tokens_per_expert.zero_()
        self.losses = {}

    def reset_evaluation(self) -> None:
        """Forget what evaluation counted."""
        self.evaluation_tokens_per_expert.zero_()

    @torch.no_grad()
    def record(self, counts: Tensor, losses: dict[str, Tensor]) -> None:
        """Add a micro-batch's `counts` `[E]` and loss values (scalars)."""
        self.tokens_per_expert += counts
        for name, loss in losses.items():
            self.losses[name] = self.losses[name] + loss if name in self.losses else loss

    @torch.no_grad()
    def record_evaluation(self, counts: Tensor) -> None:
        """Add `counts` `[E]` of a forward pass that no backward pass follows."""
        self.evaluation_tokens_per_expert += counts


def reduce_counts(counters: list[LoadCounter], group: dist.ProcessGroup | None) -> Tensor:
    """Training counts `[L, E]` int64 of all layers, summed over the ranks that see different data. One collective.

    Args:
        counters: one per layer, all with the same number of experts.
        group: the data-parallel ranks; `None` for this rank alone.
    """
    counts = torch.stack([counter.tokens_per_expert for counter in counters])
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts


def max_mean_load(counts: Tensor) -> Tensor:
    """The busiest expert's load over the mean, `[L]`, from counts `[L, E]`; 1 is perfect balance, 0 means no tokens."""
    counts = counts.double()
    return counts.max(dim=-1).values / counts.mean(dim=-1).clamp_min(1e-12)
