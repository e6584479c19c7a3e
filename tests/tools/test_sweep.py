"""`crossdock tune`: how candidates are measured, and which is chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch.distributed as dist

from crossdock.tools.tune import SweepFailed
from crossdock.tools.tune.dimensions import Dimension
from crossdock.tools.tune.ranks import ProcessGroupAgreement, Reading
from crossdock.tools.tune.sweep import Outcome, Sweep
from tests.ranks import RankPool

CHUNKS = Dimension("overlap_chunks", (1, 2, 4))
ROUNDS = 7


class Machine:
    """A stand-in for a layer: `seconds(value, run)` of the `run`th measurement, on a clock that runs only here."""

    def __init__(self, seconds: Callable[[Any, int], float], name: str = CHUNKS.name) -> None:
        self.seconds, self.name = seconds, name
        self.now = 0.0
        self.runs: list[Any] = []
        self.applied: list[dict[str, Any]] = []

    def apply(self, choices: Mapping[str, Any]) -> None:
        self.applied.append(dict(choices))

    def run(self, part: str, repeats: int) -> float:
        value = self.applied[-1][self.name]
        self.runs.append(value)
        seconds = self.seconds(value, len(self.runs))
        self.now += seconds * repeats
        return seconds


def alone(seconds: float, *, stop: bool, late: bool, problem: str) -> Reading:
    """One rank agrees with itself."""
    return Reading(seconds, stop, late, problem)


def sweep_of(machine: Machine, **options: Any) -> Sweep:
    arguments: dict[str, Any] = {"rounds": ROUNDS, "seconds": 1e9, "clock": lambda: machine.now} | options
    return Sweep(machine, alone, **arguments)


def sweep(machine: Machine, dimension: Dimension = CHUNKS, **options: Any) -> Outcome:
    return sweep_of(machine, **options).sweep(dimension, {"experts": "cpu"})


def test_what_is_faster_by_more_than_the_spread_is_chosen() -> None:
    machine = Machine(lambda value, run: {1: 1.0, 2: 0.8, 4: 0.9}[value] * (1 + 0.01 * (run % 3)))
    outcome = sweep(machine)
    assert (outcome.default, outcome.chosen, outcome.finished) == (1, 2, True)
    speed = outcome.rows[1].speed
    assert speed is not None
    assert speed.median == pytest.approx(1.25, rel=0.03)
    assert "faster than 1" in outcome.verdict
    assert all(applied["experts"] == "cpu" for applied in machine.applied), "other settings stay"


def test_nothing_is_chosen_that_wins_by_less_than_the_spread() -> None:
    noise = random.Random(0)
    outcome = sweep(Machine(lambda value, _: {1: 1.0, 2: 0.97, 4: 1.0}[value] * noise.uniform(0.8, 1.25)))
    assert outcome.chosen == 1
    assert "the default stays" in outcome.verdict


def test_of_equal_candidates_none_is_chosen_whatever_the_noise() -> None:
    noise = random.Random(1)
    many = Dimension("overlap_chunks", tuple(range(1, 9)))
    chosen = [sweep(Machine(lambda *_: noise.lognormvariate(0, 0.05)), many).chosen for _ in range(100)]
    assert sum(value != 1 for value in chosen) <= 2


def test_a_winner_must_win_twice() -> None:
    warm_up = len(CHUNKS.candidates) + 1
    first_pass = warm_up + len(CHUNKS.candidates) * ROUNDS
    outcome = sweep(Machine(lambda value, run: 0.5 if value == 2 and run <= first_pass else 1.0))
    assert outcome.chosen == 1
    assert "second time" in outcome.verdict


def test_a_machine_that_gets_slower_is_slower_for_all() -> None:
    outcome = sweep(Machine(lambda _, run: 1.03**run))
    assert outcome.chosen == 1


def test_another_candidate_is_first_in_each_round() -> None:
    machine = Machine(lambda *_: 1.0)
    sweep(machine)
    rounds = machine.runs[len(CHUNKS.candidates) + 1 :]
    assert [rounds[i : i + 3] for i in range(0, 9, 3)] == [[1, 2, 4], [2, 4, 1], [4, 1, 2]]


def test_a_candidate_without_a_chance_is_measured_no_more() -> None:
    machine = Machine(lambda value, _: {1: 1.0, 2: 0.9, 4: 2.5}[value])
    outcome = sweep(machine)
    assert outcome.chosen == 2
    assert machine.runs.count(4) == 2, "to warm up, and once"
    assert "2.5 times the default's time" in outcome.rows[2].note


def test_a_candidate_that_fails_is_left_out() -> None:
    def seconds(value: int, _: int) -> float:
        if value == 2:
            raise MemoryError("no room for 2")
        return 1 / value

    machine = Machine(seconds)
    outcome = sweep(machine)
    assert outcome.chosen == 4
    assert outcome.rows[1].note == "fails: MemoryError: no room for 2"
    assert machine.runs.count(2) == 1


def test_a_default_that_fails_ends_the_sweep() -> None:
    def seconds(value: int, _: int) -> float:
        raise ValueError("there is no such thing")

    with pytest.raises(SweepFailed, match="overlap_chunks = 1, the default, fails: ValueError: there is no such thing"):
        sweep(Machine(seconds))


@pytest.mark.parametrize("allow_lossy", [False, True])
def test_what_changes_numbers_is_chosen_only_where_that_is_allowed(allow_lossy: bool) -> None:
    wire = Dimension("wire_dtype", ("same", "fp8"), lossy=True)
    machine = Machine(lambda value, _: {"same": 1.0, "fp8": 0.5}[value], wire.name)
    outcome = sweep(machine, wire, allow_lossy=allow_lossy)
    assert outcome.chosen == ("fp8" if allow_lossy else "same")
    assert len(outcome.rows[1].seconds) == ROUNDS, "measured in any case"
    assert allow_lossy or "changes numbers" in outcome.verdict


def test_short_passes_are_repeated() -> None:
    machine = Machine(lambda *_: 1e-3)
    sweep(machine)
    assert machine.now >= 0.04 * ROUNDS * len(CHUNKS.candidates)


@pytest.mark.parametrize("seconds", [0.5, 3.5, 7.5, 12.5, 30.5])
def test_it_ends_in_time_with_what_is_known(seconds: float) -> None:
    machine = Machine(lambda value, _: 1 / value)
    swept = sweep_of(machine, seconds=seconds)
    outcome = swept.sweep(CHUNKS, {})
    assert machine.now <= seconds + 1, "one measurement more at most"
    assert swept.stopped == (seconds < 30)
    assert outcome.finished == (seconds > 12), "fewer rounds are taken where there is no time for all"
    assert outcome.chosen == (4 if outcome.finished else 1), "what was not confirmed is not chosen"


def test_settings_share_the_time_that_is_left() -> None:
    machine = Machine(lambda value, _: 1.0 if value == 1 else 0.9)
    swept = sweep_of(machine, seconds=60)
    outcome = swept.sweep(CHUNKS, {}, left=3)
    assert outcome.finished
    assert machine.now <= 35
    assert not swept.stopped


def test_it_stops_when_asked_to() -> None:
    machine = Machine(lambda *_: 1.0)
    swept = sweep_of(machine, stop_requested=lambda: machine.now >= 8)
    outcome = swept.sweep(CHUNKS, {})
    assert swept.stopped
    assert not outcome.finished
    assert len(machine.runs) == 8
    assert [len(row.seconds) for row in outcome.rows] == [1, 1, 1], "a round that broke off counts not"


def _two_ranks(case: str) -> tuple[Any, bool, list[Any], list[str]]:
    """Chosen, finished, the order of measurements, and notes, on a rank whose clock and times are its own."""
    rank = dist.get_rank()

    def seconds(value: int, run: int) -> float:
        if case == "fails" and value == 2 and rank == 1:
            raise MemoryError("rank 1 has no room")
        if case == "slowest":  # 4 is fastest on rank 0, and slowest on rank 1
            return {1: 1.0, 2: 0.8, 4: (0.1, 1.2)[rank]}[value]
        return (1.0 + rank) / value

    machine = Machine(seconds)
    stop = (lambda: machine.now >= 10) if case == "stop" and rank == 1 else lambda: False
    swept = Sweep(
        machine,
        ProcessGroupAgreement(),
        rounds=5,
        seconds=8 if case == "late" and rank == 0 else 1e9,
        stop_requested=stop,
        clock=lambda: machine.now,
    )
    outcome = swept.sweep(CHUNKS, {})
    return outcome.chosen, outcome.finished, machine.runs, [row.note for row in outcome.rows]


@pytest.mark.parametrize(
    ("case", "chosen", "finished"), [("slowest", 2, True), ("stop", 1, False), ("late", 1, False), ("fails", 4, True)]
)
def test_ranks_decide_alike_whatever_each_of_them_sees(case: str, chosen: int, finished: bool, ranks: RankPool) -> None:
    first, second = ranks.run(2, _two_ranks, case)
    assert first == second
    assert first[:2] == (chosen, finished)
    if case == "fails":
        assert first[3][1] == "fails: MemoryError: rank 1 has no room"
