"""What befell a rank, left where its launcher looks; and which of many failures is the first cause."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch

from crossdock.checkpoint import CheckpointError
from crossdock.config import ConfigError
from crossdock.data import DataError
from crossdock.dispatch import RankFailure
from crossdock.parallel import GroupsFailed
from crossdock.train.together import TrainingStopped

__all__ = ["Failure", "FailureKind", "Failures", "kind_of"]

FailureKind: TypeAlias = Literal["memory", "error", "timeout", "lost", "mistake"]
"""memory: there was not enough of it. timeout: a collective did not complete. lost: another rank is gone, or the
connection to it or to the store: a consequence of something else. mistake: of the user's. error: any other."""

_PREFIX = "failure-"
# What gloo, NCCL and torch's stores say where another process is gone.
_LOST = re.compile(
    r"connection (?:was |is )?(?:closed|reset|refused|lost|aborted)|broken pipe|socket closed|peer closed|"
    r"connectFullMesh|no route to host|remote process exited|ncclRemoteError|ncclSystemError|"
    r"failed to (?:recv|send|connect)|recvValue failed|sendBytes failed|rendezvous",
    re.IGNORECASE,
)
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """What ended a rank.

    Attributes:
        time: seconds since 1970, by the rank's machine.
        rank: over all machines.
        host: name of its machine.
        kind: see `FailureKind`.
        phase: where it was, for people.
        message: for people.
        final: starting again cannot help.
    """

    time: float
    rank: int
    host: str
    kind: FailureKind
    phase: str
    message: str
    final: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        """Raises ValueError for what `to_json` has not written."""
        try:
            failure = cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(f"no failure: {error}") from None
        numbers = isinstance(failure.time, (int, float)) and isinstance(failure.rank, int)
        if not numbers or failure.kind not in get_args(FailureKind):
            raise ValueError(f"no failure: {text[:200]}")
        return failure


class Failures:
    """The failures of a run's ranks on one machine, and those of other machines that its ranks have heard of.

    Args:
        folder: of the machine's launcher; must exist. Files of others in it are let be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, failure: Failure) -> None:
        """Write a failure, whole or not at all; one that is there already, once. Raises OSError."""
        path = self.folder / f"{_PREFIX}{failure.rank}-{failure.time:.6f}.json"
        beside = path.with_suffix(f".{os.getpid()}.partial")
        beside.write_text(failure.to_json())
        beside.rename(path)

    def first(self) -> Failure | None:
        """The first in time that is no mere consequence: another rank that was lost never hides why."""
        return min(self._all(), key=lambda failure: (failure.kind == "lost", failure.time, failure.rank), default=None)

    def clear(self) -> None:
        """Before ranks are started again. Raises OSError."""
        for path in self.folder.glob(f"{_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _all(self) -> Iterator[Failure]:
        for path in self.folder.glob(f"{_PREFIX}*.json"):
            try:
                yield Failure.from_json(path.read_text())
            except (OSError, ValueError):
                continue  # not ours


def kind_of(error: BaseException) -> tuple[FailureKind, bool]:
    """What kind of failure an exception is, and whether starting again cannot help."""
    causes = list(_causes(error))
    if isinstance(error, (ConfigError, DataError)):
        return "mistake", True
    if any(_is_out_of_memory(cause) for cause in causes):
        return "memory", False
    # What replica groups have to say is a sentence of its own, whatever it quotes.
    if isinstance(error, GroupsFailed):
        return "error", False
    # A checkpoint that broke off because a rank was lost says so in its own words.
    if any(_is_lost(cause) for cause in causes):
        return "lost", False
    if isinstance(error, (CheckpointError, TrainingStopped)):
        return "error", True
    if any(isinstance(cause, RuntimeError) and _TIMED_OUT.search(str(cause)) for cause in causes):
        return "timeout", False
    return "error", False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from: a pipeline's schedule says what was being done around them."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator raises plain RuntimeErrors.
    return isinstance(error, (RuntimeError, OSError)) and _NO_MEMORY.search(str(error)) is not None


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, RankFailure):  # said so in the midst of a forward pass
        return True
    if isinstance(error, (torch.distributed.DistNetworkError, torch.distributed.DistStoreError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
