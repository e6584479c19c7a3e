"""Whether a long run stays as it is: its memory, its open files and the time of a step.

    python -m benchmarks.soak [--steps 1000] [--write]

`crossdock train configs/debug.toml` runs on two CPU processes, with a snapshot every 10 steps, a checkpoint and a
validation every 50. From outside, ten times a second, the ranks' memory that no other process has (USS) and their open
files are read. What a rank has in the hundred steps before the last one is compared with what it has from step 100 to
200, for the rank that grew most. Of memory that is the tenth percentile, what a rank holds between steps: within a step
it holds as much more as it has tokens. Of files and of a step's time it is the median.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.results_file import write_results

ROOT = Path(__file__).parent.parent
GROWTH_GOAL = 0.01
FIRST, WINDOW = 100, 100
SETTINGS = [
    *("--nproc", "2", "--checkpoint.interval", "50", "--validation.interval", "50", "--metrics.log-freq", "100"),
    *("--data.held-out", "0.05", "--validation.max-samples", "64"),
    *("--fault-tolerance.snapshot-interval", "10", "--training.tuned", "off", "--checkpoint.no-last-save-in-hf"),
]


class Sample(NamedTuple):
    """Of one rank's process: after how many steps, bytes, open files."""

    rank: int
    step: int
    memory: int
    files: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of the run, 400 or more")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/soak_DATE.json")
    arguments = parser.parse_args()
    if arguments.steps < FIRST + 3 * WINDOW:
        parser.error(f"--steps is {arguments.steps}, must be at least {FIRST + 3 * WINDOW}")
    with tempfile.TemporaryDirectory() as folder:
        samples, seconds = watch(Path(folder), arguments.steps)
    rows = judge(samples, seconds, arguments.steps)
    for row in rows:
        print(
            f"{row['case']}: {row['peer_figure']} -> {row['figure']} {row['unit']} ({row['ratio']}), met: {row['met']}"
        )
    if arguments.write:
        print(write_results("soak", ["torch", "transformers", "crossdock"], rows))
    return 0 if all(row["met"] for row in rows) else 1


def watch(folder: Path, steps: int) -> tuple[list[Sample], list[float]]:
    """Samples of a whole run, and the seconds of each of its steps."""
    run, output = folder / "run", folder / "output"
    command = [sys.executable, "-m", "crossdock", "train", str(ROOT / "configs/debug.toml"), *SETTINGS]
    command += ["--training.steps", str(steps), "--job.dump-folder", str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with open(output, "w") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    samples: list[Sample] = []
    try:
        while launcher.poll() is None:
            time.sleep(0.1)
            samples += _look(launcher.pid, _steps_done(run))
        if launcher.returncode:
            raise RuntimeError(f"the run ended with {launcher.returncode}:\n{output.read_text()}")
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Two ranks share a step's tokens.
    return samples, [line["tokens"] / 2 / line["tokens_per_second_per_gpu"] for line in lines]


def judge(samples: list[Sample], seconds: list[float], steps: int) -> list[dict[str, Any]]:
    """A row each for memory, files and time."""
    early, late = range(FIRST, FIRST + WINDOW), range(steps - WINDOW, steps)
    rows = []
    for case, unit, scale, field, tenth in (
        ("memory of a rank between steps", "MiB", 2**20, "memory", 1),
        ("open files of a rank", "files", 1, "files", 5),
    ):
        grown = []
        for rank in (0, 1):
            before, after = (
                statistics.quantiles(
                    (getattr(each, field) for each in samples if each.rank == rank and each.step in window), n=10
                )[tenth - 1]
                for window in (early, late)
            )
            grown.append((after / before, after, before))
        ratio, after, before = max(grown)
        goal = 1 + GROWTH_GOAL if field == "memory" else 1.0
        rows.append(_row(case, unit, after / scale, before / scale, ratio, goal))
    before, after = (statistics.median(seconds[step] for step in window) for window in (early, late))
    # The machine is not ours alone: what is steady here is within a tenth.
    rows.append(_row("time of a step", "s", after, before, after / before, 1.1))
    return rows


def _row(case: str, unit: str, after: float, before: float, ratio: float, goal: float) -> dict[str, Any]:
    return {
        "case": f"{case}, the last {WINDOW} steps beside steps {FIRST} to {FIRST + WINDOW}",
        "unit": unit,
        "figure": round(after, 3),
        "peer": f"steps {FIRST} to {FIRST + WINDOW}",
        "peer_figure": round(before, 3),
        "ratio": round(ratio, 4),
        "goal": goal,
        "met": ratio <= goal,
    }


def _steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _look(launcher: int, step: int) -> list[Sample]:
    """At the ranks, which are those below the launcher that have a number."""
    samples = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
            if rank is not None:
                samples.append(Sample(int(rank), step, process.memory_full_info().uss, process.num_fds()))
        except psutil.Error:  # It has ended.
            continue
    return samples


if __name__ == "__main__":
    raise SystemExit(main())
