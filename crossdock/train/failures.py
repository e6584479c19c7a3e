"""What ended a rank, left in a file for the launcher."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Failure", "Failures"]


@dataclass(frozen=True)
class Failure:
    """Why a rank ended."""

    time: float
    rank: int
    host: str
    kind: Literal["memory", "error", "timeout", "lost", "mistake"]
    phase: str
    message: str
    final: bool


class Failures:
    """Failures of the ranks of this machine, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, failure: Failure) -> None:
        path = self.folder / f"failure-{failure.rank}.json"
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(asdict(failure)))
        beside.rename(path)

    def first(self) -> Failure | None:
        found = [Failure(**json.loads(path.read_text())) for path in self.folder.glob("failure-*.json")]
        return min(found, key=lambda failure: (failure.kind == "lost", failure.time), default=None)

    def clear(self) -> None:
        for path in self.folder.glob("failure-*.json"):
            path.unlink()
