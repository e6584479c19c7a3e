"""Where a run stands, kept: checkpoints on disk, snapshots in memory, and the newest of both to go on from."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossdock.checkpoint import (
    CHECKPOINT_FOLDER,
    Checkpointer,
    CheckpointError,
    MemoryFiles,
    Snapshots,
    checksum,
    newest_whole,
    read_counters,
)
from crossdock.config import Config
from crossdock.train.together import from_first_rank
from crossdock.train.watching import group_timeout

__all__ = ["RunKeeper", "newest_checkpoint", "run_identity"]

logger = logging.getLogger(__name__)

_IDENTITY_FILE = ".run_id"
_Counters = dict[str, Any]


class RunKeeper:
    """Saves one run and brings it back. Every method is collective.

    Args:
        config: of the run.
        folder: the run folder.
        model: on its layout.
        optimizer: with its states.
        layout: as a text, the same for the same layout.
        machine: this rank's, among those of the run.

    Raises:
        CheckpointError: where snapshots find no room.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layout: str,
        machine: int,
    ) -> None:
        self._config, self._tolerance = config.checkpoint, config.fault_tolerance
        self._saved: int | None = None
        timeout = timedelta(seconds=group_timeout(config))
        self._checkpointer = Checkpointer(
            folder / CHECKPOINT_FOLDER,
            model,
            optimizer,
            config.checkpoint.keep_latest_k,
            async_mode=config.checkpoint.async_mode,
            when_busy=config.checkpoint.async_when_busy,
            timeout=timeout,
        )
        self._snapshots: Snapshots | None = None
        if self._tolerance.snapshot_interval:
            self._snapshots = Snapshots(
                MemoryFiles(Path(self._tolerance.snapshot_folder), folder),
                self._checkpointer,
                from_first_rank(lambda: run_identity(folder)),
                layout,
                machine,
                on_partner=self._tolerance.snapshot_partner,
                timeout=timeout,
            )

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return self._checkpointer.folder

    @property
    def is_writing(self) -> bool:
        """Whether this rank is writing a checkpoint. Not collective."""
        return self._checkpointer.is_writing

    def resume(
        self, newest: int | None, take: Callable[[_Counters], None], damaged: CheckpointError | None = None
    ) -> str | None:
        """Go on from the newest state that is whole: in memory, on another machine or on disk.

        Args:
            newest: step of the newest checkpoint on disk that is whole (`newest_whole`).
            take: is given the counters, before model and optimizer have their values: it puts experts in their places.
            damaged: why the checkpoints that there are cannot be read; a snapshot may be whole.

        Returns:
            Where the run goes on from; `None` for a new one.

        Raises:
            CheckpointError: on all ranks, where it cannot be read.
        """
        found = self._snapshots.newest() if self._snapshots is not None else None
        if self._snapshots is not None and found is not None and (newest is None or found.step > newest):
            take(found.counters)
            self._snapshots.load(found)
            return f"step {found.step}, from a snapshot in memory"
        if damaged is not None:
            raise damaged
        if newest is None:
            return None
        take(read_counters(self.folder, newest))
        self._checkpointer.load(newest, verified=True)
        self._saved = newest
        return f"step {newest}"

    def after_step(self, step: int, counters: Callable[[], _Counters]) -> None:
        """Save what is due after `step`."""
        if self._config.interval and step % self._config.interval == 0:
            self._save(step, counters(), last=False)
        interval = self._tolerance.snapshot_interval
        if self._snapshots is not None and step % interval == 0:
            try:
                self._snapshots.save(step, counters())
            except CheckpointError as error:
                logger.warning(f"step {step}: no snapshot: {error}")

    def finish(self, step: int, counters: Callable[[], _Counters]) -> None:
        """Leave a checkpoint of `step` and no snapshots.

        Raises CheckpointError where it cannot be written.
        """
        self.wait()
        if self._saved != step:
            self._save(step, counters(), last=True)
        self.clear()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises CheckpointError where it cannot be written, and that is not to be passed over.
        """
        try:
            self._checkpointer.wait()
        except CheckpointError as error:
            self._pass_over(error)
            self._saved = None

    def close(self) -> str:
        """Wait for the checkpoint that is being written, and leave no snapshots; why it cannot be written, or empty."""
        try:
            self.wait()
        except CheckpointError as error:
            return str(error)
        finally:
            self.clear()
        return ""

    def clear(self) -> None:
        """Leave no snapshots."""
        if self._snapshots is not None:
            self._snapshots.clear()

    def _save(self, step: int, counters: _Counters, *, last: bool) -> None:
        """Save a step, unless the checkpoint before is still being written and this one can wait."""
        try:
            saved = self._checkpointer.save(step, counters, blocking=last)
        except CheckpointError as error:
            if last:
                raise
            self._pass_over(error)
            if self._config.async_mode != "async":
                return
            # What failed is the write of the one before.
            saved = self._checkpointer.save(step, counters, blocking=last)
        if saved is None:
            logger.warning(f"step {step}: no checkpoint, since the one before is still being written")
        else:
            self._saved = step

    def _pass_over(self, error: CheckpointError) -> None:
        """Go on in spite of it, where that is asked for."""
        if self._tolerance.on_write_error == "stop":
            raise error
        logger.warning(f"{error}; the run goes on, and tries again with the next checkpoint")


def newest_checkpoint(
    folder: Path, has_snapshots: bool, tell: Callable[[str], object]
) -> tuple[int | None, CheckpointError | None]:
    """The step of the newest that is whole, if there is one; or why none can be read. Collective.

    Args:
        folder: of checkpoints.
        has_snapshots: whether the run may go on from one instead.
        tell: hears of those that are damaged.

    Raises:
        CheckpointError: on all ranks, where checkpoints are there, none is whole, and there are no snapshots.
    """
    try:
        newest, passed_over = newest_whole(folder)
    except CheckpointError as error:
        if not has_snapshots:
            raise
        return None, error
    for message in passed_over:
        tell(message)
    return newest, None


def run_identity(folder: Path) -> str:
    """A name for the run in a folder, the same whenever it is started."""
    path = folder / _IDENTITY_FILE
    if path.exists():
        name, _, digest = path.read_bytes().partition(b" ")
        if name and digest == checksum(name).encode():
            return name.decode()
        logger.warning(f"{path} is damaged, and written anew: snapshots that are in memory are not this run's any more")
    name = uuid.uuid4().hex
    beside = path.with_suffix(".partial")
    beside.write_text(f"{name} {checksum(name.encode())}")
    beside.rename(path)
    return name
