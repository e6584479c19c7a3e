"""Measuring the candidates of one setting in turn, and choosing one of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from crossdock.tools.tune.dimensions import Dimension
from crossdock.tools.tune.ranks import Agreement, Reading

__all__ = ["LEAST_ROUNDS", "Outcome", "Row", "Spread", "Subject", "Sweep", "SweepFailed"]

LEAST_ROUNDS = 3
"""Fewer say nothing about a spread."""

# A measurement takes so long at least, by repetition: a clock's and a scheduler's grain must not show.
_SECONDS = 0.05
_MOST_REPEATS = 200
# What is so much slower in the first round is measured no more.
_HOPELESS = 2.0


class Subject(Protocol):
    """What is measured, on this rank."""

    def apply(self, choices: Mapping[str, Any]) -> None:
        """Put values of settings in force; those that are not named have their defaults."""
        ...

    def run(self, part: str, repeats: int) -> float:
        """Seconds of a forward and a backward pass of a `Dimension.part`, `repeats` times, divided by `repeats`."""
        ...


class SweepFailed(RuntimeError):
    """The default itself cannot be measured."""


class Spread(NamedTuple):
    """The median of some values, and the range of their middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass
class Row:
    """What is known of a candidate.

    Attributes:
        value: of the setting.
        seconds: of each whole round, of the slowest rank.
        speeds: the default's seconds over these, of each whole round.
        note: why it was measured no more, if so.
    """

    value: Any
    seconds: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def speed(self) -> Spread | None:
        """Beside the default, where there are rounds enough."""
        return Spread.of(self.speeds) if len(self.speeds) >= LEAST_ROUNDS else None


@dataclass(frozen=True)
class Outcome:
    """What came out for one setting.

    Attributes:
        dimension: the setting.
        rows: of its candidates, the default's first.
        chosen: the value.
        verdict: why that one, in words.
        finished: false where there were too few rounds to decide, the time being over or a stop asked for.
    """

    dimension: Dimension
    rows: tuple[Row, ...]
    chosen: Any
    verdict: str
    finished: bool = True

    @property
    def default(self) -> Any:
        return self.dimension.candidates[0]


class Sweep:
    """Sweeps settings one after the other.

    Args:
        subject: what is measured.
        agree: makes a measurement that of all ranks; collective, once for each.
        rounds: in which each candidate is measured once.
        seconds: for all of them.
        allow_lossy: choose a value that changes what is computed as well.
        stop_requested: whether this rank was asked to stop.
        measured: is told of each measurement: setting, value, how many are done and how many there will be at most.
        clock: seconds.
    """

    def __init__(
        self,
        subject: Subject,
        agree: Agreement,
        *,
        rounds: int,
        seconds: float,
        allow_lossy: bool = False,
        stop_requested: Callable[[], bool] = lambda: False,
        measured: Callable[[str, Any, int, int], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._subject, self._agree = subject, agree
        self._rounds, self._allow_lossy = rounds, allow_lossy
        self._stop_requested, self._measured, self._clock = stop_requested, measured, clock
        self._deadline = clock() + seconds
        self._share_ends = self._deadline
        self.stopped = False

    def sweep(self, dimension: Dimension, base: Mapping[str, Any], left: int = 1) -> Outcome:
        """Measure the candidates of `dimension`, everything else being as in `base`, and choose. Collective.

        Args:
            dimension: one that is not skipped.
            base: values of other settings.
            left: settings that share what time is left, this one included.

        Raises:
            SweepFailed: where the default cannot be measured.
        """
        rows = [Row(value) for value in dimension.candidates]
        now = self._clock()
        share = max(0.0, self._deadline - now) / left
        # The rest is for winning a second time.
        self._share_ends = now + share * len(rows) / (len(rows) + 2)
        default = rows[0]
        course = _Course(dimension, base, len(rows) * (1 + self._rounds) + 2 * self._rounds)
        repeats = self._warm_up(course, rows)
        if not self.stopped:
            self._measure_rounds(course, rows, repeats, set_aside=True)
        best = max((row for row in rows if row.speed is not None), key=_median, default=None)
        if best is None:
            return Outcome(dimension, tuple(rows), default.value, "not measured in time: the default stays", False)
        if best is default or not _wins(best.speed):
            return Outcome(dimension, tuple(rows), default.value, _stays(best, default))
        if dimension.lossy and not self._allow_lossy:
            verdict = f"{best.value} is {_percent(best.speed)} faster, but changes numbers: the default stays"
            return Outcome(dimension, tuple(rows), default.value, verdict)
        # The best of many has had luck: it must win anew.
        again = [Row(default.value), Row(best.value)]
        self._share_ends = now + share
        if not self.stopped:
            self._measure_rounds(course, again, repeats)
        confirmed = again[1].speed
        if not _wins(confirmed):
            why = "was not confirmed in time" if confirmed is None else "did not win a second time"
            verdict = f"{best.value} {why}: the default stays"
            return Outcome(dimension, tuple(rows), default.value, verdict, confirmed is not None)
        verdict = f"{best.value} is {_percent(confirmed)} faster than {default.value}"
        return Outcome(dimension, tuple(rows), best.value, verdict)

    def _warm_up(self, course: _Course, rows: list[Row]) -> int:
        """Each candidate once, which may compile; leaves out those that fail. How often to repeat for a measurement."""
        for row in list(rows):
            reading = self._measure(course, row.value, 1)
            if reading.problem and row is rows[0]:
                raise SweepFailed(f"{course.dimension.name} = {row.value}, the default, fails: {reading.problem}")
            row.note = f"fails: {reading.problem}" if reading.problem else ""
            if self.stopped:
                return 1
        seconds = self._measure(course, rows[0].value, 1).seconds
        return max(1, min(_MOST_REPEATS, math.ceil(_SECONDS / max(seconds, 1e-9))))

    def _measure_rounds(self, course: _Course, rows: list[Row], repeats: int, *, set_aside: bool = False) -> None:
        """Rounds in which each row is measured once, another one first each time; one that breaks off counts not."""
        for number in range(self._rounds):
            taking_part = [row for row in rows if not row.note]
            first = number % len(taking_part)
            readings: dict[int, Reading] = {}
            for row in taking_part[first:] + taking_part[:first]:
                readings[id(row)] = reading = self._measure(course, row.value, repeats)
                if reading.problem:
                    if row is rows[0]:
                        raise SweepFailed(f"{course.dimension.name} = {row.value} fails: {reading.problem}")
                    row.note = f"fails: {reading.problem}"
                if self.stopped:
                    return
            default = readings[id(rows[0])].seconds
            for row in taking_part:
                reading = readings[id(row)]
                if not reading.problem:
                    row.seconds.append(reading.seconds)
                    row.speeds.append(default / reading.seconds)
                    if set_aside and number == 0 and row is not rows[0] and reading.seconds > _HOPELESS * default:
                        row.note = f"{reading.seconds / default:.1f} times the default's time in the first round"
            late = any(reading.late for reading in readings.values())
            if late and number + 1 >= LEAST_ROUNDS:
                return

    def _measure(self, course: _Course, value: Any, repeats: int) -> Reading:
        problem, seconds = "", 0.0
        try:
            self._subject.apply({**course.base, **course.dimension.given, course.dimension.name: value})
            seconds = self._subject.run(course.dimension.part, repeats)
        except Exception as error:  # noqa: BLE001 (out of memory, a kernel that does not compile: all ranks must know)
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        now = self._clock()
        reading = self._agree(
            seconds,
            stop=self._stop_requested() or now >= self._deadline,
            late=now >= self._share_ends,
            problem=problem,
        )
        self.stopped |= reading.stop
        course.done += 1
        self._measured(course.dimension.name, value, course.done, course.most)
        return reading


@dataclass
class _Course:
    """The sweep of one setting as it goes on."""

    dimension: Dimension
    base: Mapping[str, Any]
    most: int
    done: int = 0


def _median(row: Row) -> float:
    return row.speed.median if row.speed is not None else 0.0


def _wins(speed: Spread | None) -> bool:
    """Whether a candidate is faster than the default by more than the spread."""
    return speed is not None and speed.median - 1 > speed.width


def _percent(speed: Spread | None) -> str:
    return "" if speed is None else f"{100 * (speed.median - 1):.1f} %"


def _stays(best: Row, default: Row) -> str:
    if best is default:
        return f"none is faster than {default.value}: the default stays"
    return f"{best.value} wins by less than the spread: the default stays"
