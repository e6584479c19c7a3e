"""Metrics to TensorBoard, Weights & Biases and trackio, besides `metrics.jsonl`; none of them stops or hangs a run."""

from __future__ import annotations

import importlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from crossdock.checkpoint import parse_checked_json, to_checked_json
from crossdock.config import Config
from crossdock.config.settings import setting_types
from crossdock.train.metrics import last_logged_step, say

__all__ = ["TRACKERS", "BackgroundTracker", "TrackedRun", "Tracker", "Trackers"]

# Steps that may wait for a tracker before it is given up.
_MOST_BEHIND = 1000
# What all trackers together get to write their last steps, and wandb to upload them.
_CLOSE_SECONDS = 30.0
_WANDB_FINISH_SECONDS = 20.0
_WANDB_INIT_SECONDS = 60.0


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        folder: the run folder; its name is the run's.
        id: the same whenever the run is resumed.
        project: the project it belongs to.
        settings: all of them, by `section.key`.
        resumed_step: the last step that is done; 0 for a new run.
        seen_step: the last step that this tracker has of the run already; more than `resumed_step` where the run broke
            off after its last checkpoint.
    """

    folder: Path
    id: str
    project: str
    settings: dict[str, Any]
    resumed_step: int
    seen_step: int


class Tracker(Protocol):
    """Takes the metrics of a run; made by `TRACKERS[name](run)`. Whatever it raises turns it off."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of a step. Steps rise; in a resumed run they begin after `resumed_step`."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run folder. Steps that a resumed run does again replace the old ones."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.resumed_step + 1)
        lines = [f"    {name} = {value!r}" for name, value in run.settings.items()]
        self._writer.add_text("settings", "\n".join(lines), run.resumed_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, with its files in `wandb/` of the run folder.

    Offline where wandb has no API key, unless the user's wandb settings (`WANDB_MODE`) name a mode: it never asks.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._seen_step = run.seen_step
        settings = wandb.setup().settings
        mode = None
        if settings.mode in ("online", "run", "shared") and not wandb.login(prompt=False, verify=False):
            if "mode" in settings.model_fields_set:
                raise RuntimeError(f"WANDB_MODE is {settings.mode}, but there is no key: wandb login or WANDB_API_KEY")
            mode = "offline"
        self._run = wandb.init(
            project=run.project,
            name=run.folder.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            mode=mode,
            config=run.settings,
            settings=wandb.Settings(
                init_timeout=_WANDB_INIT_SECONDS,
                finish_timeout=_WANDB_FINISH_SECONDS,
                console="off",
                silent=True,
            ),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._seen_step:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """A run of trackio, in its database of the project (`TRACKIO_DIR`), or where `TRACKIO_SPACE_ID` says."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._seen_step = run.seen_step
        self._run = trackio.init(
            project=run.project,
            name=run.folder.name,
            # It knows runs by their names, which another folder may share; without steps there is nothing to resume.
            resume="allow" if run.seen_step else "never",
            config=run.settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._seen_step:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        import trackio

        trackio.finish()


TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = MappingProxyType(
    {"tensorboard": TensorBoardTracker, "wandb": WandbTracker, "trackio": TrackioTracker}
)
# Imported by the main thread: an import in another thread can meet one of the same package half done.
_MODULES: Mapping[str, str] = MappingProxyType(
    {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
)


class BackgroundTracker:
    """A tracker in a thread of its own: what it raises turns it off with one line, what it waits for holds nobody up.

    Args:
        name: for the line.
        start: makes the tracker, in its thread.
        say: prints a line.
        most_behind: steps that may wait for it before it is given up.
    """

    def __init__(
        self, name: str, start: Callable[[], Tracker], say: Callable[[str], None], most_behind: int = _MOST_BEHIND
    ) -> None:
        self._name, self._start, self._say = name, start, say
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(most_behind)
        self._off = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._put((step, metrics))

    def end(self) -> None:
        """Ask it to write its last steps and close; `wait` waits for that."""
        self._put(None)

    def wait(self, seconds: float) -> None:
        """Give it so long to close, then leave it."""
        if not self._off:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._turn_off("did not write its last steps in time")

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        if not self._off:
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._turn_off(f"is {self._queue.maxsize} steps behind")

    def _work(self) -> None:
        try:
            tracker = self._start()
            while (item := self._queue.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever it is, the run goes on)
            self._turn_off(f"{type(error).__name__}: {error}")

    def _turn_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            self._say(f"tracker {self._name} is off, the run goes on: {' '.join(why.split())}")


class Trackers:
    """The trackers of `metrics.trackers`, on rank 0. Made before `MetricsLog`, which drops the steps of a broken end.

    Args:
        config: of the run.
        folder: the run folder; `trackers.json` there keeps what a resumed run needs.
        resumed_step: the last step that is done; 0 for a new run.
    """

    def __init__(self, config: Config, folder: Path, resumed_step: int) -> None:
        self._trackers: list[BackgroundTracker] = []
        self._last_step = resumed_step
        names = config.metrics.trackers
        run_id, seen = _remember(folder, names)
        settings = {name: attrgetter(name)(config) for name in setting_types()}
        for name in names:
            run = TrackedRun(
                folder=folder,
                id=run_id,
                project=config.metrics.project,
                settings={key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
                resumed_step=resumed_step,
                seen_step=seen.get(name, 0),
            )
            try:
                importlib.import_module(_MODULES[name])
            except Exception as error:  # noqa: BLE001 (a package that is there but broken)
                say(f"tracker {name} is off, the run goes on: {type(error).__name__}: {error}")
                continue
            self._trackers.append(BackgroundTracker(name, lambda name=name, run=run: TRACKERS[name](run), say))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Hand on the metrics of a step; those that are `None` are left out.

        Of steps that are done again after a rollback, trackers keep what they have: most cannot take it back.
        """
        if metrics["step"] <= self._last_step:
            return
        self._last_step = metrics["step"]
        numbers = {name: value for name, value in metrics.items() if value is not None and name != "step"}
        for tracker in self._trackers:
            tracker.log(metrics["step"], numbers)

    def close(self) -> None:
        deadline = time.monotonic() + _CLOSE_SECONDS
        for tracker in self._trackers:
            tracker.end()
        for tracker in self._trackers:
            tracker.wait(max(0.0, deadline - time.monotonic()))


def _remember(folder: Path, names: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    """The run's id, and the last step that each tracker has seen; kept for the next time.

    A tracker that was on when the run broke off has seen the last step of `metrics.jsonl`.
    """
    path = folder / "trackers.json"
    if not names and not path.is_file():
        return "", {}
    try:
        before = parse_checked_json(path.read_bytes())
        run_id, active, seen = str(before["id"]), list(before["active"]), dict(before["seen_steps"])
    except FileNotFoundError:
        run_id, active, seen = uuid.uuid4().hex, [], {}
    except (ValueError, KeyError, TypeError) as error:
        say(f"{path} cannot be read ({error}); the trackers begin new runs")
        run_id, active, seen = uuid.uuid4().hex, [], {}
    last = last_logged_step(folder / "metrics.jsonl")
    seen |= {name: max(last, seen.get(name, 0)) for name in active}
    beside = path.with_suffix(".partial")
    beside.write_text(to_checked_json({"id": run_id, "active": names, "seen_steps": seen}))
    beside.rename(path)
    return run_id, seen
