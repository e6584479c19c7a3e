"""Where the main thread of a rank is: written by plain attribute writes, read by a watchdog's thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Place", "Spot"]


class Spot(NamedTuple):
    """A place at one moment.

    Attributes:
        step: the one that is under way, from 1; 0 before the first.
        phase: `forward`, `optimizer` and so on.
        layer: name of the block or MoE layer; empty between them.
        part: of an MoE layer; empty elsewhere.
    """

    step: int
    phase: str
    layer: str = ""
    part: str = ""

    def __str__(self) -> str:
        words = [f"step {self.step}" if self.step else "", self.phase, self.layer and f"layer {self.layer}", self.part]
        return ", ".join(filter(None, words))


class Place:
    """Where the main thread is. Whoever knows it says so; that costs less than a microsecond.

    Attributes:
        step, phase, layer, part: as in `Spot`.
        steps: that this process has begun.
        seconds: spent on saying so by hooks, and on what else watches in the main thread.
        on_move: is told, with this place, of each phase and part that begins; `None` where nobody wants to know.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.layer, self.part = 0, "start", "", ""
        self.steps = 0
        self.seconds = 0.0
        self.on_move: Callable[[Place], None] | None = None
        self._since = time.perf_counter()
        self._spent: dict[tuple[str, str], float] = {}

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self.steps += 1

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before is over. One that fails stays, so that it can be told."""
        self._count()
        self.phase, self.layer, self.part = phase, "", ""
        if self.on_move is not None:
            self.on_move(self)

    def mark(self, layer: str, part: str) -> None:
        """Within a phase, a `part` of a `layer` begins; empty where none does."""
        self._count()
        self.layer, self.part = layer, part
        if self.on_move is not None:
            self.on_move(self)

    def spot(self) -> Spot:
        return Spot(self.step, self.phase, self.layer, self.part)

    def take_seconds(self) -> dict[tuple[str, str], float]:
        """Seconds since the last call by phase and part, as a clock on the wall shows them: waiting counts."""
        self._count()
        taken, self._spent = self._spent, {}
        return taken

    def _count(self) -> None:
        now, key = time.perf_counter(), (self.phase, self.part)
        self._spent[key] = self._spent.get(key, 0.0) + now - self._since
        self._since = now
