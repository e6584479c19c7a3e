"""The loss of a model on text that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from crossdock.data import IGNORED_LABEL, Batch
from crossdock.models import batch_loss
from crossdock.moe import load_counters
from crossdock.routing import load_statistics

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """The mean cross entropy over all `targets` tokens, in nats.

    `max_mean_load` is the busiest expert's number of routes over the mean, of the layer where that is worst.
    """

    loss: float
    targets: int
    max_mean_load: float

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that is beyond a float."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    counts: bool = True,
    loss_of: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> Evaluation:
    """The loss over all ranks' batches, the same on all ranks. Collective.

    The model is left in the mode it was in, and what its layers counted of the evaluation is forgotten, before and
    after.

    Args:
        model: from `build_model`, on any layout.
        batches: of this rank; all ranks have the same number.
        device: of this rank.
        counts: whether this rank counts its targets, which other ranks of `tp` and `pp` have as well.
        loss_of: gives this rank's share of a batch's summed loss; `batch_loss` of the model if `None`.
    """
    was_training = model.training
    model.eval()
    counters = load_counters(model)
    for counter in counters:
        counter.reset_evaluation()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        inputs = batch.inputs(device)
        totals[0] += batch_loss(model, **inputs) if loss_of is None else loss_of(inputs)
        totals[1] += counts * int((batch.labels != IGNORED_LABEL).sum())
    routes = torch.stack([counter.evaluation_tokens_per_expert for counter in counters])
    for sums in (totals, routes):
        dist.all_reduce(sums)
    model.train(was_training)
    for counter in counters:
        counter.reset_evaluation()
    loss, targets = totals.tolist()
    max_mean_load = load_statistics(routes).max_mean.max().item()
    return Evaluation(loss / targets if targets else math.nan, int(targets), max_mean_load)
