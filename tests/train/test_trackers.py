"""Trackers with the real packages, offline: what they hold after a run, a resumed run, a failure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from crossdock.config import Config, load_config
from crossdock.train.metrics import MetricsLog
from crossdock.train.trackers import TRACKERS, BackgroundTracker, TrackedRun, Trackers
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets

ALL = ("tensorboard", "wandb", "trackio")


@pytest.fixture(autouse=True)
def offline_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's login or settings."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


@pytest.fixture(scope="module", autouse=True)
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import trackio.sqlite_storage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path_factory.mktemp("trackio"))
        yield


def tracked(folder: Path, *names: str, project: str = "some") -> Config:
    arguments = ["--metrics.trackers", ",".join(names), "--metrics.project", project, "--training.seed", "7"]
    return load_config(None, arguments)


def write_steps(config: Config, folder: Path, resumed_step: int, steps: range, offset: float = 0.0) -> None:
    """What the trainer does with the metrics of these steps."""
    trackers = Trackers(config, folder, resumed_step)
    log = MetricsLog(folder / "metrics.jsonl", resumed_step)
    for step in steps:
        metrics = {"step": step, "loss": step + offset, "mfu": None, "tokens": 64}
        log.write(metrics)
        trackers.log(metrics)
    trackers.close()
    log.close()


def tensorboard_steps(folder: Path, tag: str = "loss") -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    events = accumulator.Scalars(tag)
    assert len({event.step for event in events}) == len(events), "a step is there twice"
    return {event.step: event.value for event in events}


def wandb_records(folder: Path) -> list[Any]:
    """The records of a run's `.wandb` files, in the order of writing.

    Offline, `finish` returns before wandb's service has written everything; the end of the process waits for it.
    """
    files = sorted((folder / "wandb").glob("*run-*/*.wandb"))
    assert files
    deadline = time.monotonic() + 120
    while not all(_records(file)[-1:] and _records(file)[-1].WhichOneof("record_type") == "exit" for file in files):
        assert time.monotonic() < deadline, "wandb did not write the end of its run"
        time.sleep(0.05)
    return [record for file in files for record in _records(file)]


def _records(path: Path) -> list[Any]:
    """leveldb's log format around protobuf."""
    from wandb.proto import wandb_internal_pb2

    records, data, position, pending = [], path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            break
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, last
            records.append(wandb_internal_pb2.Record.FromString(pending))  # type: ignore[attr-defined]
            pending = b""
    return records


def wandb_steps(folder: Path, key: str = "loss") -> list[tuple[int, float]]:
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if key in row:
                rows.append((record.history.step.num, row[key]))
    return rows


def trackio_steps(project: str, run: str, key: str = "loss") -> list[tuple[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    return [(log["step"], log[key]) for log in SQLiteStorage.get_logs(project, run) if key in log]


def test_several_trackers_at_once_hold_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "some-run"
    folder.mkdir()
    write_steps(tracked(folder, *ALL, project="several"), folder, 0, range(1, 41))
    steps = {step: float(step) for step in range(1, 41)}
    assert tensorboard_steps(folder) == steps
    assert wandb_steps(folder) == list(steps.items())
    assert trackio_steps("several", "some-run") == list(steps.items())
    assert (tmp_path / "some-run" / "wandb").is_dir()
    runs = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"]
    assert {(run.project, run.display_name) for run in runs} == {("several", "some-run")}
    settings = {item.key or item.nested_key[0]: item.value_json for run in runs for item in run.config.update}
    assert settings["training.seed"] == "7"
    config = SQLiteStorage.get_run_config("several", "some-run")
    assert config is not None
    assert config["training.seed"] == 7
    assert wandb_steps(folder, "mfu") == [], "a metric that is null is left out"
    assert "is off" not in capsys.readouterr().out


def test_a_resumed_run_goes_on_in_the_same_tracker_runs_without_a_step_twice(tmp_path: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "broken-off"
    folder.mkdir()
    config = tracked(folder, *ALL, project="resumed")
    write_steps(config, folder, 0, range(1, 31))
    # Broke off at 30, checkpoint at 20, and again at 25.
    write_steps(config, folder, 20, range(21, 26), offset=0.5)
    write_steps(config, folder, 20, range(21, 41), offset=0.25)
    again = {step: step + 0.25 for step in range(21, 41)}
    assert tensorboard_steps(folder) == {step: float(step) for step in range(1, 21)} | again
    seen_first = [(step, float(step)) for step in range(1, 31)] + [(step, step + 0.25) for step in range(31, 41)]
    assert wandb_steps(folder) == seen_first
    assert trackio_steps("resumed", "broken-off") == seen_first
    runs = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1
    assert len(SQLiteStorage.get_run_records("resumed")) == 1


def test_a_tracker_that_joins_later_gets_the_steps_that_follow(tmp_path: Path) -> None:
    write_steps(tracked(tmp_path, "tensorboard"), tmp_path, 0, range(1, 31))
    write_steps(tracked(tmp_path, "tensorboard", "wandb"), tmp_path, 20, range(21, 41))
    assert [step for step, _ in wandb_steps(tmp_path)] == list(range(21, 41))
    assert list(tensorboard_steps(tmp_path)) == list(range(1, 41))


def test_two_folders_of_one_name_are_two_runs(tmp_path: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        config = tracked(tmp_path, "wandb", "trackio", project="names")
        write_steps(config, tmp_path / parent / "run", 0, range(1, 4))
    assert len(SQLiteStorage.get_run_records("names")) == 2
    ids = {json.loads((tmp_path / parent / "run" / "trackers.json").read_text())["id"] for parent in ("a", "b")}
    assert len(ids) == 2


class Broken:
    """Fails or hangs at a given moment."""

    def __init__(self, moment: str, act: Any) -> None:
        self.moment, self.act, self.steps = moment, act, list[int]()
        if moment == "start":
            act()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)
        if self.moment == "log":
            self.act()

    def close(self) -> None:
        if self.moment == "close":
            self.act()


def fail() -> None:
    raise OSError(28, "No space left\non device")


@pytest.mark.parametrize("moment", ["start", "log", "close"])
def test_a_tracker_that_fails_says_one_line_and_is_off(moment: str) -> None:
    said: list[str] = []
    tracker = BackgroundTracker("some", lambda: Broken(moment, fail), said.append)
    for step in range(1, 6):
        tracker.log(step, {"loss": 1.0})
        time.sleep(0.01)
    tracker.end()
    tracker.wait(5)
    (line,) = said
    assert "tracker some is off, the run goes on" in line
    assert "No space left on device" in line


@pytest.mark.parametrize("moment", ["start", "log", "close"])
def test_a_tracker_that_hangs_holds_nobody_up(moment: str) -> None:
    said: list[str] = []
    release = threading.Event()
    tracker = BackgroundTracker("some", lambda: Broken(moment, release.wait), said.append, most_behind=10)
    started = time.monotonic()
    for step in range(1, 6 if moment == "close" else 100):
        tracker.log(step, {"loss": 1.0})
    tracker.end()
    tracker.wait(0.2)
    assert time.monotonic() - started < 10
    (line,) = said
    assert "off" in line
    release.set()


def _run_offline(assets: str, run_folder: str, cache: str, overrides: list[str]) -> list[tuple[int, float]]:
    """A run of the real trainer, whatever the wandb settings are of the one who tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        metrics = run_trainer(assets, run_folder, cache, [*overrides, "--training.local-batch-size", "2"])["metrics"]
    return [(line["step"], line["loss"]) for line in metrics]


def test_a_broken_tracker_leaves_the_others_and_the_run_alone(ranks: RankPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (str(write_assets(tmp_path / "assets")), str(run), str(tmp_path / "cache"))
    ranks.run(2, _run_offline, *arguments, ["--training.steps", "2"])
    (run / "tensorboard").touch()  # where its folder would be
    settings = ["--training.steps", "5", "--metrics.trackers", "tensorboard,wandb"]
    losses = ranks.run(2, _run_offline, *arguments, settings)[0]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]
    assert wandb_steps(run) == losses[2:], "as in metrics.jsonl"
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1, "rank 0 alone"


def test_wandb_whose_service_dies_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb

    trackers = Trackers(tracked(tmp_path, "wandb", "tensorboard"), tmp_path, 0)
    trackers.log({"step": 1, "loss": 1.0})
    deadline = time.monotonic() + 20
    while not (services := services_of_this_process()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    for step in range(2, 20):
        trackers.log({"step": step, "loss": 1.0})
        time.sleep(0.02)
    trackers.close()
    assert time.monotonic() - started < 25
    assert list(tensorboard_steps(tmp_path)) == list(range(1, 20))
    assert capsys.readouterr().out.count("tracker wandb is off, the run goes on") == 1
    with contextlib.suppress(ConnectionError):
        wandb.teardown()


def services_of_this_process() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in _text(file).split()]
    return [pid for pid in pids if "wandb" in _text(Path(f"/proc/{pid}/cmdline"))]


def _text(file: Path) -> str:
    """Its text, or none: a thread or a process may have ended since it was listed."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_wandb_never_asks_for_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    run = TrackedRun(folder=tmp_path, id="some", project="p", settings={}, resumed_step=0, seen_step=0)
    try:
        with pytest.raises(RuntimeError, match="WANDB_API_KEY"):
            TRACKERS["wandb"](run)
    finally:
        wandb.teardown()


def test_every_choice_has_a_tracker() -> None:
    assert set(TRACKERS) == set(ALL)


def test_an_unreadable_memory_of_the_trackers_begins_new_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(tracked(tmp_path, "tensorboard"), tmp_path, 0, range(1, 4))
    (tmp_path / "trackers.json").write_text("{")
    write_steps(tracked(tmp_path, "tensorboard"), tmp_path, 3, range(4, 6))
    assert "trackers.json cannot be read" in capsys.readouterr().out
    assert list(tensorboard_steps(tmp_path)) == list(range(1, 6))
    shutil.rmtree(tmp_path / "tensorboard")
