"""The stages of a pipeline, run over micro-batches by torch's schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from crossdock.parallel.gradients import GradientManager
from crossdock.parallel.mesh import Meshes, PipelineSchedule
from crossdock.parallel.stages import Stages, stages_of

__all__ = ["Boundary", "Pipeline", "check_microbatches"]

_SCHEDULES: dict[PipelineSchedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Boundary(NamedTuple):
    """What one stage hands to the next for a micro-batch.

    Attributes:
        shape: `[B, S', H]`, with `S'` the positions that a rank has between blocks: `S / cp`, and with sequence
            parallelism `S / (cp tp)`.
        dtype: in which blocks compute.
        device: of this rank.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def empty(self, *, requires_grad: bool = False) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device, requires_grad=requires_grad)


class Pipeline:
    """A step's micro-batches through the stages of a model; collective among all its ranks.

    FSDP gathers a stage's parameters once per step and reduces their gradients once, after the last micro-batch.

    Args:
        model: that `parallelize` or `apply_pp` has cut, on its layout.
        meshes: of the layout.
        gradients: of the model.
        compute: `compute(model, **inputs)`, the last stage's loss of a micro-batch, to be summed; it calls the model
            once, and where that returns no logits but what a stage hands on, returns that.
        boundary: what stages hand on.
        schedule: GPipe (arXiv 1811.06965), 1F1B and its interleaved form (arXiv 2104.04473), zero bubble and its V form
            (arXiv 2401.10241).
        num_microbatches: in each step.
        reshards: free gathered parameters after each pass, and gather them with each micro-batch, for memory; not where
            the schedule takes the backward pass in two.

    Raises:
        ValueError: for a number of micro-batches that the schedule cannot do.
    """

    def __init__(
        self,
        model: nn.Module,
        meshes: Meshes,
        gradients: GradientManager,
        compute: Callable[..., Tensor],
        boundary: Boundary,
        *,
        schedule: PipelineSchedule = "1f1b",
        num_microbatches: int,
        reshards: bool = False,
    ) -> None:
        stages = stages_of(model)
        if stages is None:
            raise ValueError("the model is whole; apply_pp cuts it into stages")
        self._stages, self._gradients, self._boundary = stages, gradients, boundary
        self._group = meshes["pp"].get_group()
        self._parts = {index: _Stage(model, stages, index, compute) for index in stages.own}
        self._scale = 1.0
        check_microbatches(schedule, num_microbatches, len(stages.blocks), self._group.size())
        made = [
            PipelineStage(
                part,
                index,
                len(stages.blocks),
                boundary.device,
                # Without these, torch would run the model once more to see them.
                input_args=self._example(index - 1),
                output_args=self._example(index),
                group=self._group,
            )
            for index, part in self._parts.items()
        ]
        single = schedule in ("gpipe", "1f1b")
        self._schedule = _SCHEDULES[schedule](
            made[0] if single else made,
            num_microbatches,
            loss_fn=lambda loss, _: loss * self._scale,
            scale_grads=False,
        )
        self._reshards = reshards
        gradients.hold(reshards=reshards)

    def step(self, batches: Sequence[Mapping[str, Tensor]], scale: float = 1.0) -> Tensor:
        """Forward and backward passes of a step, and the reduction of its gradients.

        Args:
            batches: `inputs` of `compute` for each micro-batch, all of one shape, with `input_ids` `[B, S]`: on every
                stage the same.
            scale: of the loss that is differentiated.

        Returns:
            The scaled loss, summed over micro-batches; 0 on ranks without the last stage.
        """
        self._scale = scale
        whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        losses: list[Tensor] = []
        first = (whole["input_ids"],) if self._stages.has_first else ()
        try:
            self._schedule.step(*first, target=whole["input_ids"], losses=losses, return_outputs=False, **whole)
        except RuntimeError as error:
            # torch says what was being done around why it failed.
            raise (error.__cause__ or error) from None
        self._gradients.reduce()
        self._gradients.hold(reshards=self._reshards)
        total = torch.zeros((), dtype=torch.float64, device=self._boundary.device)
        return total + sum(loss.detach() for loss in losses)

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of a micro-batch, of any number of rows; 0 on ranks without the last stage."""
        rows = len(inputs["input_ids"])
        shape = (rows, *self._boundary.shape[1:])
        last = len(self._stages.blocks) - 1
        result = torch.zeros((), device=self._boundary.device)
        handed: Tensor | None = None
        for index, part in self._parts.items():
            if index and self._is_elsewhere(index - 1):
                handed = self._boundary._replace(shape=shape).empty()
                dist.recv(handed, group=self._group, group_src=self._stages.places[index - 1])
            output = part(handed, **inputs)
            if index == last:
                result = output
            elif self._is_elsewhere(index + 1):
                dist.send(output.contiguous(), group=self._group, group_dst=self._stages.places[index + 1])
            handed = output
        return result

    def _is_elsewhere(self, index: int) -> bool:
        return index not in self._parts

    def _example(self, index: int) -> Tensor:
        """What stage `index` gives; -1 gives tokens."""
        batch = self._boundary
        if index < 0:
            return torch.empty(batch.shape[:2], dtype=torch.int64, device="meta")
        if index == len(self._stages.blocks) - 1:
            return torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        return batch._replace(device=torch.device("meta")).empty(requires_grad=True)


class _Stage(nn.Module):
    """One stage of a model, as torch's schedules call it; its parameters are the stage's."""

    def __init__(self, model: nn.Module, stages: Stages, index: int, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self._call = lambda **inputs: compute(model, **inputs)
        self._stages, self._index = stages, index
        self.modules_of_stage = nn.ModuleList(stages.modules_of(model, index))

    def forward(self, given: Tensor | None = None, **inputs: Any) -> Tensor:
        """`given` is what the stage before has handed on, `[B, S', H]`; to the first stage its tokens, or nothing."""
        with self._stages.running(self._index, given if self._index else None):
            return self._call(**inputs)


def check_microbatches(schedule: PipelineSchedule, num_microbatches: int, num_stages: int, num_ranks: int) -> None:
    """Refuse what a schedule cannot do.

    Raises:
        ValueError: with what it can.
    """
    if schedule == "1f1b" and num_microbatches < num_stages:
        raise ValueError(f"{num_microbatches} micro-batches; 1f1b needs at least {num_stages}, the stages")
    rounds = max(1, num_microbatches // num_ranks)
    if schedule in ("interleaved_1f1b", "zero_bubble") and num_microbatches % rounds:
        raise ValueError(f"{num_microbatches} micro-batches; {schedule} needs a multiple of {num_ranks}, the ranks")
