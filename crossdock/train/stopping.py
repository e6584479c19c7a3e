"""An end that was asked for."""

from __future__ import annotations

import signal
from typing import Any

__all__ = ["StopSignal"]


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C asked for an end, until the next step boundary."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
