"""How long ranks work in each phase, without waiting for others: who holds all of them up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from crossdock.comm import recorder
from crossdock.comm.place import Place

__all__ = ["Straggler", "WorkProfile", "find_straggler", "is_waiting"]

_TORCH = str(Path(torch.__file__).parent)
_COMMUNICATION = (f"{_TORCH}/distributed/", str(Path(__file__).parent))
# In these the innermost call of Python can only be one that talks to others.
_C10D = (f"{_TORCH}/distributed/distributed_c10d.py", f"{_TORCH}/distributed/_functional_collectives.py")
_P2P_WAIT = "_wait_batch_p2p"
# torch's ways from a function to an operator: the function says which.
_OP_CALLS = (f"{_TORCH}/_ops.py", f"{_TORCH}/_library/")


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread whose innermost call is `frame` waits for other ranks, going by where it is."""
    inner: FrameType | None = frame
    while inner is not None and inner.f_code.co_filename.startswith(_OP_CALLS):
        inner = inner.f_back
    if inner is None:
        return False
    name = inner.f_code.co_filename
    if name in _C10D or inner.f_code.co_name == _P2P_WAIT:
        return True
    # What FSDP and DTensor compute is there too; waiting goes with a collective that is under way.
    return name.startswith(_COMMUNICATION) and any(
        count.completed < count.started for count in recorder.counts().values()
    )


class WorkProfile:
    """Seconds of the main thread's work by phase, from samples of where it is.

    On a GPU the main thread hands out work and waits for the device: what the device does slowly is not seen.

    Attributes:
        seconds: by phase, or `phase part` within MoE layers; what waits for other ranks is left out.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, place: Place, frame: FrameType, seconds: float) -> None:
        """One sample, for the time since the one before."""
        if not is_waiting(frame):
            phase = f"{place.phase} {place.part}".rstrip()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Straggler(NamedTuple):
    """The slowest rank between two looks.

    Attributes:
        rank: which.
        ratio: its work per step over the median of the other ranks'.
        seconds: that it works longer per step than that median.
        phase: where most of these are.
    """

    rank: int
    ratio: float
    seconds: float
    phase: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} works {self.ratio:.2f} times as long as the median of the others, {self.seconds:.3g} s "
            f"more per step, most of it in {self.phase}"
        )


def find_straggler(work: Mapping[int, Mapping[str, float]]) -> Straggler | None:
    """The slowest rank; `None` where ranks have not worked yet, or there is one alone.

    Args:
        work: by rank, seconds per step by phase.
    """
    totals = {rank: sum(phases.values()) for rank, phases in work.items()}
    if len(totals) < 2:
        return None
    slowest = max(totals, key=lambda rank: totals[rank])
    others = [rank for rank in totals if rank != slowest]
    median = statistics.median(totals[rank] for rank in others)
    if median <= 0:
        return None
    surplus = {
        phase: seconds - statistics.median(work[rank].get(phase, 0.0) for rank in others)
        for phase, seconds in work[slowest].items()
    }
    phase = max(surplus, key=lambda name: surplus[name])
    return Straggler(slowest, totals[slowest] / median, totals[slowest] - median, phase)
