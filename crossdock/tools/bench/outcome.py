"""What a bench says of each case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from crossdock.dispatch import Traffic
from crossdock.tools.bench.cases import Case
from crossdock.tools.bench.workload import Workload

__all__ = ["PARTS", "Bench", "BenchError", "Moves", "Outcome", "Segment"]

PARTS = ("dispatch", "experts", "combine")


class BenchError(ValueError):
    """A bench that cannot be made; the message says why."""


class Segment(NamedTuple):
    """A part of a forward pass on one rank: which of `PARTS`, and from when to when, seconds."""

    part: int
    begin: float
    end: float


class Moves(NamedTuple):
    """What placing experts by their loads takes once: experts that ranks fetch, and the bytes of their weights."""

    experts: int
    bytes: int


@dataclass(frozen=True)
class Outcome:
    """Of a case.

    Attributes:
        case: which.
        traffic: bytes of a forward and a backward pass, all ranks; the least is not counted.
        seconds: of them, of the slowest rank; measured: the median of the rounds.
        spread: of the measured ratios to the plain all-to-all, round by round: lower quartile, median, upper one.
        busiest: routes that the busiest rank computes over the mean.
        timeline: of a forward pass, by rank.
        moves: of a balanced case.
    """

    case: Case
    traffic: Traffic
    seconds: float
    busiest: float
    timeline: dict[int, list[Segment]]
    spread: tuple[float, float, float] | None = None
    moves: Moves | None = None


@dataclass(frozen=True)
class Bench:
    """All of it.

    Attributes:
        workload: what was moved and computed.
        outcomes: the plain all-to-all first.
        facts: what it was measured on, or assumed, for people.
        measured: whether time was measured; else it was computed from assumed speeds.
        notes: for people.
    """

    workload: Workload
    outcomes: Sequence[Outcome]
    facts: Sequence[str]
    measured: bool
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def plain(self) -> Outcome:
        return self.outcomes[0]
