"""The language model's head, which computes the loss where the logits are not wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.data import IGNORED_LABEL
from crossdock.models.norm import Kernels
from crossdock.parallel import VocabularyHead, local_part, stages_of

__all__ = ["LossHead", "batch_loss", "token_loss"]


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of `logits` `[..., V]` at `labels` `[...]`, `-100` left out; in at least fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def batch_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    """Sum of the cross entropies of a model with a `LossHead`; differentiable.

    Of a model that is cut into pipeline stages, what the stage that runs hands on, unless it is the last.

    Args:
        model: from `build_model`; without a `LossHead`, the loss is that of its logits.
        input_ids: `[B, S]`.
        labels: `[B, S]`, the token after each; -100 is left out.
        inputs: for the model, such as `position_ids` `[B, S]` and `padding_mask` `[B, S]`.
    """
    head = next((module for module in model.modules() if isinstance(module, LossHead)), None)
    with nullcontext() if head is None else head.losses(labels):
        output = model(input_ids=input_ids, use_cache=False, **inputs).logits
    stages = stages_of(model)
    gives_logits = head is None and (stages is None or stages.runs_last)
    return token_loss(output, labels) if gives_logits else output


class LossHead(VocabularyHead):
    """An output projection without bias that gives logits, or, within `losses(labels)`, the loss in their place.

    Args:
        head: gives its weight `[V, H]`, under the same name.
        kernels: `liger` never makes the logits of a whole micro-batch (Liger's fused linear cross entropy).
    """

    def __init__(self, head: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        assert head.bias is None
        self.weight = head.weight
        self.kernels = kernels
        self._labels: Tensor | None = None

    @contextmanager
    def losses(self, labels: Tensor) -> Iterator[None]:
        """Within it, `forward` returns the sum of the cross entropies at `labels` `[B, S]`, a scalar; -100 left out."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden [..., H]` to logits `[..., V]`, or the loss; of a split head, this rank's share of that."""
        if self.split is not None:
            logits = F.linear(self.split.enter(hidden), local_part(self.weight))
            if self._labels is None:
                return self.split.join(logits)
            return self.split.loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), self._labels)
        if self._labels is None:
            return F.linear(hidden, self.weight)
        if self.kernels == "liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

            loss = LigerFusedLinearCrossEntropyLoss(
                ignore_index=IGNORED_LABEL, reduction="sum", accum_dtype=torch.float32
            )
            return loss(self.weight, hidden.flatten(0, -2), self._labels.flatten())
        return token_loss(F.linear(hidden, self.weight), self._labels)
