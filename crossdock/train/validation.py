"""The loss on the validation set, in the midst of a run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from crossdock.config import Config
from crossdock.data import Batch, TokenFile, evaluation_batches
from crossdock.parallel import Pipeline, Reader
from crossdock.tools.evaluate import evaluate
from crossdock.train.together import together

__all__ = ["validation_loss"]


def validation_loss(
    model: PreTrainedModel,
    tokens: Sequence[TokenFile],
    config: Config,
    reader: Reader,
    device: torch.device,
    pipeline: Pipeline | None,
) -> float | None:
    """Mean loss over the validation set; `None` where it is not finite. Collective, the same on all ranks.

    Args:
        model: this rank's part.
        tokens: to validate with.
        config: of the run.
        reader: what this rank reads of the data.
        device: of this rank.
        pipeline: of the run, where it has one.

    Raises:
        DataError: on all ranks, for tokens that cannot be read.
    """
    batches = partial(
        evaluation_batches,
        tokens,
        seq_len=config.training.seq_len,
        local_batch_size=config.training.local_batch_size,
        dp_rank=reader.rank,
        dp_degree=reader.degree,
        packing=config.data.row_packing,
        attend_within_documents=config.data.within_documents,
        max_samples=config.validation.max_samples or None,
    )

    def section(batch: Batch) -> Batch:
        return batch.section(reader.section, reader.sections)

    # Read once for what may be wrong with them: in the midst of it, the other ranks would wait for this one.
    together(lambda: deque(batches(), maxlen=0))
    loss = evaluate(
        model,
        map(section, batches()),
        device,
        counts=reader.counts_section,
        loss_of=None if pipeline is None else pipeline.evaluate,
    ).loss
    return loss if math.isfinite(loss) else None
