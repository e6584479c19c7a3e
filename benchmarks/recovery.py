"""What it costs to be ready for a failure: snapshots, watchdog and fingerprints, on the debug preset.

    python -m benchmarks.recovery [--pairs 12] [--write]

Two gloo processes of one thread each train configs/debug.toml. Blocks of ten steps with a snapshot in the first and
blocks without take turns, in one run, so that both see the same machine; the ratio is that of two neighbouring blocks.
Beside it stands the time that snapshots take of the main thread alone. Watchdog and fingerprints are always on: what is
measured is the time spent in them, of the main thread and of a processor beside it, as a share of the steps' time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.results_file import spread, write_results
from crossdock.config import load_config, validate
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer
from crossdock.train.watching import RunWatch

WORLD_SIZE = 2
INTERVAL = 10
WARM_UP = 2 * INTERVAL
SNAPSHOT_GOAL, WATCH_GOAL = 1.03, 0.005
CONFIG = Path(__file__).parents[1] / "configs/debug.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="of blocks with a snapshot and without")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/recovery_DATE.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = _measure(Path(folder), arguments.pairs)
    rows = _rows(measured)
    for row in rows:
        print(f"{row['case']}: {row['figure']} {row['unit']}, goal {row['goal']}, {'met' if row['met'] else 'not met'}")
    if arguments.write:
        print(write_results("recovery", ["torch", "transformers", "crossdock"], rows))
    return 0


def _measure(folder: Path, pairs: int) -> dict[str, list[float]]:
    """What the slower of two processes took, by kind."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(WORLD_SIZE):
        ours, theirs = context.Pipe()
        process = context.Process(target=_train, args=(rank, folder, pairs, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    measured = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return {key: [max(values) for values in zip(*(each[key] for each in measured), strict=True)] for key in measured[0]}


def _train(rank: int, folder: Path, pairs: int, results: Connection) -> None:
    """One rank: trains, and sends seconds of blocks with and without snapshots, of snapshots, of watching, of steps."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(minutes=10))
    steps = WARM_UP + 2 * pairs * INTERVAL
    settings = ["--job.dump-folder", str(folder / "run"), "--training.steps", str(steps), "--checkpoint.interval", "0"]
    settings += ["--fault-tolerance.snapshot-interval", str(INTERVAL), "--checkpoint.no-last-save-in-hf"]
    config = load_config(CONFIG, [*settings, "--metrics.log-freq", "100", "--training.tuned", "off"])
    watch = RunWatch(rank)
    watch.start(config)
    trainer = Trainer(config, validate(config, WORLD_SIZE), torch.device("cpu"), rank == 0, StopSignal(), watch=watch)
    keep = trainer.keeper.after_step
    # A block ends before the snapshot that is the next one's.
    ends: list[float] = []
    taken: list[float] = []
    spent: list[float] = []

    def after_step(step: int, *arguments: Any, **named: Any) -> Any:
        now = time.perf_counter()
        spent.append(watch.seconds_spent)
        if step % INTERVAL == 0 and step >= WARM_UP:
            ends.append(now)
            if len(ends) % 2 == 0:
                return None
            result = keep(step, *arguments, **named)
            taken.append(time.perf_counter() - now)
            return result
        return keep(step, *arguments, **named)

    trainer.keeper.after_step = after_step  # type: ignore[method-assign]
    trainer.train()
    watch.stop()
    blocks = [later - earlier for earlier, later in pairwise(ends)]
    watched = (spent[-1] - spent[WARM_UP - 1]) / (ends[-1] - ends[0])
    results.send({"with": blocks[::2], "without": blocks[1::2], "snapshot": taken[:pairs], "watch": [watched]})
    dist.destroy_process_group()


def _rows(measured: dict[str, list[float]]) -> list[dict[str, Any]]:
    with_snapshot, without = measured["with"], measured["without"]
    pairs = min(len(with_snapshot), len(without))
    ratios = spread([ours / theirs for ours, theirs in zip(with_snapshot[:pairs], without[:pairs], strict=True)])
    case = f"{INTERVAL} steps with a snapshot"
    row = {"case": case, "figure": round(statistics.median(with_snapshot), 2), "unit": "s", "spread": ratios}
    row |= {"peer": f"{INTERVAL} steps without", "peer_figure": round(statistics.median(without), 2)}
    rows = [row | {"ratio": ratios["median"], "goal": SNAPSHOT_GOAL, "met": ratios["median"] <= SNAPSHOT_GOAL}]
    share = statistics.median(measured["snapshot"]) / statistics.median(without)
    rows.append(_share("main thread in a snapshot, share of ten steps", share, SNAPSHOT_GOAL - 1))
    rows.append(_share("watchdog and fingerprints, share of a step", measured["watch"][0], WATCH_GOAL))
    return rows


def _share(case: str, share: float, goal: float) -> dict[str, Any]:
    return {"case": case, "unit": "share", "figure": round(share, 6), "goal": round(goal, 6), "met": share <= goal}


if __name__ == "__main__":
    raise SystemExit(main())
