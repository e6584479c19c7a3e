"""What a run folder tells: metrics as columns, loads, settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crossdock.checkpoint import latest_step, parse_checked_json, saved_world_size
from crossdock.config import RUN_CONFIG_FILE, Config, ConfigError, read_run_settings
from crossdock.tools.report.events import EVENTS_FILE, Event, read_events
from crossdock.tools.report.load import LOAD_FILE, RANK_LOAD_FILE, LoadFileError, read_load

__all__ = [
    "FAULTS_FOLDER",
    "METRICS_FILE",
    "FaultReport",
    "Loads",
    "ReportError",
    "RunRecords",
    "read_metrics",
    "read_run",
]

METRICS_FILE = "metrics.jsonl"
"""Of a run folder: a line per step."""
FAULTS_FOLDER = "faults"
"""Of a run folder: reports of ranks that waited in vain."""
_MOST_REPORTS = 10
_LONGEST_REPORT = 40_000
_SHOWN = 8


class ReportError(ValueError):
    """A report that cannot be made; the message names the folder or file and says why."""


class Loads(NamedTuple):
    """Of experts or ranks, one record or more: `steps` `[N]` ascending, `counts` `[N, L, E]`, both int32."""

    steps: np.ndarray
    counts: np.ndarray


class FaultReport(NamedTuple):
    """A file of `FAULTS_FOLDER`: its name, and its text, cut where it is very long."""

    name: str
    text: str


@dataclass
class RunRecords:
    """A run folder's contents.

    Attributes:
        folder: of the run.
        steps: `[S]` int64, ascending.
        columns: each metric `[S]` float64; NaN where a step lacks it or where it was not finite.
        skipped: `[S]` bool, steps without an update because loss or gradient norm was not finite.
        expert_loads: `None` without a record.
        rank_loads: likewise; one rank that has all experts records none.
        config: the resolved settings; `None` where they cannot be read.
        world_size: ranks of the newest checkpoint; `None` without one.
        events: what happened, in order.
        reports: of ranks that waited in vain, the newest ones.
        ended: when the last line of metrics was written, UTC.
        notes: what could not be read, a sentence each.
    """

    folder: Path
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    skipped: np.ndarray
    ended: datetime
    expert_loads: Loads | None = None
    rank_loads: Loads | None = None
    events: list[Event] = field(default_factory=list)
    reports: list[FaultReport] = field(default_factory=list)
    config: Config | None = None
    world_size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def span(self) -> tuple[int, int]:
        """The first step and the last."""
        return int(self.steps[0]), int(self.steps[-1])

    def column(self, name: str) -> np.ndarray:
        """`[S]`; all NaN where no step has this metric."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def has(self, name: str) -> bool:
        """Whether some step has a finite value of this metric."""
        return bool(np.isfinite(self.column(name)).any())

    def last(self, name: str) -> tuple[int, float] | None:
        """Step and value of a metric's last finite value."""
        finite = np.flatnonzero(np.isfinite(self.column(name)))
        return (int(self.steps[finite[-1]]), float(self.columns[name][finite[-1]])) if len(finite) else None


def read_run(folder: Path) -> RunRecords:
    """Everything that a report shows of a run.

    Raises:
        ReportError: for a folder that holds no step of a run.
    """
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder; a report is made of a run's, such as runs/debug/20261121-101622")
    if not path.is_file():
        raise ReportError(f"{folder} holds no run: {METRICS_FILE} is not in it")
    if _leads_out(path, folder):
        raise ReportError(f"{path} {_LEADS_OUT}")
    try:
        lines, broken = read_metrics(path)
        ended = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from None
    # Of two lines of a step the later counts.
    by_step = {row["step"]: {name: _number(value) for name, value in row.items() if _is_number(value)} for row in lines}
    if not by_step:
        raise ReportError(f"{path} has no step yet{_damaged(broken, '; ')}")
    steps = np.array(sorted(by_step), dtype=np.int64)
    rows = [by_step[step] for step in steps.tolist()]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names if name != "step"}
    skipped = np.array([any(np.isnan(row.get(name, 0.0)) for name in ("loss", "grad_norm")) for row in rows])
    records = RunRecords(folder, steps, columns, skipped, ended)
    if broken:
        records.notes.append(f"{METRICS_FILE}: {_damaged(broken)}.")
    if _is_there(LOAD_FILE, records):
        records.expert_loads = _loads(folder / LOAD_FILE, records.notes)
    if _is_there(RANK_LOAD_FILE, records):
        records.rank_loads = _loads(folder / RANK_LOAD_FILE, records.notes)
    _add_faults(records)
    _add_settings(records)
    return records


# A run folder may be somebody else's, and its report is handed on: it must not show what else lies on this machine.
_LEADS_OUT = "is a link that leads out of the run folder, and is not followed"


def _leads_out(path: Path, folder: Path) -> bool:
    return not path.resolve().is_relative_to(folder.resolve())


def _is_there(name: str, records: RunRecords) -> bool:
    """Whether there is such a file in the run folder; a link that leads out of it is noted."""
    path = records.folder / name
    if not _leads_out(path, records.folder):
        return path.is_file()
    records.notes.append(f"{name} {_LEADS_OUT}.")
    return False


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a metrics.jsonl that are what was written, and the numbers, from 1, of those that are not.

    A line ends with its checksum. A file without any is of an older version, whose lines are taken as they are.

    Raises:
        OSError: where it cannot be read.
    """
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.stat().st_size else []
    parse = parse_checked_json if any(b'"checksum": "' in line for line in lines) else json.loads
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            rows.append(row)
        else:
            broken.append(number)
    return rows, broken


def _damaged(lines: list[int], before: str = "") -> str:
    if not lines:
        return ""
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    named = f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:_SHOWN]))}{more}"
    return f"{before}{named} could not be read: cut off or damaged"


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


# Charts take differences and powers of what they show.
_MOST = 1e150


def _number(value: float | None) -> float:
    try:
        number = np.nan if value is None else float(value)
    except OverflowError:
        number = np.nan
    return number if abs(number) < _MOST else np.nan


def _loads(path: Path, notes: list[str]) -> Loads | None:
    """What a file of loads holds; what is wrong with it goes to `notes`."""
    try:
        *read, damaged = read_load(path)
    except LoadFileError as error:
        notes.append(_without_place(f"{error}.", path.parent))
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}.")
    else:
        loads = Loads(*read)
        if damaged:
            notes.append(f"{path.name}: {damaged} record{'s' * (damaged > 1)} left out: damaged.")
        # Of a run that broke off and was resumed without its loads, or of a file put together by hand.
        if (np.diff(loads.steps) > 0).all():
            return loads if len(loads.steps) else None
        notes.append(f"The steps in {path.name} do not ascend.")
    return None


def _add_faults(records: RunRecords) -> None:
    try:
        damaged = 0
        if _is_there(EVENTS_FILE, records):
            records.events, damaged = read_events(records.folder)
        if damaged:
            records.notes.append(f"{EVENTS_FILE}: {damaged} line{'s' * (damaged > 1)} left out: damaged.")
    except OSError as error:
        records.notes.append(f"{EVENTS_FILE} could not be read: {error.strerror}.")
    for path in sorted(records.folder.glob(f"{FAULTS_FOLDER}/*.txt"))[-_MOST_REPORTS:]:
        if not _is_there(f"{FAULTS_FOLDER}/{path.name}", records):
            continue
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                records.reports.append(FaultReport(path.name, file.read(_LONGEST_REPORT)))
        except OSError as error:
            records.notes.append(f"{FAULTS_FOLDER}/{path.name} could not be read: {error.strerror}.")


def _add_settings(records: RunRecords) -> None:
    if _is_there(RUN_CONFIG_FILE, records):
        try:
            records.config = read_run_settings(records.folder)
        except ConfigError as error:
            records.notes.append(_without_place(f"The settings could not be read: {error}.", records.folder))
    checkpoints = records.folder / "checkpoint"
    newest = latest_step(checkpoints)
    records.world_size = None if newest is None else saved_world_size(checkpoints, newest)
    if newest is not None and records.world_size is None:
        records.notes.append(f"{checkpoints.name}/step-{newest:08d}/state.json could not be read: it is damaged.")


def _without_place(message: str, folder: Path) -> str:
    """A message that names files by their place in the run folder, since a report is handed on."""
    return message.replace(f"{folder}/", "")
