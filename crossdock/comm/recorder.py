"""What torch's flight recorder knows of this process's collectives: it notes each of them, FSDP's and ours alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Collective", "GroupCount", "counts", "is_recording", "started", "unfinished"]


class GroupCount(NamedTuple):
    """How many collectives a group of this rank has started, and how many of them are complete."""

    started: int
    completed: int


class Collective(NamedTuple):
    """One that this rank has started.

    Attributes:
        recorder_id: of its group in `counts`.
        group: name of its group, the same on all ranks.
        number: of the group's collectives, from 1.
        name: what it is, such as `all_to_all`.
        sizes: of its inputs.
        timeout: of its group, in seconds.
    """

    recorder_id: str
    group: str
    number: int
    name: str
    sizes: list[list[int]]
    timeout: float


def _dumps(*, entries: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of the recorders of torch, each with the name of its kind: gloo's, and NCCL's where there is one."""
    for kind in ("fr", "nccl"):
        dump = getattr(torch._C._distributed_c10d, f"_dump_{kind}_trace_json", None)  # type: ignore[attr-defined]
        if dump is not None:
            # The second argument leaves complete ones out, but gloo's are never said to be complete there.
            yield kind, json.loads(dump(entries, False))


def is_recording() -> bool:
    """Whether torch records, once there is a process group: its setting TORCH_FR_BUFFER_SIZE = 0 switches that off."""
    return any(dump.get("pg_config") for _, dump in _dumps(entries=False))


def counts() -> dict[str, GroupCount]:
    """By the recorder's own number of a group, which differs between ranks. Takes some 20 microseconds."""
    return {
        f"{kind} {group}": GroupCount(int(status["last_enqueued_collective"]), int(status["last_completed_collective"]))
        for kind, dump in _dumps(entries=False)
        for group, status in dump.get("pg_status", {}).items()
    }


def unfinished() -> list[Collective]:
    """Collectives that are under way, the oldest first. Takes up to 0.1 s."""
    return [
        Collective(
            f"{kind} {entry['pg_id']}",
            entry["process_group"][0],
            entry["collective_seq_id"],
            entry["profiling_name"].split(":")[-1],
            entry["input_sizes"],
            entry["timeout_ms"] / 1000,
        )
        for kind, dump in _dumps(entries=True)
        for entry in dump.get("entries", ())
        if not entry["retired"] and not entry["is_p2p"]
    ]


def started() -> dict[str, int]:
    """How many collectives each group of this rank has started, by the group's name. Takes microseconds."""
    groups: list[tuple[Any, str]] = list(dist.distributed_c10d._world.pg_names.items())
    return {name: group._get_sequence_number_for_group() for group, name in groups}
