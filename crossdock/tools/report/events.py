"""`events.jsonl`: when a run was started, what befell it, and what was done about it (docs/report.md)."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from crossdock.checkpoint import parse_checked_json, to_checked_json

__all__ = ["EVENTS_FILE", "Event", "EventKind", "note_event", "read_events"]

EVENTS_FILE = "events.jsonl"
"""In a run folder, beside metrics.jsonl; unlike there, nothing is dropped when a run is resumed."""

EventKind: TypeAlias = Literal["start", "stop", "failure", "bad step", "groups"]
"""start: of the training loop, for the first time or again. stop: before the last step, as asked. failure: what ended
ranks, as the launcher has heard of it. bad step: one that was not applied. groups: another number of replica groups."""

# Of a message; a traceback belongs to the log.
_LONGEST = 2000


class Event(NamedTuple):
    """What happened.

    Attributes:
        time: seconds since 1970.
        kind: see `EventKind`.
        step: the last one that was done by then; `None` where whoever tells does not know.
        message: for people.
    """

    time: float
    kind: EventKind
    step: int | None
    message: str


def note_event(folder: Path, kind: EventKind, message: str, step: int | None = None) -> None:
    """Add to a run folder's events; where that fails, for a full disk, the run is worth more, and nothing is said."""
    line = to_checked_json({"time": time.time(), "kind": kind, "step": step, "message": message[:_LONGEST]})
    with contextlib.suppress(OSError):
        # In one write, since ranks' and launchers' lines go to one file; a link of somebody else's is not followed.
        descriptor = os.open(folder / EVENTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)


def read_events(folder: Path) -> tuple[list[Event], int]:
    """The events of a run folder in the order of time, and how many lines are left out, damaged.

    Raises OSError where a file that is there cannot be read.
    """
    path = folder / EVENTS_FILE
    if not path.is_file():
        return [], 0
    events, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = parse_checked_json(line)
            event = Event(float(row["time"]), row["kind"], row["step"], str(row["message"]))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            damaged += 1
            continue
        if event.kind in get_args(EventKind) and math.isfinite(event.time) and type(event.step) in (int, type(None)):
            events.append(event)
        else:
            damaged += 1
    return sorted(events, key=lambda event: event.time), damaged
