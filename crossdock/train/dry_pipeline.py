"""The passes of one rank of a pipeline in a dry run: in the order of the schedule, without the ranks beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from crossdock.config import Config
from crossdock.models import batch_loss
from crossdock.parallel import GradientManager, Meshes, ParallelDims, stages_of
from crossdock.tools.plan import StepCounter

__all__ = ["pipeline_order", "pipeline_pass"]


class _Pass(NamedTuple):
    """Of micro-batch `batch` in this rank's stage number `chunk`."""

    forward: bool
    chunk: int
    batch: int


def pipeline_order(schedule: str, place: int, size: int, chunks: int, batches: int) -> list[_Pass]:
    """The passes of the rank at `place` of `size`, with so many stages of its own.

    Raises:
        ValueError: for a schedule that takes the backward pass in two, of which there is no dry run.
    """
    forward = _virtual(size, chunks, batches)
    if schedule == "gpipe":
        warm = len(forward)
    elif schedule == "1f1b":
        warm = min(batches, size - place)
    elif schedule == "interleaved_1f1b":
        warm = min(len(forward), 2 * (size - place - 1) + (chunks - 1) * size + 1)
    else:
        raise ValueError(f"there is no dry run of the schedule {schedule}")
    ahead = [_Pass(True, chunk, batch) for chunk, batch in forward]
    back = [_Pass(False, chunks - 1 - chunk, batch) for chunk, batch in forward]
    order = ahead[:warm]
    for index, step in enumerate(back):
        order.append(step)
        order += ahead[warm + index : warm + index + 1]
    return order


def _virtual(size: int, chunks: int, batches: int) -> list[tuple[int, int]]:
    """(stage of the rank, micro-batch): rounds of as many micro-batches as ranks through one stage after another."""
    rounds = max(1, batches // size) if chunks > 1 else batches
    per_round = batches // rounds
    return [
        (chunk, first + batch)
        for first in range(0, batches, per_round)
        for chunk in range(chunks)
        for batch in range(min(per_round, batches - first))
    ]


def pipeline_pass(
    counter: StepCounter,
    config: Config,
    dims: ParallelDims,
    model: PreTrainedModel,
    meshes: Meshes,
    gradients: GradientManager,
    batches: Sequence[Mapping[str, Tensor]],
    scale: float,
) -> None:
    """Forward and backward passes of a step, and the reduction of its gradients."""
    stages = stages_of(model)
    assert stages is not None
    parallelism, group = config.parallelism, meshes["pp"].get_group()
    place, last = meshes["pp"].get_local_rank(), len(stages.blocks) - 1
    gradients.hold(reshards=parallelism.reshards)
    positions = batches[0]["input_ids"].shape[1] // (dims.tp if parallelism.sequence_parallel else 1)
    shape = (config.training.local_batch_size, positions, model.config.get_text_config().hidden_size)
    dtype = getattr(torch, config.training.dtype)

    def buffers(needs_grad: bool) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, requires_grad=needs_grad) for _ in batches]

    # As torch's stages: a buffer for every micro-batch, as long as the run lasts.
    given = {c: buffers(True) for c, stage in enumerate(stages.own) if stage > 0}
    returned = {c: buffers(False) for c, stage in enumerate(stages.own) if stage < last}
    kept: dict[tuple[int, int], Tensor] = {}
    order = pipeline_order(parallelism.pipeline_parallel_schedule, place, dims.pp, len(stages.own), len(batches))
    for is_forward, chunk, batch in order:
        stage, key = stages.own[chunk], (chunk, batch)
        if is_forward:
            counter.enter("forward")
            received = given[chunk][batch].detach().requires_grad_() if stage > 0 else None
            with stages.running(stage, received):
                output = batch_loss(model, **batches[batch])
            kept[key] = output * scale if stage == last else output
            if received is not None:
                given[chunk][batch] = received
            if stage < last:
                dist.send(output.detach(), group=group, group_dst=stages.places[stage + 1])
            del output
        else:
            counter.enter("backward")
            output = kept.pop(key)
            output.backward(None if stage == last else returned[chunk][batch])
            if stage > 0:
                gradient = given[chunk][batch].grad
                assert gradient is not None
                dist.send(gradient, group=group, group_dst=stages.places[stage - 1])
                given[chunk][batch].grad = None
            del output
    counter.enter("reduce")
    gradients.reduce()
    gradients.hold(reshards=parallelism.reshards)
