"""Who writes into the run folder: the first rank, of the first of the replica groups that take part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from crossdock.train.record import RunRecord, lock_folder
from crossdock.train.together import together

__all__ = ["Writing"]


class Writing:
    """The record of a run and the lock of its folder, on the rank that has them; all ranks know whether their group
    does.

    Without groups both are held from the start. Among groups, the one that is the first in a step (`take_turn`) has
    them until another is. Methods are collective among the ranks of a group.

    Args:
        folder: of the run.
        open_record: makes the record, at the step that is done by then.
        among_groups: whether there are some.
        patience: seconds to wait for a group that is about to let go of the folder.

    Attributes:
        is_ours: whether this group is the one that writes.
        record: on its first rank; elsewhere `None`.

    Raises:
        TrainingStopped: on all ranks, where another run holds the folder or it cannot be written.
    """

    def __init__(
        self, folder: Path, open_record: Callable[[], RunRecord], *, among_groups: bool, patience: float
    ) -> None:
        self._folder, self._open_record, self._patience = folder, open_record, patience
        self.is_ours = not among_groups
        self.record: RunRecord | None = None
        self._lock: TextIO | None = None
        if self.is_ours:
            together(lambda: self._take(0.0, None))

    def begin(self) -> None:
        """Open the record of a run without groups."""
        if self.is_ours:
            together(self._open)

    def take_turn(self, is_ours: bool, before_leaving: Callable[[], object]) -> None:
        """From here on this group writes, or does not.

        Args:
            is_ours: whether it does.
            before_leaving: waits for what this group is writing still.
        """
        if is_ours == self.is_ours:
            return
        self.is_ours = is_ours
        if is_ours:
            together(lambda: self._take(self._patience, self._open))
        else:
            before_leaving()
            self.close(report=False)

    def close(self, *, report: bool = True) -> None:
        """Write what is left, and the `report`; let go of the folder. Not collective."""
        if self.record is not None:
            self.record.close(report=report)
            self.record = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take(self, patience: float, then: Callable[[], None] | None) -> None:
        if dist.get_rank() == 0:
            self._lock = lock_folder(self._folder, patience)
            if then is not None:
                then()

    def _open(self) -> None:
        if dist.get_rank() == 0:
            self.record = self._open_record()
