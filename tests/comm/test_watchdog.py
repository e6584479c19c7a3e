"""Ranks that wait in vain end with a report of who waits for whom, in what, and where the missing one is."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from crossdock.comm import GRACE_SECONDS, WATCHDOG_EXIT_CODE, Place, Report, Watchdog
from tests.faults import Ended, run_processes

TIMEOUT = 3


def watch() -> tuple[Place, Watchdog]:
    """Begin to watch this rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT + GRACE_SECONDS))
    place = Place()

    def report(made: Report) -> None:
        print(f"<{made.kind} {made.rank}>\n{made.text}\n<end>", flush=True)

    watchdog = Watchdog(place, TIMEOUT, report=report)
    watchdog.start()
    return place, watchdog


def the_report(ended: list[Ended]) -> str:
    """There is one, whichever rank has made it."""
    reports = [output[output.index("<") : output.index("<end>")] for _, output in ended if "<end>" in output]
    assert len(reports) == 1, ended
    return reports[0]


def sum_in_a_layer(place: Place) -> None:
    place.enter("forward")
    place.layer, place.part = "model.layers.1.mlp", "dispatch"
    dist.all_reduce(torch.ones(7))
    place.enter("optimizer")


def waits_for_a_disk() -> None:
    time.sleep(600)


def asleep() -> None:
    place, _ = watch()
    for step in (1, 2):
        place.begin(step)
        place.enter("data")
        if step == 2 and dist.get_rank() == 1:
            waits_for_a_disk()
        sum_in_a_layer(place)


def test_a_rank_that_is_elsewhere_is_named_with_its_stack(tmp_path: Path) -> None:
    ended = run_processes(3, asleep, folder=tmp_path)
    report = the_report(ended)
    assert [code for code, _ in ended] == [WATCHDOG_EXIT_CODE] * 3
    assert f"within {TIMEOUT} s: rank 1 did not take part" in report
    assert (
        "all_reduce of [7], number 2 among ranks 0-2, in step 2, forward, layer model.layers.1.mlp, dispatch" in report
    )
    assert "  arrived: ranks 0, 2\n" in report
    assert "  not arrived: rank 1\n" in report
    assert "is in step 2, data:" in report
    assert "in waits_for_a_disk\n" in report
    assert "in sum_in_a_layer\n" not in report, "nobody needs the stacks of those that wait"


def stopped() -> None:
    place, _ = watch()
    for step in (1, 2):
        place.begin(step)
        place.enter("data")
        if step == 2 and dist.get_rank() == 1:
            place.layer, place.part = "model.layers.1.mlp", "dispatch"
            time.sleep(2)  # the watchdog has seen this
            os.kill(os.getpid(), signal.SIGSTOP)
        sum_in_a_layer(place)


def test_a_rank_that_was_stopped_is_named_with_its_last_place_and_ended(tmp_path: Path) -> None:
    ended = run_processes(3, stopped, folder=tmp_path)
    report = the_report(ended)
    assert [code for code, _ in ended] == [WATCHDOG_EXIT_CODE, -signal.SIGKILL, WATCHDOG_EXIT_CODE]
    assert "rank 1 stopped (a signal, SIGSTOP)" in report
    assert "not known to have arrived: rank 1\n" in report
    assert "its process is stopped; last heard of" in report
    assert "in step 2, data, layer model.layers.1.mlp, dispatch" in report.splitlines()[-1]


def other_collectives() -> None:
    place, _ = watch()
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT + GRACE_SECONDS))
    place.begin(1)
    place.enter("forward")
    if dist.get_rank() == 0:
        dist.all_gather([torch.empty(2), torch.empty(2)], torch.ones(2), group=pair)
    place.enter("optimizer")
    dist.all_reduce(torch.ones(7))


def test_ranks_that_take_another_number_of_collectives_are_told_apart(tmp_path: Path) -> None:
    ended = run_processes(3, other_collectives, folder=tmp_path)
    report = the_report(ended)
    assert [code for code, _ in ended] == [WATCHDOG_EXIT_CODE] * 3
    of_pair, of_all = report.index("all_gather"), report.index("all_reduce of [7]")
    assert "among ranks 0-1, in step 1, forward" in report[of_pair:].splitlines()[0]
    assert "not arrived: rank 1\n" in report
    assert "in step 1, optimizer" in report[of_all:].splitlines()[0]
    assert "not arrived: rank 0\n" in report


def different_collectives() -> None:
    place, _ = watch()
    place.begin(1)
    if dist.get_rank() == 1:
        dist.broadcast(torch.ones(7), src=2)
    elif dist.get_rank() == 2:
        dist.recv(torch.ones(7), src=0)
    else:
        dist.all_reduce(torch.ones(7))


def test_collectives_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    report = the_report(run_processes(3, different_collectives, folder=tmp_path))
    assert "these do not go together: rank 0: all_reduce of [7]; rank 1: broadcast of [7]" in report
    assert "rank 2 in a send or receive" in report


def receives() -> None:
    place, _ = watch()
    place.begin(1)
    place.enter("pipeline")
    if dist.get_rank() == 0:
        dist.recv(torch.ones(7), src=1)
    waits_for_a_disk()


def test_a_send_that_never_comes_is_a_time_out_too(tmp_path: Path) -> None:
    ended = run_processes(2, receives, folder=tmp_path)
    assert [code for code, _ in ended] == [WATCHDOG_EXIT_CODE] * 2
    assert "rank 0 in a send or receive, in step 1, pipeline" in the_report(ended)


def patient() -> None:
    _, watchdog = watch()
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT + GRACE_SECONDS + 3600))
    if dist.get_rank() == 1:
        time.sleep(2 * TIMEOUT)
    dist.all_reduce(torch.ones(7), group=group)
    watchdog.stop()


def test_a_group_with_a_longer_time_out_may_take_longer(tmp_path: Path) -> None:
    assert [code for code, _ in run_processes(2, patient, folder=tmp_path)] == [0, 0]


def killed() -> int:
    place, watchdog = watch()
    for step in range(1, 1000):
        place.begin(step)
        if step == 300 and dist.get_rank() == 1:
            place.enter("snapshot")
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            sum_in_a_layer(place)
        except RuntimeError:
            watchdog.explain("the connection to another rank is gone")
            return 1
    return 0


def test_of_a_rank_that_was_killed_its_last_place_is_told(tmp_path: Path) -> None:
    ended = run_processes(3, killed, folder=tmp_path)
    report = the_report(ended)
    assert [code for code, _ in ended] == [1, -signal.SIGKILL, 1]
    assert report.startswith("<lost 1>\nthe connection to another rank is gone: rank 1 gone")
    assert "its process is gone; last heard of" in report
    assert "in step 300, snapshot" in report
