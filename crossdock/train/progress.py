"""How far a run has come, left by its ranks where their launcher looks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["Progress", "furthest_step"]

_PREFIX = "progress-"


class Progress:
    """One rank's word of the furthest step that was done, in this start or an earlier one.

    Args:
        folders: of the launchers that look, this machine's and the group's; must exist.
        local_rank: of the rank on its machine.
    """

    def __init__(self, folders: Sequence[Path], local_rank: int) -> None:
        self._paths = [folder / f"{_PREFIX}{local_rank}" for folder in folders]
        self._furthest = max(map(furthest_step, folders), default=0)

    def done(self, step: int) -> None:
        """Leave that a step is done, where none further was; what cannot be written is lost and ends nothing."""
        if step > self._furthest:
            self._furthest = step
            for path in self._paths:
                beside = path.with_suffix(".partial")
                with suppress(OSError):
                    beside.write_text(str(step))
                    beside.rename(path)


def furthest_step(folder: Path) -> int:
    """The furthest step that any rank of a launcher's has done, over all starts; 0 where none was."""
    steps = [0]
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError, ValueError):  # One that is being written.
            steps.append(int(path.read_text()))
    return max(steps)
