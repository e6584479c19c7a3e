"""An end that was asked for."""

from __future__ import annotations

import signal
from typing import Any

__all__ = ["REGROUP_SIGNAL", "StopSignal"]

REGROUP_SIGNAL = signal.SIGUSR1
"""Asks a rank to end at its next step boundary, for another start with more or fewer machines."""


class StopSignal:
    """Remembers that a signal asked for an end, until the next step boundary.

    Attributes:
        requested: by SIGTERM or Ctrl-C, or for another start.
        regroups: for another start, with more or fewer machines, alone (`REGROUP_SIGNAL`).
    """

    def __init__(self) -> None:
        self.requested = False
        self.regroups = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, REGROUP_SIGNAL):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.regroups = number == REGROUP_SIGNAL and (self.regroups or not self.requested)
        self.requested = True
