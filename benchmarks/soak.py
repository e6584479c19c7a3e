"""Whether a long run stays as it is: its memory, its open files and the time of a step.

    python -m benchmarks.soak [--steps 1000] [--write]

`crossdock train configs/debug.toml` runs on two CPU processes, with a snapshot every 10 steps, a checkpoint and a
validation every 50. Each rank notes its open files and the memory that no other process has (USS), at the end of each
step and after each time that it gave free memory back. The last hundred steps are compared with steps 100 to 200, for
the rank that grew most (`course` in the results has every hundred):

- what a rank holds when it has given back what is free; the least of each hundred steps, since a snapshot may be under
  way, or garbage not be collected yet;
- what it holds at a step's end, with what it keeps for the next step's tensors; the median;
- its open files, and the time that a step and what is between it and the next take of the CPU, which other programs
  change less than time by the clock; the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.results_file import write_results

ROOT = Path(__file__).parent.parent
FIRST, WINDOW = 100, 100
SETTINGS = [
    *("--nproc", "2", "--checkpoint.interval", "50", "--validation.interval", "50", "--metrics.log-freq", "100"),
    *("--data.held-out", "0.05", "--validation.max-samples", "64"),
    *("--fault-tolerance.snapshot-interval", "10", "--training.tuned", "off", "--checkpoint.no-last-save-in-hf"),
]


class Note(NamedTuple):
    """What a rank held at the end of a step, or, of the same step, once it had given free memory back."""

    rank: int
    step: int
    given_back: bool
    memory: int
    """Bytes."""
    files: int
    cpu_seconds: float
    """Since the rank's start."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of the run, hundreds, 400 or more")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/soak_DATE.json")
    arguments = parser.parse_args()
    if arguments.steps < FIRST + 3 * WINDOW or arguments.steps % WINDOW:
        parser.error(f"--steps is {arguments.steps}, must be hundreds, and at least {FIRST + 3 * WINDOW}")
    with tempfile.TemporaryDirectory() as folder:
        notes = watch(Path(folder), arguments.steps)
    rows = judge(notes, arguments.steps)
    for row in rows:
        print(
            f"{row['case']}: {row['peer_figure']} -> {row['figure']} {row['unit']} ({row['ratio']}), met: {row['met']}"
        )
    if arguments.write:
        print(write_results("soak", ["torch", "transformers", "crossdock"], rows))
    return 0 if all(row["met"] for row in rows) else 1


def watch(folder: Path, steps: int) -> list[Note]:
    """Notes of a whole run's ranks."""
    run, notes = folder / "run", folder / "notes"
    notes.mkdir()
    command = [sys.executable, "-m", "crossdock", "train", str(ROOT / "configs/debug.toml"), *SETTINGS]
    command += ["--training.steps", str(steps), "--job.dump-folder", str(run)]
    path = os.pathsep.join((str(ROOT / "benchmarks/soak_inject"), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "SOAK_NOTES": str(notes)}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise RuntimeError(f"the run ended with {ended.returncode}:\n{ended.stdout}")
    return [Note(*json.loads(line)) for path in notes.iterdir() for line in path.read_text().splitlines()]


def note_each_step(trainer: Any) -> None:
    """In a rank: have the trainer, a module, append `Note`s to a file of this rank's in the folder SOAK_NOTES."""
    train_step, give_back_memory = trainer.Trainer._train_step, trainer.give_back_memory
    rank, process = int(os.environ["RANK"]), psutil.Process()
    path = Path(os.environ["SOAK_NOTES"], str(rank))
    step = 0

    def note(given_back: bool) -> None:
        used = process.cpu_times()
        memory, files = process.memory_full_info().uss, process.num_fds()
        noted = Note(rank, step, given_back, memory, files, used.user + used.system)
        with path.open("a") as file:
            print(json.dumps(noted), file=file)

    def noted_step(this: Any, *arguments: Any) -> Any:
        nonlocal step
        taken = train_step(this, *arguments)
        step = this.step
        note(given_back=False)
        return taken

    def noted_give_back() -> None:
        give_back_memory()
        note(given_back=True)

    trainer.Trainer._train_step, trainer.give_back_memory = noted_step, noted_give_back


def judge(notes: list[Note], steps: int) -> list[dict[str, Any]]:
    """A row each for memory in use, memory with what is kept, files and time."""
    windows = [range(start, start + WINDOW) for start in range(FIRST, steps, WINDOW)]

    def row(
        case: str, unit: str, scale: int, goal: float, figure: Callable[[list[Note]], float], given_back: bool = False
    ) -> dict[str, Any]:
        by_rank = []
        for rank in (0, 1):
            of_rank = [each for each in notes if each.rank == rank and each.given_back == given_back]
            by_rank.append([figure([each for each in of_rank if each.step in window]) for window in windows])
        course = max(by_rank, key=lambda course: course[-1] / course[0])
        ratio, after, before = course[-1] / course[0], course[-1], course[0]
        return {
            "case": f"{case}, the last {WINDOW} steps beside steps {FIRST} to {FIRST + WINDOW}",
            "unit": unit,
            "figure": round(after / scale, 3),
            "peer": f"steps {FIRST} to {FIRST + WINDOW}",
            "peer_figure": round(before / scale, 3),
            "ratio": round(ratio, 4),
            "goal": goal,
            "met": ratio <= goal,
            "course": [round(each / scale, 3) for each in course],
        }

    def least_memory(notes: list[Note]) -> float:
        return min(each.memory for each in notes)

    def median_memory(notes: list[Note]) -> float:
        return statistics.median(each.memory for each in notes)

    def median_files(notes: list[Note]) -> float:
        return statistics.median(each.files for each in notes)

    def median_time(notes: list[Note]) -> float:
        return statistics.median(after.cpu_seconds - before.cpu_seconds for before, after in pairwise(notes))

    return [
        row("memory of a rank, free memory given back", "MiB", 2**20, 1.01, least_memory, given_back=True),
        row("memory of a rank at a step's end", "MiB", 2**20, 1.01, median_memory),
        row("open files of a rank", "files", 1, 1.0, median_files),
        # The machine is not ours alone: what is steady here is within a tenth.
        row("a rank's time of the CPU for a step", "s", 1, 1.1, median_time),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
