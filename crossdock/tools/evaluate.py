"""The loss of a model on text that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from crossdock.data import IGNORED_LABEL, Batch
from crossdock.models import batch_loss
from crossdock.moe import moe_layers

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """The mean cross entropy over all `targets` tokens, in nats."""

    loss: float
    targets: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that is beyond a float."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """The loss over all ranks' batches, the same on all ranks. Collective.

    The model is left in the mode it was in, and what its layers counted of the evaluation is forgotten.

    Args:
        model: from `build_model`, on any layout.
        batches: of this rank; all ranks have the same number.
        device: of this rank.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        totals[0] += batch_loss(model, **batch.inputs(device))
        totals[1] += int((batch.labels != IGNORED_LABEL).sum())
    dist.all_reduce(totals)
    model.train(was_training)
    for layer in moe_layers(model).values():
        layer.load.reset_evaluation()
    loss, targets = totals.tolist()
    return Evaluation(loss / targets if targets else math.nan, int(targets))
