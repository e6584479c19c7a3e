"""Replica groups on this machine: each is the ordinary command in a process of its own, started again when killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from crossdock.config import Config, ConfigError, ranks_per_group
from crossdock.parallel import LOOPBACK, GroupPlace
from crossdock.train.host_memory import memory_settings
from crossdock.train.launch import GROUP_NUMBER, Machines, tell, thread_settings
from crossdock.train.progress import furthest_step

__all__ = ["group_place", "is_in_group", "start_groups"]

_GROUPS, _LIGHTHOUSE = "CROSSDOCK_REPLICA_GROUPS", "CROSSDOCK_LIGHTHOUSE"
_HOST, _FOLDER = "CROSSDOCK_GROUP_HOST", "CROSSDOCK_GROUP_FOLDER"
_TICK_MS = 50  # How often the lighthouse looks whether groups can go on.
_POLL_SECONDS = 0.1
_USERS_MISTAKE = 2


def is_in_group(environment: Mapping[str, str]) -> bool:
    """Whether this process belongs to a replica group that our launcher has started."""
    return GROUP_NUMBER in environment


def group_place(config: Config, environment: Mapping[str, str]) -> GroupPlace | None:
    """Where a rank's group is among those of the run; `None` without groups.

    Raises:
        ConfigError: where settings want groups and nobody has started any.
    """
    groups = config.fault_tolerance.replica_groups
    if not groups:
        return None
    if not is_in_group(environment):
        valid = "needs `crossdock train` to start the ranks, not torchrun"
        raise ConfigError("fault_tolerance.replica_groups", groups, valid)
    return GroupPlace(
        int(environment[GROUP_NUMBER]),
        int(environment[_GROUPS]),
        environment[_LIGHTHOUSE],
        environment[_HOST],
        Path(environment[_FOLDER]),
    )


def start_groups(arguments: list[str], config: Config, machines: Machines) -> int:
    """Run `crossdock ARGUMENTS` once for each replica group of this machine, until all have ended.

    A group whose process is killed is started again, `fault_tolerance.max_restarts` times in a row without getting
    further; within a group, its own agent starts ranks again. SIGTERM and Ctrl-C reach all groups.

    Args:
        arguments: of the command, with the run folder, without those about machines.
        config: of the run, validated for the ranks of a group.
        machines: where; the first hosts the lighthouse.

    Returns:
        The exit code for this command: 0 if a group ended well, else that of the one that failed first.

    Raises:
        ConfigError: where ranks do not divide over groups.
    """
    ranks = ranks_per_group(config, machines.nproc, machines.nnodes)
    here = machines.nproc // ranks
    numbers = range(machines.node_rank * here, (machines.node_rank + 1) * here)
    with _lighthouse(config, machines) as address, tempfile.TemporaryDirectory(prefix="crossdock-groups-") as folder:
        common = _common_settings(config, machines, address)
        command = [sys.executable, "-m", "crossdock", *arguments, "--nproc", str(ranks)]
        groups = [
            _Group(number, command, common | _devices(index, ranks), Path(folder), config.fault_tolerance.max_restarts)
            for index, number in enumerate(numbers)
        ]
        is_whole = machines.nnodes == 1 and not config.fault_tolerance.lighthouse
        return _watch(groups, config.fault_tolerance.min_replica_groups if is_whole else 1)


def _watch(groups: list[_Group], fewest: int) -> int:
    """Start all, and wait for them; fewer than `fewest` are of no use."""
    stopping = False

    def stop(*_: int | FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for group in groups:
            group.ask_to_end()

    with _handling(stop):
        for group in groups:
            group.start()
        while any(group.is_running for group in groups):
            time.sleep(_POLL_SECONDS)
            for group in groups:
                if not group.has_ended() or stopping or not group.code:
                    continue
                if group.code == _USERS_MISTAKE:
                    stop()
                elif not group.start_again() and any(other.is_running for other in groups):
                    left = sum(other.is_running for other in groups)
                    tell(f"replica group {group.number} is given up ({group.ending}); {left} go on")
                    if left < fewest:
                        tell(f"fault_tolerance.min_replica_groups is {fewest}: stopping the run")
                        stop()
    if any(group.code == 0 for group in groups):
        return 0
    first = min(groups, key=lambda group: group.ended_at)
    assert first.code is not None
    return first.code if first.code > 0 else 128 - first.code


class _Group:
    """One group's process.

    Attributes:
        number: of the group.
        code: the exit code of its last process; `None` while that runs.
        ended_at: when that was.
    """

    def __init__(
        self, number: int, command: list[str], environment: dict[str, str], folder: Path, max_restarts: int
    ) -> None:
        self.number = number
        self.code: int | None = None
        self.ended_at = 0.0
        self._command, self._environment = command, environment
        self._folders, self._folder = folder, folder
        self._allowed, self._restarts, self._starts, self._furthest = max_restarts, 0, 0, 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def ending(self) -> str:
        assert self.code is not None
        return signal.Signals(-self.code).name if self.code < 0 else f"exit code {self.code}"

    def start(self) -> None:
        self._starts += 1
        self._folder = self._folders / f"{self.number}-{self._starts}"
        self._folder.mkdir()
        self.code = None
        place = {GROUP_NUMBER: str(self.number), _FOLDER: str(self._folder)}
        # In a session of its own: a terminal's Ctrl-C is passed on once, by this launcher.
        self._process = subprocess.Popen(
            self._command, env=os.environ | self._environment | place, start_new_session=True
        )

    def has_ended(self) -> bool:
        """Whether it has ended since this was asked last."""
        if self._process is None or (code := self._process.poll()) is None:
            return False
        self.code, self.ended_at, self._process = code, time.monotonic(), None
        self._kill_ranks()
        return True

    def ask_to_end(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def start_again(self) -> bool:
        """Start it anew where that may help: its process was killed, which no agent of its own can mend."""
        assert self.code is not None
        reached = furthest_step(self._folder)
        if reached > self._furthest:
            self._furthest, self._restarts = reached, 0
        if self.code > 0 or self._restarts >= self._allowed:
            return False
        self._restarts += 1
        tell(f"replica group {self.number} ended with {self.ending}; starting it again")
        self.start()
        return True

    def _kill_ranks(self) -> None:
        """Those of a group whose agent was killed would go on, and count as a group."""
        mark = f"{_FOLDER}={self._folder}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:  # Not ours, or gone.
                continue


@contextmanager
def _handling(stop: Callable[..., None]) -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _lighthouse(config: Config, machines: Machines) -> Iterator[str]:
    """The address of the lighthouse, which machine 0 runs unless one is named."""
    settings = config.fault_tolerance
    if settings.lighthouse:
        yield settings.lighthouse
        return
    host = LOOPBACK if machines.nnodes == 1 else str(machines.master_addr)
    if machines.node_rank:
        yield f"http://{host}:{machines.master_port}"
        return
    os.environ.setdefault("RUST_LOG", "error")  # torchft's, which tells of every step.
    from torchft.coordination import LighthouseServer

    port = 0 if machines.nnodes == 1 else machines.master_port
    try:
        server = LighthouseServer(
            bind=f"{host}:{port}" if machines.nnodes == 1 else f"0.0.0.0:{port}",
            min_replicas=settings.min_replica_groups,
            join_timeout_ms=settings.join_timeout_ms,
            quorum_tick_ms=_TICK_MS,
            heartbeat_timeout_ms=settings.heartbeat_timeout_ms,
        )
    except RuntimeError as error:
        valid = f"must be a free port of this machine ({error})"
        raise ConfigError("--master-port", machines.master_port, valid) from None
    try:
        yield f"http://{host}:{server.address().rpartition(':')[2]}"
    finally:
        server.shutdown()


def _common_settings(config: Config, machines: Machines, lighthouse: str) -> dict[str, str]:
    """Of all groups of this machine."""
    host = LOOPBACK if machines.nnodes == 1 and not config.fault_tolerance.lighthouse else _own_address(lighthouse)
    settings = memory_settings() | {"RUST_LOG": "error"}
    if host == LOOPBACK:
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    if "OMP_NUM_THREADS" not in os.environ:
        settings |= thread_settings(machines.nproc)
    groups = {_GROUPS: str(config.fault_tolerance.replica_groups), _LIGHTHOUSE: lighthouse, _HOST: host}
    return settings | groups


def _own_address(lighthouse: str) -> str:
    """The address of this machine on the way to the lighthouse."""
    host, _, port = lighthouse.removeprefix("http://").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # Sends nothing: the system chooses a way.
        except (OSError, OverflowError) as error:
            field, valid = "fault_tolerance.lighthouse", f"must name a host that this machine can reach ({error})"
            raise ConfigError(field, lighthouse, valid) from None
        return probe.getsockname()[0]


def _devices(index: int, ranks: int) -> dict[str, str]:
    """The GPUs of the group number `index` of this machine, where there are some."""
    if not torch.cuda.device_count():
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[index * ranks : (index + 1) * ranks])}
