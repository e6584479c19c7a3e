"""Runs that faults befall: `python -m tests.chaos.run [--faults 32] [--seed 0] [--write]` prints a table.

Every run must finish by itself with the losses of an undisturbed one, bit by bit, on the same samples, and with no more
steps computed twice than two snapshots lie apart: the newest may have been in flight.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from tests.chaos.faults import KINDS, POINTS, Fault
from tests.tiny import write_assets

ROOT = Path(__file__).parents[2]
STEPS, SNAPSHOT_INTERVAL, CHECKPOINT_INTERVAL, REBALANCE_INTERVAL = 36, 4, 10, 6
MOST_REPEATED = 2 * SNAPSHOT_INTERVAL  # The newest snapshot may have been in flight.
# A run with five faults takes a minute or two; one that hangs is an error.
_SECONDS = 600


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        losses: of each step, as they stand in metrics.jsonl in the end.
        computed: for each start, the steps in the order in which the first rank computed them.
        seen: what each rank saw at each step: digests of its batches, the same whenever it saw it.
        seconds: that it took.
        output: of the command.
    """

    losses: list[float]
    computed: list[list[int]]
    seen: dict[tuple[int, int], set[str]]
    seconds: float
    output: str

    @property
    def repeated(self) -> list[int]:
        """For each new start, how many steps were computed again."""
        repeated, done = [], 0
        for steps in self.computed:
            if done and steps:
                repeated.append(done - steps[0] + 1)
            done = max([done, *steps])
        return repeated


def plan(count: int, world_size: int, rng: random.Random, first: int = 0) -> list[list[Fault]]:
    """Faults for runs of up to five each: every point with every kind before any comes again."""
    cases = [(point, kind) for point in POINTS for kind in KINDS]
    rng.shuffle(cases)
    cases = (cases * (count // len(cases) + 1))[:count]
    runs = []
    for start in range(0, count, 5):
        own = cases[start : start + 5]
        steps = sorted(rng.sample(range(3, STEPS - REBALANCE_INTERVAL), len(own)))
        runs.append(
            [
                Fault(first + start + index, step, rng.randrange(world_size), point, kind)
                for index, (step, (point, kind)) in enumerate(zip(steps, own, strict=True))
            ]
        )
    return runs


def settings(assets: Path, run_folder: Path) -> list[str]:
    """Of a run of seconds that does all that a fault may hit."""
    return [
        *("--model.hf-assets-path", str(assets / "assets"), "--data.source", str(assets / "speeches")),
        *("--data.cache-folder", str(assets / "cache"), "--job.dump-folder", str(run_folder)),
        *("--training.steps", str(STEPS), "--training.seq-len", "32", "--training.local-batch-size", "2"),
        *("--training.tuned", "off", "--checkpoint.no-last-save-in-hf"),
        *("--parallelism.expert-parallel-degree", "2", "--job.comm-timeout-seconds", "10"),
        *("--checkpoint.interval", str(CHECKPOINT_INTERVAL), "--checkpoint.async-mode", "async"),
        *("--balance.strategy", "eplb", "--balance.rebalance-interval", str(REBALANCE_INTERVAL)),
        *("--balance.no-move-if-it-pays", "--balance.min-gain", "0"),
        *("--fault-tolerance.snapshot-interval", str(SNAPSHOT_INTERVAL), "--fault-tolerance.max-restarts", "3"),
    ]


def run(folder: Path, assets: Path, world_size: int, faults: list[Fault], *more: str) -> Outcome:
    """One run with faults. Raises AssertionError with its output where it did not finish."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps([fault.to_json() for fault in faults]))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'tests/chaos/inject'}:{ROOT}",
        "CHAOS_PLAN": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "crossdock", "train", "--nproc", str(world_size)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, *settings(assets, folder / "run"), *more],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_SECONDS,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}"
    fired = sum((folder / f"fired-{fault.number}").exists() for fault in faults)
    assert fired == len(faults), f"{fired} of {len(faults)} faults came about\n{done.stdout}"
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1)), done.stdout
    seen: dict[tuple[int, int], set[str]] = {}
    computed: list[list[int]] = []
    for rank in range(world_size):
        for line in (folder / f"computed-{rank}.jsonl").read_text().splitlines():
            values = json.loads(line)
            if "start" in values:
                computed += [[]] if rank == 0 else []
                continue
            seen.setdefault((rank, values["step"]), set()).add(values["seen"])
            if rank == 0:
                computed[-1].append(values["step"])
    return Outcome([line["loss"] for line in metrics], computed, seen, time.monotonic() - started, done.stdout)


def check(outcome: Outcome, reference: Outcome) -> None:
    """What must hold of a run that faults befell. Raises AssertionError."""
    assert outcome.losses == reference.losses, f"other losses than those of the undisturbed run\n{outcome.output}"
    assert outcome.seen == reference.seen, "other samples than those of the undisturbed run"
    assert max(outcome.repeated, default=0) <= MOST_REPEATED, f"steps computed again: {outcome.repeated}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=32, help="how many, over both numbers of processes (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan (0)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/chaos_DATE.json as well")
    parsed = parser.parse_args()
    rng = random.Random(parsed.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="crossdock-chaos-") as temporary:
        top = Path(temporary)
        write_assets(top / "assets")
        for world_size, share in ((2, parsed.faults // 2), (4, parsed.faults - parsed.faults // 2)):
            reference = run(top / f"reference-{world_size}", top, world_size, [])
            for index, faults in enumerate(plan(share, world_size, rng, first=100 * world_size)):
                outcome = run(top / f"run-{world_size}-{index}", top, world_size, faults)
                check(outcome, reference)
                rows.append(
                    {
                        "case": f"{world_size} processes, run {index}",
                        "faults": [fault.to_json() for fault in faults],
                        "figure": max(outcome.repeated, default=0),
                        "unit": "steps computed again at most",
                        "goal": MOST_REPEATED,
                        "met": True,  # Else `check` had raised.
                        "steps_computed_again": outcome.repeated,
                        "seconds": round(outcome.seconds),
                        "undisturbed_seconds": round(reference.seconds),
                        "results_agree": True,  # Likewise.
                    }
                )
                for fault in faults:
                    print(
                        f"{world_size} processes  step {fault.step:2d}  rank {fault.rank}  {fault.point:10s} "
                        f"{fault.kind}",
                        flush=True,
                    )
                print(
                    f"  finished, losses equal; steps computed again {outcome.repeated}; {outcome.seconds:.0f} s, "
                    f"undisturbed {reference.seconds:.0f} s",
                    flush=True,
                )
    print(f"{parsed.faults} faults, all runs finished, all losses equal bit by bit")
    if parsed.write:
        print(write_results("chaos", ["torch", "transformers", "crossdock"], rows))


if __name__ == "__main__":
    main()
