"""The record of a run: what the first rank shows and writes at every step, and the report at its end."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from crossdock.config import Config
from crossdock.tools.report import LOAD_FILE, RANK_LOAD_FILE, EventKind, LoadLog, note_event, write_report
from crossdock.train.metrics import MetricsLog, ProgressDisplay, say
from crossdock.train.together import TrainingStopped
from crossdock.train.trackers import Trackers

__all__ = ["RunRecord", "lock_folder", "one_at_a_time"]


class RunRecord:
    """`metrics.jsonl`, loads, trackers and display; the caller holds the run folder (`lock_folder`).

    Args:
        config: of the run.
        folder: the run folder.
        step: the last one that is done.
        num_layers, num_experts: of the model's MoE layers.
        num_ranks: that hold the experts of a layer together; loads of ranks are recorded where there are several.
        on_gpu: shows what is known of GPUs alone.

    Raises:
        OSError: where files cannot be written.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        step: int,
        num_layers: int,
        num_experts: int,
        *,
        num_ranks: int,
        on_gpu: bool,
    ) -> None:
        self.folder = folder
        self.load_interval = config.metrics.load_interval
        self._last_step = step
        self._goes_on = config.fault_tolerance.on_write_error == "warn"
        self._is_behind = False
        # Before the log, which drops lines that a tracker may have seen.
        self._trackers = Trackers(config, folder, step)
        self._log = MetricsLog(folder / "metrics.jsonl", step)
        sizes = {LOAD_FILE: num_experts, RANK_LOAD_FILE: num_ranks if num_ranks > 1 else 0}
        self._load_shapes = {name: (num_layers, size) for name, size in sizes.items() if size and self.load_interval}
        self._loads = self._open_loads(step)
        self._display = ProgressDisplay(config.training.steps, step, config.metrics.log_freq, on_gpu=on_gpu)

    def write(self, metrics: dict[str, Any], routes: Tensor, of_ranks: Tensor | None) -> str | None:
        """Record a step: its metrics, its routes per expert `[L, E]`, and those that each rank computed `[L, R]`.

        Returns what is wrong where files cannot be written.
        """
        self._last_step = metrics["step"]
        self._display.update(metrics)
        self._trackers.log(metrics)
        return self._attempt(lambda: self._write(metrics, routes, of_ranks))

    def rewind(self, step: int, why: str) -> str | None:
        """Tell of the last step what is no metric; where the run is back at an earlier `step`, drop what is after that.

        Returns what is wrong where files cannot be written.
        """
        self.say(f"step {self._last_step}: {why}")
        self.note("bad step", why)
        return self._attempt(lambda: self._drop_after(step)) if step < self._last_step else None

    def _write(self, metrics: dict[str, Any], routes: Tensor, of_ranks: Tensor | None) -> None:
        self._log.write(metrics)
        if self._loads and metrics["step"] % self.load_interval == 0:
            self._loads[LOAD_FILE].write(metrics["step"], routes)
            if of_ranks is not None:
                self._loads[RANK_LOAD_FILE].write(metrics["step"], of_ranks)

    def _drop_after(self, step: int) -> None:
        self._last_step = step
        self._log.close()
        self._log = MetricsLog(self._log.path, step)
        for loads in self._loads.values():
            loads.close()
        self._loads = self._open_loads(step)

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """What is wrong where `action` cannot write; where the run goes on in spite of it, that is said once."""
        try:
            action()
        except OSError as error:
            problem = f"cannot write below {self.folder}: {error.strerror or error}"
            if not self._goes_on:
                return problem
            if not self._is_behind:
                self.say(f"step {self._last_step}: {problem}; the run goes on, metrics are written when there is room")
            self._is_behind = True
        else:
            self._is_behind = False
        return None

    def _open_loads(self, step: int) -> dict[str, LoadLog]:
        return {name: LoadLog(self.folder / name, *shape, step) for name, shape in self._load_shapes.items()}

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        self._display.say(message)

    def note(self, kind: EventKind, message: str) -> None:
        """Add to the run's events."""
        note_event(self.folder, kind, message, self._last_step)

    def close(self, *, report: bool = True) -> None:
        """Write what is left, and the `report`."""
        self._display.close()
        self._trackers.close()
        for file in (self._log, *self._loads.values()):
            try:
                file.close()
            except OSError as error:
                say(f"cannot write the last lines below {self.folder}: {error.strerror or error}")
        if not report:
            return
        try:
            say(f"report: {write_report(self.folder)}")
        except Exception as error:  # noqa: BLE001 (whatever is wrong with it, a report is not worth a run)
            say(f"no report: {error}")


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is here, for what replica groups write into the run folder when they start.

    Raises:
        OSError: where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open_lock(folder / ".start.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_folder(folder: Path, patience: float = 0.0) -> TextIO:
    """Hold the run folder, made where it is missing, until the file is closed, so that no other run writes there.

    Args:
        folder: of the run.
        patience: seconds to wait for one that is about to let go of it.

    Raises:
        TrainingStopped: where another run holds it.
        OSError: where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_lock(folder / ".lock")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() >= deadline:
                file.close()
                raise TrainingStopped(f"job.dump_folder {folder} is in use by another run") from None
        time.sleep(0.05)


def _open_lock(path: Path) -> TextIO:
    # The folder may be shared: a link that somebody else has put there is not followed.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
