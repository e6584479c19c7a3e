"""Loading through torch's distributed checkpoint without what it would load or leave out silently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from crossdock.checkpoint.folders import CheckpointError, in_short

__all__ = ["StrictLoadPlanner"]


class StrictLoadPlanner(DefaultLoadPlanner):
    """Refuses what torch's reader would load or leave out silently.

    That is: tensors that the checkpoint lacks, wholly or in part, those of another shape or dtype, and those that the
    checkpoint has and the run has not.

    Args:
        expected: names that there must be.
        elsewhere: names that other ranks may expect.
        ignored: how names begin that the checkpoint may have and the run not.
    """

    def __init__(self, expected: set[str], elsewhere: set[str], ignored: tuple[str, ...]) -> None:
        super().__init__()
        self.expected = expected
        self.elsewhere = elsewhere
        self.ignored = ignored

    def create_local_plan(self) -> LoadPlan:
        metadata = self.metadata
        assert isinstance(metadata, Metadata)
        assert self.state_dict is not None
        stored = metadata.state_dict_metadata
        missing = (self.expected | self.state_dict.keys()) - stored.keys()
        unknown = stored.keys() - self.expected - self.elsewhere
        foreign = {name for name in unknown if not name.startswith(self.ignored)}
        problems = {name: _mismatch(stored[name], self.state_dict[name]) for name in self.state_dict.keys() - missing}
        wrong = [f"{name} is missing" for name in sorted(missing)]
        wrong += [f"{name} {problem}" for name, problem in sorted(problems.items()) if problem]
        wrong += [f"{name} is in the checkpoint, but not in this run" for name in sorted(foreign)]
        if wrong:
            raise CheckpointError(in_short(wrong))
        return super().create_local_plan()


def _mismatch(stored: Any, tensor: Tensor) -> str | None:
    assert isinstance(stored, TensorStorageMetadata)
    held = sum(torch.Size(chunk.sizes).numel() for chunk in stored.chunks)
    if stored.size != tensor.shape or held != tensor.numel():
        return f"holds {held} values of shape {tuple(stored.size)}, not {tensor.numel()} of {tuple(tensor.shape)}"
    if stored.properties.dtype != tensor.dtype:
        return f"is {stored.properties.dtype}, not {tensor.dtype}"
    return None
