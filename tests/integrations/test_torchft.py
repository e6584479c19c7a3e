"""Replica groups: real launchers, agents and ranks on loopback, one group killed while the others train."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.blocks import commands_of
from tests.integrations.live_records import StepRecord, read_records
from tests.ranks import RankPool
from tests.tiny import speeches, write_assets

pytest.importorskip("torchft")

ROOT = Path(__file__).parents[2]
# As long as a busy machine may need.
SECONDS = 300
SAMPLES = 8


class Run:
    """`crossdock train` with replica groups (or none), and a look into its ranks."""

    def __init__(self, folder: Path, name: str, options: list[str]) -> None:
        self.folder, self.records = folder / name, folder / f"{name}-records"
        self.records.mkdir()
        inject = ROOT / "tests/integrations/live_inject"
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
        environment |= {"PYTHONPATH": f"{inject}:{ROOT}", "OMP_NUM_THREADS": "1", "LIVE_RECORDS": str(self.records)}
        environment |= {"XDG_CACHE_HOME": str(folder / "xdg")}
        environment.pop("GLOO_SOCKET_IFNAME", None)  # The launcher sees to it.
        settings = [
            *("--job.dump-folder", str(self.folder), "--job.comm-timeout-seconds", "60"),
            *("--model.hf-assets-path", str(folder / "assets")),
            *("--data.source", str(speeches(folder / "assets")), "--data.cache-folder", str(folder / "cache")),
            *("--training.seq-len", "32", "--training.local-batch-size", "2", "--training.tuned", "off"),
            *("--training.global-batch-size", str(SAMPLES), "--optimizer.lr", "3e-3"),
            *("--parallelism.expert-parallel-degree", "2", "--checkpoint.no-last-save-in-hf"),
        ]
        self._output = open(folder / f"{name}.txt", "w+")  # noqa: SIM115 (open as long as the run)
        command = [sys.executable, "-m", "crossdock", "train", *settings, *options]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self._output, stderr=subprocess.STDOUT
        )

    def output(self) -> str:
        self._output.flush()
        return Path(self._output.name).read_text()

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for(self, holds: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Until the metrics say so."""
        deadline = time.monotonic() + SECONDS
        while not holds(self.metrics()):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def processes(self, group: int) -> list[int]:
        """Of a group: its agent and its ranks."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes().split(b"\0")
            except OSError:
                continue
            marks = {f"CROSSDOCK_REPLICA_GROUP={group}".encode(), f"LIVE_RECORDS={self.records}".encode()}
            if marks <= set(environment):
                found.append(int(path.parent.name))
        return found

    def kill(self, group: int) -> None:
        victims = self.processes(group)
        assert len(victims) >= 3, "an agent and two ranks"
        for process in victims:
            os.kill(process, signal.SIGKILL)

    def finish(self) -> list[dict[str, Any]]:
        """Wait for a good end; the metrics."""
        assert self.process.wait(SECONDS) == 0, self.output()
        return self.metrics()

    def end(self) -> None:
        """Leave no process."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for group in (0, 1):
            for process in self.processes(group):
                os.kill(process, signal.SIGKILL)
        self._output.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """`start(name, *options)`: a run on the tiny model."""
    folder = tmp_path_factory.mktemp("live")
    write_assets(folder / "assets")
    runs: list[Run] = []

    def started(name: str, *options: str) -> Run:
        runs.append(Run(folder, name, list(options)))
        return runs[-1]

    yield started
    for run in runs:
        run.end()


GROUPS = ("--nproc", "4", "--fault-tolerance.replica-groups", "2")
BALANCED = (
    *("--moe.expert-bias", "--moe.sequence-aux-loss-coeff", "0.01"),
    *("--balance.strategy", "eplb", "--balance.rebalance-interval", "10", "--balance.no-move-if-it-pays"),
)


def taken_by(groups: int, after: int, steps: int = 1) -> Callable[[list[dict[str, Any]]], bool]:
    """Whether as many `steps` after the step `after` were taken by so many groups."""
    return lambda lines: sum(line["step"] > after and line["replica_groups"] == groups for line in lines) >= steps


def assert_same_samples(records: dict[int, list[StepRecord]], undisturbed: dict[int, list[StepRecord]]) -> None:
    """Each step that counts was computed from the same rows: none lost, none repeated."""
    assert sorted(records) == sorted(undisturbed)
    for step, expected in undisturbed.items():
        rows = Counter(row for record in records[step] for row in record["rows"])
        assert rows == Counter(row for record in expected for row in record["rows"]), f"step {step}"
        assert rows.total() == SAMPLES


def assert_equal_groups(records: dict[int, list[StepRecord]], steps: set[int]) -> None:
    """Rank by rank, groups that took a step together have the same bits of weights and moments after it."""
    for step in steps:
        for rank in (0, 1):
            ended = [each for each in records[step] if each["rank"] == rank and "counted" in each]
            assert len({(each["weights"], each["moments"]) for each in ended}) == 1, f"step {step}, rank {rank}"


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_group_that_is_killed_stops_no_other_and_catches_up(start: Callable[..., Run], victim: int) -> None:
    steps = 1000
    # In float64 rounding stays small for as many steps as there may be.
    common = ("--training.dtype", "float64", "--checkpoint.interval", "0", *BALANCED)
    run = start(f"kill-{victim}", *GROUPS, *common, "--training.steps", str(steps))
    run.wait_for(taken_by(2, 0, 15))
    run.kill(victim)
    killed = run.metrics()[-1]["step"]
    run.wait_for(taken_by(1, killed))
    run.wait_for(taken_by(2, max(line["step"] for line in run.metrics()), 15))
    # A whole stop, with a checkpoint.
    run.process.send_signal(signal.SIGTERM)
    lines = run.finish()
    done = lines[-1]["step"]
    assert [line["step"] for line in lines] == list(range(1, done + 1))
    print(f"longest stall: {max(line['stall_seconds'] for line in lines):.2f} s")
    assert f"replica group {victim} ended with SIGKILL; starting it again" in run.output()

    undisturbed = start(f"undisturbed-{victim}", "--nproc", "2", *common, "--training.steps", str(steps))
    undisturbed.wait_for(lambda lines: bool(lines) and lines[-1]["step"] >= done)
    undisturbed.process.send_signal(signal.SIGTERM)
    expected = undisturbed.finish()[:done]
    for line, alike in zip(lines, expected, strict=True):
        for name in ("loss", "tokens", "grad_norm", "sequence_aux_loss", "max_mean_load", "rank_max_mean"):
            assert line[name] == pytest.approx(alike[name], rel=1e-6), (name, line["step"])
    assert any(line.get("moved_experts") for line in lines), "experts are where they were at the start"
    records, others = read_records(run.records), read_records(undisturbed.records)
    assert_same_samples(records, {step: others[step] for step in range(1, done + 1)})
    together = {line["step"] for line in lines if line["replica_groups"] == 2}
    assert max(together) - min(together) > len(together) > 20, "together, apart and together again"
    assert_equal_groups(records, together)
    assert all(len(records[step]) == (4 if step in together else 2) for step in records)


def test_two_groups_train_as_two_replicas_in_one_world(start: Callable[..., Run]) -> None:
    losses = ("--moe.global-aux-loss-coeff", "0.05", "--moe.z-loss-coeff", "0.01", "--moe.expert-bias")
    common = ("--training.dtype", "float64", "--training.steps", "8", "--lr-scheduler.warmup-steps", "2", *losses)
    together = start("groups", *GROUPS, "--fault-tolerance.min-replica-groups", "2", *common).finish()
    replicas = ("--nproc", "4", "--parallelism.data-parallel-replicate-degree", "2")
    one_world = start("one-world", *replicas, *common).finish()
    assert all(line["replica_groups"] == 2 for line in together)
    timed = {"memory_gib", "memory_percent", "tflops", "mfu", "tokens_per_second_per_gpu"}
    timed |= {"slowest_rank", "slowest_rank_ratio", "checksum"}
    for line, alike in zip(together, one_world, strict=True):
        for name in line.keys() & alike.keys() - timed:
            if name.endswith("_seconds"):
                continue
            assert line[name] == pytest.approx(alike[name], rel=1e-9), (name, line["step"])


LOOPBACK = ("0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF0000" + "0100007F")


def listening_beyond_loopback(process: int) -> list[str]:
    """Addresses other than the loopback's on which a process listens for TCP, as hexadecimal digits and a port."""
    inodes = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    own = [fields[1] for fields in lines if fields[3] == "0A" and fields[9] in inodes]
    return [address for address in own if address.rpartition(":")[0] not in LOOPBACK]


@pytest.mark.slow
def test_a_stop_ends_all_groups_and_a_start_with_others_resumes(start: Callable[..., Run]) -> None:
    common = ("--lr-scheduler.warmup-steps", "10", "--training.steps", "1000")
    run = start("stopped", *GROUPS, *common)
    run.wait_for(taken_by(2, 0, 5))
    assert not listening_beyond_loopback(run.process.pid), "the lighthouse"
    for process in [*run.processes(0), *run.processes(1)]:
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        if b"RANK=0" in environment:
            assert len(listening_beyond_loopback(process)) == 1, "torchft's manager"
        elif b"RANK=1" in environment:
            assert not listening_beyond_loopback(process)
    run.process.send_signal(signal.SIGTERM)
    first = run.finish()
    assert f"stopped as asked, at step {first[-1]['step']}" in run.output()
    alone = ("--nproc", "2", "--fault-tolerance.replica-groups", "0")
    resumed = start("resumed", *alone, *common, "--job.dump-folder", str(run.folder))
    resumed.folder = run.folder
    resumed.wait_for(lambda lines: len(lines) >= first[-1]["step"] + 3)
    resumed.process.send_signal(signal.SIGTERM)
    lines = resumed.finish()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[: len(first)] == first


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--nproc", "3"], "must be a multiple of 2, the replica groups of a machine"),
        (["--nproc", "4", "--training.global-batch-size", "4"], "-1 or a multiple of 8"),
        (["--nproc", "4", "--parallelism.data-parallel-replicate-degree", "2"], "whose groups are the replicas"),
        (["--nproc", "4", "--fault-tolerance.min-replica-groups", "3"], "must be 1 to 2"),
        (["--nproc", "4", "--fault-tolerance.lighthouse", "there"], "http://HOST:PORT"),
        (["--nproc", "4", "--fault-tolerance.lighthouse", "http://there:99999"], "a port of 1 to 65535"),
        (["--nproc", "4", "--fault-tolerance.heartbeat-timeout-ms", "50"], "must be 300 to 300000"),
        (["--nproc", "4", "--parallelism.pipeline-parallel-degree", "2"], "number of micro-batches"),
    ],
)
def test_settings_that_cannot_work_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], told: str
) -> None:
    from crossdock.cli import main

    write_assets(tmp_path / "assets")
    settings = [
        *("--model.hf-assets-path", str(tmp_path / "assets"), "--data.source", str(speeches(tmp_path / "assets"))),
        *("--data.cache-folder", str(tmp_path / "cache"), "--training.local-batch-size", "2"),
        *("--training.seq-len", "32", "--fault-tolerance.replica-groups", "2"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["config", *settings, *options])
    assert ended.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert told in shown


def test_groups_on_several_machines_need_one_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from crossdock.cli import main

    write_assets(tmp_path / "assets")
    settings = [
        *("--model.hf-assets-path", str(tmp_path / "assets"), "--data.source", str(speeches(tmp_path / "assets"))),
        *("--training.seq-len", "32", "--fault-tolerance.replica-groups", "2"),
        *("--nproc", "2", "--nnodes", "2", "--node-rank", "1"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["train", *settings, "--master-addr", "10.1.2.3"])
    assert ended.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "job.dump_folder" in shown
    assert "all machines of replica groups share" in shown


def test_ranks_of_torchrun_are_told_that_groups_need_our_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from crossdock.cli import main

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("CROSSDOCK_REPLICA_GROUP", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--fault-tolerance.replica-groups", "2", "--job.dump-folder", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "not torchrun" in capsys.readouterr().err


def test_the_documents_commands_start_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from crossdock.cli import main
    from crossdock.train import groups

    started: list[tuple[int, int]] = []

    def start_groups(arguments: list[str], config: Any, machines: Any) -> int:
        started.append((config.fault_tolerance.replica_groups, machines.world_size))
        return 0

    monkeypatch.setattr(groups, "start_groups", start_groups)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CROSSDOCK_REPLICA_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CONFIG.toml").write_text((ROOT / "configs/debug.toml").read_text())
    commands = [command.removeprefix("crossdock ") for command in commands_of("docs/live.md", "crossdock train")]
    assert len(commands) >= 3
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(command.replace("/shared/", f"{tmp_path}/").split())
        assert ended.value.code == 0
    assert set(started) == {(2, 8), (2, 16)}


@pytest.mark.slow
def test_a_group_whose_weights_drift_ends_the_run(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVE_DRIFT", "1")
    run = start("drift", *GROUPS, "--training.steps", "1000", "--checkpoint.interval", "20")
    deadline = time.monotonic() + SECONDS
    while "the weights of the 2 replica groups are not the same any more" not in run.output():
        assert run.process.poll() is None, run.output()
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.1)
    assert not list((run.folder / "checkpoint").glob("step-*")), "what has drifted is not saved"


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_back_with_its_group(start: Callable[..., Run]) -> None:
    run = start("rank", *GROUPS, "--training.steps", "3000", "--checkpoint.interval", "0")
    run.wait_for(taken_by(2, 0, 5))
    (victim,) = (
        process
        for process in run.processes(1)
        if b"RANK=1" in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    )
    os.kill(victim, signal.SIGKILL)
    run.wait_for(taken_by(1, run.metrics()[-1]["step"]))
    run.wait_for(taken_by(2, run.metrics()[-1]["step"], 5))
    run.process.send_signal(signal.SIGTERM)
    lines = run.finish()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert re.search(r"crossdock: replica group 1: .*; starting all ranks again", run.output()), "its own agent says so"


@pytest.mark.slow
def test_too_few_groups_wait_and_end_with_a_checkpoint_when_asked(start: Callable[..., Run]) -> None:
    needs_both = ("--fault-tolerance.min-replica-groups", "2", "--fault-tolerance.max-restarts", "0")
    run = start("waiting", *GROUPS, *needs_both, "--training.steps", "1000", "--checkpoint.interval", "0")
    run.wait_for(taken_by(2, 0, 5))
    run.kill(1)
    # The launcher sees that the run cannot go on, and asks the group that is left to stop.
    lines = run.finish()
    assert "replica group 1 is given up" in run.output()
    assert "stopping the run" in run.output()
    assert "Traceback" not in run.output()
    step = lines[-1]["step"]
    assert [path.name for path in (run.folder / "checkpoint").iterdir()] == [f"step-{step:08d}"]


@pytest.mark.slow
def test_a_lighthouse_that_is_not_there_is_named(start: Callable[..., Run]) -> None:
    address = "http://127.0.0.1:9"
    run = start("dark", *GROUPS, "--fault-tolerance.lighthouse", address, "--fault-tolerance.max-restarts", "0")
    assert run.process.wait(SECONDS) != 0
    assert f"cannot reach the lighthouse at {address}" in run.output()


@pytest.mark.slow
def test_a_group_that_is_stopped_with_the_run_folder_keeps_nobody_from_training(start: Callable[..., Run]) -> None:
    options = ("--job.comm-timeout-seconds", "20", "--training.steps", "100000", "--checkpoint.interval", "0")
    run = start("stopped-writer", *GROUPS, *options)
    run.wait_for(taken_by(2, 0, 10))
    stopped = run.processes(0)
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    before = run.metrics()[-1]["step"]
    trained = run.records / "1-0.jsonl"
    deadline = time.monotonic() + SECONDS
    while json.loads(trained.read_text().splitlines()[-1])["step"] < before + 20:
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.2)
    for process in stopped:
        os.kill(process, signal.SIGCONT)
    run.wait_for(taken_by(2, before + 20, 10))
    run.process.send_signal(signal.SIGTERM)
    run.finish()


def test_sums_that_broke_off_are_no_hang_for_the_watchdog(ranks: RankPool) -> None:
    assert ranks.run(1, _watch_broken_sums) == [[None] * 3]


def _watch_broken_sums() -> list[Any]:
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import AllreduceOptions
    from torchft import ProcessGroupGloo

    from crossdock.comm import Place, Watchdog, recorder

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Gloo's threads end what broke off in any order, and count it in that order: mostly not in that of its start.
    for attempt in range(30):
        alone = ProcessGroupGloo(timedelta(seconds=0.3))
        other = ProcessGroupGloo(timedelta(seconds=9))
        absent = threading.Thread(target=other.configure, args=_place(store.port, attempt, 1))
        absent.start()
        alone.configure(*_place(store.port, attempt, 0))
        absent.join()
        sums = [alone.allreduce([torch.ones(4)], AllreduceOptions()) for _ in range(4)]
        with pytest.raises(RuntimeError):
            sums[0].wait()
        alone.abort(errored=False)
        if any(count.completed < count.started for count in recorder.counts().values()):
            break
    else:
        raise AssertionError("what broke off was complete by its count in 30 attempts")
    watchdog = Watchdog(Place(), 0.5, report=lambda report: None)
    return [watchdog._expired(2.0) for _ in range(3)]


def _place(port: int, attempt: int, rank: int) -> tuple[str, str, int, int, int, int, int, list[int]]:
    return f"127.0.0.1:{port}/{attempt}", str(rank), rank, 2, 1, 0, 1, [0, 1]


def test_groups_of_several_machines_are_not_pinned_to_loopback(tmp_path: Path) -> None:
    from crossdock.parallel import GroupPlace

    hosts = ("127.0.0.1", "10.1.2.3")
    places = [GroupPlace(0, 2, "http://10.1.2.3:29500", host, tmp_path) for host in hosts]
    assert [place.is_alone for place in places] == [True, False]
