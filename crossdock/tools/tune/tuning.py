"""`crossdock tune` on one rank: all settings one after the other, written as they are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from crossdock.comm import raise_together
from crossdock.config import Config
from crossdock.config.tuned import TunedEntry, TunedFileError, write_entry
from crossdock.parallel import ParallelDims
from crossdock.tools.tune.dimensions import Dimension, dimensions
from crossdock.tools.tune.layer import MeasuredLayer
from crossdock.tools.tune.ranks import ProcessGroupAgreement
from crossdock.tools.tune.sweep import Outcome, Sweep
from crossdock.tools.tune.table import SweepDisplay, outcome_table, output_console, remarks

__all__ = ["TuneOptions", "tune"]


@dataclass(frozen=True)
class TuneOptions:
    """What a sweep may take and do.

    Attributes:
        output: the file that is written.
        seconds: for all settings together; what is not known then keeps its default.
        rounds: in which each candidate is measured once.
        allow_lossy: choose a wire that changes numbers, where it is faster.
        own_threads: whether the number of threads was left open.
    """

    output: Path
    seconds: float = 300.0
    rounds: int = 7
    allow_lossy: bool = False
    own_threads: bool = False


def tune(
    config: Config,
    dims: ParallelDims,
    device: torch.device,
    options: TuneOptions,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> TunedEntry:
    """Sweep what is open of a run's settings; the first rank shows and writes. Collective.

    Args:
        config: of the run, validated.
        dims: its layout.
        device: of this rank.
        options: the same on all ranks.
        stop_requested: whether this rank was asked to stop: what is known by then is written.
        console: of the first rank; standard output unless told.

    Returns:
        What was written, the same on all ranks.

    Raises:
        SweepFailed: where the defaults themselves cannot be measured.
        TunedFileError, OSError: on all ranks, where the file cannot be written.
    """
    subject = MeasuredLayer(config, dims, device)
    layer, key = subject.layer, subject.key
    swept = dimensions(
        layer,
        config.moe,
        subject.dtype,
        device,
        tokens_per_rank=key.tokens_per_rank,
        ranks_per_machine=key.ranks_per_machine,
        threads=subject.threads,
        own_threads=options.own_threads,
    )
    display = SweepDisplay(console or output_console()) if dist.get_rank() == 0 else None
    say: Callable[[str], None] = display.say if display is not None else lambda _: None
    say(
        f"tuning {config.model.name}: H {key.hidden_size}, I {key.intermediate_size}, E {key.num_experts}, "
        f"K {key.top_k}, {key.tokens_per_rank} tokens per rank, {key.dtype}, on {dims.world_size} ranks ({dims}), "
        f"{key.device}; at most {options.seconds:.0f} s"
    )
    sweep = Sweep(
        subject,
        ProcessGroupAgreement(),
        rounds=options.rounds,
        seconds=options.seconds,
        allow_lossy=options.allow_lossy,
        stop_requested=stop_requested,
        measured=display.measured if display is not None else lambda *_: None,
    )
    outcomes: list[Outcome] = []
    base: dict[str, Any] = {}
    todo = [each for each in swept if not each.skipped]
    skipped = [each for each in swept if each.skipped]
    try:
        for number, dimension in enumerate(todo):
            if sweep.stopped:
                skipped.append(Dimension(dimension.name, skipped="no time was left", lossy=dimension.lossy))
                continue
            outcome = sweep.sweep(dimension, base, len(todo) - number)
            outcomes.append(outcome)
            base[dimension.name] = outcome.chosen
            say(f"{dimension.name}: {outcome.verdict}")
            subject.forget()
            _write(options.output, _entry(subject, outcomes), writes=display is not None)
    finally:
        subject.apply({})
        if display is not None:
            display.close()
    if display is not None:
        display.show(outcome_table(outcomes))
        for line in remarks(outcomes, skipped):
            say(line)
    entry = _entry(subject, outcomes)
    taken = ", ".join(f"{name} = {value}" for name, value in entry.choices.items()) or "the defaults everywhere"
    say(f"chosen: {taken}")
    if outcomes:
        say(f"written: {options.output}")
    return entry


def _write(path: Path, entry: TunedEntry, *, writes: bool) -> None:
    """The first rank `writes`; where it cannot, all raise, or they would wait for it. Collective."""
    error: Exception | None = None
    try:
        if writes:
            write_entry(path, entry)
    except (OSError, TunedFileError) as caught:
        error = caught
    raise_together(error)


def _entry(subject: MeasuredLayer, outcomes: list[Outcome]) -> TunedEntry:
    settings = {each.dimension.name: _record(each) for each in outcomes if each.finished}
    return TunedEntry(subject.key, datetime.now().isoformat(timespec="seconds"), settings)


def _record(outcome: Outcome) -> dict[str, Any]:
    candidates = [
        {
            "value": row.value,
            "seconds": row.seconds,
            "speed": None if row.speed is None else row.speed._asdict(),
            "note": row.note,
        }
        for row in outcome.rows
    ]
    return {
        "default": outcome.default,
        "chosen": outcome.chosen,
        "verdict": outcome.verdict,
        "part": outcome.dimension.part,
        "candidates": candidates,
    }
