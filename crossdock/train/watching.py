"""What watches over one rank of a run, and what is said and left behind when it fails."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from crossdock.comm import GRACE_SECONDS, Place, Report, Watchdog, is_from_other_rank
from crossdock.comm.recorder import is_recording
from crossdock.config import Config
from crossdock.tools.report import FAULTS_FOLDER
from crossdock.train.failures import Failure, FailureKind, Failures, kind_of
from crossdock.train.fingerprints import StepFingerprint
from crossdock.train.out_of_memory import memory_message

__all__ = ["RunWatch", "group_timeout"]

logger = logging.getLogger(__name__)

# A rank that is so much slower than the others, so many looks in a row, is worth a word.
_SLOW = 1.2
_LOOKS = 3
# How long a rank that lost another one waits for that one's own word.
_CAUSE_SECONDS = 2.0


def group_timeout(config: Config) -> int:
    """Seconds for process groups: the watchdog, which can say why, comes first."""
    return config.job.comm_timeout_seconds + GRACE_SECONDS


class RunWatch:
    """Where this rank is, who is slow, and what happens when it fails. By itself, without `start`, it only takes notes.

    Args:
        rank: over all machines.
        failures: the launcher's folder for them, if there is one.

    Attributes:
        place: that the trainer writes.
        fingerprint: of a step.
        folder: of the run, once it is known.
    """

    def __init__(self, rank: int = 0, failures: Path | None = None) -> None:
        self._rank = rank
        self.place = Place()
        self.fingerprint = StepFingerprint(self.place)
        self.folder: Path | None = None
        self._watchdog: Watchdog | None = None
        self._failures = None if failures is None else Failures(failures)
        self._timeout = 0
        self._has_failed = False
        self._slow_looks: list[int] = []

    @property
    def seconds_spent(self) -> float:
        """On watching, in this process so far: of the main thread, and of a processor beside it."""
        return self.place.seconds if self._watchdog is None else self._watchdog.seconds_spent

    def start(self, config: Config) -> None:
        """Watch from here on. Needs the default process group."""
        self._timeout = config.job.comm_timeout_seconds
        if not is_recording():
            logger.warning("no watchdog: torch's flight recorder is off (TORCH_FR_BUFFER_SIZE = 0)")
            return
        self._watchdog = Watchdog(
            self.place,
            self._timeout,
            straggler_interval=config.fault_tolerance.straggler_interval,
            report=self._report,
            ending=self._pass_on,
        )
        self._watchdog.start()

    def stop(self) -> None:
        """Before a rank leaves the others."""
        if self._watchdog is not None:
            self._watchdog.stop()

    def straggler_metrics(self) -> dict[str, Any]:
        """At a step after a look for the slowest rank: which, and how slow; a rank that stays slow is warned of."""
        if self._watchdog is None or not self._watchdog.stragglers:
            return {}
        straggler = self._watchdog.stragglers.popleft()
        self._slow_looks = [*self._slow_looks[1 - _LOOKS :], straggler.rank if straggler.ratio > _SLOW else -1]
        if self._slow_looks == [straggler.rank] * _LOOKS:
            logger.warning(f"step {self.place.step}: {straggler}")
            self._slow_looks = []
        return {"slowest_rank": straggler.rank, "slowest_rank_ratio": straggler.ratio}

    @contextlib.contextmanager
    def leaving_failures(self) -> Iterator[None]:
        """What fails within is left for the launcher, unless it has been."""
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                kind, final = kind_of(error)
                self._leave(self._failure(kind, f"{type(error).__name__}: {error}", final=final))
            raise

    def failed(self, error: BaseException, config: Config, device: torch.device) -> bool:
        """Leave what befell this rank for the launcher; true where all has been said that a person needs.

        Memory is told of here, by the rank that had too little. A rank that only lost the others says nothing where the
        cause is known; where it is not, all ranks are asked, and one says who is missing.
        """
        self._has_failed = True
        kind, final = kind_of(error)
        if is_from_other_rank(error):
            return kind == "memory"
        message = f"{error}" if final else f"{type(error).__name__}: {error}"
        if kind == "memory":
            message = memory_message(error, config, device)
            _say(f"{self._where()}: {message}")
        failure = self._failure(kind, message, final=final)
        if kind in ("lost", "timeout"):
            return self._lost(failure)
        self._leave(failure)
        if self._watchdog is not None:
            self._watchdog.tell(failure.to_json())
        return kind == "memory"

    def _lost(self, failure: Failure) -> bool:
        if self._watchdog is None:
            self._leave(failure)
            return False
        told = self._told_soon()
        if not told:
            what = "the connection to another rank is gone" if failure.kind == "lost" else "a collective timed out"
            self._watchdog.explain(what)
            told = self._watchdog.told()
        self._pass_on(told)
        if not told:
            self._leave(failure)
            _say(f"{self._where()}: {failure.message.splitlines()[0]}")
        return True

    def _told_soon(self) -> list[str]:
        """What ranks have told. One that failed may have made others fail before it could tell why."""
        assert self._watchdog is not None
        deadline = time.monotonic() + _CAUSE_SECONDS
        while not (told := self._watchdog.told()) and time.monotonic() < deadline:
            time.sleep(_CAUSE_SECONDS / 10)
        return told

    def _report(self, report: Report) -> None:
        """On the one rank that made it."""
        limit = f" (job.comm_timeout_seconds = {self._timeout})" if report.kind == "timeout" else ""
        text = report.text.replace(report.headline, f"{report.headline}{limit}", 1)
        path = None
        if self.folder is not None:
            path = self.folder / FAULTS_FOLDER / f"{datetime.now():%Y%m%d-%H%M%S}.txt"
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{text}\n")
            except OSError as error:
                text = f"{text}\n  {path} could not be written: {error}"
        _say(text)
        rank = self._rank if report.rank is None else report.rank
        kind: FailureKind = "timeout" if report.kind == "timeout" else "lost"
        failure = Failure(time.time(), rank, socket.gethostname(), kind, report.spot, f"{report.headline}{limit}")
        self._leave(failure)
        if self._watchdog is not None:
            self._watchdog.tell(failure.to_json())

    def _pass_on(self, told: list[str]) -> None:
        """What ranks of other machines have told, for this machine's launcher."""
        for text in told:
            with contextlib.suppress(ValueError):
                self._leave(Failure.from_json(text))

    def _leave(self, failure: Failure) -> None:
        if self._failures is not None:
            with contextlib.suppress(OSError):
                self._failures.leave(failure)

    def _failure(self, kind: FailureKind, message: str, *, final: bool) -> Failure:
        spot = str(self.place.spot())
        return Failure(time.time(), self._rank, socket.gethostname(), kind, spot, message, final)

    def _where(self) -> str:
        return f"rank {self._rank} (machine {socket.gethostname()}), {self.place.spot()}"


def _say(message: str) -> None:
    """In one piece: other ranks write to the same place."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"crossdock: {message}\n")
        sys.stderr.flush()
