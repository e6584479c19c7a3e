"""Who writes into the run folder: the first rank, of the first of the replica groups that take part."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from crossdock.train.metrics import say
from crossdock.train.record import RunRecord, lock_folder
from crossdock.train.together import TrainingStopped, from_first_rank, together

__all__ = ["Writing"]

_PATIENCE = 10.0  # Seconds to wait for a group that is about to let go of the folder.


class Writing:
    """The record of a run and the lock of its folder, on the rank that has them; all ranks know whether their group
    does.

    Without groups both are held from the start. Among groups, the one that is the first in a step (`take_turn`) has
    them for that step, and lets go of the folder before the next one (`let_go`): a group that waits for others, or is
    gone, must not keep them from writing. Methods are collective among the ranks of a group.

    Args:
        folder: of the run.
        open_record: makes the record, at the step that is done by then.
        among_groups: whether there are some.

    Attributes:
        is_ours: whether this group is the one that writes.
        record: on its first rank; elsewhere `None`.

    Raises:
        TrainingStopped: on all ranks, where another run holds the folder or it cannot be written.
    """

    def __init__(self, folder: Path, open_record: Callable[[], RunRecord], *, among_groups: bool) -> None:
        self._folder, self._open_record, self._among_groups = folder, open_record, among_groups
        self.is_ours = not among_groups
        self.record: RunRecord | None = None
        self._lock: TextIO | None = None
        self._name = uuid.uuid4().hex
        self._has_told = False
        if self.is_ours:
            together(lambda: self._hold(0.0) if dist.get_rank() == 0 else None)

    def begin(self) -> None:
        """Open the record of a run without groups."""
        if self.is_ours:
            together(self._open)

    def let_go(self, *, is_writing: bool) -> None:
        """Let another group write, unless a checkpoint of this one `is_writing` still. Not collective."""
        if self._among_groups and not is_writing:
            self._release()

    def take_turn(self, is_first: bool, before_leaving: Callable[[], object]) -> None:
        """From here on this group writes, or does not.

        Where another group holds the folder, stopped or slow, the step is taken without a record of it.

        Args:
            is_first: whether it is the first of the groups.
            before_leaving: waits for what this group is writing still.
        """
        if not self._among_groups:
            return
        if self.is_ours and not is_first:
            before_leaving()
            self.close(report=False)
        self.is_ours = is_first and from_first_rank(self._take)

    def close(self, *, report: bool = True) -> None:
        """Write what is left, and the `report`; let go of the folder. Not collective."""
        if self.record is not None:
            self.record.close(report=report)
            self.record = None
        self._release()

    def _take(self) -> bool:
        """On the first rank: hold the folder, with a record that knows what others have written."""
        if self._lock is not None:
            return True
        try:
            # A group that holds it for long is not waited for in every step.
            self._hold(0.0 if self._has_told else _PATIENCE)
        except TrainingStopped as error:
            if not self._has_told:
                say(f"{error}, a replica group that does not answer: steps go on without a record and checkpoints")
                self._has_told = True
            return False
        assert self._lock is not None
        self._has_told = False
        self._lock.seek(0)
        if self._lock.read() != self._name or self.record is None:
            if self.record is not None:
                self.record.close(report=False)
            self.record = self._open_record()
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(self._name)
            self._lock.flush()
        return True

    def _hold(self, patience: float) -> None:
        self._lock = lock_folder(self._folder, patience)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        if dist.get_rank() == 0:
            self.record = self._open_record()
