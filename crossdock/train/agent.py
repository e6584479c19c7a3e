"""torchrun's elastic agent, which starts a machine's ranks again after a failure, in an order of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous_registry

from crossdock.train.failures import Failures
from crossdock.train.progress import furthest_step
from crossdock.train.stopping import REGROUP_SIGNAL

__all__ = ["REGROUP_EXIT_CODE", "Rendezvous", "run_agent"]

REGROUP_EXIT_CODE = 75
"""Of a rank that ended for another start (`REGROUP_SIGNAL`)."""
# Exit code of a command for a mistake of the user's, which another start would make again.
_MISTAKE = 2
_ADDRESS = "crossdock/address"
_UNSHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_KILLED_WITHIN_SECONDS = 10


@dataclass(frozen=True)
class Rendezvous:
    """Where machines meet, and how many.

    Attributes:
        run_id: of the run; the same on all machines.
        endpoint: `host:port` of the machine that hosts it.
        is_host: whether this one does; unset: torch finds out.
        min_nodes, max_nodes: machines.
        local_addr: of this machine, where its name will not do.
        last_call_seconds: how long more machines are waited for once `min_nodes` are there.
        keep_alive_seconds: a machine that was not heard of for three of these is lost.
    """

    run_id: str
    endpoint: str
    is_host: bool | None
    min_nodes: int
    max_nodes: int
    local_addr: str | None = None
    last_call_seconds: int = 10
    keep_alive_seconds: int = 3

    def parameters(self) -> RendezvousParameters:
        options: dict[str, Any] = {
            "last_call_timeout": self.last_call_seconds,
            "keep_alive_interval": self.keep_alive_seconds,
        }
        if self.is_host is not None:
            options["is_host"] = self.is_host
        return RendezvousParameters(
            backend="c10d",
            endpoint=self.endpoint,
            run_id=self.run_id,
            min_nodes=self.min_nodes,
            max_nodes=self.max_nodes,
            local_addr=self.local_addr,
            **options,
        )


def run_agent(
    arguments: list[str],
    rendezvous: Rendezvous,
    *,
    nproc: int,
    max_restarts: int,
    folder: Path,
    shutdown_seconds: int,
    tell: Callable[[str], None],
) -> dict[int, ProcessFailure]:
    """Run `python -m crossdock ARGUMENTS` as `nproc` ranks of this machine until all have ended well or for good.

    Args:
        arguments: of each rank.
        rendezvous: with the other machines.
        nproc: ranks here.
        max_restarts: how often in a row ranks are started again without having come further than ever before.
        folder: where ranks leave failures and the furthest step that they have done (`Progress`).
        shutdown_seconds: how long ranks may take to end when they are asked to.
        tell: takes lines about restarts.

    Returns:
        The failures that ended it, by global rank; none where all went well.

    Raises:
        SignalException: for SIGTERM, Ctrl-C and the like, when all ranks have ended.
        RendezvousError: where the machines do not find each other, or the one that hosts the rendezvous is lost.
    """
    spec = WorkerSpec(
        role="crossdock",
        local_world_size=nproc,
        entrypoint=sys.executable,
        args=("-m", "crossdock", *arguments),
        rdzv_handler=rendezvous_registry.get_rendezvous_handler(rendezvous.parameters()),
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr=rendezvous.local_addr,
    )
    agent = _Agent(spec, folder, shutdown_seconds, tell)
    # What ended a rank is told once, by `tell`.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
    stopped = True
    try:
        result: RunResult = agent.run()  # type: ignore[assignment] (torch's decorator hides what it returns)
        stopped = False
    finally:
        # A machine that a signal stops leaves the others to go on without it.
        if not stopped:
            with suppress(Exception):  # The machine that hosts it may be gone by now.
                spec.rdzv_handler.shutdown()
    return dict(result.failures) if result is not None and result.is_failed() else {}


class _Agent(LocalElasticAgent):
    """Restarts are counted anew where the run has come further than ever before; what none can mend ends the run.

    Steps that are done again, from a checkpoint or a snapshot, are no progress: a fault that comes at the same step of
    every start must end the run.

    Ranks that are left after a failure are killed at once: they wait for the one that is gone. Every start has a store
    of its own: what ranks of an earlier one have written there would mislead. (A decorator of torch's hides the
    signatures of its methods.)
    """

    def __init__(self, spec: WorkerSpec, folder: Path, shutdown_seconds: int, tell: Callable[[str], None]) -> None:
        super().__init__(
            spec, DefaultLogsSpecs(), exit_barrier_timeout=shutdown_seconds, shutdown_timeout=shutdown_seconds
        )
        self._failures = Failures(folder)
        self._folder, self._furthest = folder, 0
        self._tell = tell
        self._workers_store: dist.TCPStore | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:  # type: ignore[override]
        # A store that torch shares over rounds is never told to machines that come later.
        os.environ[_UNSHARED_STORE] = "1"
        try:
            super()._rendezvous(worker_group)  # type: ignore[call-arg]
        finally:
            del os.environ[_UNSHARED_STORE]
        store = worker_group.store  # of this round alone
        assert store is not None
        if worker_group.group_rank == 0:
            address = worker_group.master_addr
            self._workers_store = dist.TCPStore(address or "localhost", 0, is_master=True, wait_for_workers=False)
            store.set(_ADDRESS, json.dumps([address, self._workers_store.port]))
        worker_group.master_addr, worker_group.master_port = json.loads(store.get(_ADDRESS))
        self._failures.clear()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # type: ignore[override]
        result: RunResult = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
        if result.state not in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            return result
        codes = {failure.exitcode for failure in result.failures.values()}
        cause = self._failures.first()
        allowed = self._worker_group.spec.max_restarts
        if codes == {REGROUP_EXIT_CODE}:
            self._remaining_restarts += 1
        elif (cause is not None and cause.final) or _MISTAKE in codes or not allowed:
            self._remaining_restarts = 0
        else:
            if (furthest := furthest_step(self._folder)) > self._furthest:
                self._remaining_restarts, self._furthest = allowed, furthest
            if self._remaining_restarts:
                self._tell(f"{_sentence(result, cause)}; starting all ranks again")
            else:
                done = f"that came no further than step {self._furthest}" if self._furthest else "without a step done"
                self._tell(
                    f"{_sentence(result, cause)}; that was start {allowed + 1} in a row {done} "
                    "(fault_tolerance.max_restarts)"
                )
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # type: ignore[override]
        if worker_group.state is WorkerState.HEALTHY:  # Another machine has come, or wants to begin anew.
            self._shutdown(REGROUP_SIGNAL, timeout=self._shutdown_timeout)
        else:
            self._shutdown(signal.SIGKILL, timeout=_KILLED_WITHIN_SECONDS)


def _sentence(result: RunResult, cause: Any) -> str:
    if cause is not None:
        return f"rank {cause.rank} failed: {cause.message.splitlines()[0]}"
    # SIGTERM is what torch sends to those that are left.
    failures = result.failures.items()
    rank, failure = min(failures, key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp, item[0]))
    code = failure.exitcode
    return f"rank {rank} ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
