"""Whole runs as a user starts them: `crossdock train` with its own ranks, signals, lost ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crossdock.tools.report.events import read_events
from tests.tiny import write_assets

SECONDS = 120


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_assets(tmp_path / "assets")
    return tmp_path / "run"


def _start(run_folder: Path) -> subprocess.Popen[str]:
    arguments = [
        *("--nproc", "2"),
        *("--job.dump-folder", str(run_folder)),
        *("--model.hf-assets-path", str(run_folder.parent / "assets")),
        *("--data.source", str(run_folder.parent / "speeches")),
        *("--data.cache-folder", str(run_folder.parent / "cache")),
        *("--training.seq-len", "32", "--training.local-batch-size", "2"),
        *("--parallelism.expert-parallel-degree", "2", "--training.steps", "100000"),
        *("--fault-tolerance.max-restarts", "0"),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "crossdock", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def _wait_for_steps(process: subprocess.Popen[str], run_folder: Path, steps: int) -> None:
    log = run_folder / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not log.is_file() or len(log.read_text().splitlines()) < steps:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_with_a_checkpoint_that_it_goes_on_from_until_a_rank_is_lost(
    run_folder: Path, number: signal.Signals
) -> None:
    """One story, for a start takes seconds: a run is stopped, started again, and loses a rank."""
    process = _start(run_folder)
    _wait_for_steps(process, run_folder, 3)
    process.send_signal(number)
    code, output = _finish(process)
    assert code == 0, output
    assert "Traceback" not in output
    assert "stopped as asked" in output
    (checkpoint,) = (run_folder / "checkpoint").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert _steps(run_folder) == list(range(1, done + 1))

    process = _start(run_folder)
    _wait_for_steps(process, run_folder, done + 3)
    os.kill(_ranks_of(process.pid)[-1], signal.SIGKILL)
    started = time.monotonic()
    code, output = _finish(process)
    assert code not in (0, 2), output
    assert time.monotonic() - started < 60
    assert "signal 9" in output
    assert f"resumed {run_folder} at step {done}" in output
    steps = _steps(run_folder)
    assert len(steps) >= done + 3
    assert steps == list(range(1, len(steps) + 1)), "steps were lost or done twice"
    assert list((run_folder / "checkpoint").iterdir()) == [checkpoint]
    events, _ = read_events(run_folder)
    assert [(event.kind, event.step) for event in events] == [
        *(("start", 0), ("stop", done), ("start", done), ("failure", None)),
    ]
    assert "signal 9" in events[-1].message


def _steps(run_folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def _ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [pid for pid in map(int, children) if "crossdock" in Path(f"/proc/{pid}/cmdline").read_text()]
