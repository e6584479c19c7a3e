"""Counting: how many routes each logical expert received, on the device, without a host sync; what the counts say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "CollapseMonitor",
    "LoadCounter",
    "LoadStatistics",
    "Observed",
    "StepLoad",
    "is_recompute",
    "load_statistics",
    "reduce_load",
]


# The number of the backward pass that is at work, where there is none.
_NO_BACKWARD = -1


class Observed(NamedTuple):
    """Of one forward pass: `routes [E]` per logical expert, scalars `tokens` (unpadded) and `dropped` routes; int64."""

    routes: Tensor
    tokens: Tensor
    dropped: Tensor


class StepLoad(NamedTuple):
    """Of a step over the whole global batch: `routes [L, E]` per layer and logical expert, `dropped [L]`; int64.

    `computed [L]` is this rank's own: routes of any rank's tokens that it has computed.
    """

    routes: Tensor
    dropped: Tensor
    computed: Tensor


def is_recompute() -> bool:
    """Whether this forward pass is one that a backward pass runs again (non-reentrant activation checkpointing)."""
    return torch._C._current_graph_task_id() != _NO_BACKWARD


class LoadCounter(nn.Module):
    """Counts of one layer since the last `reset`.

    A forward pass in training mode, under grad mode, is training, and is counted in its backward pass
    (`losses.attach_losses`); all others are evaluation, counted there and then, into a counter of its own that the
    expert bias never sees. Recompute counts neither again. What this rank computes, of any rank's tokens, is counted in
    the forward pass of training.
    """

    tokens_per_expert: Tensor
    tokens: Tensor
    dropped: Tensor
    computed: Tensor
    evaluation_tokens_per_expert: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        for name in ("tokens_per_expert", "evaluation_tokens_per_expert"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        for name in ("tokens", "dropped", "computed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=False)
        self.losses: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget what training counted."""
        for counts in (self.tokens_per_expert, self.tokens, self.dropped, self.computed):
            counts.zero_()
        self.losses = {}

    def reset_evaluation(self) -> None:
        """Forget what evaluation counted."""
        self.evaluation_tokens_per_expert.zero_()

    @torch.no_grad()
    def record(self, observed: Observed, losses: dict[str, Tensor]) -> None:
        """Add what a micro-batch `observed`, and its loss values (scalars)."""
        self.tokens_per_expert += observed.routes
        self.tokens += observed.tokens
        self.dropped += observed.dropped
        for name, loss in losses.items():
            self.losses[name] = self.losses[name] + loss if name in self.losses else loss

    @torch.no_grad()
    def record_computed(self, slot_ids: Tensor) -> None:
        """Add the routes of `slot_ids`, `-1` for none, that this rank computes in training; not in recompute."""
        self.computed += (slot_ids >= 0).sum()

    @torch.no_grad()
    def record_evaluation(self, routes: Tensor) -> None:
        """Add `routes` `[E]` of a forward pass of evaluation."""
        if not is_recompute():
            self.evaluation_tokens_per_expert += routes


def reduce_load(counters: Sequence[LoadCounter], group: dist.ProcessGroup | None) -> StepLoad:
    """What training counted in all layers, summed over the ranks that see different data. One collective.

    Args:
        counters: one per layer, all with the same number of experts.
        group: the data-parallel ranks; `None` for this rank alone.
    """
    counts = torch.stack([torch.cat([counter.tokens_per_expert, counter.dropped[None]]) for counter in counters])
    if group is not None:
        dist.all_reduce(counts, group=group)
    computed = torch.stack([counter.computed for counter in counters])
    return StepLoad(counts[:, :-1], counts[:, -1], computed)


class LoadStatistics(NamedTuple):
    """How even a load is, each `[L]` float64, on the device of the counts.

    Attributes:
        max_mean: the busiest expert's load over the mean; 1 is perfect balance, 0 means no tokens.
        variation: standard deviation over the mean (coefficient of variation); 0 is perfect balance.
        entropy: of the shares, over `log E`: 1 is perfect balance, 0 a single expert.
        dead: experts without a route.
    """

    max_mean: Tensor
    variation: Tensor
    entropy: Tensor
    dead: Tensor


def load_statistics(routes: Tensor) -> LoadStatistics:
    """Statistics of `routes` `[L, E]`, counts or averages of counts."""
    routes = routes.double()
    mean = routes.mean(dim=-1).clamp_min(1e-12)
    shares = routes / routes.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    entropy = torch.special.entr(shares).sum(dim=-1) / max(torch.tensor(float(routes.shape[-1])).log().item(), 1e-12)
    return LoadStatistics(
        routes.amax(dim=-1) / mean,
        routes.std(dim=-1, correction=0) / mean,
        entropy,
        (routes == 0).sum(dim=-1).double(),
    )


class CollapseMonitor:
    """Watches a moving average of the loads for layers whose router sends nearly all tokens to few experts.

    A layer has collapsed when, for `patience` steps in a row, `few = max(K, E // 8)` experts or less hold `share` of
    the average's routes. It is named once, with as many of them as it takes, and again only after it has recovered.

    Args:
        layers: their names, `L` of them.
        top_k: `K`.
        decay: of the moving average, per step.
        share: of a layer's routes.
        patience: steps.

    Attributes:
        average: `[L, E]` float64, the moving average of each layer's shares; `None` before the first step.
    """

    def __init__(
        self, layers: Sequence[str], top_k: int, *, decay: float = 0.9, share: float = 0.9, patience: int = 50
    ) -> None:
        self.layers, self.top_k = list(layers), top_k
        self.decay, self.share, self.patience = decay, share, patience
        self.average: Tensor | None = None
        self._steps_in_a_row = [0] * len(self.layers)

    def update(self, routes: Tensor) -> list[str]:
        """Take in a step's `routes` `[L, E]`, on the host; returns a message per layer that has now collapsed."""
        shares = routes.double() / routes.sum(dim=-1, keepdim=True).clamp_min(1)
        average = shares if self.average is None else self.decay * self.average + (1 - self.decay) * shares
        self.average = average
        num_experts = routes.shape[-1]
        few = max(self.top_k, num_experts // 8)
        if few > num_experts // 2:
            return []
        largest = average.topk(few, dim=-1)
        held = largest.values.cumsum(-1).tolist()
        messages = []
        for layer in range(len(self.layers)):
            # A share that is met but for the rounding of sums is met.
            hot = next((count for count, share in enumerate(held[layer], start=1) if share >= self.share - 1e-9), 0)
            self._steps_in_a_row[layer] = self._steps_in_a_row[layer] + 1 if hot else 0
            if self._steps_in_a_row[layer] == self.patience:
                named = ", ".join(map(str, largest.indices[layer, :hot].sort().values.tolist()))
                messages.append(
                    f"the router of {self.layers[layer]} has collapsed: experts {named} of {num_experts} took "
                    f"{held[layer][hot - 1]:.0%} of its routes for {self.patience} steps. Raise an auxiliary loss "
                    "(moe.sequence_aux_loss_coeff), set moe.expert_bias, or lower optimizer.lr"
                )
        return messages
