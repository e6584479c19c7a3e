"""A selection of what `python -m tests.chaos.run` does, and clean ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.faults import Fault
from tests.chaos.run import ROOT, STEPS, Outcome, check, run, settings
from tests.tiny import write_assets

SECONDS = 240


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    write_assets(folder / "assets")
    return folder


@pytest.fixture(scope="module")
def reference(top: Path) -> Outcome:
    return run(top / "reference", top, 2, [])


def test_a_run_that_faults_befall_gives_what_an_undisturbed_one_gives(top: Path, reference: Outcome) -> None:
    faults = [
        Fault(0, 7, 1, "dispatch", "kill"),
        Fault(1, 14, 0, "migration", "exit"),
        Fault(2, 26, 1, "backward", "raise"),
    ]
    outcome = run(top / "faults", top, 2, faults)
    check(outcome, reference)
    assert len(outcome.computed) == 1 + len(faults)
    # None of the faults comes just after a checkpoint.
    assert outcome.output.count("from a snapshot in memory") == len(faults)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_cleanly_and_goes_on_with_equal_losses(top: Path, reference: Outcome) -> None:
    folder = top / "stopped"
    folder.mkdir()
    command = [sys.executable, "-m", "crossdock", "train", "--nproc", "2", *settings(top, folder / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = folder / "run/metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 0, output
    assert len(metrics.read_text().splitlines()) < STEPS
    again = subprocess.run(command, env=environment, check=False, timeout=SECONDS, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [json.loads(line)["loss"] for line in metrics.read_text().splitlines()] == reference.losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "settings", "ended_with"),
    [
        (1, (), "without a step done"),
        # Each start but the first does steps again, and none that was not done before.
        (6, ("--fault-tolerance.snapshot-interval", "0"), "that came no further than step 5"),
        (6, ("--fault-tolerance.snapshot-interval", "2"), "that came no further than step 5"),
    ],
    ids=["in the first step", "from the beginning", "from a snapshot"],
)
def test_a_fault_that_comes_again_at_each_start_ends_the_run(
    top: Path, step: int, settings: tuple[str, ...], ended_with: str, request: pytest.FixtureRequest
) -> None:
    faults = [Fault(number, step, 0, "forward", "exit") for number in range(4)]
    settings += ("--checkpoint.interval", "0", "--fault-tolerance.max-restarts", "1")
    with pytest.raises(AssertionError, match=r"exit code 1\n") as ended:
        run(top / request.node.callspec.id.replace(" ", "-"), top, 2, faults, *settings)
    output = str(ended.value)
    assert output.count("starting all ranks again") == 1
    assert f"that was start 2 in a row {ended_with}" in output
    assert output.count("from a snapshot in memory") == ("snapshot" in request.node.callspec.id)
