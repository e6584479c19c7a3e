"""What a run reports: a line of JSON per step, and a display for the person who watches."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from crossdock.checkpoint import to_checked_json
from crossdock.dispatch import Traffic
from crossdock.parallel import ReplicaGroups, ReplicaTraffic
from crossdock.routing import StepLoad, load_statistics
from crossdock.tools.report import read_metrics

__all__ = [
    "MetricsLog",
    "ProgressDisplay",
    "gather_metrics",
    "last_logged_step",
    "load_metrics",
    "memory_use",
    "say",
    "traffic_metrics",
]

logger = logging.getLogger(__name__)

_SHOWN = 8


def memory_use(device: torch.device) -> tuple[float, float]:
    """Memory that this process holds, in GiB and in percent of the device's.

    The peak that the CUDA allocator reserved, of the GPU's memory; the resident set, of the machine's memory, on CPU.
    """
    if device.type == "cuda":
        held, there = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        held = int(Path("/proc/self/statm").read_text().split()[1]) * page
        there = os.sysconf("SC_PHYS_PAGES") * page
    return held / 2**30, 100 * held / there


def gather_metrics(
    terms: Mapping[str, Tensor], norm: Tensor, device: torch.device, groups: ReplicaGroups | None = None
) -> tuple[dict[str, float], float, dict[str, float]]:
    """What a step's numbers are over all ranks: the same bits on each, whatever devices they have.

    All add up the same numbers in the same order, on the host, and take the first rank's norm. Collective, over the
    default group: one all-gather.

    Args:
        terms: this rank's of each loss: fp64 scalars.
        norm: of the global gradient, a fp64 scalar.
        device: of this rank.
        groups: over which losses are summed too; the norm is that of the first one's.

    Returns:
        The sum of each loss, the norm, and the memory of the rank that holds most.
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    own = torch.stack([zero + value for value in (*terms.values(), norm, *memory_use(device))])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    *columns, norms, gib, percent = zip(*torch.stack(everyone).tolist(), strict=True)
    values = [*(float(sum(column)) for column in columns), norms[0]]
    if groups is not None and groups.count > 1:
        over_groups = torch.tensor(values if groups.index == 0 else [*values[:-1], 0.0], dtype=torch.float64)
        groups.sum_(over_groups)
        values = over_groups.tolist()
    return (
        dict(zip(terms, values[:-1], strict=True)),
        values[-1],
        {"memory_gib": max(gib), "memory_percent": max(percent)},
    )


def load_metrics(load: StepLoad) -> dict[str, float]:
    """How even a step's load was, of the layer where it is worst, and how many experts and routes went without."""
    statistics = load_statistics(load.routes)
    worst = [statistics.max_mean.max(), statistics.variation.max(), statistics.entropy.min()]
    totals = [statistics.dead.sum(), load.dropped.sum().double()]
    max_mean, variation, entropy, dead, dropped = torch.stack([*worst, *totals]).tolist()
    return {
        "max_mean_load": max_mean,
        "load_variation": variation,
        "load_entropy": entropy,
        "dead_experts": int(dead),
        "dropped_routes": int(dropped),
    }


def traffic_metrics(
    traffic: Traffic, of_replicas: ReplicaTraffic | None, device: torch.device, groups: ReplicaGroups
) -> dict[str, int | float]:
    """Bytes that all ranks of all groups sent, of what each sent; seconds are a rank's mean. Collective."""
    own = [*astuple(traffic), *(of_replicas or ())]
    sums = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    groups.sum_(sums)
    values = sums.tolist()
    in_all = Traffic(*map(int, values[: len(astuple(traffic))]))
    replicas: dict[str, int | float] = {}
    if of_replicas is not None:
        sent, skipped, overlapped, waited = values[-len(of_replicas) :]
        replicas = {
            "replica_bytes": int(sent),
            "skipped_replica_bytes": int(skipped),
            "replica_overlap_seconds": overlapped / dist.get_world_size(),
            "replica_wait_seconds": waited / dist.get_world_size(),
        }
    return {
        "bytes_within_nodes": in_all.within,
        "bytes_between_nodes": in_all.between,
        "least_bytes_within_nodes": in_all.least_within,
        "least_bytes_between_nodes": in_all.least_between,
        "metadata_bytes": in_all.metadata,
        **replicas,
    }


class MetricsLog:
    """`metrics.jsonl`: one object per step, each with its checksum. Those after `resumed_step` are dropped.

    They are of a run that broke off. Lines that are damaged are dropped, too, and told in a warning.

    Args:
        path: of the file.
        resumed_step: the last step that counts, 0 for a new run.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        rows, broken = read_metrics(path) if path.is_file() else ([], [])
        if broken:
            shown = ", ".join(map(str, broken[:_SHOWN])) + ", ..." * (len(broken) > _SHOWN)
            logger.warning("%s: cut off or damaged, and dropped: line %s", path, shown)
        kept = [row for row in rows if row["step"] <= resumed_step]
        if missing := resumed_step - len({row["step"] for row in kept}):
            logger.warning("%s: %s of the %s steps so far are not in it", path, missing, resumed_step)
        beside = path.with_suffix(".partial")
        beside.write_text("".join(f"{to_checked_json(row)}\n" for row in kept))
        beside.rename(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        self._unwritten = b""

    def write(self, metrics: dict[str, Any]) -> None:
        """Add a line. Raises OSError where the disk is full, for one; the line is kept then, for the next call."""
        self._unwritten += f"{to_checked_json(metrics)}\n".encode()
        self._flush()

    def close(self) -> None:
        """Raises OSError where a line that was kept still cannot be written."""
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._unwritten) != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file.fileno(), size)  # No part of a line stays.
            raise
        self._unwritten = b""


def last_logged_step(path: Path) -> int:
    """The last step that a `metrics.jsonl` tells of; 0 where there is none."""
    rows, _ = read_metrics(path) if path.is_file() else ([], [])
    return max((row["step"] for row in rows), default=0)


def say(message: str, *, end: str = "\n") -> None:
    """Print a line, or a piece of one, unless nobody reads any more."""
    try:
        print(message, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)


class ProgressDisplay:
    """A progress bar on a terminal, else a plain line every `log_freq` steps.

    Args:
        steps: of the whole run.
        resumed_step: where it goes on.
        log_freq: steps between plain lines.
        on_gpu: show FLOPs too.
    """

    def __init__(self, steps: int, resumed_step: int, log_freq: int, *, on_gpu: bool = False) -> None:
        self._steps = steps
        self._log_freq = log_freq
        self._on_gpu = on_gpu
        self._first = resumed_step + 1
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task("", total=steps, completed=resumed_step, line="")
            self._bar.start()

    def update(self, metrics: dict[str, Any]) -> None:
        """Show the metrics of a step."""
        step = metrics["step"]
        flops = ""
        if self._on_gpu:
            mfu = "" if metrics["mfu"] is None else f" ({metrics['mfu']:.1f} % MFU)"
            flops = f"{metrics['tflops']:.1f} TFLOP/s{mfu}  "
        validated = "validation_loss" in metrics
        validation = f"validation {_number(metrics['validation_loss'], '.4f')}  " if validated else ""
        ranks = ""
        if "rank_max_mean" in metrics:
            before, after = metrics["rank_max_mean_before"], metrics["rank_max_mean"]
            ranks = f", of ranks {before:.2f}" + (f" > {after:.2f}" if abs(before - after) > 5e-3 else "")
        line = (
            f"loss {_number(metrics['loss'], '.4f')}  {validation}"
            f"{metrics['tokens_per_second_per_gpu']:,.0f} tok/s/rank  {flops}"
            f"{metrics['memory_gib']:.2f} GiB  max/mean load {metrics['max_mean_load']:.2f}{ranks}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
        elif validated or step in (self._first, self._steps) or step % self._log_freq == 0:
            seconds = (time.monotonic() - self._started) / (step - self._first + 1) * (self._steps - step)
            self.say(f"step {step:>{len(str(self._steps))}}/{self._steps}  {line}  {seconds:.0f} s left")

    def say(self, message: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            say(message)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _number(value: float | None, spec: str) -> str:
    return "not finite" if value is None else format(value, spec)
