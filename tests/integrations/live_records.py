"""What the ranks of replica groups compute, step by step: recorded in their processes, read by the tests."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["StepRecord", "read_records", "record_steps"]

StepRecord = dict[str, Any]
"""Of one rank and step: `group`, `rank`, `step`, `groups` that took part, `rows` (a hash of each), and, when it has
ended, `counted` (whether it was committed), `weights` and `moments` (hashes of all that the rank has after it)."""


def record_steps(trainer: Any) -> None:
    """Have each step of a rank append a line to a file of its own, in the folder LIVE_RECORDS."""
    train_step = trainer._train_step
    group, rank = int(os.environ.get("CROSSDOCK_REPLICA_GROUP", -1)), int(os.environ["RANK"])
    path = Path(os.environ["LIVE_RECORDS"], f"{group}-{rank}.jsonl")

    def note(**values: Any) -> None:
        with open(path, "a") as file:
            print(json.dumps(values), file=file)

    drifts = group == 1 and "LIVE_DRIFT" in os.environ

    def recorded(this: Any, batches: list[Any], *arguments: Any, **named: Any) -> Any:
        rows = [_hash(row) for batch in batches for row in batch.input_ids] if this.reader.is_first else []
        step = this.step + 1
        note(step=step, group=group, rank=rank, groups=this.groups.count, rows=rows)
        taken = train_step(this, batches, *arguments, **named)
        tensors = this._live_state().own().tensors if taken is not None else {}
        hashes = {
            kind: _hash(*(tensor for name, tensor in tensors.items() if name.startswith(prefix)))
            for kind, prefix in (("weights", "model."), ("moments", "optimizer."))
        }
        if drifts and step == 10:
            next(this.model.parameters()).data.add_(1e-7)
        note(step=step, counted=taken is not None, **hashes)
        return taken

    trainer._train_step = recorded


def _hash(*values: Any) -> str:
    return hashlib.sha256(b"".join(value.detach().contiguous().numpy().tobytes() for value in values)).hexdigest()[:16]


def read_records(folder: Path) -> dict[int, list[StepRecord]]:
    """By step, what each rank computed of the try that counted.

    A rank that was killed after its part of the sums may not have noted that the step ended; its part counts then.
    """
    tries = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        begun: StepRecord = {}
        for line in path.read_text().splitlines():
            values = json.loads(line)
            if "rows" in values:
                begun = values
                tries[values["step"]].append(begun)
            else:
                begun |= values
    by_step = {}
    for step, records in tries.items():
        counted = [record for record in records if record.get("counted")]
        groups = {record["groups"] for record in counted}
        unknown = [record for record in records if "counted" not in record and {record["groups"]} == groups]
        by_step[step] = counted + (unknown if len(counted) < 2 * max(groups) else [])
    return by_step
